"""What was found in a source: everything that a user should know before training on it."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gan.data.dataset_files import LABEL_FILE
from gan.data.duplicates import near_duplicates
from gan.data.pack_options import PackOptions
from gan.data.pack_plan import Plan, Progress, Skipped
from gan.data.packed_image import PackedImage
from gan.data.transforms import enlargement
from gan.image_size import Size


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
    label_width: int | None
    """numbers in a label; None if labels are classes, or there are none"""
    class_counts: dict[str, int]
    """images of each class"""
    label_problems: list[str]
    ignored: list[str]
    """files that are no images"""
    notes: list[str]
    """what else is to be known of the source"""

    @property
    def num_problems(self) -> int:
        """What --strict does not accept: images left out, and bad labels."""
        return len(self.skipped) + len(self.label_problems)

    def problems_in_words(self) -> str:
        """`3 images would be left out, 1 bad label`."""
        return (
            f"{counted(len(self.skipped), 'image')} would be left out, {counted(len(self.label_problems), 'bad label')}"
        )


def counted(number: int, thing: str, plural: str = "s") -> str:
    """`1 image`, `1,900 images`."""
    return f"{number:,} {thing}{'' if number == 1 else plural}"


def summarise(plan: Plan, images: Sequence[PackedImage], progress: Progress | None = None) -> Scan:
    """The result of a pass over the images of a plan."""
    names, labels = plan.source.names, plan.labels
    usable = [image for image in images if image.problem is None]
    notes = [*plan.source.notes, *(labels.notes if labels is not None else [])]
    exact, near = _duplicates(usable, notes, progress)

    def named(groups: Sequence[Sequence[int]]) -> list[list[str]]:
        return [[names[usable[i].index] for i in group] for group in groups]

    def has_conflict(group: Sequence[int]) -> bool:
        first, *others = (plan.label(usable[i].index) for i in group)
        return any(label != first for label in others)

    headers = {names[image.index]: plan.headers[image.index] for image in usable}
    sizes = {name: (header.width, header.height) for name, header in headers.items()}
    return Scan(
        source=plan.source.name,
        num_images=len(plan.headers) + len(plan.skipped),
        num_usable=len(usable),
        size=plan.size,
        mode=plan.mode,
        sizes=_counts(f"{width}x{height}" for width, height in sizes.values()),
        modes=_counts(header.mode for header in headers.values()),
        skipped=sorted([*plan.skipped, *((names[image.index], image.problem) for image in images if image.problem)]),
        exact_duplicates=named(exact),
        near_duplicates=named(near),
        label_conflicts=named([group for group in exact + near if has_conflict(group)]),
        enlarged=_enlarged(sizes, plan.options),
        distorted=_distorted(sizes, plan.options),
        transparent=sum(image.transparent for image in usable),
        bad_profiles={names[image.index]: image.bad_profile for image in usable if image.bad_profile is not None},
        labels_from=labels.origin if labels is not None else None,
        label_width=_label_width(plan),
        class_counts=_class_counts(plan, [image.index for image in usable]),
        label_problems=labels.problems if labels is not None else [],
        ignored=[name for name in plan.source.ignored if posixpath.basename(name) != LABEL_FILE],
        notes=notes,
    )


def _duplicates(
    images: Sequence[PackedImage], notes: list[str], progress: Progress | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Places of images that are equal, and of those that look alike; the first of equal ones stands for all."""

    def compared(done: int, total: int) -> None:
        if progress is not None:
            progress("comparing", done, total)

    places: dict[str, list[int]] = {}
    for place, image in enumerate(images):
        places.setdefault(image.digest, []).append(place)
    firsts = [group[0] for group in places.values()]
    alike = near_duplicates([images[place].perceptual_hash for place in firsts], compared, notes.append)
    return [group for group in places.values() if len(group) > 1], [[firsts[i] for i in group] for group in alike]


def _enlarged(sizes: dict[str, Size], options: PackOptions) -> dict[str, float]:
    """Images that become larger, and how many times, the worst first."""
    transform, resolution = options.effective_transform, options.resolution
    if resolution is None:
        return {}
    factors = {name: enlargement(transform, size, resolution) for name, size in sizes.items()}
    return {name: round(f, 2) for name, f in sorted(factors.items(), key=lambda item: -item[1]) if f > 1}


def _distorted(sizes: dict[str, Size], options: PackOptions) -> int:
    """How many images change their proportions by more than 2 %."""
    resolution = options.resolution
    if resolution is None or options.effective_transform not in ("none", "stretch"):
        return 0
    changes = (width * resolution[1] / (height * resolution[0]) for width, height in sizes.values())
    return sum(not 0.98 < change < 1.02 for change in changes)


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _label_width(plan: Plan) -> int | None:
    first = plan.label(next(iter(plan.headers))) if plan.headers else None
    return len(first) if isinstance(first, list) else None


def _class_counts(plan: Plan, indices: Sequence[int]) -> dict[str, int]:
    """How many images each class has; of vectors, how many have something in a column. Empty without classes."""
    if plan.labels is None:
        return {}
    counts: Counter[int] = Counter()
    for index in indices:
        label = plan.label(index)
        counts.update([label] if isinstance(label, int) else [i for i, value in enumerate(label or []) if value])
    names = plan.labels.class_names
    if names is None and _label_width(plan) is not None:
        return {}
    number = len(names) if names is not None else max(counts, default=-1) + 1
    return {names[i] if names is not None else str(i): counts[i] for i in range(number)}
