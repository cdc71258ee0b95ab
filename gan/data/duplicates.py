"""Pictures that look the same though their files differ: saved again, scaled, or in another format."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

# A hash is a thumbnail: 8x8 bytes of brightness, then 4x4 bytes each of Cb and Cr, as one big-endian number.
SIDE = 8
LUMA = SIDE * SIDE
BYTES = LUMA + LUMA // 2

# Two pictures are near duplicates where their thumbnails agree this well, in levels of 255. Saved again as JPEG of
# quality 10 to 90 or WebP, or scaled to a fourth up to double, 99 % of clothing-photos.zip and of noto-emoji.zip (on
# white) do. Of the 1900 photos one pair does, which is twice the same photo; of the 3583 emojis 78 in 26 groups,
# which differ in a small face's skin or hair.
MAX_DIFFERENCE = 12.0  # of the brightness anywhere, at high contrast
MAX_RELATIVE_DIFFERENCE = 1 / 8  # of it at low contrast: this part of the difference between darkest and brightest
MIN_DIFFERENCE = 3.0  # no contrast makes it less than rounding and compression are
MAX_RMS_DIFFERENCE = 4.0  # of the brightness, root mean square
MAX_COLOUR_DIFFERENCE = 8  # of Cb and Cr anywhere
MIN_CONTRAST = 16  # a picture without as much is nearly one colour: nothing tells whether it is the same

ROWS, COLUMNS = 512, 8192  # pairs looked at at once
PAIRS = 1 << 16  # pairs compared byte by byte at once


def perceptual_hash(image: Image.Image) -> int:
    """What an upright L, RGB or RGBA image looks like from afar, to be compared by `near_duplicates`."""
    if image.mode == "RGBA":  # on the green of film studios, which hardly any drawing has: so its outline counts
        small = _thumbnail(image.convert("RGBa")).convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", small.size, (0, 255, 0, 255)), small).convert("RGB")
    else:
        small = _thumbnail(image)
    brightness, blue, red = (small if small.mode == "RGB" else small.convert("RGB")).convert("YCbCr").split()
    return int.from_bytes(brightness.tobytes() + blue.reduce(2).tobytes() + red.reduce(2).tobytes(), "big")


def near_duplicates(hashes: Sequence[int]) -> list[list[int]]:
    """Groups of at least two indices of pictures that look the same, in order; pictures of nearly one colour aside.

    Whatever looks like any member of a group belongs to it.
    """
    places: dict[int, list[int]] = {}
    for index, value in enumerate(hashes):
        places.setdefault(value, []).append(index)
    different = [value.to_bytes(BYTES, "big") for value in places]
    thumbnails = np.frombuffer(b"".join(different), dtype=np.uint8).reshape(-1, BYTES)
    shaped = _contrast(thumbnails) >= MIN_CONTRAST
    members = [indices for indices, has_shape in zip(places.values(), shaped, strict=True) if has_shape]
    groups: dict[int, list[int]] = {}
    for group, indices in zip(_groups(thumbnails[shaped]), members, strict=True):
        groups.setdefault(group, []).extend(indices)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _thumbnail(image: Image.Image) -> Image.Image:
    """8x8 pixels: whole blocks averaged first, which is quick, then a smooth filter, which forgives their edges."""
    return image.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=4)


def _groups(thumbnails: np.ndarray) -> list[int]:
    """The group of each of the thumbnails, uint8 [n, BYTES].

    Thumbnails that differ little do so in every direction. They are sorted by the direction in which brightness varies
    most, so that only a few are within reach of each other. Of those all pairs are measured by a matrix product.
    """
    reach = MAX_RMS_DIFFERENCE * LUMA**0.5
    points = thumbnails[:, :LUMA].astype(np.float32)
    points -= points.sum(axis=0) / max(1, len(points))
    heights = points @ np.linalg.eigh(points.T @ points)[1][:, -1]
    order = np.argsort(heights, kind="stable")
    thumbnails, points, heights = thumbnails[order], points[order], heights[order]
    halves = np.square(points).sum(axis=1, keepdims=True) / 2
    left, right = np.hstack([points, np.ones_like(halves)]), np.hstack([points, -halves])
    limits = halves - (reach**2 + 2) / 2  # a little more: float32 rounds
    group = np.arange(len(points))
    for start in range(0, len(points), ROWS):
        rows = slice(start, min(start + ROWS, len(points)))
        end = int(np.searchsorted(heights, heights[rows.stop - 1] + reach, side="right"))
        for begin in range(start, end, COLUMNS):
            columns = slice(begin, min(begin + COLUMNS, end))
            near = left[rows] @ right[columns].T >= limits[rows]  # ab - b^2/2 >= a^2/2 - reach^2/2
            group = _joined(near, thumbnails, group, rows, columns)
    found = np.empty_like(group)
    found[order] = order[group]
    return found.tolist()


def _joined(near: np.ndarray, thumbnails: np.ndarray, group: np.ndarray, rows: slice, columns: slice) -> np.ndarray:
    """The groups once those of near pairs, bool [rows, columns], that look the same are one.

    A group's number is that of one of its members.
    """
    while True:
        # Thousands of copies of one picture need not all be compared with each other, but only until they are joined.
        if np.count_nonzero(near) > ROWS:
            near &= group[rows, None] != group[columns]
        first, second = (indices[:PAIRS] for indices in np.nonzero(near))
        if not len(first):
            return group
        near[first, second] = False
        a, b = first + rows.start, second + columns.start
        same = (a < b) & _look_the_same(thumbnails[a], thumbnails[b])
        if same.any():
            group = _united(group, a[same], b[same])


def _united(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    for first, second in zip(a.tolist(), b.tolist(), strict=True):
        while group[first] != first:
            first = group[first]
        while group[second] != second:
            second = group[second]
        group[max(first, second)] = min(first, second)
    while (group[group] != group).any():
        group = group[group]
    return group


def _look_the_same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether thumbnails, uint8 [n, BYTES], show the same picture: bool [n]."""
    difference = np.abs(a.astype(np.int16) - b)
    luma, colour = difference[:, :LUMA], difference[:, LUMA:]
    contrast = np.minimum(_contrast(a), _contrast(b))
    limit = np.clip(contrast * MAX_RELATIVE_DIFFERENCE, MIN_DIFFERENCE, MAX_DIFFERENCE)
    same = (luma.max(axis=1) <= limit) & (colour.max(axis=1) <= MAX_COLOUR_DIFFERENCE)
    return same & (np.square(luma, dtype=np.int32).mean(axis=1) <= MAX_RMS_DIFFERENCE**2)


def _contrast(thumbnails: np.ndarray) -> np.ndarray:
    """Between the darkest and the brightest of 8x8 places, of uint8 [n, BYTES]: uint8 [n]."""
    return np.ptp(thumbnails[:, :LUMA], axis=1)
