import json
import os
import pickle
import random
import socket
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from checks import in_child, refusal
from pictures import encoded, noise, save, turned
from PIL import Image, features

from gan.data.label_files import choose_labels
from gan.data.packing import scan
from gan.data.sources import DemoSource, Header, Source, open_source
from gan.errors import GanError, printable

NOT_READ = "kind not read; convert it to png or jpg first"
PHOTOGRAPHS, DRAWINGS = "clothing-photos.zip", "noto-emoji.zip"


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
    assert source.own_labels is None
    assert source.lost == []
    assert source.notes == ["1 hidden image (.hidden.png) not looked at: the name begins with a dot"]
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
        ("heic", folder_without_images, "holds no images that can be read (a.heic: kind not read; convert it"),
        ("empty.zip", lambda path: zipfile.ZipFile(path, "w").close(), "it is empty"),
        ("zero.zip", lambda path: path.write_bytes(b""), "not a zip file"),
        ("text.zip", lambda path: path.write_bytes(b"hello" * 99), "not a zip file"),
        ("cut.zip", lambda path: path.write_bytes(b"PK\x03\x04" + bytes(99)), "make or copy it again"),
        ("text.txt", lambda path: path.write_bytes(b"hello"), "name a folder or a .zip of images"),
        ("one.png", lambda path: path.write_bytes(b""), "is a single image"),
        ("one", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n"), "is a single image"),
        ("pipe", os.mkfifo, "is neither a file nor a folder"),
    ],
)
def test_a_source_that_cannot_be_opened_says_why_in_one_line(tmp_path, name, make, said):
    make(tmp_path / name)
    text = refusal(open_source, str(tmp_path / name))
    assert said in text
    assert text.startswith(f"--source {tmp_path / name}: ")


def test_headers_are_read_without_decoding_the_pixels(tmp_path):
    whole = encoded(noise(64, 48, 3))
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    assert open_source(str(tmp_path)).header(0) == Header("RGB", 48, 64)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_the_size_in_a_header_is_that_of_the_upright_image(tmp_path, suffix):
    save(tmp_path / f"a.{suffix}", size=(10, 4), exif=turned(6))
    assert open_source(str(tmp_path)).header(0) == Header("RGB", 4, 10)


def test_images_are_known_by_their_content_too(tmp_path):
    for name, kind in [("a", "PNG"), ("b.dat", "JPEG"), ("c.txt", "WEBP"), ("d.1", "GIF"), ("e.bin", "TIFF")]:
        Image.new("RGB", (8, 8)).save(tmp_path / name, kind)
    Image.new("RGB", (8, 8)).save(tmp_path / "camera.NEF", "TIFF")  # whose first picture is a thumbnail
    for name in ("f.JFIF", "g.jpe"):
        Image.new("RGB", (8, 8)).save(tmp_path / name, "JPEG")
    (tmp_path / "notes").write_bytes(b"")
    for source in (open_source(str(tmp_path)), open_source(str(zip_folder(tmp_path, tmp_path.parent / "a.zip")))):
        assert source.names == ["a", "b.dat", "c.txt", "d.1", "e.bin", "f.JFIF", "g.jpe"]
        assert source.ignored == ["notes"]
        assert source.lost == [("camera.NEF", NOT_READ)]
        assert source.notes == ["5 images (a, b.dat, ...) recognised by the content, not by the name"]
        assert {source.read(index).size for index in range(7)} == {(8, 8)}


