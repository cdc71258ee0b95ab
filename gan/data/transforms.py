"""From whatever an image file holds to 8-bit pixels of the wanted size: pure functions of Pillow images."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image

TRANSFORMS = ("none", "center-crop", "center-crop-wide")
RESIZE_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

Size = tuple[int, int]  # width, height in pixels
Transform = Callable[[Image.Image], np.ndarray]

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


def is_grey(mode: str) -> bool:
    """Whether images of this Pillow mode hold no colour."""
    return mode in ("1", "L", "LA", "La", "I", "F") or mode.startswith("I;16")


def upright_size(image: Image.Image) -> Size:
    """Width and height once the image is turned the way its EXIF orientation says; decodes no pixels."""
    width, height = image.size
    if image.format == "TIFF":  # Pillow turns these itself
        return width, height
    return (height, width) if _orientation(image) >= 5 else (width, height)


def to_8bit(image: Image.Image, mode: str) -> Image.Image:
    """The image the right way up, without transparency (on white), as 8-bit `mode`: "L" or "RGB".

    16-bit grey is scaled, so that 65535 becomes 255. Float images may range over 0..1, 0..255 or 0..65535.
    Raises ValueError for other ranges, and whatever Pillow raises for a file that it cannot decode.
    """
    image.load()  # only then is all metadata known, and a TIFF turned by Pillow itself
    turn = UPRIGHT_TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = Image.fromarray(_wide_grey_to_8bit(np.asarray(image)))
    elif "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        drawing = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing)
    image = image.convert(mode)
    return image if turn is None else image.transpose(turn)


def make_transform(name: str, size: Size | None, resize_filter: str = "lanczos") -> Transform:
    """The function that takes an 8-bit image to pixels: uint8 [H, W] for mode L, [H, W, 3] for RGB.

    `name` is one of TRANSFORMS, `resize_filter` one of RESIZE_FILTERS. `size` may be None for the transform "none"
    alone, which then leaves the images as they are.
    """
    resample = RESIZE_FILTERS[resize_filter]
    if size is None:
        assert name == "none", "a crop needs a size"
        return np.asarray
    functions = {"none": scale, "center-crop": center_crop, "center-crop-wide": center_crop_wide}
    function = functions[name]
    return lambda image: np.asarray(function(image, size, resample))


def scale(image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The whole image scaled to `size`, whatever that does to its proportions."""
    return image if image.size == size else image.resize(size, resample)


def center_crop(image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS) -> Image.Image:
    """The largest centred part that has the proportions of `size`, scaled to `size`."""
    return scale(image.crop(_centred_box(image.size, size)), size, resample)


def center_crop_wide(
    image: Image.Image, size: Size, resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """`center_crop` to the wide `size` on a black square of its width: 512 x 384 becomes 512 x 512."""
    width, height = size
    square = Image.new(image.mode, (width, width))
    square.paste(center_crop(image, size, resample), (0, (width - height) // 2))
    return square


def output_size(name: str, size: Size) -> Size:
    """Width and height of what the transform `name` makes when it is asked for `size`."""
    return (size[0], size[0]) if name == "center-crop-wide" else size


def is_too_small(name: str, image_size: Size, size: Size) -> bool:
    """Whether the transform leaves this image out: center-crop-wide does when it would have to enlarge the crop."""
    if name != "center-crop-wide":
        return False
    left, top, right, bottom = _centred_box(image_size, size)
    return right - left < size[0] or bottom - top < size[1]


def _centred_box(image_size: Size, proportions: Size) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the largest centred box with these proportions; an odd margin is larger at the end.

    At least one pixel wide and high.
    """
    image_width, image_height = image_size
    width, height = proportions
    box_width = max(1, min(image_width, round(image_height * width / height)))
    box_height = max(1, min(image_height, round(image_width * height / width)))
    left, top = (image_width - box_width) // 2, (image_height - box_height) // 2
    return left, top, left + box_width, top + box_height


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) when there is none or none that can be read."""
    try:
        value = Image.Image.getexif(image).get(ORIENTATION_TAG, 1)  # a PNG's own method would decode the pixels
    except Exception:  # damaged metadata raises almost anything, and the picture is still good
        return 1
    return value if value in UPRIGHT_TURNS else 1


def _wide_grey_to_8bit(pixels: np.ndarray) -> np.ndarray:
    """Grey of more than 8 bits (uint16, int32 or float32 [H, W]) as uint8 [H, W]."""
    white: float = 65535
    if pixels.dtype.kind == "f":
        white = next((limit for limit in (1, 255) if pixels.max() <= limit), 65535)
    if not (pixels.min() >= 0 and pixels.max() <= white):
        raise ValueError(f"grey values from {pixels.min()} to {pixels.max()}; save it with 8 or 16 bits")
    return np.rint(pixels * (255 / white)).astype(np.uint8)
