"""Encoded images as pixels, the way training takes them: 8-bit grey, RGB or RGBA with straight alpha."""

from __future__ import annotations

import importlib.util
import io
import zlib
from typing import IO

import numpy as np
import PIL.Image

from gan.errors import GanError

Shape = tuple[int, int, int]  # C, H, W

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_CHANNELS = {0: 1, 2: 3, 6: 4}  # by the colour type of its header
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "RGBA": 4}  # by Pillow's mode
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_HEAD = 128  # bytes of a PNG in which a transparent colour would be declared, for all but odd ones


class UnsuitableImage(ValueError):
    """An image whose pixels training would show as something else. The text says what it is."""


def decode(data: bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 `[C, H, W]`, C = 1, 3 or 4. `where` names it in errors."""
    if data[:8] == _PNG and not _png_is_intact(data):
        raise GanError(f"{where} is damaged (a checksum in it is wrong); remove it and pack again")
    image = _decode_own_png(data) if _is_own_png(data) else None
    if image is None:
        try:
            with PIL.Image.open(io.BytesIO(data)) as file:
                image = np.asarray(file.convert(_MODES[_channels(data, file)]))
        except UnsuitableImage as error:
            raise GanError(f"{where} is {error}; pack it again with dataset_tool.py") from error
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise GanError(f"{where} is damaged or not an image ({error}); remove it and pack again") from error
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def shape_of(file: IO[bytes]) -> Shape:
    """The shape that `decode` will give, out of the header alone.

    Raises UnsuitableImage, or whatever Pillow raises where there is no image.
    """
    head = file.read(_HEAD)
    if _is_own_png(head):
        return _own_shape(head)
    file.seek(0)
    with PIL.Image.open(file) as image:
        return _channels(head, image), image.height, image.width


def decoder() -> str:
    """What decodes PNGs of our own kind, for the start of a run's log."""
    if importlib.util.find_spec("pyspng") is not None:
        return "pyspng"
    return "Pillow, slower, because pyspng is not installed"


def _channels(data: bytes, image: PIL.Image.Image) -> int:
    if image.mode.startswith("I") or (data[:8] == _PNG and data[24] > 8):  # of 16-bit colours, Pillow says only RGB
        raise UnsuitableImage("of 16 bits")
    if "transparency" in image.info:
        raise UnsuitableImage("partly transparent by its palette or by a colour")
    if image.mode not in _CHANNELS:
        raise UnsuitableImage({"LA": "grey with transparency"}.get(image.mode, image.mode))
    return _CHANNELS[image.mode]


def _is_own_png(data: bytes) -> bool:
    """Whether it is what dataset_tool.py writes: an 8-bit grey, RGB or RGBA PNG, not interlaced, no colour transparent.

    The first bytes are enough.
    """
    bit_depth, colour, interlace = data[24:25], data[25:26], data[28:29]
    own = data[:8] == _PNG and bit_depth == b"\x08" and colour in (b"\x00", b"\x02", b"\x06") and interlace == b"\x00"
    return own and b"tRNS" not in data[:_HEAD]


def _own_shape(data: bytes) -> Shape:
    return _PNG_CHANNELS[data[25]], int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def _png_is_intact(data: bytes) -> bool:
    """Whether all chunks are there with the right checksums, at which pyspng does not look, nor Pillow at all."""
    position = len(_PNG)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big") or end + 4 > len(data):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _decode_own_png(data: bytes) -> np.ndarray | None:
    """Decode with pyspng, several times faster than Pillow. None without it, or if it cannot."""
    try:
        import pyspng
    except ImportError:
        return None
    try:
        image = pyspng.load(data)
    except RuntimeError:
        return None  # Pillow says better what is wrong
    channels, height, width = _own_shape(data)
    if image.dtype != np.uint8 or image.size != channels * height * width:
        return None
    return image.reshape(height, width, channels)
