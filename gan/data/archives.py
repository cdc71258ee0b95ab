"""Sources that are one file of many images: LSUN's databases, CIFAR's archives of batches, MNIST's arrays.

What a file is, its content tells. Nothing in an archive is executed, and headers are not believed.
"""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import itertools
import lzma
import math
import os
import posixpath
import re
import struct
import tarfile
import zlib
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from gan.data.label_files import Labels, are_class_names, labels_in_order, shown
from gan.data.plain_pickle import load_plain
from gan.data.sources import Header, Source, digest, is_hidden, open_image
from gan.errors import GanError

RECOGNISED = 512  # bytes at the start of a file that tell what it is: the first block of a tar
LMDB_FILE = "data.mdb"
MAX_IDX = 2**30  # bytes; the largest of the kind, EMNIST, has 640 MB
MAX_TAR = 400_000_000  # bytes unpacked; CIFAR has 180 MB
MAX_MEMBERS = 100  # of a tar that are looked at
CIFAR10_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]

_TRAINING = re.compile(r"data_batch_[0-9]+|train")
_CLASS_NAMES = {"batches.meta": "label_names", "meta": "fine_label_names"}
_IDX_TYPES = (b"\x08", b"\x09", b"\x0b", b"\x0c", b"\x0d", b"\x0e")
_LMDB_META = 152  # bytes of a page's and a meta page's header

_COMPRESSED: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}
_OTHERS = {
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with: git lfs pull",
    b"<": "a web page; the download went wrong",
}
_UNPACK = "unpack it first and name the folder"


def open_archive(name: str, start: bytes) -> Source | None:
    """The source in a file that begins with `start` (RECOGNISED bytes); None if it may be something else, as a zip.

    Raises GanError for archives that nothing here reads, and damaged ones.
    """
    if is_lmdb(start):
        return LmdbSource(name, Path(name))
    packing = next((magic for magic in _COMPRESSED if start.startswith(magic)), None)
    if packing is not None:
        try:
            with _unpacked(name) as file:
                start = file.read(RECOGNISED)
        except (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError) as error:
            raise _damaged(name, error) from error
    if _is_idx(start):
        return IdxSource(name)
    if _is_tar(start):
        return CifarSource(name)
    if packing is not None:
        raise GanError(f"--source {name}: is a compressed file, but none of CIFAR or MNIST; {_UNPACK}")
    other = next((text for magic, text in _OTHERS.items() if start.lstrip().startswith(magic)), None)
    if other is not None:
        raise GanError(f"--source {name}: is {other}" + ("" if ";" in other else f"; {_UNPACK}"))
    return None


def is_lmdb(start: bytes) -> bool:
    """Whether a file that begins like this is an LMDB database."""
    return start[16:20] == b"\xde\xc0\xef\xbe"


class LmdbSource(Source):
    """The images in an LMDB database, such as LSUN's, by sorted key. `file` is its data.mdb.

    The database is opened for each image, which costs 0.1 ms: what is open does not survive a fork.
    """

    def __init__(self, name: str, file: Path) -> None:
        self._file = str(file)
        try:
            import lmdb
        except ImportError:
            raise GanError(f"--source {name}: is an LMDB database; to read it: pip install lmdb") from None
        missing = _missing_from_lmdb(file)
        if missing:
            raise GanError(f"--source {name}: {missing}")
        try:
            with self._open() as database, database.begin() as transaction:
                names = [_key_name(key) for key in transaction.cursor().iternext(values=False)]
        except lmdb.Error as error:
            raise _damaged(name, error) from error
        super().__init__(name, names)

    def read(self, index: int) -> Image.Image:
        with self._open() as database, database.begin() as transaction:
            data = transaction.get(_key(self.names[index]))
        if data is None:
            raise GanError("gone: the database has been replaced")
        return open_image(io.BytesIO(data))

    def fingerprint(self) -> str:
        return digest("lmdb", *_version(self._file))

    def _open(self) -> Any:
        import lmdb

        return lmdb.open(self._file, subdir=False, readonly=True, lock=False, readahead=False, create=False)


class ArraySource(Source):
    """Images that are held in memory. A process that is sent the source reads them again."""

    def __init__(self, name: str, names: list[str], images: Sequence[np.ndarray]) -> None:
        super().__init__(name, names)
        self._images: Sequence[np.ndarray] | None = images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}

    @abstractmethod
    def _load(self) -> Sequence[np.ndarray]:
        """The images, uint8 [H, W] or [H, W, 3]."""

    def _image(self, index: int) -> np.ndarray:
        if self._images is None:
            self._images = self._load()
        return self._images[index]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self._image(index)))

    def fingerprint(self) -> str:
        return digest(type(self).__name__, *_version(self.name))


