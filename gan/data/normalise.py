"""From whatever an image file holds to an upright picture of 8 bits a channel, in sRGB."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageCms, features

from gan.image_size import Size

Colour = tuple[int, int, int]  # red, green, blue, each 0 to 255

WHITE: Colour = (255, 255, 255)

# The EXIF tag that says how the camera was held, and the turn that undoes each of its values.
ORIENTATION_TAG = 0x0112
UPRIGHT_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
BITS_PER_SAMPLE_TAG = 258  # of a TIFF
NEARLY = 2  # levels of 255 by which a profile may differ from sRGB without being applied


def is_grey(mode: str) -> bool:
    """Whether images of this Pillow mode hold no colour."""
    return mode in ("1", "L", "LA", "La") or _is_deep(mode)


def has_alpha(image: Image.Image) -> bool:
    """Whether the image may be transparent somewhere; decodes no pixels."""
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return True
    return image.palette is not None and image.palette.mode == "RGBA"


def upright_size(image: Image.Image) -> Size:
    """Width and height once the image is turned the way its EXIF orientation says; decodes no pixels."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow turns these itself
        return width, height
    return (height, width) if _orientation(image) >= 5 else (width, height)


def to_8bit(image: Image.Image, mode: str, background: Colour = WHITE) -> Image.Image:
    """The image (an animation's first picture) the right way up, in sRGB, as `mode`: "L", "RGB" or "RGBA".

    L and RGB: transparency is put on the background. RGBA: alpha is straight and stays as it is, but what is fully
    transparent has the background's colour, as whatever an editor left there must not be learned.

    16-bit grey is scaled, so that 65535 becomes 255. Float images may range over 0..1, 0..255 or 0..65535, and
    TIFFs of 32-bit integers over 0..255 or 0..65535.
    The result may be the image itself, which is why it must not be changed in place.

    Raises ValueError for other ranges, and whatever Pillow raises for a file that it cannot decode.
    """
    image.load()  # only then is all metadata known, and a TIFF turned by Pillow itself
    turn = UPRIGHT_TURNS.get(_orientation(image))
    drawing = _in_srgb(image)
    if mode == "RGBA":
        drawing = paint_hidden(drawing if drawing.mode == "RGBA" else drawing.convert("RGBA"), background)
    else:
        if drawing.mode == "RGBA":
            drawing = Image.alpha_composite(Image.new("RGBA", drawing.size, (*background, 255)), drawing)
        drawing = drawing if drawing.mode == mode else drawing.convert(mode)
    return drawing if turn is None else drawing.transpose(turn)


def paint_hidden(image: Image.Image, background: Colour) -> Image.Image:
    """The RGBA image with the background's colour wherever it is fully transparent."""
    alpha = image.getchannel("A")
    if alpha.getextrema()[0] != 0:
        return image
    painted = image.copy()
    painted.paste((*background, 0), mask=alpha.point([255] + 255 * [0]))
    return painted


def profile_problem(image: Image.Image) -> str | None:
    """Why `to_8bit` ignores the colour profile that the loaded image carries; None where it does not."""
    profile = image.info.get("icc_profile")
    return _from_profile(profile, _colour_space(image)).problem if profile else None


def _in_srgb(image: Image.Image) -> Image.Image:
    """The picture as L, RGB or RGBA, with its colour profile, if it has one, applied."""
    profile = image.info.get("icc_profile")
    to_srgb = _from_profile(profile, _colour_space(image)).apply if profile else None
    if to_srgb is not None and image.mode in ("CMYK", "LAB"):
        return to_srgb(image)
    drawing = _plain(image)
    if to_srgb is None:
        return drawing
    if drawing.mode != "RGBA":
        return to_srgb(drawing)
    colours = to_srgb(drawing.convert("L" if is_grey(image.mode) else "RGB")).convert("RGB")
    colours.putalpha(drawing.getchannel("A"))
    return colours


