"""Which sizes of image can be trained on: a small base, doubled some times; and how images are described (no torch)."""

from __future__ import annotations

Size = tuple[int, int]  # width, height in pixels

IMAGE_KINDS = {1: "grey", 3: "RGB", 4: "RGBA"}  # by channels; --channels of dataset_tool.py in small letters

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


def largest_trainable(size: Size) -> Size:
    """The trainable size of the most pixels that fits into `size`; 8x8 where there is none."""
    fits = [(2 * MIN_BASE, 2 * MIN_BASE)]
    for n in range(1, max(size).bit_length()):
        fits += [(width << n, height << n) for width, height in _highest_bases((size[0] >> n, size[1] >> n))]
    return max(fits, key=lambda fit: (fit[0] * fit[1], min(fit)))


def _highest_bases(limit: Size) -> list[Size]:
    """For every width that a base can have the highest base that fits into `limit`."""
    widest = min(limit[0], MAX_BASE_AREA // MIN_BASE)
    bases = [(width, min(limit[1], MAX_BASE_AREA // width)) for width in range(MIN_BASE, widest + 1)]
    return [base for base in bases if base[1] >= MIN_BASE]


def nominal_resolution(size: Size) -> int:
    """The side of the square of a power of two that an image counts as where presets ask for "the resolution": the one
    nearest in area, of two the smaller, so that it doubles when the size does.
    """
    return int(2 ** ((size[0] * size[1] - 1).bit_length() // 2))


def describe_image(height: int, width: int, channels: int) -> str:
    """`96x64 RGBA`."""
    return f"{width}x{height} {IMAGE_KINDS[channels]}"
