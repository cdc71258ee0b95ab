"""Writing files so that a final name never holds half a file."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image

from gan.errors import GanError


@contextlib.contextmanager
def atomic_path(dest: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `dest`; on success it is flushed to disk and renamed to `dest`.

    On any exception, Ctrl-C included, the temporary file is removed and `dest` is left as it was.
    Raises GanError when the folder cannot be written to or the disk is full.
    """
    dest = Path(dest)
    temporary: Path | None = None
    try:
        temporary = temporary_beside(dest)
        yield temporary
        publish(temporary, dest)
    except OSError as error:
        raise explain_os_error(error, dest) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def temporary_beside(dest: Path) -> Path:
    """A new empty file in the folder of `dest`, which is made if need be: `.NAME.*.tmp`."""
    dest.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent)
    os.close(handle)
    return Path(name)


def publish(temporary: Path, dest: Path) -> None:
    """Flush a complete temporary file to disk and give it its final name."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files; these are to be shared
    os.replace(temporary, dest)


def write_text(dest: str | Path, text: str) -> None:
    """Atomically replace the file `dest` by `text` (UTF-8)."""
    with atomic_path(dest) as path:
        path.write_text(text, encoding="utf-8")


def explain_os_error(error: OSError, path: str | Path) -> GanError:
    """The one-line message for a failed write to `path`."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GanError(f"{path}: no space left on the device; free some, or choose another place")
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return GanError(f"{path}: cannot be written (permission denied); choose a folder that you may write to")
    if isinstance(error, (NotADirectoryError, FileExistsError)):
        return GanError(f"{path}: a part of this path is a file, not a folder; choose another place")
    return GanError(f"{path}: {error.strerror or error}")


def write_png(dest: str | Path, image: np.ndarray) -> None:
    """Atomically write uint8 `[C, H, W]`, C = 1 (grey) or 3 (RGB), as a PNG."""
    pixels = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    picture = PIL.Image.fromarray(np.ascontiguousarray(pixels))
    with atomic_path(dest) as path:  # runs alone are a fourth of the time of PNG's default, and as small
        picture.save(path, format="PNG", compress_level=1, compress_type=zlib.Z_RLE)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
