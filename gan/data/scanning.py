"""Looking at every image of a plan: the one pass that decodes them all, and what it found."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import posixpath
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from gan.data.duplicates import near_duplicates, perceptual_hash
from gan.data.label_files import Label
from gan.data.normalise import has_alpha, profile_problem, to_8bit
from gan.data.plan import Plan, Progress, Skipped
from gan.data.png import encode_png
from gan.data.processes import BUDGET, Failed, in_processes
from gan.data.read_errors import reason
from gan.data.sources import LABEL_FILE
from gan.data.transforms import Transform, enlargement, make_transform
from gan.image_size import Size
from gan.memory import available_bytes

# Decoding, compositing and turning hold an image a few times over, with up to four bytes a pixel.
_BYTES_PER_PIXEL = 16
_THUMBNAIL = 256
_SHARE_OF_MEMORY = 0.4  # of what is free, for images that are being worked on


@dataclass(frozen=True)
class Look:
    """What became of one image. Either it was left out, or there are digests."""

    index: int
    problem: str | None = None
    pixels: str = ""
    """hex digest of the pixels that are packed"""
    shape: int = 0
    """perceptual hash of the upright image"""
    transparent: bool = False
    """or may be"""
    profile: str | None = None
    """what is wrong with its colour profile, which is then ignored"""
    png: bytes | None = field(default=None, repr=False)

    def record(self) -> dict[str, Any]:
        """All but the image, for JSON."""
        if self.problem is not None:
            return {"index": self.index, "problem": self.problem}
        record = {"index": self.index, "pixels": self.pixels, "shape": f"{self.shape:x}"}
        if self.transparent:
            record["transparent"] = True
        if self.profile is not None:
            record["profile"] = self.profile
        return record

    @staticmethod
    def of(record: Mapping[str, Any]) -> Look:
        """The inverse of `record`."""
        if "problem" in record:
            return Look(record["index"], record["problem"])
        shape, transparent = int(record["shape"], 16), record.get("transparent", False)
        return Look(record["index"], None, record["pixels"], shape, transparent, record.get("profile"))


@dataclass(frozen=True)
class Looker:
    """Decodes, transforms, hashes and encodes an image; to be called in worker processes with an index.

    Args:
        thumbnails_of: nothing is packed, and of these images there is a PNG of at most 256 pixels each way.
    """

    plan: Plan
    thumbnails_of: frozenset[int] | None = None

    def __call__(self, index: int) -> Look:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Pillow warns of harmless oddities file by file
                return self._look(index)
        except Exception as error:  # decoders raise almost anything for a damaged file: it never ends the work
            return Look(index, reason(error))

    def _look(self, index: int) -> Look:
        with self.plan.source.read(index) as image:
            upright = to_8bit(image, self.plan.mode, self.plan.options.colour)
            transparent, profile = has_alpha(image), profile_problem(image)
        pixels = self._transform(upright)
        made, size = (pixels.shape[1], pixels.shape[0]), self.plan.size
        if size is not None and made != size:
            return Look(index, f"is {made[0]}x{made[1]}, unlike its header says")
        digest = hashlib.sha1(repr(pixels.shape).encode(), usedforsecurity=False)  # the quickest of the good ones
        digest.update(np.ascontiguousarray(pixels).data)
        shape, png = perceptual_hash(upright), self._png(index, pixels)
        return Look(index, None, digest.hexdigest(), shape, transparent, profile, png)

    def _png(self, index: int, pixels: np.ndarray) -> bytes | None:
        if self.thumbnails_of is None:
            return encode_png(pixels)
        if index not in self.thumbnails_of:
            return None
        thumbnail = Image.fromarray(pixels)
        thumbnail.thumbnail((_THUMBNAIL, _THUMBNAIL))
        return encode_png(np.asarray(thumbnail))

    @functools.cached_property
    def _transform(self) -> Transform:
        o = self.plan.options
        return make_transform(o.how, o.resolution, o.resize_filter, o.colour)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "plan": self.plan,
            "thumbnails_of": self.thumbnails_of,
        }  # functions made here cannot be sent to a process


def look_at(
    looker: Looker, indices: Sequence[int], workers: int, report: Callable[[str], None] | None = None
) -> Iterator[Look]:
    """What became of these images, in order, computed ahead by worker processes."""
    headers = looker.plan.headers

    def weight(index: int) -> int:
        return _BYTES_PER_PIXEL * headers[index].width * headers[index].height

    free = int(_SHARE_OF_MEMORY * available_bytes()) or BUDGET
    with contextlib.closing(in_processes(looker, indices, workers, weight, free, report=report)) as results:
        for index, look in results:
            if isinstance(look, Failed):  # its process died: by its fault, or by that of whatever ate the memory
                ((_, look),) = in_processes(looker, [index], min(workers, 1))
            yield Look(index, look.reason) if isinstance(look, Failed) else look


@dataclass(frozen=True)
class Scan:
    """What is in a source, and what of it can be packed. Images are named as in the source."""

    source: str
    num_images: int
    """that were looked at, those left out among them"""
    num_usable: int
    size: Size | None
    """width and height as packed; None: of several sizes, as they are"""
    mode: str
    """L, RGB or RGBA, as packed"""
    sizes: dict[str, int]
    """WxH of the originals, upright: how many, the most frequent first"""
    modes: dict[str, int]
    """Pillow's modes of the originals"""
    skipped: list[Skipped]
    """what is left out, and why"""
    exact_duplicates: list[list[str]]
    """groups that are equal in every pixel as packed"""
    near_duplicates: list[list[str]]
    """groups that look alike, and are not equal in every pixel"""
    label_conflicts: list[list[str]]
    """those of both kinds whose labels differ"""
    enlarged: dict[str, float]
    """images that are smaller than what is packed: by how much they are enlarged"""
    distorted: int
    """images whose proportions change"""
    transparent: int
    """images that are, or may be, transparent somewhere"""
    bad_profiles: dict[str, str]
    """images whose colour profile is ignored, and why"""
    labels_from: str | None
    class_counts: dict[str, int]
    """images of each class"""
    label_problems: list[str]
    ignored: list[str]
    """files that are no images"""
    notes: list[str]
    """what else is to be known of the source"""

    @property
    def num_problems(self) -> int:
        """What --strict does not accept: images left out, and rows of labels that are wrong."""
        return len(self.skipped) + len(self.label_problems)


