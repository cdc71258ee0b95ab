"""Decoded images in a file beside the dataset, or in the folder of --cache-dir.

It is a header (`MAGIC`, then JSON with format, fingerprint and shape, filled up with blanks) and the pixels, uint8
`[images, C, H, W]`, not flipped. It is made under a temporary name, and renamed when every image is in it. If several
processes have made it (`shared_store`), a checksum of each image follows, which nobody reads any more.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gan.data.store import Store
from gan.files import publish, temporary_beside

MAGIC = b"GANCACHE"
HEADER_BYTES = 4096  # a page, so that the pixels of a mapped file are aligned
CHECKSUM_BYTES = 4  # of each image
_FORMAT = 1  # to be raised when decoding an image gives other pixels than before
_DAY = 86400


@dataclass(frozen=True)
class Content:
    """What a cache holds: images of a dataset, in their order, not flipped."""

    dataset: Path
    fingerprint: str
    """hex digest of the dataset; for a part of it `-` and a digest of the choice"""
    shape: tuple[int, int, int, int]
    """(images, C, H, W)"""

    @property
    def num_bytes(self) -> int:
        """Of the pixels."""
        return math.prod(self.shape)

    @property
    def checksums_at(self) -> int:
        """Where in a file they begin, if it has any: aligned, so that one is never read while half of it is written."""
        return HEADER_BYTES + -(-self.num_bytes // CHECKSUM_BYTES) * CHECKSUM_BYTES

    def file_in(self, folder: Path) -> Path:
        """`FOLDER/metfaces.zip.3fa91c22.cache`."""
        digits = "-".join(part[:8] for part in self.fingerprint.split("-"))
        return folder / f"{self.dataset.name}.{digits}.cache"


class FoundStore(Store):
    """A cache file that is complete: read, not mapped, because a disk that fails kills a process that maps it.

    Args:
        path: the file.
        image_shape: (C, H, W).
        rows: where in it each image is; by default in order.
    """

    complete = True

    def __init__(self, path: Path, image_shape: tuple[int, ...], rows: np.ndarray | None = None) -> None:
        self.path, self._rows = path, rows
        self._pixels = _Pixels(path, image_shape)

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        self._pixels.take(rows if self._rows is None else self._rows[rows], out)


class FileStore(Store):
    """A cache file in the making. Raises OSError if it cannot be made."""

    complete = False

    def __init__(self, content: Content, path: Path) -> None:
        self.path, self._content = path, content
        remove_leftovers(path)
        self._temporary = temporary_beside(path)
        # Also at the exit of the interpreter. Killed processes leave it behind: see remove_leftovers.
        self._remove = weakref.finalize(self, _remove_own, self._temporary, os.getpid())
        try:
            self._file = open(self._temporary, "r+b", buffering=0)  # noqa: SIM115
            self._write(header(content))
            self._file.truncate(HEADER_BYTES + content.num_bytes)
            self._pixels = _Pixels(self._temporary, content.shape[1:])
        except OSError:
            self.close()
            raise

    def put(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Written, not mapped: a full disk is an error here, and would kill the process there."""
        size = self._content.num_bytes // self._content.shape[0]
        for row, image in zip(rows, images, strict=True):
            self._file.seek(HEADER_BYTES + int(row) * size)
            self._write(np.ascontiguousarray(image).data.cast("B"))

    def _write(self, data: memoryview | bytes) -> None:
        data = memoryview(data)
        while data:
            data = data[self._file.write(data) :]

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        self._pixels.take(rows, out)

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def publish(self) -> None:
        self._pixels.close()  # Windows renames no file that is open
        self._file.close()
        # If another run has made it, it may be reading it: replacing it would take it away on NFS, and fail on Windows.
        if problem_with(self.path, self._content) is not None:
            publish(self._temporary, self.path)
        self._pixels = _Pixels(self.path, self._content.shape[1:])
        self.complete = True
        self._remove()
        remove_stale(self._content, self.path)

    def close(self) -> None:
        if not self.complete:
            with contextlib.suppress(OSError, AttributeError):
                self._file.close()
                self._pixels.close()
            self._remove()


class _Pixels:
    """The images in a cache file of shape `[images, *image_shape]`, read by any thread."""

    def __init__(self, path: Path, image_shape: tuple[int, ...]) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._size, self._lock = math.prod(image_shape), threading.Lock()

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        with self._lock:
            for row, image in zip(rows.tolist(), out, strict=True):
                self._file.seek(HEADER_BYTES + row * self._size)
                rest = image.data.cast("B")
                while rest:
                    count = self._file.readinto(rest)
                    if not count:
                        raise OSError(errno.EIO, "the file has been cut off")
                    rest = rest[count:]

    def close(self) -> None:
        self._file.close()


