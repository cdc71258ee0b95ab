"""A cache that the processes of one machine fill together, so that each image is decoded by one of them.

A file under a temporary name, in the layout of `cache_file` but for its first bytes (`_MAKING`), which it exchanges for
those of a cache when every image is in it. Behind the pixels stands a checksum for each image, uint32, written after
it: 0 says that the image is not there. So what a process that was killed has half written does not count, and what
another one reads is what was decoded. Nobody is waited for: any process may come, go or die at any moment.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import socket
import time
import weakref
import zlib
from pathlib import Path

import numpy as np

from gan.data.cache_file import (
    CHECKSUM_BYTES,
    HEADER_BYTES,
    MAGIC,
    Content,
    file_size,
    header,
    problem_with,
    remove_leftovers,
    remove_stale,
)
from gan.data.store import Store
from gan.files import publish, temporary_beside
from torch_utils.distributed import Place

try:
    import fcntl
except ImportError:  # Windows, where no file that is open can be renamed either
    fcntl = None  # type: ignore[assignment]

_MAKING = b"GANMAKES"  # in place of MAGIC: nobody takes it for a cache, whatever its name
_JOINED_AT = 2048  # where in the header a byte for each process says that it has opened the file
_CHUNK = 4096  # checksums that are read at a time


def can_share() -> bool:
    """Whether processes can fill a file together here."""
    return fcntl is not None and hasattr(os, "preadv")


class SharedStore(Store):
    """A cache file in the making, or memory, of all processes of this machine. Raises OSError if it cannot be had.

    Args:
        content: what it is to hold.
        path: of the cache, which appears when every image is there.
        place: this process.
        in_memory: the path is in a file system that is memory, and the file ends with its processes: it never appears,
            and when all of this machine have opened it its temporary name goes, so that no death leaves it behind.
            Another run has one of its own, as its processes would be taken for those of this one.
    """

    complete = False

    def __init__(self, content: Content, path: Path, place: Place, in_memory: bool = False) -> None:
        self.path, self.in_memory, self.kept, self._content = path, in_memory, False, content
        self._size = content.num_bytes // content.shape[0]
        self._first_missing = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        run = f"{place.address}:{place.port}" if in_memory else ""
        self._temporary = path.with_name(f".{path.name}.{_digits(run)}.tmp")
        making = _MAKING + header(content, checksums=True)[len(MAGIC) : _JOINED_AT]
        self._handle = _opened(self._temporary, making)
        self._leave = weakref.finalize(self, _leave, self._handle, self._temporary, os.getpid())  # also at exit
        try:
            os.truncate(self._handle, file_size(content, checksums=True))  # several may do so: it is the same
            if in_memory:
                self._write(b"\1", _JOINED_AT + place.local_rank)
                if all(self._read(_JOINED_AT, place.local_size)):
                    _remove(self._handle, self._temporary)
        except OSError:
            self._leave()
            raise

    def put(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Those that are there already, which another process was quicker to decode, are left as they are."""
        there = self.has(rows)
        for row, image in zip(rows[~there].tolist(), images[~there], strict=True):
            pixels = np.ascontiguousarray(image).data.cast("B")
            self._write(pixels, HEADER_BYTES + row * self._size)
            self._write(_checksum(pixels).to_bytes(CHECKSUM_BYTES, "little"), self._checksum_at(row))

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        for row, image in zip(rows.tolist(), out, strict=True):
            pixels = image.data.cast("B")
            self._read_into(pixels, HEADER_BYTES + row * self._size)
            if not self.complete and _checksum(pixels) != self._checksums(row, 1)[0]:
                raise OSError(errno.EIO, "an image in it is not what was written")

    def has(self, rows: np.ndarray) -> np.ndarray:
        """Which of them are there, bool `[rows]`. Raises OSError."""
        return np.array([self._checksums(row, 1)[0] != 0 for row in rows.tolist()], dtype=bool)

    def is_full(self) -> bool:
        """Whether every image is there. Raises OSError."""
        count = self._content.shape[0]
        while self._first_missing < count:
            part = self._checksums(self._first_missing, min(_CHUNK, count - self._first_missing))
            if not part.all():
                self._first_missing += int(part.argmin())
                return False
            self._first_missing += len(part)
        return True

    def flush(self) -> None:
        if not self.in_memory:
            os.fsync(self._handle)

    def publish(self) -> None:
        """By whoever comes first; the others find it done. All go on reading the file that they have open."""
        if self.in_memory:
            _remove(self._handle, self._temporary)
        else:
            self._write(header(self._content, checksums=True), 0)
            os.fsync(self._handle)
            self._rename()
            self.kept = os.fstat(self._handle).st_nlink > 0
            remove_stale(self._content, self.path)
        self.complete = True
        fcntl.flock(self._handle, fcntl.LOCK_UN)

    def close(self) -> None:
        """The last one to leave what is not complete removes it."""
        if not self.complete:
            self._leave()

    def _rename(self) -> None:
        """By way of a name of our own: the temporary one may by now be that of another file, which others make."""
        if problem_with(self.path, self._content) is None:
            # Another machine or run has made it; on NFS, replacing it would take it from whoever reads it there.
            _remove(self._handle, self._temporary)
            return
        own = temporary_beside(self.path)
        try:
            os.replace(self._temporary, own)
            if _is_at(self._handle, own):
                publish(own, self.path)
            else:
                os.replace(own, self._temporary)
        except FileNotFoundError:  # another process was quicker
            pass
        finally:
            own.unlink(missing_ok=True)

    def _checksum_at(self, row: int) -> int:
        return self._content.checksums_at + CHECKSUM_BYTES * row

    def _checksums(self, row: int, count: int) -> np.ndarray:
        """Of images from this one on, uint32 `[count]`; 0: not there."""
        return np.frombuffer(self._read(self._checksum_at(row), CHECKSUM_BYTES * count), dtype="<u4")

    def _read(self, offset: int, count: int) -> bytearray:
        data = bytearray(count)
        self._read_into(memoryview(data), offset)
        return data

    def _read_into(self, out: memoryview, offset: int) -> None:
        while out:
            count = os.preadv(self._handle, [out], offset)
            if not count:
                raise OSError(errno.EIO, "the file has been cut off")
            out, offset = out[count:], offset + count

    def _write(self, data: memoryview | bytes, offset: int) -> None:
        """Written, not mapped: a full disk is an error here, and would kill the process there."""
        data = memoryview(data)
        while data:
            count = os.pwrite(self._handle, data, offset)
            data, offset = data[count:], offset + count