class CifarSource(ArraySource):
    """The training images of CIFAR-10 (or CIFAR-100, with its fine labels), batch by batch: RGB, 32x32."""

    def __init__(self, name: str) -> None:
        found = _read_cifar(name)
        names = [f"{batch}-{row:05d}.png" for batch, part in found.batches.items() for row in range(len(part))]
        super().__init__(name, names, found.images())
        self._labels, self._class_names = found.labels, found.class_names
        self.ignored, self.notes = found.ignored, found.notes

    def header(self, index: int) -> Header:
        return Header("RGB", 32, 32)

    def _load(self) -> Sequence[np.ndarray]:
        return _read_cifar(self.name).images()

    def _read_labels(self) -> Labels:
        return labels_in_order(self.names, self._labels, self._class_names, "its batches", f"--source {self.name}")


class IdxSource(ArraySource):
    """A file of images as MNIST's: grey, all of one size. Those of 28x28 get a black border, to 32x32."""

    def __init__(self, name: str) -> None:
        images = _read_idx(name, f"--source {name}", 3)
        digits = max(5, len(str(len(images) - 1)))
        super().__init__(name, [f"{index:0{digits}d}.png" for index in range(len(images))], list(images))

    def _load(self) -> Sequence[np.ndarray]:
        return list(_read_idx(self.name, f"--source {self.name}", 3))

    def _image(self, index: int) -> np.ndarray:
        image = super()._image(index)
        return np.pad(image, 2) if image.shape == (28, 28) else image

    def fingerprint(self) -> str:
        labels = _idx_labels(self.name)
        return digest(super().fingerprint(), *(_version(labels) if labels else ()))

    def _read_labels(self) -> Labels | None:
        path = _idx_labels(self.name)
        if path is None:
            return None
        where = f"--source {self.name}: its labels, {shown(os.path.basename(path))}"
        labels = _read_idx(path, where, 1)
        if len(labels) != len(self.names):
            raise GanError(
                f"{where}: are {len(labels):,} for {len(self.names):,} images; get the file that belongs to it"
            )
        return labels_in_order(self.names, labels.tolist(), None, os.path.basename(path), where)


@dataclass
class _Cifar:
    """What was found in a CIFAR archive: batch -> uint8 [N, 32, 32, 3], and a label for each image in their order."""

    batches: dict[str, np.ndarray] = field(default_factory=dict)
    labels: list[Any] = field(default_factory=list)
    class_names: list[str] | None = None
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def images(self) -> list[np.ndarray]:
        return [image for batch in self.batches.values() for image in batch]


def _read_cifar(name: str) -> _Cifar:
    """Raises GanError if the tar holds no training batches, or one of them is damaged."""
    found = _Cifar()
    test: list[str] = []
    labels: dict[str, list[Any]] = {}
    batches: dict[str, np.ndarray] = {}
    for member, data in _tar_members(name):
        base = posixpath.basename(member)
        try:
            if _TRAINING.fullmatch(base):
                batches[base], labels[base] = _read_batch(load_plain(data))
            elif base in _CLASS_NAMES:
                found.class_names = _read_class_names(load_plain(data), _CLASS_NAMES[base])
            else:
                (test if base in ("test_batch", "test") else found.ignored).append(member)
        except ValueError as error:
            raise GanError(
                f"--source {name}: {shown(member)} is no batch of CIFAR ({error}); download it again"
            ) from None
    if not batches:
        raise GanError(f"--source {name}: is a tar archive without the batches of CIFAR; {_UNPACK}")
    for batch in sorted(batches, key=lambda batch: (len(batch), batch)):
        found.batches[batch] = batches[batch]
        found.labels += labels[batch]
    if test:
        found.notes.append(f"{shown(test[0])} is left out: its images are for testing")
    lacking = [batch for batch in CIFAR10_BATCHES if batch not in batches]
    if lacking and "train" not in batches:
        found.notes.append(f"incomplete: {', '.join(lacking)} is not in the archive; download it again for all images")
    return found


def _read_batch(batch: Any) -> tuple[np.ndarray, list[Any]]:
    """Images uint8 [N, 32, 32, 3] and labels of a batch. Raises ValueError if it is none."""
    values = batch if isinstance(batch, dict) else {}
    images = getattr(values.get("data"), "filled", None)
    labels = values.get("labels", values.get("fine_labels"))
    if images is None or images.ndim != 2 or images.shape[1] != 3 * 32 * 32 or not isinstance(labels, list):
        raise ValueError("it does not hold images of 32x32 with labels")
    if any(type(label) is not int for label in labels):
        raise ValueError("its labels are not whole numbers")
    if len(labels) != len(images):
        raise ValueError(f"it holds {len(labels):,} labels for {len(images):,} images")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _read_class_names(meta: Any, key: str) -> list[str]:
    names = meta.get(key) if isinstance(meta, dict) else None
    if not isinstance(names, list) or not are_class_names(names):
        raise ValueError("it does not hold the names of the classes")
    return names


