import builtins
import bz2
import gzip
import io
import lzma
import os
import pickle
import struct
import sys
import tarfile
import time

import numpy as np
import pytest
from checks import in_child, refusal
from pictures import encoded, noise
from PIL import Image

from gan.data.label_files import choose_labels
from gan.data.sources import Header, open_source
from gan.data.sources.plain_pickle import load_plain
from gan.errors import GanError

CLASSES = ["airplane", "automobile", "bird"]


def refused(path, *said):
    text = refusal(open_source, str(path))
    assert text.startswith(f"--source {path}: ")
    for part in said:
        assert part in text
    return text


# CIFAR


def python2_pickle(images, labels):
    """A batch byte for byte as Python 2 wrote those of CIFAR: protocol 2, text and arrays as byte strings."""
    short = [b"K" + bytes([label]) for label in labels]
    names = [b"U\x05n.png" for _ in labels]
    return b"".join(
        [
            b"\x80\x02}q\x01(U\x0bbatch_labelq\x02U\x15training batch 1 of 5q\x03U\x06labelsq\x04]q\x05(",
            *short,
            b"eU\x04dataq\x06cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85U\x01b\x87Rq\t",
            b"(K\x01M" + struct.pack("<H", len(images)) + b"M\x00\x0c\x86cnumpy\ndtype\nq\nU\x02u1K\x00K\x01\x87Rq\x0b",
            b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T" + struct.pack("<i", images.size),
            images.tobytes() + b"tbU\tfilenamesq\x0c]q\r(",
            *names,
            b"eu.",
        ]
    )


def batch(number, count=4):
    images = noise(count, 3072, seed=number)
    return images, [(number + row) % 3 for row in range(count)]


