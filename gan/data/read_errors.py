"""Why an image could not be read, for people."""

from __future__ import annotations

import zipfile

from PIL import Image, UnidentifiedImageError

from gan.errors import GanError, one_line


def reason(error: Exception) -> str:
    """Why an image could not be read, in a few words on one line."""
    if isinstance(error, GanError):
        return str(error)
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels; scale it down first"
    if isinstance(error, zipfile.BadZipFile):
        return "damaged inside the zip file"
    if isinstance(error, OSError) and "truncated" in str(error).lower():
        return "truncated: its end is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    return f"cannot be decoded ({one_line(error)})"