def _checksum(pixels: memoryview) -> int:
    """32 bits, never 0."""
    return zlib.crc32(pixels) or 1


def _opened(path: Path, making: bytes) -> int:
    """A descriptor of the file, made if need be, with a share in its lock, which says that somebody needs it."""
    for _ in range(100):
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_at(handle, path):  # nobody has it: it cannot become a cache while this is written
                    _begin(handle, making)
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            if _is_at(handle, path) and _has_begun(handle, making):
                return handle
        except BlockingIOError:  # somebody is just about to begin or to remove it
            pass
        except BaseException:
            if not _size(handle):  # where there are no locks, or no room
                _remove(handle, path)
            os.close(handle)
            raise
        os.close(handle)
        time.sleep(0.01)
    raise OSError(errno.EBUSY, f"{path} is locked")


def _begin(handle: int, making: bytes) -> None:
    """Write the header, also of what killed processes have left: that they had opened it does not count."""
    _has_begun(handle, making)
    whole = making.ljust(HEADER_BYTES, b"\0")
    if os.pwrite(handle, whole, 0) < len(whole):
        os.truncate(handle, 0)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _has_begun(handle: int, making: bytes) -> bool:
    """Whether the header is there. Raises OSError if it is that of something else."""
    there = os.pread(handle, len(making), 0)
    if there and (there[len(MAGIC) :] != making[len(MAGIC) :] or there[: len(MAGIC)] not in (_MAKING, MAGIC)):
        raise OSError(errno.EEXIST, "its temporary name is that of something else")
    return bool(there)


def _size(handle: int) -> int | None:
    """Bytes of the file; None: it does not say."""
    with contextlib.suppress(OSError):
        return os.fstat(handle).st_size
    return None


def _is_at(handle: int, path: Path) -> bool:
    """Whether that is still the name of this file."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _remove(handle: int, path: Path) -> None:
    with contextlib.suppress(OSError):
        if _is_at(handle, path):
            path.unlink()


def _leave(handle: int, path: Path, pid: int) -> None:
    """A worker process that was forked off has no part in this."""
    if os.getpid() == pid:
        with contextlib.suppress(OSError):  # another one needs it; the attempt alone gives up this one's share
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(handle, path)
        with contextlib.suppress(OSError):
            os.close(handle)


def _digits(run: str) -> str:
    """Eight hex digits of the user, the run, and the machine: whose processes share the memory that holds a file."""
    try:
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:
        machine = socket.gethostname()
    return hashlib.sha256(f"{machine}{os.getuid()}{run}".encode()).hexdigest()[:8]