def tar_of(path, members, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def cifar_members(write=python2_pickle):
    # The real archive is in no order either.
    members = {f"cifar-10-batches-py/data_batch_{number}": write(*batch(number)) for number in (4, 3, 2, 5, 1)}
    members["cifar-10-batches-py/readme.html"] = b"<html>"
    members["cifar-10-batches-py/test_batch"] = b"never looked at"
    members["cifar-10-batches-py/batches.meta"] = pickle.dumps({"label_names": CLASSES}, protocol=2)
    return members


@pytest.mark.parametrize(("name", "mode"), [("cifar-10-python.tar.gz", "w:gz"), ("no-name", "w"), ("x.zip", "w:xz")])
def test_cifar_is_read_batch_by_batch_whatever_it_is_called(tmp_path, name, mode):
    source = open_source(str(tar_of(tmp_path / name, cifar_members(), mode)))
    assert len(source) == 20
    assert source.names[:2] == ["data_batch_1-00000.png", "data_batch_1-00001.png"]
    assert source.names == sorted(source.names)
    assert source.ignored == ["cifar-10-batches-py/readme.html"]
    assert source.notes == ["cifar-10-batches-py/test_batch is left out: its images are for testing"]
    assert source.lost == []
    images, labels = batch(2)
    picture = source.read(5)
    assert (picture.mode, picture.size) == ("RGB", (32, 32))
    assert (np.asarray(picture) == images[1].reshape(3, 32, 32).transpose(1, 2, 0)).all()
    assert source.header(5) == Header("RGB", 32, 32)
    own = choose_labels(source, None)
    assert own.class_names == CLASSES
    assert [own.by_name[name] for name in source.names[4:8]] == labels
    assert own.problems == []


@pytest.mark.parametrize("protocol", range(6))
def test_cifar_packed_again_by_python_3_is_read_too(tmp_path, protocol):
    def write(images, labels):
        return pickle.dumps({"data": images, "labels": labels}, protocol=protocol)

    source = open_source(str(tar_of(tmp_path / "a.tar", cifar_members(write), "w")))
    assert (np.asarray(source.read(0)) == batch(1)[0][0].reshape(3, 32, 32).transpose(1, 2, 0)).all()


def test_cifar_100_has_fine_labels(tmp_path):
    images, labels = batch(1, 5)
    train = {"data": images, "fine_labels": labels, "coarse_labels": [9] * 5}
    members = {"cifar-100-python/meta": pickle.dumps({"fine_label_names": CLASSES, "coarse_label_names": ["x"]})}
    members["cifar-100-python/test"] = b""
    members["cifar-100-python/train"] = pickle.dumps(train)
    source = open_source(str(tar_of(tmp_path / "c.tar.gz", members)))
    assert [source.own_labels.by_name[name] for name in source.names] == labels
    assert source.own_labels.class_names == CLASSES
    assert source.notes == ["cifar-100-python/test is left out: its images are for testing"]
    assert source.lost == []


def test_a_missing_batch_is_said(tmp_path):
    members = cifar_members()
    del members["cifar-10-batches-py/data_batch_3"]
    source = open_source(str(tar_of(tmp_path / "c.tar.gz", members)))
    assert len(source) == 16
    assert source.lost == [("data_batch_3", "not in the archive; download it again for all images")]


class Runs:
    def __reduce__(self):
        return os.system, ("touch hacked",)


def laughs(end):
    """A tuple of itself twice, forty times over: small as a pickle, endless to write out or compare."""
    steps = b"".join(b"h" + bytes([n]) + b"h" + bytes([n]) + b"\x86q" + bytes([n + 1]) for n in range(40))
    return b"\x80\x02)q\x00" + steps + end


@pytest.mark.parametrize(
    ("hostile", "said"),
    [
        (pickle.dumps({"data": Runs(), "labels": []}, protocol=2), "system"),
        (b"cos\nsystem\n(S'touch hacked'\ntR.", "asks for os.system"),
        (b"\x80\x04\x8c\x08builtins\x8c\x04exec\x93\x8c\x01x\x85R.", "asks for builtins.exec"),
        (b"\x80\x02Nr\xff\xff\xff\x7f.", "does not hold images"),  # a memo of 2 billion places, 34 GB for Python's own
        (b"\x80\x02U\xff", "damaged"),
        (b"\x80\x02\x8d" + b"\xff" * 7 + b"\x00.", "damaged"),  # text of 72 million GB
        (b"\x80\x02ctorch\nload\n)R.", "asks for torch.load"),
        (b"(i__main__\nX\n.", "asks for __main__.X"),
        (b"\x80\x02}(U\x04data]U\x06labels]u.", "does not hold images"),
        (b"\x80\x02cnumpy\ndtype\n(U\x01OK\x00K\x01tR.", "does not hold images"),
        (b"", "damaged"),
        (b"\x80\x02.", "damaged"),
        (b"\x80\x02}.", "does not hold images"),
        (laughs(b"."), "does not hold images"),
        (laughs(b"}h\x28K\x01s."), "a key is neither text"),
        (laughs(b"h\x28\x93."), "damaged"),
        (laughs(b"cnumpy\ndtype\nh\x28R."), "does not hold images"),
    ],
)
def test_a_hostile_batch_runs_nothing_and_is_refused(tmp_path, monkeypatch, hostile, said):
    monkeypatch.chdir(tmp_path)
    members = {**cifar_members(), "cifar-10-batches-py/data_batch_3": hostile}
    text = refused(tar_of(tmp_path / "c.tar.gz", members), "data_batch_3", "is no batch of CIFAR")
    assert said in text
    assert not (tmp_path / "hacked").exists()


def test_labels_that_are_no_numbers_are_refused(tmp_path):
    images, _ = batch(1)
    for labels in ([0, 1, 2], [0, 1, 2, "cat"], [0, 1, 2, None], [[0]] * 4):
        members = {"data_batch_1": pickle.dumps({"data": images, "labels": labels})}
        refused(tar_of(tmp_path / "c.tar", members, "w"), "data_batch_1 is no batch of CIFAR")
    members = {"data_batch_1": pickle.dumps({"data": images, "labels": [0, 1, 2, 3]})}
    members["batches.meta"] = pickle.dumps({"label_names": CLASSES})
    labels = open_source(str(tar_of(tmp_path / "c.tar", members, "w"))).own_labels
    assert len(labels.by_name) == 3
    assert "class 3 is out of range: there are 3 class names" in labels.problems[0]


def test_plain_pickles_are_read_as_pickle_reads_them():
    value = {"a": [1, -2, 300, 70000, 2**40, True, None, 1.5, "é", b"\xff\x00"], "b": {"c": ()}, "d": (1, (2, 3), [[]])}
    for protocol in range(2, 6):
        assert load_plain(pickle.dumps(value, protocol=protocol)) == value
    shared = ["x"]
    first, second = load_plain(pickle.dumps([shared, shared]))
    assert first is second


def test_a_truncated_cifar_archive_says_so(tmp_path):
    whole = tar_of(tmp_path / "c.tar.gz", cifar_members()).read_bytes()
    for length in (30, len(whole) // 2, len(whole) - 20):
        (tmp_path / "c.tar.gz").write_bytes(whole[:length])
        refused(tmp_path / "c.tar.gz", "is cut short", "download it again")
    (tmp_path / "c.tar.gz").write_bytes(whole[:5000] + b"\xff" * 500 + whole[5500:])
    refused(tmp_path / "c.tar.gz", "is damaged")


def test_other_archives_are_to_be_unpacked_first(tmp_path):
    photo = encoded(Image.new("RGB", (8, 8)))
    many = {f"photos/{number}.png": photo for number in range(150)}
    refused(
        tar_of(tmp_path / "photos.tar.gz", many), "is a tar archive without the batches of CIFAR", "unpack it first"
    )
    refused(tar_of(tmp_path / "photos.tar", many, "w"), "unpack it first")
    (tmp_path / "notes.txt.gz").write_bytes(gzip.compress(b"hello"))
    refused(tmp_path / "notes.txt.gz", "is a compressed file", "unpack it first")
    for name, start, said in [
        ("a.7z", b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it first"),
        ("a.rar", b"Rar!\x1a\x07\x01\x00", "is a RAR archive"),
        ("cifar.tar.gz", b"<!DOCTYPE html>", "is a web page"),
        ("photos.zip", b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
    ]:
        (tmp_path / name).write_bytes(start + bytes(600))
        refused(tmp_path / name, said)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_an_archive_that_unpacks_to_far_too_much_is_left_after_a_while(tmp_path, monkeypatch, compress):
    monkeypatch.setattr("gan.data.sources.cifar.MAX_TAR", 3_000_000)
    header = tarfile.TarInfo("photos/a.png")
    header.size = 8_000_000
    (tmp_path / "bomb.tar.x").write_bytes(compress(header.tobuf() + bytes(8_000_000)))
    refused(tmp_path / "bomb.tar.x", "unpack it first")
    long_name = tarfile.TarInfo("././@LongLink")
    long_name.type, long_name.size = tarfile.GNUTYPE_LONGNAME, 7_000_000_000
    (tmp_path / "bomb.tar.x").write_bytes(compress(long_name.tobuf(tarfile.GNU_FORMAT) + b"a" * 8_000_000))
    refused(tmp_path / "bomb.tar.x", "unpack it first")


# MNIST


def idx(array, kind=8):
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, kind, array.ndim, *array.shape) + array.tobytes()


def digits(count=5, size=(28, 28)):
    return noise(count, *size)


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
        ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
        ("train-images.idx3-ubyte", "train-labels.idx1-ubyte.gz"),
        ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte"),
    ],
)
def test_mnist_is_read_with_the_labels_beside_it(tmp_path, images, labels):
    for name, array in ((images, digits()), (labels, np.array([3, 0, 9, 1, 1], dtype=np.uint8))):
        data = idx(array)
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    source = open_source(str(tmp_path / images))
    assert source.names == ["00000.png", "00001.png", "00002.png", "00003.png", "00004.png"]
    assert source.header(0) == Header("L", 32, 32)
    picture = np.asarray(source.read(4))
    assert (picture[2:-2, 2:-2] == digits()[4]).all()
    assert picture.shape == (32, 32)
    assert picture.sum() == digits()[4].sum()
    own = choose_labels(source, None)
    assert [own.by_name[name] for name in source.names] == [3, 0, 9, 1, 1]
    assert own.origin == labels


def test_other_sizes_keep_their_size_and_may_lack_labels(tmp_path):
    (tmp_path / "anything").write_bytes(idx(digits(2, (16, 24))))
    source = open_source(str(tmp_path / "anything"))
    assert source.read(1).size == (24, 16)
    assert source.own_labels is None


def test_labels_of_another_file_are_refused_but_can_be_left_out(tmp_path):
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(digits()))
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(idx(np.zeros(6, dtype=np.uint8)))
    source = open_source(str(tmp_path / "train-images-idx3-ubyte"))
    with pytest.raises(GanError, match="train-labels-idx1-ubyte: are 6 for 5 images"):
        choose_labels(source, None)
    assert choose_labels(source, "none") is None


