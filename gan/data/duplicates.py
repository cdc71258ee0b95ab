"""Pictures that look the same though their files differ: saved again, scaled, or in another format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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

# The search is exact up to MAX_WASTED pairs that are compared byte by byte and differ; it then leaves some out, and
# says so. So 200,000 pictures take a minute at most on one core, whatever they are. Of 7,000 it leaves out nothing.
MAX_WASTED = 30_000_000
COLOUR_WEIGHT = 0.5  # of colour beside brightness where distances are measured
DIRECTIONS = 16  # in which they are measured
ROWS, COLUMNS = 256, 4096  # pairs measured at once
FEW = 8192  # pairs of these that may be near before quicker tests are worth while
STRIP = 16  # rows of these tests, which are quickest where their operands stay in the cache


def perceptual_hash(image: Image.Image) -> int:
    """What an upright L, RGB or RGBA image looks like from afar, to be compared by `near_duplicates`."""
    if image.mode == "RGBA":  # on the green of film studios, which hardly any drawing has: so its outline counts
        small = _thumbnail(image.convert("RGBa")).convert("RGBA")
        small = Image.alpha_composite(Image.new("RGBA", small.size, (0, 255, 0, 255)), small).convert("RGB")
    else:
        small = _thumbnail(image)
    brightness, blue, red = (small if small.mode == "RGB" else small.convert("RGB")).convert("YCbCr").split()
    return int.from_bytes(brightness.tobytes() + blue.reduce(2).tobytes() + red.reduce(2).tobytes(), "big")


def near_duplicates(
    hashes: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
    report: Callable[[str], None] | None = None,
) -> list[list[int]]:
    """Groups of at least two indices of pictures that look the same, in order; pictures of nearly one colour aside.

    Whatever looks like any member of a group belongs to it. `progress` gets how many pictures are done, and of how
    many; `report` a sentence if so many are nearly the same that not all of them could be compared.
    """
    places: dict[int, list[int]] = {}
    for index, value in enumerate(hashes):
        places.setdefault(value, []).append(index)
    different = [value.to_bytes(BYTES, "big") for value in places]
    thumbnails = np.frombuffer(b"".join(different), dtype=np.uint8).reshape(-1, BYTES)
    shaped = _contrast(thumbnails) >= MIN_CONTRAST
    members = [indices for indices, has_shape in zip(places.values(), shaped, strict=True) if has_shape]
    found, unfinished = _groups(thumbnails[shaped], progress)
    if unfinished and report is not None:
        report(
            f"look-alikes may be missing: {unfinished:,} images are like so many others, and yet not the same, that "
            "they were not compared with all of them"
        )
    groups: dict[int, list[int]] = {}
    for group, indices in zip(found, members, strict=True):
        groups.setdefault(group, []).extend(indices)
    return sorted(sorted(group) for group in groups.values() if len(group) > 1)


def _thumbnail(image: Image.Image) -> Image.Image:
    """8x8 pixels: whole blocks averaged first, which is quick, then a smooth filter, which forgives their edges."""
    return image.resize((SIDE, SIDE), Image.Resampling.HAMMING, reducing_gap=4)


def _groups(thumbnails: np.ndarray, progress: Callable[[int, int], None] | None) -> tuple[list[int], int]:
    """The group of each of the thumbnails, uint8 [n, BYTES], and how many were not compared with all that are near.

    Thumbnails that differ little do so in every direction. They are sorted by the direction in which they vary most,
    so that only a few are within reach of each other. Of those all pairs are measured by a matrix product.
    """
    count = len(thumbnails)
    points = _points(thumbnails)
    limits = _limits(thumbnails)
    reach = _reach(limits)
    order = np.argsort(points[:, 0], kind="stable")
    heights = points[order, 0]
    order = order[np.lexsort((limits[order], np.arange(count) // ROWS))]  # in a block of rows those of one limit
    thumbnails, points, limits, reach = thumbnails[order], points[order], limits[order], reach[order]
    halves = np.square(points).sum(axis=1, keepdims=True) / 2
    left, right = np.hstack([points, np.ones_like(halves)]), np.hstack([points, -halves])
    bounds = halves - (reach[:, None] ** 2 + 2) / 2  # a little more: float32 rounds
    comparison = _Comparison(thumbnails, limits)
    wasted, unfinished = 0, 0
    for start in range(0, count, ROWS):
        rows = slice(start, min(start + ROWS, count))
        end = np.searchsorted(heights, heights[rows.stop - 1] + reach[rows].max(), side="right")
        end = min(-(-int(end) // ROWS) * ROWS, count)
        share = min(1, 2 * ROWS / (count - start))  # of all pairs that are left
        most = wasted + int((MAX_WASTED - wasted) * share)
        crowded = False
        for begin in range(start, end, COLUMNS):
            columns = slice(begin, min(begin + COLUMNS, end))
            if crowded:  # the tests that follow are quick, and enough
                near = np.ones((rows.stop - rows.start, columns.stop - columns.start), dtype=bool)
            else:
                near = left[rows] @ right[columns].T >= bounds[rows]  # ab - b^2/2 >= a^2/2 - reach^2/2
                crowded = np.count_nonzero(near) > near.size // 2
            wasted += comparison.join(near, rows, columns, most - wasted)
            if wasted >= most:
                unfinished += rows.stop - rows.start
                break
        if progress is not None:
            progress(rows.stop, count)
    found = np.empty_like(comparison.group)
    found[order] = order[comparison.group]
    return found.tolist(), unfinished


def _points(thumbnails: np.ndarray) -> np.ndarray:
    """float32 [n, DIRECTIONS]: in the directions in which thumbnails vary most, the foremost first."""
    points = thumbnails.astype(np.float32)
    points[:, LUMA:] *= COLOUR_WEIGHT
    points -= points.sum(axis=0) / max(1, len(points))
    return points @ np.linalg.eigh(points.T @ points)[1][:, : -DIRECTIONS - 1 : -1]


def _reach(limits: np.ndarray) -> np.ndarray:
    """How far from each other the points of thumbnails of these limits can be that look the same: float32 [n]."""
    luma = LUMA * np.minimum(limits, MAX_RMS_DIFFERENCE) ** 2
    colour = (BYTES - LUMA) * (COLOUR_WEIGHT * MAX_COLOUR_DIFFERENCE) ** 2
    return np.sqrt(luma + colour).astype(np.float32)


class _Comparison:
    """Thumbnails and the group of each: the number of one of its members."""

    def __init__(self, thumbnails: np.ndarray, limits: np.ndarray) -> None:
        self.thumbnails, self.limits = thumbnails, limits
        self.group = np.arange(len(thumbnails), dtype=np.int32)
        self._codes: dict[tuple[int, int], np.ndarray] = {}

    def join(self, near: np.ndarray, rows: slice, columns: slice, most: int) -> int:
        """Makes the groups of near pairs, bool [rows, columns], one where they look the same.

        Ends early once `most` pairs were compared that do not. Returns how many were.
        """
        if rows.start == columns.start:
            near = np.triu(near, 1)  # each pair once
        many = np.count_nonzero(near) > FEW
        step = STRIP if many else len(near)
        wasted, done = 0, 0
        for top in range(0, len(near), step):
            bottom = min(top + step, len(near))
            if many:
                self._thin_out(near[top:bottom], slice(rows.start + top, rows.start + bottom), columns)
            if bottom < len(near) and np.count_nonzero(near[done:bottom]) <= FEW:
                continue  # few at a time are slow to compare
            first, second = np.divmod(np.flatnonzero(near[done:bottom]), near.shape[1])
            wasted += self._compare(first + rows.start + done, second + columns.start, most - wasted)
            if wasted >= most:
                break
            done = bottom
        return wasted

    def _thin_out(self, near: np.ndarray, rows: slice, columns: slice) -> None:
        """Takes out of the near pairs those of one group, and most of those that do not look the same."""
        # Thousands of copies of one picture need not all be compared with each other, but only until they are joined.
        near &= self.group[rows, None] != self.group[columns]
        limit = int(self.limits[rows].max())
        for phase in (0, limit // 2):
            if np.count_nonzero(near) <= near.size // 256:
                return
            low, high = self._code(limit, phase)
            opposite = low[rows, None] ^ low[columns]
            opposite &= high[rows, None] ^ high[columns]
            near &= opposite == 0

    def _code(self, limit: int, phase: int) -> np.ndarray:
        """Two numbers of 64 bits for each thumbnail, uint64 [2, n], one bit for each place of its brightness.

        Levels are dealt out in turn to four classes, `limit` levels at a time, whose bits are 00, 01, 11, 10. Where
        both bits differ a whole class lies between, and the levels differ by more than the limit.
        """
        if (limit, phase) not in self._codes:
            turn = (self.thumbnails[:, :LUMA].astype(np.uint16) + phase) // limit % 4
            bits = np.stack([(turn == 1) | (turn == 2), turn >= 2])
            self._codes[limit, phase] = np.packbits(bits, axis=-1).view(np.uint64)[..., 0]
        return self._codes[limit, phase]

    def _compare(self, a: np.ndarray, b: np.ndarray, most: int) -> int:
        """Joins those of the pairs that look the same, and returns how many do not; `most` of these end it."""
        wasted = 0
        for start in range(0, len(a), FEW):
            first, second = a[start : start + FEW], b[start : start + FEW]
            apart = self.group[first] != self.group[second]
            first, second = first[apart], second[apart]
            same = _look_the_same(self.thumbnails[first], self.thumbnails[second])
            if same.any():
                _unite(self.group, first[same], second[same])
            wasted += len(same) - np.count_nonzero(same)
            if wasted >= most:
                return most  # the rest of a batch is not to the cost of those that follow
        return wasted


def _unite(group: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    for first, second in zip(a.tolist(), b.tolist(), strict=True):
        while group[first] != first:
            first = group[first]
        while group[second] != second:
            second = group[second]
        group[max(first, second)] = min(first, second)
    while (group[group] != group).any():
        group[:] = group[group]


def _look_the_same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Whether thumbnails, uint8 [n, BYTES], show the same picture: bool [n]."""
    difference = np.maximum(a, b) - np.minimum(a, b)
    luma, colour = difference[:, :LUMA], difference[:, LUMA:]
    limit = np.minimum(_limits(a), _limits(b))
    same = (luma <= limit[:, None]).all(axis=1) & (colour <= MAX_COLOUR_DIFFERENCE).all(axis=1)
    same[same] = np.square(luma[same], dtype=np.int32).mean(axis=1) <= MAX_RMS_DIFFERENCE**2
    return same


def _limits(thumbnails: np.ndarray) -> np.ndarray:
    """By how many levels the brightness may differ anywhere, of uint8 [n, BYTES]: uint8 [n]."""
    return np.clip(_contrast(thumbnails) * MAX_RELATIVE_DIFFERENCE, MIN_DIFFERENCE, MAX_DIFFERENCE).astype(np.uint8)


def _contrast(thumbnails: np.ndarray) -> np.ndarray:
    """Between the darkest and the brightest of 8x8 places, of uint8 [n, BYTES]: uint8 [n]."""
    return np.ptp(thumbnails[:, :LUMA], axis=1)