def _tar_members(name: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in a tar, as far as CIFAR's could reach; only CIFAR's own are read.

    Raises GanError where the tar is damaged.
    """
    try:
        with _unpacked(name) as file:
            limited: Any = _Limited(file)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in itertools.islice(archive, MAX_MEMBERS):
                    base = posixpath.basename(member.name)
                    if not member.isreg() or is_hidden(member.name):
                        continue
                    content = archive.extractfile(member) if _TRAINING.fullmatch(base) or base in _CLASS_NAMES else None
                    yield member.name, content.read() if content else b""
    except (GanError, MemoryError):
        raise
    except _TooLong:
        return
    except Exception as error:  # damaged archives raise almost anything
        raise _damaged(name, error) from error


class _TooLong(Exception):
    pass


class _Limited:
    """A file of which no more than MAX_TAR bytes are read, whatever it unpacks to."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = MAX_TAR

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _TooLong
        return data


def _is_tar(start: bytes) -> bool:
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


def _is_idx(start: bytes) -> bool:
    return start[:2] == b"\0\0" and start[2:3] in _IDX_TYPES and start[3:4] in (b"\1", b"\2", b"\3", b"\4")


def _read_idx(path: str, where: str, dims: int) -> np.ndarray:
    """The uint8 array of `dims` dimensions in an IDX file. Raises GanError, beginning with `where`, for another."""
    try:
        with _unpacked(path) as file:
            start = file.read(4)
            if start != bytes([0, 0, 8, dims]):
                raise GanError(f"{where}: {_describe_idx(start)}; name a file such as train-images-idx3-ubyte.gz")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size = math.prod(shape)
            if size > MAX_IDX or (0 in shape[1:]):
                raise GanError(f"{where}: says that it holds {' x '.join(map(str, shape))} bytes; its start is damaged")
            data = file.read(size + 1)
    except (EOFError, OSError, struct.error, zlib.error, lzma.LZMAError) as error:
        raise GanError(f"{where}: {_reason(error)}; copy or download it again") from error
    if len(data) != size:
        found = "more" if len(data) > size else f"only {len(data):,}"
        raise GanError(f"{where}: says that it holds {size:,} bytes, but has {found}; copy or download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _describe_idx(start: bytes) -> str:
    if not _is_idx(start):
        return "is no array as MNIST's are"
    if start[2:] == b"\x08\x01":
        return "holds labels, not images"
    return f"holds an array of {start[3]} dimensions of type {start[2]:#04x}, not grey images of 8 bits"


def _idx_labels(path: str) -> str | None:
    """The file of labels that lies beside a file of images, packed or not."""
    folder, base = os.path.split(path)
    for images, labels in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1"), ("images", "labels")):
        if images in base:
            name = os.path.join(folder, base.replace(images, labels))
            for candidate in (name, name.removesuffix(".gz"), f"{name}.gz"):
                if os.path.isfile(candidate):
                    return candidate
    return None


def _missing_from_lmdb(file: Path) -> str | None:
    """Whether a database is shorter than it says, which ends the process when it is read: LMDB maps it into memory."""
    length = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(_LMDB_META)
        page_size = int.from_bytes(start[40:44], "little")
        if page_size.bit_count() != 1 or not 256 <= page_size <= 65536:
            return "is a damaged LMDB database; copy or download it again"
        opened.seek(page_size)
        metas = [meta for meta in (start, opened.read(_LMDB_META)) if len(meta) == _LMDB_META and is_lmdb(meta)]
    # The last page in use and the number of the transaction; the later one of two counts.
    _, last_page = max((struct.unpack_from("<QQ", meta, 136)[::-1] for meta in metas), default=(0, 2**63))
    if (last_page + 1) * page_size <= length:
        return None
    return (
        f"is a truncated LMDB database: it has {length / 1e6:,.1f} MB of {(last_page + 1) * page_size / 1e6:,.1f}; "
        "copy or download it again (or, if it is whole, make a compact copy: mdb_copy -c)"
    )


def _key_name(key: bytes) -> str:
    """A key as the name of an image: its text, or 0x and its hexadecimal digits."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text and not text.startswith("0x") else f"0x{key.hex()}"


def _key(name: str) -> bytes:
    return bytes.fromhex(name[2:]) if name.startswith("0x") else name.encode()


@contextlib.contextmanager
def _unpacked(path: str) -> Iterator[IO[bytes]]:
    """A file, decompressed while it is read if it is compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
        opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), open)
    with opener(path, "rb") as file:
        yield file


def _version(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


def _damaged(name: str, error: Exception) -> GanError:
    return GanError(f"--source {name}: {_reason(error)}; copy or download it again")


def _reason(error: Exception) -> str:
    if isinstance(error, EOFError) or "unexpected end" in str(error):
        return "is cut short"
    return f"is damaged ({shown(str(error))[:120] or type(error).__name__})"