def test_a_wrong_idx_file_says_what_is_wrong(tmp_path):
    path, good = tmp_path / "train-images-idx3-ubyte", idx(digits())
    for content, said in [
        (good[:-1], "says that it holds 3,920 bytes, but has only 3,919"),
        (good + b"x", "but has more"),
        (good[:9], "is damaged"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 60000, 2**31, 2**31), "its start is damaged"),
        (struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 0, 0), "its start is damaged"),
        (idx(np.zeros(7, dtype=np.uint8)), "holds labels, not images"),
        (idx(np.zeros((2, 28, 28), dtype=">f4"), 13), "of type 0x0d"),
        (idx(digits(0)), "holds no images"),
    ]:
        path.write_bytes(content)
        refused(path, said)
    packed = gzip.compress(good)
    path.write_bytes(packed[: len(packed) // 2])
    refused(path, "is cut short")
    path.write_bytes(packed[:2000] + bytes(100) + packed[2100:])
    refused(path, "damaged")


# LSUN


@pytest.fixture
def bedrooms(tmp_path):
    """A database like LSUN's: what is under a key is a whole WebP file."""
    lmdb = pytest.importorskip("lmdb")
    folder = tmp_path / "bedrooms"
    with lmdb.open(str(folder), map_size=2**24) as database, database.begin(write=True) as transaction:
        for number, key in enumerate([b"00ff", b"\xff\x00", b"0x12", b"b/c", b"\xc3\xa9"]):
            file = io.BytesIO()
            Image.new("RGB", (20 + number, 10)).save(file, "WEBP")
            transaction.put(key, file.getvalue())
        transaction.put(b"length", b"5")
    return folder


def test_lsun_is_read_in_the_order_of_its_keys(bedrooms):
    for path in (bedrooms, bedrooms / "data.mdb"):
        source = open_source(str(path))
        assert source.names == ["00ff", "0x30783132", "b/c", "length", "é", "0xff00"]
        assert [source.read(index).width for index in (0, 1, 2, 4, 5)] == [20, 22, 23, 24, 21]
        assert source.header(1) == Header("RGB", 22, 10)
        with pytest.raises(OSError, match="cannot identify"):
            source.read(3)


def test_a_folder_that_holds_a_database_further_down_is_told(bedrooms):
    text = refused(bedrooms.parent, f"name {bedrooms}")
    (bedrooms / "data.mdb").write_bytes(b"something else")
    refused(bedrooms, "its data.mdb is no LMDB database")
    assert "holds no images" in text


def test_a_truncated_database_is_told_before_it_ends_the_process(bedrooms):
    whole = (bedrooms / "data.mdb").read_bytes()
    for length in (100, 4096, 8192, len(whole) - 1):
        (bedrooms / "data.mdb").write_bytes(whole[:length])
        refused(bedrooms, "is a truncated LMDB database", "copy or download it again")
    (bedrooms / "data.mdb").write_bytes(whole[:40] + b"\x03" + whole[41:])
    refused(bedrooms, "damaged LMDB")


def test_without_the_package_it_says_how_to_install_it(bedrooms, monkeypatch):
    monkeypatch.delitem(sys.modules, "lmdb")
    real = builtins.__import__

    def without_lmdb(name, *args):
        if name == "lmdb":
            raise ImportError("No module named 'lmdb'")
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_lmdb)
    refused(bedrooms, "pip install lmdb")


# All of them


@pytest.fixture(params=["cifar", "mnist", "lsun"])
def archive(request, tmp_path):
    if request.param == "lsun":
        return request.getfixturevalue("bedrooms") / "data.mdb"
    if request.param == "cifar":
        return tar_of(tmp_path / "c.tar.gz", cifar_members())
    (tmp_path / "m").write_bytes(idx(digits()))
    return tmp_path / "m"


def test_every_kind_works_in_other_processes(archive):
    source = open_source(str(archive))
    wanted = np.asarray(source.read(1)).tolist()
    assert in_child(lambda: np.asarray(source.read(1)).tolist()) == wanted
    sent = pickle.dumps(source)
    assert in_child(lambda: np.asarray(pickle.loads(sent).read(1)).tolist()) == wanted
    assert np.asarray(source.read(1)).tolist() == wanted


def test_the_fingerprint_changes_with_the_file(archive):
    first = open_source(str(archive)).fingerprint()
    assert open_source(str(archive)).fingerprint() == first
    os.utime(archive, ns=(0, time.time_ns() + 10**9))
    assert open_source(str(archive)).fingerprint() != first
