import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from gan.data.sources import DemoSource, Header, open_source
from gan.errors import GanError


def save(path, size=(8, 8), colour=(200, 30, 60), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)


def zip_folder(folder, path, prefix=""):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in folder.rglob("*"):
            archive.write(file, prefix + str(file.relative_to(folder)))
    return path


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    for number, name in enumerate(["b/2.JPG", "b/1.jpeg", "a.png", "c.webp", "d.bmp", "e.tif", "f.tiff", "g.gif"]):
        save(folder / name, size=(8 + number, 8))
    for name in ["notes.txt", ".hidden.png", ".cache/x.png", "__MACOSX/._a.png", "movie.mp4"]:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    return folder


SORTED = ["a.png", "b/1.jpeg", "b/2.JPG", "c.webp", "d.bmp", "e.tif", "f.tiff", "g.gif"]


def test_a_folder_is_read_with_everything_below_it_in_sorted_order(photos):
    source = open_source(str(photos))
    assert source.names == SORTED
    assert len(source) == 8
    assert source.ignored == ["movie.mp4", "notes.txt"]
    assert source.labels is None
    assert source.read(1).size == (9, 8)
    assert source.header(1) == Header("RGB", 9, 8)


def test_a_zip_equals_the_folder_it_was_made_from(photos, tmp_path):
    source = open_source(str(zip_folder(photos, tmp_path / "photos.zip")))
    assert source.names == SORTED
    folder = open_source(str(photos))
    for index in range(len(source)):
        assert (np.asarray(source.read(index)) == np.asarray(folder.read(index))).all()


def test_a_zip_made_on_windows_has_folders_too(tmp_path):
    save(tmp_path / "x.png")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        info = zipfile.ZipInfo("placeholder")
        info.filename = "cats\\x.png"
        archive.writestr(info, (tmp_path / "x.png").read_bytes())
    assert open_source(str(tmp_path / "a.zip")).names == ["cats/x.png"]


def test_the_demo_is_built_in():
    source = open_source("demo")
    assert isinstance(source, DemoSource)
    assert len(source) == len(set(source.names)) == 4000
    assert source.names == sorted(source.names)
    assert source.read(3).size == (64, 64)
    assert source.header(3) == Header("RGB", 64, 64)


@pytest.mark.parametrize("prefix", ["", "wrapped/"])
def test_labels_come_from_dataset_json(tmp_path, prefix):
    folder = tmp_path / "photos"
    save(folder / "x" / "1.png")
    save(folder / "2.png")
    (folder / "dataset.json").write_text(json.dumps({"labels": [["x\\1.png", 4], ["./2.png", 0], ["gone.png", 1]]}))
    source = open_source(str(zip_folder(folder, tmp_path / "photos.zip", prefix)))
    assert [source.labels[name] for name in source.names] == ([0, 4])
    if not prefix:
        assert open_source(str(folder)).labels == source.labels


def test_labels_may_be_null_or_vectors(tmp_path):
    save(tmp_path / "1.png")
    (tmp_path / "dataset.json").write_text('{"labels": null}')
    assert open_source(str(tmp_path)).labels is None
    (tmp_path / "dataset.json").write_text('{"labels": [["1.png", [0.5, 1]]]}')
    assert open_source(str(tmp_path)).labels == {"1.png": [0.5, 1]}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "not valid JSON"),
        ('{"labels": {"1.png": 3}}', "is not a list"),
        ('{"labels": [["1.png", 3], ["2.png", -1]]}', "row 1"),
        ('{"labels": [["1.png", "cat"]]}', 'row 0 of labels is ["1.png", "cat"]'),
        ('{"labels": [["1.png", true]]}', "row 0"),
        ('{"labels": [["1.png", [NaN]]]}', "row 0"),
        ('{"labels": ["1.png"]}', "row 0"),
        ('{"labels": [["1.png", 1], ["2.png", [0.5]]]}', "row 1 of labels (2.png)"),
        ('{"labels": [["1.png", [1, 2]], ["2.png", [0.5]]]}', "row 1 of labels (2.png)"),
    ],
)
def test_a_wrong_dataset_json_names_its_row(tmp_path, content, said):
    save(tmp_path / "1.png")
    (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(GanError) as caught:
        open_source(str(tmp_path))
    assert said in str(caught.value)
    assert "dataset.json" in str(caught.value)
    assert "\n" not in str(caught.value)


def empty_folder(path):
    path.mkdir()


def folder_without_images(path):
    path.mkdir()
    (path / "a.heic").write_bytes(b"x")


@pytest.mark.parametrize(
    ("name", "make", "said"),
    [
        ("missing", lambda path: None, "no such file or folder"),
        ("empty", empty_folder, "it is empty"),
        ("heic", folder_without_images, "only 1 x .heic"),
        ("empty.zip", lambda path: zipfile.ZipFile(path, "w").close(), "it is empty"),
        ("zero.zip", lambda path: path.write_bytes(b""), "not a zip file"),
        ("text.zip", lambda path: path.write_bytes(b"hello" * 99), "not a zip file"),
        ("one.png", lambda path: path.write_bytes(b""), "is a single image"),
    ],
)
def test_a_source_that_cannot_be_opened_says_why_in_one_line(tmp_path, name, make, said):
    make(tmp_path / name)
    with pytest.raises(GanError) as caught:
        open_source(str(tmp_path / name))
    assert said in str(caught.value)
    assert str(caught.value).startswith(f"--source {tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_headers_are_read_without_decoding_the_pixels(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert open_source(str(tmp_path)).header(0) == Header("RGB", 48, 64)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_size_in_a_header_is_that_of_the_upright_image(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    save(tmp_path / f"a.{suffix}", size=(10, 4), exif=exif)
    assert open_source(str(tmp_path)).header(0) == Header("RGB", 4, 10)
