"""Writing files so that a final name never holds half a file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL.Image

from gan.errors import DiskFullError, GanError


class Locked(Exception):
    """Another process has the lock."""


_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # the names that tempfile.mkstemp makes for temporary_beside


@contextlib.contextmanager
def atomic_path(dest: str | Path, flush_folder: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `dest`; on success it is flushed to disk and renamed to `dest`.

    With `flush_folder` its name survives a power failure too, which takes several milliseconds.
    On any exception, Ctrl-C included, the temporary file is removed and `dest` is left as it was.
    Raises DiskFullError when the disk is full, GanError when the folder cannot be written to.
    """
    dest = Path(dest)
    temporary: Path | None = None
    try:
        temporary = temporary_beside(dest)
        yield temporary
        publish(temporary, dest, flush_folder)
    except OSError as error:
        raise explain_os_error(error, dest) from error
    except RuntimeError as error:  # torch.save complains of its own when the system refuses what it writes
        if not isinstance(error.__context__, OSError):
            raise
        raise explain_os_error(error.__context__, dest) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):  # a disk that is gone: the error that tells of it is on its way
                temporary.unlink(missing_ok=True)


def temporary_beside(dest: Path) -> Path:
    """A new empty file in the folder of `dest`, which is made if need be: `.NAME.*.tmp`."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent)
    os.close(handle)
    return Path(name)


def remove_leftovers(folder: Path) -> list[str]:
    """Remove the temporary files that killed processes left in `folder`, and return their names.

    For whoever knows that no other process writes there: a file in the making looks the same.
    """
    removed = []
    for path in sorted(folder.iterdir()):
        if _TEMPORARY.fullmatch(path.name) and path.is_file():
            with contextlib.suppress(OSError):  # they only take room
                path.unlink()
                removed.append(path.name)
    return removed


def publish(temporary: Path, dest: Path, flush_folder: bool = True) -> None:
    """Flush a complete temporary file to disk and give it its final name, with `flush_folder` whatever comes."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())  # an error here is one of the file
    os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; these are to be shared
    os.replace(temporary, dest)
    if flush_folder:
        flush(dest.parent)


def write_text(dest: str | Path, text: str) -> None:
    """Atomically replace the file `dest` by `text` (UTF-8)."""
    with atomic_path(dest) as path:
        path.write_text(text, encoding="utf-8")


def explain_os_error(error: OSError, path: str | Path) -> GanError:
    """The one-line message for a failed write to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(f"{path}: no space left on the device; free some, or choose another place")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return GanError(f"{path}: cannot be written (permission denied); choose a folder that you may write to")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return GanError(f"{path}: a part of this path is a file, not a folder; choose another place")
    return GanError(f"{path}: {error.strerror or error}")


def write_png(dest: str | Path, image: np.ndarray) -> None:
    """Atomically write uint8 `[C, H, W]`, C = 1 (grey), 3 (RGB) or 4 (RGBA), as a PNG."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    # Many are written in a row; the names of a run's sheets are flushed with the state that comes after them.
    with atomic_path(dest, flush_folder=False) as path:
        # Runs alone take a fourth of the time of PNG's default, and are as small.
        picture.save(path, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)


def readable_size(num_bytes: float) -> str:
    """`1.5 GB`, `281.3 MB`: of a thousand each."""
    return f"{num_bytes / 1e9:.1f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.1f} MB"


def nearest_existing(folder: Path) -> Path:
    """`folder`, or the one above it in which it would be made."""
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())


def disk_size(folder: Path) -> tuple[int, int]:
    """(all, free) bytes of the disk of a folder, which need not be there yet. Raises GanError if it does not say."""
    try:
        usage = shutil.disk_usage(nearest_existing(folder))
    except OSError as error:
        raise explain_os_error(error, folder) from error
    return usage.total, usage.free


def free_bytes(folder: Path) -> int:
    """What this user can still write in a folder, which need not be there yet. Raises GanError as `disk_size`."""
    return disk_size(folder)[1]


def flush(path: Path) -> None:
    """Have a file, or the names in a folder, survive a power failure, where the system knows how."""
    if os.name != "posix":
        return
    with contextlib.suppress(OSError):  # not there, or on a file system that cannot: nothing that a caller could mend
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def lock(file: IO[Any]) -> str | None:
    """Keep other processes from locking a file that is open for writing. What makes that impossible, or None.

    The lock is one of the process: whatever ends it, kill -9 included, ends the lock, and processes that it forks hold
    no part of it. It ends as well with the first descriptor of the file that the process closes, so there must be one
    only. Raises Locked if another process was first.
    """
    try:
        import fcntl
    except ImportError:
        return "this system has no such locks"
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise Locked from error
    except OSError as error:
        return error.strerror or str(error)
    return None


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