def _plain(image: Image.Image) -> Image.Image:
    """The picture as L, RGB or, if there is any transparency, RGBA, whatever Pillow's mode for it is."""
    mode = image.mode
    if _is_deep(mode):
        return _deep_to_8bit(image)
    if has_alpha(image):
        return (image.convert("LA") if mode == "La" else image).convert("RGBA")
    if mode in ("L", "RGB"):
        return image
    return image.convert("L" if mode == "1" else "RGB")


def _is_deep(mode: str) -> bool:
    """Whether this is one of the modes of grey with more than 8 bits."""
    return mode in ("I", "F") or mode.startswith("I;16")


def _deep_to_8bit(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits as L, or as RGBA if one of its values means "transparent"."""
    pixels = np.asarray(image)  # uint16, int32 or float32 [H, W]
    white: float = 65535
    if pixels.dtype.kind == "f":
        white = next((limit for limit in (1, 255) if pixels.max() <= limit), 65535)
    elif _has_32_bits(image) and pixels.max() <= 255:
        white = 255
    if not (pixels.min() >= 0 and pixels.max() <= white):
        raise ValueError(f"grey values from {pixels.min()} to {pixels.max()}; save it with 8 or 16 bits")
    grey = Image.fromarray(np.rint(pixels * (255 / white)).astype(np.uint8))
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):
        return grey
    drawing = grey.convert("RGBA")
    drawing.putalpha(Image.fromarray(np.where(pixels == transparent, 0, 255).astype(np.uint8)))
    return drawing


def _has_32_bits(image: Image.Image) -> bool:
    """Whether this is a TIFF of 32-bit integers. Pillow's mode does not tell: files of 16 bits, whose white is known,
    may be "I" as well."""
    tags = getattr(image, "tag_v2", None)
    return image.mode == "I" and tags is not None and tags.get(BITS_PER_SAMPLE_TAG) == (32,)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) when there is none or none that can be read."""
    try:
        value = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)  # a PNG's own method would decode the pixels
    except Exception:  # damaged metadata raises almost anything, and the picture is still good
        return 1
    return value if value in UPRIGHT_TURNS else 1


def _colour_space(image: Image.Image) -> str:
    """What a profile of this image has to describe, in Pillow's words: "L", "RGB", "CMYK" or "LAB"."""
    if is_grey(image.mode):
        return "L"
    return image.mode if image.mode in ("CMYK", "LAB") else "RGB"


class _ToSrgb(NamedTuple):
    """What a profile does to an image of its colour space: nothing if it is sRGB, or if there is a problem with it."""

    apply: Callable[[Image.Image], Image.Image] | None
    problem: str | None


@lru_cache(maxsize=16)  # making one takes as long as decoding an image, and most images of a set share theirs
def _from_profile(profile: bytes, space: str) -> _ToSrgb:
    if not features.check("littlecms2"):
        return _ToSrgb(None, "this build of Pillow cannot apply colour profiles")
    try:
        source, srgb = ImageCms.ImageCmsProfile(io.BytesIO(profile)), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(source, srgb, space, "RGB")
        if space == "L":
            table = transform.apply(_ramp()).getchannel("G").tobytes()
            is_srgb = max(abs(value - index) for index, value in enumerate(table)) <= NEARLY
            return _ToSrgb(None if is_srgb else lambda image: image.point(list(table)), None)
        if space == "RGB":
            colours = _all_colours()
            changed = np.asarray(transform.apply(colours)).astype(int)
            if np.abs(changed - np.asarray(colours)).max() <= NEARLY:
                return _ToSrgb(None, None)
        return _ToSrgb(transform.apply, None)
    except Exception:  # the library has no error of its own for what is in a damaged profile
        return _ToSrgb(None, f"damaged, or not one for images in {space}")


def _ramp() -> Image.Image:
    """All greys in a row."""
    return Image.frombytes("L", (256, 1), bytes(range(256)))


def _all_colours() -> Image.Image:
    """A picture of 9 x 9 x 9 colours from all over RGB."""
    levels = np.linspace(0, 255, 9).astype(np.uint8)
    return Image.fromarray(np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3))
