"""Which sizes of image can be trained on: a small base, doubled some times (no torch)."""

from __future__ import annotations

Size = tuple[int, int]  # width, height in pixels

MIN_BASE = 4  # pixels of the shorter side of the base, where the generator starts and the discriminator ends
MAX_BASE_AREA = 256  # the discriminator's last layers have this many weights for each pair of their channels


def base_size(size: Size) -> Size:
    """The base of an image's size, `size / 2**n` for the largest n that leaves at least 4 pixels each way.

    4x4 for squares of a power of two, 6x4 for 96x64. Where nothing can be halved it is the size itself.
    """
    width, height = size
    while width % 2 == height % 2 == 0 and min(width, height) >= 2 * MIN_BASE:
        width, height = width // 2, height // 2
    return width, height


def is_trainable(size: Size) -> bool:
    """Whether networks can be built for images of this size: `(a * 2**n) x (b * 2**n)`, n >= 1, a and b at least 4,
    a * b at most 256.
    """
    width, height = base_size(size)
    return (width, height) != tuple(size) and min(width, height) >= MIN_BASE and width * height <= MAX_BASE_AREA


def nearest_trainable(size: Size) -> Size:
    """The largest trainable size that fits into `size`; 8x8 where there is none."""
    fits = [(2 * MIN_BASE, 2 * MIN_BASE)]
    for n in range(1, max(size).bit_length()):
        step = 2**n
        width, height = (side // step * step for side in size)
        if is_trainable((width, height)):
            fits.append((width, height))
        # Strips and near-squares may have no base of 256 pixels: then the longer side gives way.
        side = min(width, height)
        longest = side and MAX_BASE_AREA * step // (side // step) // step * step
        narrower = (min(width, longest), min(height, longest))
        if is_trainable(narrower):
            fits.append(narrower)
    return max(fits, key=lambda fit: fit[0] * fit[1])


def nominal_resolution(size: Size) -> int:
    """The side of the square of a power of two that an image counts as where presets ask for "the resolution": the one
    nearest in area, of two the smaller, so that it doubles when the size does.
    """
    return int(2 ** ((size[0] * size[1] - 1).bit_length() // 2))