def test_images_of_kinds_that_are_not_read_are_lost_and_not_merely_ignored(tmp_path):
    save(tmp_path / "a.png")
    names = ["b.HEIC", "c/d.jxl", "e.cr3", "f.svg", "g.tga"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    Image.new("RGB", (8, 8)).save(tmp_path / "h.heif", "JPEG")  # as some phones send them
    (tmp_path / "notes.txt").write_bytes(b"x")
    for source in (open_source(str(tmp_path)), open_source(str(zip_folder(tmp_path, tmp_path.parent / "a.zip")))):
        assert source.names == ["a.png", "h.heif"]
        assert source.lost == [(name, NOT_READ) for name in names]
        assert source.ignored == ["notes.txt"]


@pytest.mark.parametrize("suffix", ["ppm", "PGM", "pbm", "avif"])
def test_some_less_usual_kinds_are_read(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    mode = {"PGM": "L", "pbm": "1"}.get(suffix, "RGB")
    Image.new(mode, (8, 6)).save(tmp_path / f"a.{suffix}")
    assert open_source(str(tmp_path)).header(0) == Header(mode, 8, 6)


def test_images_that_are_hidden_by_their_own_name_are_counted(tmp_path):
    for name in ["a.png", "...Baby One More Time.png", "b/.c.jpg", ".git/d.png", "._a.png", "__MACOSX/e.png"]:
        save(tmp_path / name)
    (tmp_path / ".notes").write_bytes(b"x")
    os.mkfifo(tmp_path / ".pipe.png")
    folder = open_source(str(tmp_path))
    (tmp_path / ".pipe.png").unlink()
    for source in (folder, open_source(str(zip_folder(tmp_path, tmp_path.parent / "a.zip")))):
        assert (source.names, source.ignored, source.lost) == (["a.png"], [], [])
        assert source.notes == [
            "2 hidden images (...Baby One More Time.png, b/.c.jpg) not looked at: the name begins with a dot"
        ]


def test_what_a_scan_has_written_is_no_image(tmp_path):
    for name in ("1.png", "2.png"):
        save(tmp_path / name)
    scan(tmp_path, tmp_path, workers=0)
    assert (tmp_path / "scan.png").exists()
    source = open_source(str(tmp_path))
    assert source.names == ["1.png", "2.png"]
    assert source.ignored == ["scan.json", "scan.png"]
    (tmp_path / "scan.json").write_text('{\n  "version": "5.0", "shapes": []}')  # some program's notes on the image
    assert open_source(str(tmp_path)).names == ["1.png", "2.png", "scan.png"]


def test_links_are_followed_once_and_loops_are_named(tmp_path):
    folder, other = tmp_path / "photos", tmp_path / "elsewhere"
    save(folder / "b" / "1.png")
    save(other / "2.png")
    (folder / "a").symlink_to(folder / "b")  # sorted before the folder itself, which is to go by its own name
    (folder / "b" / "loop").symlink_to(folder)
    (folder / "c").symlink_to(other)
    (folder / "d.png").symlink_to(other / "2.png")
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "self.png").symlink_to(folder / "self.png")
    source = open_source(str(folder))
    assert source.names == ["b/1.png", "c/2.png", "d.png", "gone.png", "self.png"]
    assert source.notes == [
        "a: leads to a folder that is read already; not followed",
        "b/loop: leads to a folder that is read already; not followed",
    ]
    assert source.read(2).size == (8, 8)
    for index in (3, 4):
        with pytest.raises(OSError):
            source.header(index)
    assert len(source.fingerprint()) == 64


def test_pipes_and_sockets_are_left_alone(tmp_path, monkeypatch):
    save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "2.png")
    os.mkfifo(tmp_path / "notes")
    monkeypatch.chdir(tmp_path)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("3.png")
        (tmp_path / "4.png").symlink_to("/dev/zero")
        source = open_source(str(tmp_path))
    assert source.names == ["1.png"]
    assert len(source.notes) == 1
    assert source.notes[0].startswith("4 entries (")


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    save(tmp_path / "1.png")
    save(tmp_path / "locked" / "2.png")
    scandir = os.scandir

    def refusing(path):  # the superuser may read anything
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(str(tmp_path))
    assert source.names == ["1.png"]
    assert source.lost == [("locked", "cannot be read (Permission denied); what is in it is left out")]
    assert source.notes == []
    with pytest.raises(GanError, match="cannot be read"):
        open_source(str(tmp_path / "locked"))
    (tmp_path / "1.png").unlink()
    with pytest.raises(GanError, match=r"holds no images that can be read \(locked: cannot be read"):
        open_source(str(tmp_path))


def test_names_of_any_bytes_survive(tmp_path):
    folder = os.fsencode(tmp_path)
    names = [b"\xff\xfe.png", "é\u202e\n.png".encode(), b"n" * 251 + b".png", b"a\\b.png", b"  .png", b"'\".png"]
    save(tmp_path / "x.png")
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:
            file.write((tmp_path / "x.png").read_bytes())
    deep = tmp_path
    for _ in range(12):
        deep = deep / ("d" * 200)
    save(deep / "y.png")
    (tmp_path / "b\udcff").mkdir()
    (tmp_path / "b\udcff" / "up").symlink_to(tmp_path)
    source = open_source(str(tmp_path))
    assert {os.fsencode(name) for name in source.names} >= set(names)
    assert len(source) == 8
    assert json.loads(json.dumps(source.names)) == source.names
    for index, name in enumerate(source.names):
        assert source.read(index).size == (8, 8)
        printable(name).encode()
    "\n".join(source.notes).encode()
    assert source.notes == ["b?/up: leads to a folder that is read already; not followed"]
    assert len(source.fingerprint()) == 64


