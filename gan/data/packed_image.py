"""One image on its way into a dataset: decoded once, brought to its size, encoded, and hashed to find duplicates."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from gan.data.contact_sheet import MAX_SIDE
from gan.data.duplicates import perceptual_hash
from gan.data.normalise import has_alpha, profile_problem, to_8bit
from gan.data.pack_plan import Plan
from gan.data.png import encode_png
from gan.data.process_pool import BUDGET, Failed, in_processes
from gan.data.read_errors import reason
from gan.data.transforms import make_transform
from gan.errors import GanError
from gan.memory import available_bytes

# Decoding, compositing and turning hold an image a few times over, with up to four bytes a pixel.
_BYTES_PER_PIXEL = 16
_BYTES_PER_PACKED_PIXEL = 8  # the PNG here and in its process
_SHARE_OF_MEMORY = 0.4  # of what is free, for images that are being worked on


@dataclass(frozen=True)
class PackedImage:
    """What became of an image of the source: it was left out, or these are its digests."""

    index: int
    problem: str | None = None
    """why it is left out"""
    digest: str = ""
    """of the pixels as packed, hex"""
    perceptual_hash: int = 0
    """of the pixels as packed"""
    transparent: bool = False
    """the original is, or may be, somewhere"""
    bad_profile: str | None = None
    """what is wrong with its colour profile, which is then ignored"""
    png: bytes | None = field(default=None, repr=False)
    may_pass: bool = False
    """the problem may be one of the machine, such as its memory or a disk, and not of the image"""

    def record(self) -> dict[str, Any]:
        """What is to be known of it later, for JSON."""
        if self.problem is not None:
            return {"index": self.index, "problem": self.problem}
        record = {"index": self.index, "digest": self.digest, "perceptual_hash": f"{self.perceptual_hash:x}"}
        if self.transparent:
            record["transparent"] = True
        if self.bad_profile is not None:
            record["bad_profile"] = self.bad_profile
        return record

    @staticmethod
    def of(record: Mapping[str, Any]) -> PackedImage:
        """The inverse of `record`."""
        values = dict(record)
        if "perceptual_hash" in values:
            values["perceptual_hash"] = int(values["perceptual_hash"], 16)
        return PackedImage(**values)


@dataclass(frozen=True)
class ImagePacker:
    """Packs an image of a plan; to be called in worker processes with its index.

    Args:
        thumbnails_of: nothing is packed, and of these images there is a PNG small enough for a contact sheet.
    """

    plan: Plan
    thumbnails_of: frozenset[int] | None = None

    def __call__(self, index: int) -> PackedImage:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of harmless oddities file by file
                return self._packed(index)
        except Exception as error:  # decoders raise almost anything for a damaged file: it never ends the work
            of_machine = isinstance(error, (MemoryError, GanError)) or (isinstance(error, OSError) and error.errno)
            return PackedImage(index, reason(error), may_pass=bool(of_machine))

    def _packed(self, index: int) -> PackedImage:
        o = self.plan.options
        with self.plan.source.read(index) as image:
            upright = to_8bit(image, self.plan.mode, o.background_rgb)
            transparent, bad_profile = has_alpha(image), profile_problem(image)
        transform = make_transform(o.effective_transform, o.resolution, o.resize_filter, o.background_rgb)
        pixels = np.ascontiguousarray(transform(upright))
        made, size = (pixels.shape[1], pixels.shape[0]), self.plan.size
        if size is not None and made != size:
            return PackedImage(index, f"is {made[0]}x{made[1]}, unlike its header says")
        digest = hashlib.sha1(repr(pixels.shape).encode(), usedforsecurity=False)  # the quickest of the good ones
        digest.update(pixels.data)
        hash_ = perceptual_hash(Image.fromarray(pixels))
        return PackedImage(index, None, digest.hexdigest(), hash_, transparent, bad_profile, self._png(index, pixels))

    def _png(self, index: int, pixels: np.ndarray) -> bytes | None:
        if self.thumbnails_of is None:
            return encode_png(pixels)
        if index not in self.thumbnails_of:
            return None
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((MAX_SIDE, MAX_SIDE))
        return encode_png(np.asarray(thumbnail))


def packed_images(
    packer: ImagePacker, indices: Sequence[int], workers: int, report: Callable[[str], None] | None = None
) -> Iterator[PackedImage]:
    """What became of these images, in order, computed ahead by worker processes."""
    headers = packer.plan.headers

    def weight(index: int) -> int:
        header = headers[index]
        width, height = packer.plan.size or (0, 0)
        return _BYTES_PER_PIXEL * header.width * header.height + _BYTES_PER_PACKED_PIXEL * width * height

    budget = int(_SHARE_OF_MEMORY * available_bytes()) or BUDGET
    with contextlib.closing(in_processes(packer, indices, workers, weight, budget, report=report)) as results:
        for index, result in results:
            image = _image(index, result)
            if image.may_pass:  # a disk that is slow, or memory that others took: once more, alone
                packer.plan.source.check()
                ((_, result),) = in_processes(packer, [index], min(workers, 1))
                image = _image(index, result)
            yield image


def _image(index: int, result: PackedImage | Failed) -> PackedImage:
    """Of what a process answered. One that died may have done so by its image or by what the machine lacked."""
    return PackedImage(index, result.reason, may_pass=True) if isinstance(result, Failed) else result
