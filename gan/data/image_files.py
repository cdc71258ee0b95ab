"""What an image file is: by its name, by its first bytes, and to Pillow."""

from __future__ import annotations

import functools
import posixpath
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from PIL import Image

from gan.data import png

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
IMAGE_SUFFIXES |= {".avif", ".pbm", ".pgm", ".pnm", ".ppm"}
# Files of cameras are TIFFs as well, whose first picture is a thumbnail.
RAW_SUFFIXES = frozenset(
    {".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".nef", ".nrw"}
)
RAW_SUFFIXES |= {".orf", ".pef", ".raw", ".rw2", ".sr2", ".srf", ".srw"}
# Pictures as well, of kinds that are not read.
UNREAD_SUFFIXES = RAW_SUFFIXES | {".cr3", ".crw", ".mrw", ".raf", ".rwl", ".x3f"}
UNREAD_SUFFIXES |= {".dds", ".exr", ".heic", ".heif", ".hif", ".j2k", ".jp2", ".jpx", ".jxl", ".psd", ".qoi", ".svg"}
UNREAD_SUFFIXES |= {".tga", ".xcf"}
# What Pillow may take a file for. Others have a format of their own that nobody means by .png, or run programs (EPS).
# AVIF, of which only newer ones know, is what many web sites send under the name of a JPEG.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "PPM")
SNIFFED = 16  # bytes at the start of a file that tell whether it is an image


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image of one of FORMATS, its pixels not yet decoded. Raises whatever the decoder raises."""
    return Image.open(file, formats=_formats())


def first_bytes(path: Path, count: int = SNIFFED) -> bytes:
    """What a file begins with."""
    with open(path, "rb") as file:
        return file.read(count)


def is_image(start: bytes) -> bool:
    """Whether a file that begins like this is a PNG, JPEG, WebP, GIF or TIFF."""
    magic = (png.SIGNATURE, b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
    return start.startswith(magic) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def is_hidden(path: str) -> bool:
    """Whether a path with '/' between its parts is nothing a user put there: hidden, or an archiver's leftovers."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in path.split("/"))


def count_by_suffix(names: Iterable[str]) -> dict[str, int]:
    """How many of the file names end in which suffix (lower case, with the dot), the most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        suffix = posixpath.splitext(name)[1].lower() or posixpath.basename(name)
        counts[suffix] = counts.get(suffix, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]