def zip_of(path, entries, **options):
    """A zip of (name, content) as they are, whatever zipfile itself thinks of such names."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo("x")
            info.filename = name
            info.compress_type = archive.compression
            archive.writestr(info, content)
    return str(path)


@pytest.fixture
def png(tmp_path):
    save(tmp_path / "x.png")
    return (tmp_path / "x.png").read_bytes()


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_names_in_a_zip_are_just_names(tmp_path, png):
    names = [
        "/etc/a.png",
        "../../b.png",
        "C:\\c.png",
        "é.png",
        "dir\\",
        "a" * 60000 + ".png",
        "__MACOSX/._a.png",
        ".b.png",
    ]
    source = open_source(zip_of(tmp_path / "a.zip", [(name, png) for name in names]))
    assert source.names == sorted(["/etc/a.png", "../../b.png", "C:/c.png", "é.png", "a" * 60000 + ".png"])
    assert [source.read(index).size for index in range(5)] == [(8, 8)] * 5
    entries = [("a.png", b"x"), ("b/c.png", png), ("a.png", b"y"), ("t.txt", b"x"), ("t.txt", b"y"), ("a.png", png)]
    source = open_source(zip_of(tmp_path / "a.zip", entries))
    assert source.names == ["a.png", "b/c.png"]
    assert source.read(0).size == (8, 8)
    assert source.lost == [("a.png", "a later entry of the zip has the same name")] * 2
    assert source.notes == ["1 entry (t.txt) of the zip left out: a later one has the same name"]
    source = open_source(zip_of(tmp_path / "a.zip", [("a.png", png), ("more.ZIP", b"PK\5\6" + bytes(18))]))
    assert source.ignored == ["more.ZIP"]
    assert source.notes == ["1 zip file (more.ZIP) inside of the zip not looked into; unpack it first"]


def patched(path, entry, offset, value):
    """The zip with bytes of an entry's row in the central directory set to `value`."""
    data = bytearray(Path(path).read_bytes())
    row = data.rindex(entry.encode()) - 46
    data[row + offset : row + offset + len(value)] = value
    Path(path).write_bytes(data)
    return str(path)


def test_entries_that_cannot_be_unpacked_say_why(tmp_path, png):
    def source(*about, method=zipfile.ZIP_DEFLATED):
        path = zip_of(tmp_path / "a.zip", [("a.png", png), ("b.png", png), ("dataset.json", "{}")], compression=method)
        return open_source(patched(path, *about) if about else path)

    assert source().read(1).size == (8, 8)
    for about, said in [
        (("b.png", 8, b"\x01"), "encrypted"),
        (("b.png", 10, b"\x09\x00"), "packed in a way that cannot be read here"),
        (("b.png", 24, b"\xff\xff\xff\x7f"), "unpacks to 2,147 MB, more than any image"),
    ]:
        opened = source(*about)
        assert opened.read(0).size == (8, 8)
        for attempt in (opened.read, opened.header):
            with pytest.raises(GanError, match=said):
                attempt(1)
    with pytest.raises(zipfile.BadZipFile):
        source("b.png", 16, b"\0\0\0\0").read(1)  # a wrong checksum
    hidden = source("dataset.json", 8, b"\x01")
    with pytest.raises(GanError, match=r"dataset.json cannot be read \(encrypted"):
        choose_labels(hidden, None)
    assert choose_labels(hidden, "none") is None


def test_a_bomb_in_a_zip_is_not_unpacked(tmp_path, png):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("a.png", "w") as entry:
        for _ in range(100):
            entry.write(bytes(1_000_000))
    opened = open_source(str(bomb))
    with pytest.raises(OSError, match="cannot identify"):
        opened.read(0)
    # One that says it holds few bytes gives no more of them.
    squeezed = zlib.compressobj(wbits=-15)
    data = squeezed.compress(png + bytes(50_000_000)) + squeezed.flush()
    path = zip_of(tmp_path / "liar.zip", [("a.png", data)])
    patched(path, "a.png", 10, b"\x08\x00")
    patched(path, "a.png", 24, len(png).to_bytes(4, "little"))
    with pytest.raises((zipfile.BadZipFile, GanError)):
        open_source(path).read(0)


