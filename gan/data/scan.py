"""Looking at every image's first bytes, so that a bad file or setting is known before any work is done."""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, UnidentifiedImageError

from gan.data.sources import Header, Source
from gan.data.transforms import Size, is_grey, is_too_small, output_size
from gan.errors import GanError

MIN_SIDE = 4  # the generator starts from 4 x 4 pixels

Skipped = tuple[str, str]  # name of an image, and why it is left out
Progress = Callable[[str, int, int], None]  # "scanning" or "packing", images done, images in all


@dataclass(frozen=True)
class Scan:
    """What can be packed from a source: which images, how large, in which mode ("L" or "RGB"), and what is left out."""

    indices: list[int]
    size: Size
    mode: str
    skipped: list[Skipped]


def scan(
    source: Source,
    resolution: Size | None = None,
    transform: str = "none",
    max_images: int | None = None,
    progress: Progress | None = None,
) -> Scan:
    """Choose the first `max_images` usable images of the source by their headers.

    Raises GanError where none is usable, where the images differ in size or have a size that cannot be trained on
    and no resolution was given, or where only some of the images have labels.
    """
    total = len(source) if max_images is None else min(max_images, len(source))
    headers: dict[int, Header] = {}
    skipped: list[Skipped] = []
    for index, name in enumerate(source.names):
        if len(headers) == total:
            break
        if progress is not None:
            progress("scanning", min(index + 1, total), total)
        try:
            header = source.header(index)
        except Exception as error:  # decoders raise almost anything for a damaged file; the others must still be packed
            skipped.append((name, reason(error)))
            continue
        if resolution is not None and is_too_small(transform, header[1:], resolution):
            skipped.append((name, f"too small for {transform} ({header.width}x{header.height} pixels)"))
            continue
        headers[index] = header
    if not headers:
        raise nothing_readable(source, skipped)
    _check_labels(source, list(headers))
    size = _common_size(source, headers) if resolution is None else output_size(transform, resolution)
    mode = "L" if all(is_grey(header.mode) for header in headers.values()) else "RGB"
    return Scan(list(headers), size, mode, skipped)


def is_trainable(size: Size) -> bool:
    """Whether a network can be built for images of this size: square, and a power of two."""
    width, height = size
    return width == height and width >= MIN_SIDE and width & (width - 1) == 0


def trainable_side(side: int) -> int:
    """The largest side up to `side` that can be trained on; the smallest there is where there is none."""
    return max(MIN_SIDE, 1 << (side.bit_length() - 1))


def nothing_readable(source: Source, skipped: list[Skipped]) -> GanError:
    """The error for a source of which no image could be used."""
    name, why = skipped[0]
    return GanError(
        f"--source {source.name}: none of its {len(skipped)} images can be used; the first, {name}: {why}; "
        "mend the files or name another source"
    )


def reason(error: Exception) -> str:
    """Why an image could not be read, in a few words on one line."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image, or damaged at its start"
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {2 * (Image.MAX_IMAGE_PIXELS or 0) // 10**6} million pixels; scale it down first"
    if isinstance(error, zipfile.BadZipFile):
        return "damaged inside the zip file"
    if isinstance(error, OSError) and "truncated" in str(error).lower():
        return "truncated: its end is missing"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, MemoryError):
        return "too large for the memory of this machine"
    return f"cannot be decoded ({' '.join(str(error).split())[:120] or type(error).__name__})"


def _common_size(source: Source, headers: dict[int, Header]) -> Size:
    """The size that all images share. Raises GanError that names the first image that stands in the way."""
    sizes = {index: (header.width, header.height) for index, header in headers.items()}
    common = Counter(sizes.values()).most_common(1)[0][0]
    side = trainable_side(min(common))
    remedy = f"give a size and a crop, such as --resolution {side}x{side} --transform center-crop"
    odd = [index for index, size in sizes.items() if size != common]
    if odd:
        width, height = sizes[odd[0]]
        found = f"{source.names[odd[0]]} is {width}x{height}, but most images are {common[0]}x{common[1]}"
        raise GanError(f"--source {source.name}: {found} ({len(odd)} of {len(sizes)} differ); {remedy}")
    if not is_trainable(common):
        first = source.names[next(iter(sizes))]
        found = f"{first} is {common[0]}x{common[1]}, but training needs squares with a power of two as their side"
        raise GanError(f"--source {source.name}: {found}; {remedy}")
    return common


def _check_labels(source: Source, indices: list[int]) -> None:
    if source.labels is None:
        return
    missing = [source.names[index] for index in indices if source.names[index] not in source.labels]
    if missing:
        raise GanError(
            f"--source {source.name}: its dataset.json has no label for {missing[0]} "
            f"({len(missing)} of {len(indices)} images lack one); add the rows, or delete dataset.json"
        )
