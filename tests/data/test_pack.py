import errno
import io
import json
import zipfile

import numpy as np
import pytest
from pictures import encoded, noise, turned
from PIL import Image

from gan.data import pack
from gan.data.pack_options import PackOptions, dest_problems
from gan.data.sources import DemoSource, open_source
from gan.errors import GanError, UsageError

NOISE = noise(16, 16, 3)


def rotated_jpeg():
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:, :16] = 255
    return encoded(Image.fromarray(stored), "JPEG", quality=95, exif=turned(6))


def palette_gif():
    image = Image.fromarray(np.repeat(np.arange(2, dtype=np.uint8), 128).reshape(16, 16), "P")
    image.putpalette([255, 0, 0, 0, 0, 255])
    return encoded(image, "GIF", transparency=1)


GOOD = {
    "16bit.png": encoded(Image.fromarray(np.full((16, 16), 32768, dtype=np.uint16)), "PNG"),
    "cmyk.jpg": encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG"),
    "float.tif": encoded(Image.fromarray(np.full((16, 16), 0.5, dtype=np.float32)), "TIFF"),
    "grey-alpha.png": encoded(Image.new("LA", (16, 16), (0, 0)), "PNG"),
    "palette.gif": palette_gif(),
    "rotated.jpg": rotated_jpeg(),
    "rgb.png": encoded(Image.fromarray(NOISE), "PNG"),
}
JPEG = encoded(Image.fromarray(np.tile(NOISE, (4, 4, 1))), "JPEG")
BAD = {
    "cut-in-header.jpg": JPEG[:100],
    "empty.png": b"",
    "later-cut.jpg": JPEG[: len(JPEG) * 2 // 3],
    "cut.png": GOOD["rgb.png"][: len(GOOD["rgb.png"]) // 2],
    "text.png": b"this is no image\n" * 20,
    "bomb.bmp": encoded(Image.new("L", (16, 16)), "BMP").replace(b"\x10\0\0\0\x10\0\0\0", b"\0\0\1\0\0\0\1\0"),
}


@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of files with the given contents."""

    def make(files, name="photos"):
        for path, content in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        return open_source(str(tmp_path / name))

    return make


def images_of(path):
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith(".png")]
        return [np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in names]


def everything_below(path):
    return sorted(str(found.relative_to(path)) for found in path.rglob("*"))


def test_the_zip_has_the_layout_that_is_documented(tmp_path):
    summary = pack(DemoSource(count=3), tmp_path / "demo.zip")
    assert (summary.num_images, summary.width, summary.height, summary.channels) == (3, 64, 64, 3)
    assert (summary.has_labels, summary.skipped, summary.dest) == (False, [], str(tmp_path / "demo.zip"))
    with zipfile.ZipFile(tmp_path / "demo.zip") as archive:
        names = [f"00000/img0000000{number}.png" for number in range(3)]
        assert archive.namelist() == [*names, "dataset.json"]
        assert archive.read("dataset.json") == (
            b'{"labels": null, "packed": {"transform": "none", "resize_filter": null}, "skipped": []}'
        )
        for info in archive.infolist():
            assert info.compress_type == zipfile.ZIP_STORED
        for number, name in enumerate(names):
            data = archive.read(name)
            assert len(data) > 64 * 64 * 3  # not compressed inside either
            with Image.open(io.BytesIO(data)) as image:
                assert image.mode == "RGB"
                assert not image.info
                assert (np.asarray(image) == np.asarray(DemoSource().read(number))).all()


def test_folders_inside_hold_a_thousand_images(tmp_path):
    pack(DemoSource(count=1001, size=8), tmp_path / "demo.zip")
    with zipfile.ZipFile(tmp_path / "demo.zip") as archive:
        assert archive.namelist()[999:1001] == ["00000/img00000999.png", "00001/img00001000.png"]


def test_equal_input_gives_equal_bytes(tmp_path, folder):
    source = folder(GOOD)
    for name in ("a.zip", "b.zip"):
        pack(source, tmp_path / name, resolution=(8, 8), transform="center-crop")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_a_folder_holds_what_the_zip_holds(tmp_path):
    pack(DemoSource(count=3), tmp_path / "demo.zip")
    (tmp_path / "demo").mkdir()  # an empty one may be there
    pack(DemoSource(count=3), tmp_path / "demo")
    with zipfile.ZipFile(tmp_path / "demo.zip") as archive:
        for name in archive.namelist():
            assert (tmp_path / "demo" / name).read_bytes() == archive.read(name)
    assert everything_below(tmp_path / "demo") == sorted(["00000", *zipfile.ZipFile(tmp_path / "demo.zip").namelist()])


def test_a_packed_dataset_can_be_packed_again(tmp_path):
    pack(DemoSource(count=3), tmp_path / "demo.zip")
    pack(open_source(str(tmp_path / "demo.zip")), tmp_path / "again.zip")
    assert (tmp_path / "demo.zip").read_bytes() == (tmp_path / "again.zip").read_bytes()


def test_every_kind_of_image_is_packed_the_right_way_up_on_white(tmp_path, folder):
    summary = pack(folder(GOOD), tmp_path / "a.zip", resolution=(16, 16), transform="stretch")
    assert summary.skipped == []
    images = dict(zip(sorted(GOOD), images_of(tmp_path / "a.zip"), strict=True))
    assert (images["16bit.png"] == 128).all()
    assert np.abs(images["cmyk.jpg"] - [255.0, 0, 0]).max() < 3
    assert (images["float.tif"] == 128).all()
    assert (images["grey-alpha.png"] == 255).all()
    assert images["palette.gif"][0, 0].tolist() == [255, 0, 0]
    assert images["palette.gif"][15, 0].tolist() == [255, 255, 255]
    assert (images["rgb.png"] == NOISE).all()
    assert images["rotated.jpg"][:7].min() > 240
    assert images["rotated.jpg"][9:].max() < 15


def test_images_stay_grey_when_all_are_grey(tmp_path, folder):
    grey = {name: GOOD[name] for name in ("16bit.png", "grey-alpha.png", "float.tif")}
    assert pack(folder(grey), tmp_path / "grey.zip").channels == 1
    assert {image.shape for image in images_of(tmp_path / "grey.zip")} == {(16, 16)}
    assert pack(folder({"rgb.png": GOOD["rgb.png"]}), tmp_path / "mixed.zip").channels == 3
    assert {image.shape for image in images_of(tmp_path / "mixed.zip")} == {(16, 16, 3)}


@pytest.mark.parametrize(("channels", "shape"), [("grey", (16, 16)), ("rgb", (16, 16, 3)), ("rgba", (16, 16, 4))])
def test_the_channels_are_those_asked_for(tmp_path, folder, channels, shape):
    some = {name: GOOD[name] for name in ("16bit.png", "grey-alpha.png", "palette.gif", "rgb.png")}
    summary = pack(folder(some), tmp_path / "a.zip", channels=channels)
    assert summary.channels == (shape[2] if len(shape) > 2 else 1)
    images = dict(zip(sorted(some), images_of(tmp_path / "a.zip"), strict=True))
    assert {image.shape for image in images.values()} == {shape}
    if channels == "rgba":
        assert images["grey-alpha.png"][0, 0].tolist() == [255, 255, 255, 0]  # what is hidden is the background
        assert images["rgb.png"][0, 0, 3] == 255


def test_transparency_lies_on_the_background(tmp_path, folder):
    pack(folder({"a.png": GOOD["grey-alpha.png"]}), tmp_path / "a.zip", channels="rgb", background="#ff8000")
    assert (images_of(tmp_path / "a.zip")[0] == [255, 128, 0]).all()


@pytest.mark.parametrize(
    ("transform", "background", "channels"), [(None, "red", 3), (None, "grey", 1), ("fit", "red", 3)]
)
def test_grey_images_become_rgb_where_a_colour_will_show(tmp_path, folder, transform, background, channels):
    source = folder({"a.png": GOOD["grey-alpha.png" if transform is None else "16bit.png"]})
    summary = pack(source, tmp_path / "a.zip", resolution=[32, 16], transform=transform, background=background)
    assert summary.channels == channels


def test_transparency_and_damaged_profiles_are_mentioned(tmp_path, folder):
    files = {"a.png": GOOD["grey-alpha.png"], "b.png": encoded(Image.fromarray(NOISE), "PNG", icc_profile=b"x" * 200)}
    lines = []
    found = pack(folder(files), tmp_path / "a.zip", report=lines.append).scan
    assert found.transparent == 1
    assert "  transparent 1 image, laid on --background; --channels rgba keeps them so" in lines
    assert list(found.bad_profiles) == ["b.png"]
    assert any(line.startswith("  profiles    of 1 image ignored, colours kept as they are: b.png (") for line in lines)


def test_images_need_not_be_square(tmp_path, folder):
    stripes = np.repeat(np.arange(96, dtype=np.uint8)[None] * 2, 64, axis=0)
    files = {
        "exact.png": encoded(Image.fromarray(stripes), "PNG"),
        "tall.png": encoded(Image.new("L", (30, 90)), "PNG"),
    }
    summary = pack(folder(files), tmp_path / "a.zip", resolution=(96, 64))
    assert (summary.width, summary.height) == (96, 64)
    exact, tall = images_of(tmp_path / "a.zip")
    assert (exact == stripes).all()
    assert tall.shape == (64, 96)
    assert pack(folder({"exact.png": files["exact.png"]}, "one"), tmp_path / "b.zip").width == 96  # as it is


def test_fit_keeps_the_whole_image_on_the_background(tmp_path, folder):
    files = {"wide.png": encoded(Image.new("RGB", (32, 8), "blue"), "PNG")}
    pack(folder(files), tmp_path / "a.zip", resolution=(16, 16), transform="fit", background="red")
    image = images_of(tmp_path / "a.zip")[0]
    assert (image[:6] == [255, 0, 0]).all()
    assert (image[6:10] == [0, 0, 255]).all()
    assert (image[10:] == [255, 0, 0]).all()


def test_without_a_transform_proportions_are_kept(tmp_path, folder):
    half = np.zeros((16, 32), dtype=np.uint8)
    half[:, 8:24] = 255
    source = folder({"a.png": encoded(Image.fromarray(half), "PNG")})
    pack(source, tmp_path / "a.zip", resolution=(16, 16))
    assert (images_of(tmp_path / "a.zip")[0] == 255).all()
    pack(source, tmp_path / "b.zip", resolution=(16, 16), transform="none", resize_filter="box")
    assert images_of(tmp_path / "b.zip")[0][0].tolist() == [0] * 4 + [255] * 8 + [0] * 4


def test_unreadable_images_are_left_out_by_name(tmp_path, folder):
    lines = []
    summary = pack(folder(GOOD | BAD), tmp_path / "a.zip", resolution=(8, 8), report=lines.append)
    assert summary.num_images == len(GOOD) == len(images_of(tmp_path / "a.zip"))
    reasons = dict(summary.skipped)
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert dict(json.loads(archive.read("dataset.json"))["skipped"]) == reasons
    for name, why in reasons.items():
        assert f"    {name}: {why}" in lines
    assert sorted(reasons) == sorted(BAD)
    assert reasons["text.png"] == reasons["empty.png"] == "not an image, or damaged at its start"
    assert reasons["later-cut.jpg"] == "truncated: its end is missing"
    assert "million pixels" in reasons["bomb.bmp"]
    assert all(reason and "\n" not in reason for reason in reasons.values())


def test_a_damaged_zip_entry_is_left_out(tmp_path):
    with zipfile.ZipFile(tmp_path / "in.zip", "w") as archive:
        for name in ("a.bmp", "b.bmp", "c.bmp"):
            archive.writestr(name, encoded(Image.fromarray(NOISE), "BMP"), zipfile.ZIP_DEFLATED)
        middle = archive.infolist()[1].header_offset
    content = bytearray((tmp_path / "in.zip").read_bytes())
    content[middle + 45 : middle + 90] = b"\xff" * 45
    (tmp_path / "in.zip").write_bytes(content)
    summary = pack(open_source(str(tmp_path / "in.zip")), tmp_path / "out.zip")
    assert summary.num_images == 2
    assert [name for name, _ in summary.skipped] == ["b.bmp"]


def test_nothing_readable_is_an_error_that_leaves_nothing(tmp_path, folder):
    source = folder(BAD)
    for bad in (source, folder({"later-cut.jpg": BAD["later-cut.jpg"]}, "late")):
        with pytest.raises(GanError, match="none of its") as caught:
            pack(bad, tmp_path / "out" / "a.zip", resolution=(8, 8))
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists() or everything_below(tmp_path / "out") == []


def test_labels_follow_their_images(tmp_path, folder):
    labels = [["b/2.png", 5], ["a.png", 3], ["cut.png", 1]]
    files = {"a.png": GOOD["rgb.png"], "b/2.png": GOOD["rgb.png"], "cut.png": BAD["cut.png"]}
    source = folder(files | {"dataset.json": json.dumps({"labels": labels}).encode()})
    assert pack(source, tmp_path / "a.zip").has_labels
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        packed = json.loads(archive.read("dataset.json"))
    assert packed["labels"] == [["00000/img00000000.png", 3], ["00000/img00000001.png", 5]]
    assert [name for name, _ in packed["skipped"]] == ["cut.png"]
    assert pack(open_source(str(tmp_path / "a.zip")), tmp_path / "b.zip").has_labels


def test_an_image_without_a_label_is_left_out_by_name(tmp_path, folder):
    files = {"a.png": GOOD["rgb.png"], "b.png": GOOD["rgb.png"], "dataset.json": b'{"labels": [["a.png", 1]]}'}
    summary = pack(folder(files), tmp_path / "a.zip")
    assert summary.num_images == 1
    assert summary.skipped == [("b.png", "has no label in dataset.json")]
    assert pack(folder(files), tmp_path / "a.zip", labels="none").num_images == 2


def test_folders_are_classes_if_asked_for(tmp_path, folder):
    files = {f"{animal}/{i}.png": GOOD["rgb.png"] for animal in ("dog", "cat") for i in range(2)}
    source = folder(files)
    assert not pack(source, tmp_path / "a.zip").has_labels
    lines = []
    assert pack(source, tmp_path / "b.zip", labels="folders", report=lines.append).scan.class_counts == {
        "cat": 2,
        "dog": 2,
    }
    assert "  labels      2 classes from sub-folders: cat (2), dog (2)" in lines
    with zipfile.ZipFile(tmp_path / "b.zip") as archive:
        packed = json.loads(archive.read("dataset.json"))
    assert packed["class_names"] == ["cat", "dog"]
    assert [label for _, label in packed["labels"]] == [0, 0, 1, 1]
    assert pack(tmp_path / "b.zip", tmp_path / "c.zip").scan.class_counts == {"cat": 2, "dog": 2}  # they are passed on


def test_labels_come_from_a_table(tmp_path, folder):
    source = folder({f"{i}.png": GOOD["rgb.png"] for i in range(3)})
    (tmp_path / "labels.csv").write_text("file,red,round\n0.png,1,0\n1.png,1,1\n2.png,x,1\n7.png,0,0\n")
    summary = pack(source, tmp_path / "a.zip", labels=str(tmp_path / "labels.csv"))
    assert [name for name, _ in summary.skipped] == ["2.png"]
    assert len(summary.scan.label_problems) == 2
    assert "2.png" in summary.scan.label_problems[0]
    assert "7.png" in summary.scan.label_problems[1]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert [label for _, label in json.loads(archive.read("dataset.json"))["labels"]] == [[1, 0], [1, 1]]


def test_labels_that_contradict_each_other_are_named(tmp_path, folder):
    photos = {f"{name}.png": encoded(Image.effect_noise((64, 64), 90), "PNG") for name in ("cat/1", "cat/2", "dog/3")}
    source = folder(photos | {"dog/same.png": photos["cat/1.png"], "cat/same.png": photos["cat/2.png"]})
    lines = []
    found = pack(source, tmp_path / "a.zip", labels="folders", report=lines.append).scan
    assert found.exact_duplicates == [["cat/1.png", "dog/same.png"], ["cat/2.png", "cat/same.png"]]
    assert found.label_conflicts == [["cat/1.png", "dog/same.png"]]
    assert "  conflicts   labels differ between images that look alike, kept: cat/1.png = dog/same.png" in lines


def test_strict_writes_nothing_if_anything_is_wrong(tmp_path, folder):
    lines = []
    with pytest.raises(GanError, match="--strict: 6 images would be left out"):
        pack(folder(GOOD | BAD), tmp_path / "a.zip", resolution=(8, 8), strict=True, report=lines.append)
    assert not (tmp_path / "a.zip").exists()
    assert all(any(line.startswith(f"    {name}: ") for line in lines) for name in BAD)
    assert pack(folder(GOOD, "good"), tmp_path / "b.zip", resolution=(8, 8), strict=True).num_images == len(GOOD)


def test_images_of_several_sizes_need_a_resolution(tmp_path, folder):
    files = {f"{number}.png": GOOD["rgb.png"] for number in range(3)}
    files["2.png"] = encoded(Image.new("RGB", (20, 16)), "PNG")
    with pytest.raises(GanError, match=r"2\.png is 20x16, but most images are 16x16 .*--resolution 16x16"):
        pack(folder(files), tmp_path / "a.zip")
    with pytest.raises(GanError, match=r"a\.png is 25x18, .* doubled .*--resolution 16x16"):
        pack(folder({"a.png": encoded(Image.new("L", (25, 18)), "PNG")}, "odd"), tmp_path / "a.zip")
    assert everything_below(tmp_path / "photos") == ["0.png", "1.png", "2.png"]
    assert not (tmp_path / "a.zip").exists()


def test_center_crop_wide_pads_and_leaves_out_small_images(tmp_path, folder):
    files = {"a.png": encoded(Image.new("L", (20, 20), 255), "PNG"), "b.png": encoded(Image.new("L", (15, 20)), "PNG")}
    summary = pack(folder(files), tmp_path / "a.zip", resolution=(16, 12), transform="center-crop-wide")
    assert summary.skipped == [("b.png", "too small for center-crop-wide (15x20 pixels)")]
    assert (summary.width, summary.height) == (16, 16)
    image = images_of(tmp_path / "a.zip")[0]
    assert image[:, 0].tolist() == [0] * 2 + [255] * 12 + [0] * 2


def test_max_images_takes_the_first_usable_ones(tmp_path, folder):
    files = {"0.png": BAD["text.png"]} | {f"{number}.png": GOOD["rgb.png"] for number in range(1, 5)}
    summary = pack(folder(files), tmp_path / "a.zip", max_images=2)
    assert summary.num_images == 2
    assert [name for name, _ in summary.skipped] == ["0.png"]
    assert pack(folder(files), tmp_path / "b.zip", max_images=99).num_images == 4


def test_progress_counts_each_stage_to_its_end(tmp_path, folder):
    seen = []
    pack(folder(GOOD | BAD), tmp_path / "a.zip", resolution=(8, 8), progress=lambda *step: seen.append(step))
    for stage in ("reading headers", "packing"):
        steps = [step[1:] for step in seen if step[0] == stage]
        assert steps == [(i + 1, len(steps)) for i in range(len(steps))]


def test_all_wrong_settings_are_told_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        pack(
            tmp_path / "nowhere",
            tmp_path / "a.7z",
            transform="center-crop",
            resize_filter="sinc",
            channels="cmyk",
            background="wihte",
            labels="no.csv",
            max_images=0,
        )
    flags = [problem.split()[0] for problem in caught.value.problems]
    assert flags == [
        *("--transform", "--resize-filter", "--channels", "--background", "--labels", "--max-images"),
        *("--source", "--dest"),
    ]


@pytest.mark.parametrize(
    ("resolution", "transform", "said"),
    [
        ((49, 50), "none", "--resolution 49x50: .* try --resolution 48x48"),
        ((100, 100), "center-crop", "try --resolution 96x96"),
        ((400, 533), "center-crop", "try --resolution 384x512"),
        ((0, 0), "none", "at least 1 pixel"),
        ((2, 2), "none", "try --resolution 8x8"),
        ((64, 100), "center-crop-wide", "a width of at least the height"),
        ((50, 30), "center-crop-wide", "try --resolution 48x28"),
        ((64, 64), "squash", "--transform squash: is not one of none, stretch"),
        (64, None, "--resolution 64: is not a width and a height"),
        ([64.0, 64], None, "is not a width and a height"),
    ],
)
def test_a_size_that_cannot_be_trained_on_is_refused(resolution, transform, said):
    with pytest.raises(UsageError, match=said):
        raise UsageError(PackOptions(resolution=resolution, transform=transform).problems())


def test_a_dest_that_would_lose_something_is_refused(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "photos").mkdir()
    pack(DemoSource(count=1), tmp_path / "in.zip")
    with zipfile.ZipFile(tmp_path / "originals.zip", "w") as archive:
        archive.writestr("IMG_1.JPG", JPEG)
    for dest, said in {
        "full": "not empty",
        "folder.zip": "is a folder",
        "file": "is a file",
        "in.zip": "is the --source itself",
        "file/below/a.zip": "is a file, not a folder",
        "a.tar": "only .zip files and folders",
        "originals.zip": "is there, and no dataset",
    }.items():
        (problem,) = dest_problems(str(tmp_path / "in.zip"), tmp_path / dest)
        assert said in problem
        with pytest.raises(UsageError):
            pack(open_source(str(tmp_path / "in.zip")), tmp_path / dest)
    assert "inside of the --source" in dest_problems(str(tmp_path / "photos"), tmp_path / "photos" / "packed")[0]
    assert dest_problems(str(tmp_path / "photos"), tmp_path / "photos" / "packed.zip") == []
    monkeypatch.chdir(tmp_path / "photos")
    assert "the current folder" in dest_problems("demo", ".")[0]
    assert dest_problems("demo", tmp_path / "new" / "sub" / "a.zip") == []


def test_an_existing_zip_is_replaced_only_by_a_complete_one(tmp_path, folder):
    pack(DemoSource(count=1), tmp_path / "a.zip")
    before = (tmp_path / "a.zip").read_bytes()
    with pytest.raises(GanError):
        pack(folder({"a.jpg": BAD["later-cut.jpg"]}), tmp_path / "a.zip", resolution=(8, 8))
    assert (tmp_path / "a.zip").read_bytes() == before
    pack(DemoSource(count=2), tmp_path / "a.zip")
    assert len(images_of(tmp_path / "a.zip")) == 2


@pytest.mark.parametrize("dest", ["a.zip", "a"])
def test_a_run_that_breaks_off_is_continued(tmp_path, dest):
    def break_off(stage, done, total):
        if (stage, done) == ("packing", 20):
            raise KeyboardInterrupt

    lines = []
    with pytest.raises(KeyboardInterrupt):
        pack(DemoSource(count=50), tmp_path / "out" / dest, progress=break_off, report=lines.append)
    assert not (tmp_path / "out" / dest).exists()
    pack(DemoSource(count=50), tmp_path / "out" / dest, report=lines.append)
    assert "Going on after 20 of 50 images, which an earlier run has packed" in lines
    pack(DemoSource(count=50), tmp_path / "whole" / dest)
    assert everything_below(tmp_path / "out") == everything_below(tmp_path / "whole")
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / "out" / path.relative_to(tmp_path / "whole")).read_bytes()


def test_what_an_earlier_run_packed_differently_is_not_used(tmp_path, folder):
    def break_off(stage, done, total):
        if (stage, done) == ("packing", 3):
            raise KeyboardInterrupt

    source, lines = folder(GOOD), []
    with pytest.raises(KeyboardInterrupt):
        pack(source, tmp_path / "a.zip", resolution=(8, 8), progress=break_off)
    pack(source, tmp_path / "a.zip", resolution=(16, 16), report=lines.append)
    assert not any(line.startswith("Going on") for line in lines)
    assert {image.shape for image in images_of(tmp_path / "a.zip")} == {(16, 16, 3)}
    assert everything_below(tmp_path) == sorted(["a.zip", "photos", *(f"photos/{name}" for name in GOOD)])


class Faulty(DemoSource):
    """Drawn images, some of which cannot be read at first."""

    def __init__(self, marks, error, path="demo"):
        super().__init__(count=6, size=8)
        self.marks, self.error, self.name = marks, error, str(path)

    def read(self, index):
        if index in (2, 3) and not (self.marks / str(index)).exists():
            (self.marks / str(index)).touch()
            raise self.error
        return super().read(index)


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), MemoryError()])
def test_what_the_machine_lacks_for_a_moment_costs_no_image(tmp_path, error):
    summary = pack(Faulty(tmp_path, error), tmp_path / "a.zip", workers=2)
    assert (summary.num_images, summary.skipped) == (6, [])
    assert [(tmp_path / name).exists() for name in "23"] == [True, True]


def test_a_source_that_is_gone_ends_the_work_and_is_not_taken_for_bad_images(tmp_path, folder):
    def take_away(stage, done, total):
        if (stage, done) == ("packing", 5):
            (tmp_path / "photos").rename(tmp_path / "elsewhere")

    source = folder({f"{i:02d}.png": GOOD["rgb.png"] for i in range(60)})
    with pytest.raises(GanError, match=r"photos: is gone; .*goes on"):
        pack(source, tmp_path / "a.zip", progress=take_away)
    (tmp_path / "elsewhere").rename(tmp_path / "photos")
    lines = []
    assert pack(source, tmp_path / "a.zip", report=lines.append).num_images == 60
    assert lines[0].startswith("Going on after ")
