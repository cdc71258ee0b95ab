"""Files that may be compressed, and why one cannot be unpacked."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gan.errors import GanError, one_line

DAMAGED = (EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)  # what reading such a file may raise

_OPENERS: dict[bytes, Callable[..., Any]] = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\0": lzma.open}


def is_compressed(start: bytes) -> bool:
    """Whether a file that begins like this is compressed by gzip, bzip2 or xz."""
    return start.startswith(tuple(_OPENERS))


@contextlib.contextmanager
def unpacked(path: str | Path) -> Iterator[IO[bytes]]:
    """A file, decompressed while it is read if it is compressed."""
    with open(path, "rb") as file:
        start = file.read(8)
        opener = next((opener for magic, opener in _OPENERS.items() if start.startswith(magic)), open)
    with opener(path, "rb") as file:
        yield file


def damaged(where: str, error: Exception) -> GanError:
    """The error for a file that `where` names, out of what reading it raised."""
    cut = isinstance(error, EOFError) or "unexpected end" in str(error)
    what = "is cut short" if cut else f"is damaged ({one_line(error)})"
    return GanError(f"{where}: {what}; copy or download it again")
