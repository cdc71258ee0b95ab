"""Many pictures on one, to be looked at."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

MAX_PICTURES = 48
GAP = 4  # pixels between pictures and around them
GAP_COLOUR = (96, 96, 96)  # neither the white of a background nor the black of a border
MIN_SIDE, MAX_SIDE = 128, 256  # pixels of the longest side as it is shown: smaller ones are enlarged, larger reduced
CHECKER = 8  # pixels of a square of what is shown behind transparency
CHECKER_COLOURS = (204, 153)


def contact_sheet(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """The first MAX_PICTURES pictures in rows, about as wide as a screen for its height: uint8 [H, W, 3].

    Pictures are uint8 [H, W], [H, W, 3] or [H, W, 4]; of the last, transparent parts show a chequerboard. All are
    scaled alike: by a whole factor if they are enlarged, so that single pixels can be seen.
    """
    assert pictures, "there is nothing to show"
    images = [Image.fromarray(np.ascontiguousarray(pixels)) for pixels in pictures[:MAX_PICTURES]]
    longest = max(max(image.size) for image in images)
    factor = max(1, MIN_SIDE // longest) if longest <= MAX_SIDE else MAX_SIDE / longest
    shown = [_shown(image, factor) for image in images]
    width, height = (max(image.size[axis] for image in shown) + GAP for axis in (0, 1))
    columns = min(len(shown), math.ceil(math.sqrt(len(shown) * 4 / 3 * height / width)))
    rows = math.ceil(len(shown) / columns)
    sheet = Image.new("RGB", (GAP + columns * width, GAP + rows * height), GAP_COLOUR)
    for index, image in enumerate(shown):
        row, column = divmod(index, columns)
        left, top = (width - GAP - image.width) // 2, (height - GAP - image.height) // 2
        sheet.paste(image, (GAP + column * width + left, GAP + row * height + top))
    return np.asarray(sheet)


def _shown(image: Image.Image, factor: float) -> Image.Image:
    """The picture scaled, as RGB."""
    size = max(1, round(image.width * factor)), max(1, round(image.height * factor))
    if size != image.size:
        image = image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)
    if image.mode == "RGBA":
        image = Image.alpha_composite(_chequerboard(size), image)
    return image.convert("RGB")


def _chequerboard(size: tuple[int, int]) -> Image.Image:
    columns, rows = (np.arange(side) // CHECKER for side in size)
    light = (rows[:, None] + columns) % 2 == 0
    return Image.fromarray(np.where(light, *CHECKER_COLOURS).astype(np.uint8)).convert("RGBA")
