"""From an 8-bit image of any size to pixels of the wanted size: pure functions of Pillow images."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
from PIL import Image

from gan.data.normalise import WHITE, Colour, paint_hidden
from gan.image_size import Size

TRANSFORMS = ("none", "stretch", "center-crop", "center-crop-wide", "fit")
RESIZE_FILTERS = {"lanczos": Image.Resampling.LANCZOS, "box": Image.Resampling.BOX}

Transform = Callable[[Image.Image], np.ndarray]

LANCZOS = Image.Resampling.LANCZOS


def make_transform(
    name: str, size: Size | None, resize_filter: str = "lanczos", background: Colour = WHITE
) -> Transform:
    """The function that takes an 8-bit image to pixels: uint8 [H, W] for mode L, [H, W, 3] for RGB, [H, W, 4] for RGBA.

    `name` is one of TRANSFORMS, `resize_filter` one of RESIZE_FILTERS. `size` may be None for the transform "none"
    alone, which then leaves the images as they are. The background is what "fit" has beside the picture, and the
    colour of RGBA images where they are fully transparent.
    """
    resample = RESIZE_FILTERS[resize_filter]
    if size is None:
        assert name == "none", "a transform needs a size"
        return np.asarray
    functions: dict[str, Callable[..., Image.Image]] = {
        "none": stretch,
        "stretch": stretch,
        "center-crop": center_crop,
        "center-crop-wide": center_crop_wide,
        "fit": partial(fit, background=background),
    }
    function = functions[name]
    return lambda image: np.asarray(_tidied(function(image, size, resample), background))


def stretch(image: Image.Image, size: Size, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """The whole image scaled to `size`, whatever that does to its proportions."""
    return image if image.size == size else image.resize(size, resample)


def center_crop(image: Image.Image, size: Size, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """The largest centred part that has the proportions of `size`, scaled to `size`."""
    box = _centred_box(image.size, size)
    return stretch(image if box == (0, 0, *image.size) else image.crop(box), size, resample)


def center_crop_wide(image: Image.Image, size: Size, resample: Image.Resampling = LANCZOS) -> Image.Image:
    """`center_crop` to the wide `size` on a black square of its width: 512 x 384 becomes 512 x 512.

    Around an RGBA image the square is transparent.
    """
    width, height = size
    square = Image.new(image.mode, (width, width))
    square.paste(center_crop(image, size, resample), (0, (width - height) // 2))
    return square


def fit(
    image: Image.Image, size: Size, resample: Image.Resampling = LANCZOS, background: Colour = WHITE
) -> Image.Image:
    """The whole image, scaled to fit into `size`, in the middle of the background, which in RGBA is transparent.

    An odd border is larger at the end. At least one pixel of the image is left each way.
    """
    inner = _fitting_size(image.size, size)
    picture = stretch(image, inner, resample)
    if inner == size:
        return picture
    canvas = Image.new("RGBA", size, (*background, 0)) if image.mode == "RGBA" else Image.new("RGB", size, background)
    canvas = canvas if canvas.mode == image.mode else canvas.convert(image.mode)
    canvas.paste(picture, ((size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2))
    return canvas


def output_size(name: str, size: Size) -> Size:
    """Width and height of what the transform `name` makes when it is asked for `size`."""
    return (size[0], size[0]) if name == "center-crop-wide" else size


def enlargement(name: str, image_size: Size, size: Size) -> float:
    """By which factor the transform `name` enlarges an image, in the direction in which it does so most.

    Up to 1 nothing has to be made up.
    """
    left, top, right, bottom = (0, 0, *image_size)
    if name == "fit":
        size = _fitting_size(image_size, size)
    elif name in ("center-crop", "center-crop-wide"):
        left, top, right, bottom = _centred_box(image_size, size)
    return max(size[0] / (right - left), size[1] / (bottom - top))


def is_too_small(name: str, image_size: Size, size: Size) -> bool:
    """Whether the transform leaves this image out: center-crop-wide does when it would have to enlarge the crop."""
    return name == "center-crop-wide" and enlargement(name, image_size, size) > 1


def _tidied(image: Image.Image, background: Colour) -> Image.Image:
    """Pillow resizes RGBA with the colours weighted by alpha, as it should, but then leaves black where alpha is 0."""
    return paint_hidden(image, background) if image.mode == "RGBA" else image


def _fitting_size(image_size: Size, size: Size) -> Size:
    """The largest size with the proportions of the image that fits into `size`; at least one pixel each way."""
    factor = min(size[0] / image_size[0], size[1] / image_size[1])
    width, height = (max(1, min(limit, round(side * factor))) for side, limit in zip(image_size, size, strict=True))
    return width, height


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