def stored_shape(dataset: Path, fingerprint: str, num_images: int, folder: Path) -> tuple[int, int, int] | None:
    """(C, H, W) as a complete cache of the whole dataset says; None without one."""
    path = Content(Path(os.path.abspath(dataset)), fingerprint, (num_images, 0, 0, 0)).file_in(folder)
    try:
        with open(path, "rb") as file:
            shape = _read_header(file.read(HEADER_BYTES))[1]
    except (OSError, ValueError):
        return None
    content = Content(dataset, fingerprint, (num_images, *shape[1:]))
    return shape[1:] if problem_with(path, content) is None else None


def problem_with(path: Path, content: Content) -> str | None:
    """Why the file is not a complete cache of this content; None if it is. An empty text: it is not there."""
    try:
        with open(path, "rb") as file:
            fingerprint, shape, checksums = _read_header(file.read(HEADER_BYTES))
            size = os.fstat(file.fileno()).st_size
    except FileNotFoundError:
        return ""
    except OSError as error:
        return error.strerror or str(error)
    except ValueError as error:
        return str(error)
    if (fingerprint, shape) != (content.fingerprint, content.shape):
        return "it holds other images"
    expected = file_size(content, checksums)
    if size != expected:
        return f"it has {size} bytes instead of {expected}"
    return None


def file_size(content: Content, checksums: bool) -> int:
    """Bytes of a cache file."""
    if checksums:
        return content.checksums_at + CHECKSUM_BYTES * content.shape[0]
    return HEADER_BYTES + content.num_bytes


def header(content: Content, checksums: bool = False) -> bytes:
    """The first `HEADER_BYTES` of a cache; whether checksums follow the pixels."""
    fields = {"format": _FORMAT, "fingerprint": content.fingerprint, "shape": content.shape, "of": _place(content)}
    if checksums:
        fields["checksums"] = True
    return (MAGIC + json.dumps(fields).encode()).ljust(HEADER_BYTES)


def _read_header(data: bytes) -> tuple[str, tuple[int, int, int, int], bool]:
    """Fingerprint, shape, and whether checksums follow the pixels. Raises ValueError."""
    if not data.startswith(MAGIC):
        raise ValueError("it is no cache")
    try:
        fields = json.loads(data[len(MAGIC) :])
        kind, fingerprint, (n, c, h, w) = fields["format"], fields["fingerprint"], map(int, fields["shape"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError("its header is damaged") from error
    if kind != _FORMAT:
        raise ValueError("it was made by another version")
    return fingerprint, (n, c, h, w), bool(fields.get("checksums"))


def _place(content: Content) -> str:
    """Digest of where the dataset is, to tell apart datasets of one name that share a --cache-dir."""
    return hashlib.sha256(os.path.abspath(content.dataset).encode(errors="surrogateescape")).hexdigest()[:16]


def _cache_name(content: Content) -> str:
    """A pattern of the names that caches of this dataset have or had; group 1 is the dataset's fingerprint."""
    return re.escape(content.dataset.name) + r"\.([0-9a-f]{8})(?:-[0-9a-f]{8})?\.cache"


def remove_stale(content: Content, path: Path) -> None:
    """Remove the caches of what this dataset was before it changed."""
    for other in _listed(path.parent):
        match = re.fullmatch(_cache_name(content), other.name)
        if match is None or content.fingerprint.startswith(match[1]):
            continue
        with contextlib.suppress(OSError, ValueError, KeyError):
            with open(other, "rb") as file:
                header = file.read(HEADER_BYTES)
            beside = path.parent == content.dataset.parent
            if header.startswith(MAGIC) and (beside or json.loads(header[len(MAGIC) :])["of"] == _place(content)):
                other.unlink()


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes left of this cache, when it is too old to be in the making."""
    for other in _listed(path.parent):
        if re.fullmatch(rf"\.{re.escape(path.name)}\..*\.tmp", other.name):
            with contextlib.suppress(OSError):
                if time.time() - other.stat().st_mtime > _DAY:
                    other.unlink()


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError:
        return []


def _remove_own(path: Path, pid: int) -> None:
    """A worker process that was forked off must not remove the file of its parent."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