def summarise(plan: Plan, looks: Sequence[Look], progress: Progress | None = None) -> Scan:
    """The result of a pass over the images of a plan."""
    names = plan.source.names
    usable = [look for look in looks if look.problem is None]
    if progress is not None:
        progress("comparing", 0, 1)
    exact = _groups(look.pixels for look in usable)
    firsts = sorted({group[0] for group in exact} | set(range(len(usable))) - {i for group in exact for i in group})
    near = [[firsts[i] for i in group] for group in near_duplicates([usable[i].shape for i in firsts])]
    if progress is not None:
        progress("comparing", 1, 1)

    def named(groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[names[usable[i].index] for i in group] for group in groups]

    def label_of(place: int) -> Label | None:
        return plan.label(usable[place].index)

    headers = {look.index: plan.headers[look.index] for look in usable}
    enlarged, distorted = {}, 0
    if plan.options.resolution is not None:
        wanted = plan.options.resolution
        for index, header in headers.items():
            factor = enlargement(plan.options.how, (header.width, header.height), wanted)
            if factor > 1:
                enlarged[names[index]] = round(factor, 2)
            if plan.options.how in ("none", "stretch"):
                share = header.width * wanted[1] / (header.height * wanted[0])
                distorted += not 0.98 < share < 1.02
    return Scan(
        source=plan.source.name,
        num_images=len(plan.headers) + len(plan.skipped),
        num_usable=len(usable),
        size=plan.size,
        mode=plan.mode,
        sizes=_counts(f"{header.width}x{header.height}" for header in headers.values()),
        modes=_counts(header.mode for header in headers.values()),
        skipped=sorted(
            plan.skipped + [(names[look.index], look.problem) for look in looks if look.problem is not None]
        ),
        exact_duplicates=named(exact),
        near_duplicates=named(near),
        label_conflicts=named([g for g in exact + near if any(label_of(i) != label_of(g[0]) for i in g)]),
        enlarged=dict(sorted(enlarged.items(), key=lambda item: -item[1])),
        distorted=distorted,
        transparent=sum(look.transparent for look in usable),
        bad_profiles={names[look.index]: look.profile for look in usable if look.profile is not None},
        labels_from=plan.labels.origin if plan.labels is not None else None,
        class_counts=_class_counts(plan, [look.index for look in usable]),
        label_problems=plan.labels.problems if plan.labels is not None else [],
        ignored=[name for name in plan.source.ignored if posixpath.basename(name) != LABEL_FILE],
        notes=plan.source.notes,
    )


def _groups(keys: Iterator[str]) -> list[list[int]]:
    """Positions of equal keys, where there are several."""
    places: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(key, []).append(i)
    return [group for group in places.values() if len(group) > 1]


def _counts(values: Iterator[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _class_counts(plan: Plan, indices: Sequence[int]) -> dict[str, int]:
    """How many images each class has; of vectors, how many have something in a column. Empty without classes."""
    if plan.labels is None:
        return {}
    counts: Counter[int] = Counter()
    for index in indices:
        label = plan.label(index)
        counts.update([label] if isinstance(label, int) else [i for i, value in enumerate(label or []) if value])
    names = plan.labels.class_names
    if names is None and any(isinstance(plan.label(index), list) for index in indices[:1]):
        return {}
    known = range(len(names)) if names is not None else sorted(counts)
    return {names[i] if names is not None else str(i): counts[i] for i in known}
