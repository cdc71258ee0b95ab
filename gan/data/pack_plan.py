"""What is to be packed, as far as the first bytes of every image and the labels tell: before any long work."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import PIL.Image

from gan.data.label_files import choose_labels
from gan.data.label_matching import Label, Labels
from gan.data.normalise import is_grey
from gan.data.pack_options import CHANNELS, PackOptions
from gan.data.process_pool import Failed, in_processes
from gan.data.read_errors import reason
from gan.data.sources import Header, Source
from gan.data.transforms import is_too_small, output_size
from gan.errors import GanError, printable
from gan.image_size import Size, is_trainable, largest_trainable

Skipped = tuple[str, str]  # name of an image, and why it is left out
Progress = Callable[[str, int, int], None]  # what is being done, images done, images in all

_FORMAT = 1  # to be raised when packing an image gives other pixels than before
_CHUNK = 64  # headers that a process reads at a time


@dataclass(frozen=True)
class Plan:
    """Which images of a source are packed, and as what."""

    source: Source
    options: PackOptions
    headers: dict[int, Header]
    """of the images that are packed, by their index in the source, in order"""
    size: Size | None
    """width and height of what is made; None: images stay as they are, whatever their sizes are"""
    mode: str
    """L, RGB or RGBA"""
    labels: Labels | None
    skipped: list[Skipped]
    """what is known to be left out"""

    def label(self, index: int) -> Label | None:
        """The label of an image; None if there are no labels."""
        return None if self.labels is None else self.labels.by_name[self.source.names[index]]

    def key(self) -> str:
        """Hex digest of all that decides what the packed images are: the files, which of them, options and programs."""
        o = self.options
        what = [_FORMAT, PIL.__version__, self.source.fingerprint(), self.size, self.mode]
        what += [o.effective_transform, o.resolution, o.resize_filter, o.background_rgb]
        digest = hashlib.sha256(repr(what).encode())
        digest.update(np.array(list(self.headers), dtype="<i8").tobytes())
        return digest.hexdigest()


def make_plan(
    source: Source, options: PackOptions, workers: int, to_look: bool = False, progress: Progress | None = None
) -> Plan:
    """Read the headers of all images, or until there are `max_images`, and choose.

    Args:
        to_look: nothing will be packed. There may be no usable image, and without a resolution they may have any sizes.

    Raises GanError where none can be used, where labels are missing altogether, or where the images differ in size
    or have a size that cannot be trained on and no resolution was given.
    """
    PIL.Image.init()  # here once, and not in every process
    labels = choose_labels(source, options.labels)
    headers: dict[int, Header] = {}
    skipped: list[Skipped] = [*source.lost]
    total = len(source) if options.max_images is None else min(options.max_images, len(source))
    for index, header in enumerate(_headers(source, workers)):
        problem = header if isinstance(header, str) else _unfit(source.names[index], header, options, labels)
        if problem is not None:
            skipped.append((source.names[index], problem))
        else:
            assert isinstance(header, Header)
            headers[index] = header
        if progress is not None:
            progress("reading headers", min(index + 1, total), total)
        if len(headers) == total:
            break
    if skipped:
        source.check()  # otherwise these are not the fault of the images
    if not headers and not to_look:
        raise nothing_usable(source, skipped)
    size = None
    if options.resolution is not None:
        size = output_size(options.effective_transform, options.resolution)
    elif not to_look:
        size = _common_size(source, headers)
    mode = CHANNELS[options.channels] or _common_mode(headers, options)
    return Plan(source, options, headers, size, mode, labels, skipped)


def nothing_usable(source: Source, skipped: Sequence[Skipped]) -> GanError:
    """The error for a source of which no image could be used."""
    name, why = skipped[0]
    return GanError(
        f"--source {source.name}: none of its {len(skipped)} images can be used; the first, {printable(name)}: {why}; "
        "mend the files or name another source"
    )


def _headers(source: Source, workers: int) -> Iterator[Header | str]:
    """Of every image, in order; a text says why there is none."""
    chunks = [range(i, min(i + _CHUNK, len(source))) for i in range(0, len(source), _CHUNK)]
    reader = _HeaderReader(source)
    with contextlib.closing(in_processes(reader, chunks, workers)) as results:
        for chunk, found in results:
            if not isinstance(found, Failed):
                yield from found
                continue
            # One of them ended the process: it is found, and named, by giving each a call of its own.
            for _, one in in_processes(reader, [range(i, i + 1) for i in chunk], min(workers, 1)):
                yield one.reason if isinstance(one, Failed) else one[0]


@dataclass(frozen=True)
class _HeaderReader:
    source: Source

    def __call__(self, indices: range) -> list[Header | str]:
        found: list[Header | str] = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of harmless oddities file by file
            for index in indices:
                try:
                    found.append(self.source.header(index))
                except Exception as error:  # decoders raise almost anything for a damaged file
                    found.append(reason(error))
        return found


def _unfit(name: str, header: Header, options: PackOptions, labels: Labels | None) -> str | None:
    """Why an image that can be read is left out all the same."""
    if labels is not None and name not in labels.by_name:
        return f"has no label in {labels.origin}"
    if options.resolution is not None and is_too_small(options.effective_transform, header[1:], options.resolution):
        return f"too small for {options.effective_transform} ({header.width}x{header.height} pixels)"
    return None


def _common_mode(headers: dict[int, Header], options: PackOptions) -> str:
    """L if that holds all colours that there will be, otherwise RGB."""
    modes = {header.mode for header in headers.values()}
    red, green, blue = options.background_rgb
    background_shows = options.effective_transform == "fit" or any("a" in mode.lower() for mode in modes)
    grey = all(map(is_grey, modes)) and (red == green == blue or not background_shows)
    return "L" if grey else "RGB"


def _common_size(source: Source, headers: dict[int, Header]) -> Size:
    """The size that all images share. Raises GanError that names the first image that stands in the way."""
    sizes = {index: (header.width, header.height) for index, header in headers.items()}
    common = Counter(sizes.values()).most_common(1)[0][0]
    side = 2 ** (largest_trainable((min(common), min(common)))[0].bit_length() - 1)
    remedy = f"give a size, such as --resolution {side}x{side}, which crops and scales"
    odd = [index for index, size in sizes.items() if size != common]
    if odd:
        width, height = sizes[odd[0]]
        found = f"{printable(source.names[odd[0]])} is {width}x{height}, but most images are {common[0]}x{common[1]}"
        raise GanError(f"--source {source.name}: {found} ({len(odd)} of {len(sizes)} differ); {remedy}")
    if not is_trainable(common):
        first = printable(source.names[next(iter(sizes))])
        found = f"{first} is {common[0]}x{common[1]}, which is no small size doubled some times, as training needs"
        raise GanError(f"--source {source.name}: {found}; {remedy}")
    return common
