"""Encoded images as pixels, the way training takes them: 8-bit grey, RGB or RGBA with straight alpha."""

from __future__ import annotations

import importlib.util
import io
import zlib
from typing import IO

import numpy as np
from PIL import Image

from gan.data import png
from gan.data.image_files import open_image
from gan.errors import GanError

Shape = tuple[int, int, int]  # C, H, W

_PNG_CHANNELS = {colour: channels for channels, colour in png.COLOUR_TYPES.items()}
_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "RGBA": 4}  # by Pillow's mode
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_HEAD = 128  # bytes of a PNG in which a transparent colour would be declared, for all but odd ones


class UnsuitableImage(ValueError):
    """An image whose pixels training would show as something else. The text says what it is."""


def decode(data: bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 `[C, H, W]`, C = 1, 3 or 4. `where` names it in errors."""
    if data.startswith(png.SIGNATURE) and not _png_is_intact(data):
        raise GanError(f"{where} is damaged (a checksum in it is wrong); remove it and pack again")
    image = _decode_own_png(data) if _is_own_png(data) else None
    if image is None:
        try:
            with open_image(io.BytesIO(data)) as file:
                image = np.asarray(file.convert(_MODES[_channels(data, file)]))
        except UnsuitableImage as error:
            raise GanError(f"{where} is {error}; pack it again with dataset_tool.py") from error
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
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
    with open_image(file) as image:
        return _channels(head, image), image.height, image.width


def decoder() -> str:
    """What decodes PNGs of our own kind, for the start of a run's log."""
    if importlib.util.find_spec("pyspng") is not None:
        return "pyspng"
    return "Pillow, slower, because pyspng is not installed"


def _channels(data: bytes, image: Image.Image) -> int:
    is_deep_png = data.startswith(png.SIGNATURE) and data[24] > 8  # of 16-bit colours, Pillow says only RGB
    if image.mode.startswith("I") or is_deep_png:
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
    if not data.startswith(png.SIGNATURE) or len(data) < 29:
        return False
    bit_depth, colour, interlaced = data[24], data[25], data[28]
    return bit_depth == 8 and colour in _PNG_CHANNELS and not interlaced and b"tRNS" not in data[:_HEAD]


def _own_shape(data: bytes) -> Shape:
    return _PNG_CHANNELS[data[25]], int.from_bytes(data[20:24], "big"), int.from_bytes(data[16:20], "big")


def _png_is_intact(data: bytes) -> bool:
    """Whether all chunks are there with the right checksums, at which pyspng does not look, nor Pillow at all."""
    position = len(png.SIGNATURE)
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
