import errno
import io
import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from gan.data.pack import dest_problems, pack, settings_problems
from gan.data.sources import DemoSource, open_source
from gan.errors import GanError, UsageError

NOISE = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def rotated_jpeg():
    exif = Image.Exif()
    exif[0x0112] = 6  # held sideways: the left edge of what is stored is the top of the picture
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:, :16] = 255
    return encoded(Image.fromarray(stored), "JPEG", quality=95, exif=exif)


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
        assert archive.read("dataset.json") == b'{"labels": null}'
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
    pack(DemoSource(count=1001, size=4), tmp_path / "demo.zip")
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
    summary = pack(folder(GOOD), tmp_path / "a.zip", resolution=(16, 16))
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


def test_unreadable_images_are_left_out_by_name(tmp_path, folder):
    summary = pack(folder(GOOD | BAD), tmp_path / "a.zip", resolution=(8, 8))
    assert summary.num_images == len(GOOD) == len(images_of(tmp_path / "a.zip"))
    reasons = dict(summary.skipped)
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
    assert packed == {"labels": [["00000/img00000000.png", 3], ["00000/img00000001.png", 5]]}
    assert pack(open_source(str(tmp_path / "a.zip")), tmp_path / "b.zip").has_labels


def test_an_image_without_a_label_is_named(tmp_path, folder):
    files = {"a.png": GOOD["rgb.png"], "b.png": GOOD["rgb.png"], "dataset.json": b'{"labels": [["a.png", 1]]}'}
    with pytest.raises(GanError, match=r"no label for b\.png \(1 of 2 images"):
        pack(folder(files), tmp_path / "a.zip")


def test_images_of_several_sizes_need_a_resolution(tmp_path, folder):
    files = {f"{number}.png": GOOD["rgb.png"] for number in range(3)}
    files["2.png"] = encoded(Image.new("RGB", (20, 16)), "PNG")
    with pytest.raises(GanError, match=r"2\.png is 20x16, but most images are 16x16 .*--resolution 16x16"):
        pack(folder(files), tmp_path / "a.zip")
    with pytest.raises(GanError, match=r"a\.png is 24x18, .* power of two.*--resolution 16x16 --transform center-crop"):
        pack(folder({"a.png": encoded(Image.new("L", (24, 18)), "PNG")}, "odd"), tmp_path / "a.zip")
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
    total = len(GOOD | BAD)
    assert [step for step in seen if step[0] == "scanning"] == [("scanning", i + 1, total) for i in range(total)]
    packing = [step for step in seen if step[0] == "packing"]
    assert packing[-1][1] == packing[-1][2] == len(packing)


def test_all_wrong_settings_are_told_at_once(tmp_path):
    with pytest.raises(UsageError) as caught:
        pack(DemoSource(count=1), tmp_path / "a.7z", resize_filter="sinc", max_images=0, transform="center-crop")
    flags = [problem.split()[0] for problem in caught.value.problems]
    assert flags == ["--transform", "--resize-filter", "--max-images", "--dest"]


@pytest.mark.parametrize(
    ("resolution", "transform", "said"),
    [
        ((48, 48), "none", "--resolution 48x48: .* try --resolution 32x32"),
        ((64, 32), "center-crop", "--resolution 64x32: .* squares"),
        ((0, 0), "none", "at least 1 pixel"),
        ((2, 2), "none", "try --resolution 4x4"),
        ((64, 100), "center-crop-wide", "a width of at least the height"),
        ((60, 30), "center-crop-wide", "try --resolution 32x16"),
        ((64, 64), "squash", "--transform squash: is not one of none, center-crop"),
    ],
)
def test_a_size_that_cannot_be_trained_on_is_refused(resolution, transform, said):
    with pytest.raises(UsageError, match=said):
        raise UsageError(settings_problems(resolution, transform, "lanczos", None))


def test_a_dest_that_would_lose_something_is_refused(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("x")
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "file").write_text("x")
    pack(DemoSource(count=1), tmp_path / "in.zip")
    for dest, said in {
        "full": "not empty",
        "folder.zip": "is a folder",
        "file": "is a file",
        "in.zip": "is the --source itself",
        "file/below/a.zip": "is a file, not a folder",
        "a.tar": "only .zip files and folders",
    }.items():
        (problem,) = dest_problems(str(tmp_path / "in.zip"), tmp_path / dest)
        assert said in problem
        with pytest.raises(UsageError):
            pack(open_source(str(tmp_path / "in.zip")), tmp_path / dest)
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
@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), GanError, "no space left"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_a_run_that_breaks_off_leaves_nothing(tmp_path, dest, error, raised, said):
    def break_off(stage, done, total):
        if (stage, done) == ("packing", 2):
            raise error

    (tmp_path / "out").mkdir()
    with pytest.raises(raised, match=said):
        pack(DemoSource(count=50), tmp_path / "out" / dest, progress=break_off)
    assert everything_below(tmp_path / "out") == []