def test_a_damaged_zip_never_ends_in_a_traceback(tmp_path, png):
    path = zip_of(tmp_path / "a.zip", [("a.png", png), ("é/b.png", png), ("dataset.json", '{"labels": null}')])
    whole = Path(path).read_bytes()
    rng = random.Random(0)
    opened, refused = 0, []
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(whole) * 3 // 5, len(whole))] = rng.randrange(256)
        Path(path).write_bytes(damaged[: rng.choice([len(whole), len(whole), rng.randrange(len(whole))])])
        try:
            choose_labels(open_source(path), None)
            opened += 1
        except GanError as error:
            refused.append(str(error))
    assert opened > 20
    assert len(refused) > 20
    assert all(text.startswith(f"--source {path}: ") and "\n" not in text for text in refused)


def make_demo(tmp_path):
    return "demo"


def make_folder(tmp_path):
    for name in ("1.png", "a/2.png"):
        save(tmp_path / "photos" / name, size=(9, 8))
    return str(tmp_path / "photos")


def make_zip(tmp_path):
    return str(zip_folder(Path(make_folder(tmp_path)), tmp_path / "photos.zip"))


@pytest.mark.parametrize("make", [make_demo, make_folder, make_zip])
def test_a_source_may_be_read_by_several_processes(tmp_path, make):
    source = open_source(make(tmp_path))
    wanted = [np.asarray(source.read(index)).tolist() for index in range(2)]

    def reads(other):
        return [np.asarray(other.read(index)).tolist() for index in range(2)] == wanted

    assert in_child(lambda: all(reads(source) for _ in range(20)))
    sent = pickle.dumps(source)
    assert in_child(lambda: reads(pickle.loads(sent)))
    assert reads(source)
    assert pickle.loads(sent).fingerprint() == source.fingerprint()


def test_a_zip_that_is_replaced_while_it_is_read_is_noticed(tmp_path):
    path = make_zip(tmp_path)
    source = pickle.loads(pickle.dumps(open_source(path)))
    save(tmp_path / "photos" / "0.png")
    zip_folder(tmp_path / "photos", path)
    with pytest.raises(GanError, match="has been replaced"):
        source.read(0)


@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_a_source_that_is_taken_away_is_told_from_a_bad_image(tmp_path, make):
    path = make(tmp_path)
    source = open_source(path)
    source.check()
    Path(path).rename(tmp_path / "elsewhere")
    with pytest.raises(GanError, match="is gone; bring it back"):
        source.check()
    open_source("demo").check()


@pytest.mark.parametrize("make", [make_folder, make_zip])
def test_the_fingerprint_tells_other_images(tmp_path, make):
    source = make(tmp_path)
    known = {open_source(source).fingerprint()}
    assert open_source(source).fingerprint() in known
    for name, colour in [("1.png", (0, 0, 0)), ("0.png", (200, 30, 60)), ("dataset.json", None)]:
        if colour is None:
            (tmp_path / "photos" / name).write_text("{}")
        else:
            save(tmp_path / "photos" / name, size=(9, 8), colour=colour)
        if make is make_zip:
            zip_folder(tmp_path / "photos", source)
        known.add(open_source(source).fingerprint())
    assert len(known) == 4


def test_pictures_that_are_computed_have_a_fingerprint():
    class Drawn(Source):
        def __init__(self, count, size):
            super().__init__("drawn", [f"{number}.png" for number in range(count)])
            self.size = size

        def read(self, index):
            return Image.new("L", (self.size, self.size))

    assert Drawn(3, 8).fingerprint() == Drawn(3, 8).fingerprint()
    assert len({source.fingerprint() for source in (Drawn(3, 8), Drawn(4, 8), Drawn(3, 16), DemoSource(count=3))}) == 4
    assert DemoSource().fingerprint() == DemoSource().fingerprint() != DemoSource(size=32).fingerprint()


@pytest.mark.skipif("GAN_TEST_DATA" not in os.environ, reason="wants real photographs: GAN_TEST_DATA")
def test_real_collections_are_read():
    photographs = open_source(os.path.join(os.environ["GAN_TEST_DATA"], PHOTOGRAPHS))
    assert (len(photographs), photographs.ignored, photographs.notes) == (1900, ["LICENSE"], [])
    labels = choose_labels(photographs, "folders")
    assert (len(labels.by_name), len(labels.class_names), labels.problems) == (1900, 10, [])
    assert labels.class_names[labels.by_name[photographs.names[-1]]] == "t-shirt"
    drawings = open_source(os.path.join(os.environ["GAN_TEST_DATA"], DRAWINGS))
    assert {drawings.header(index) for index in range(len(drawings))} == {Header("RGBA", 128, 128)}
    with pytest.raises(GanError, match="all images are in one folder"):
        choose_labels(drawings, "folders")
