"""A scan in words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from gan.data.scanning import Scan
from gan.data.sources import count_by_suffix

MAX_LISTED = 100  # files left out that are listed by name
_FEW = 5


def scan_lines(scan: Scan, listed_in: str | None) -> list[str]:
    """What a scan found and what becomes of it. `listed_in`: the file that lists all that is left out; None: here."""
    lines = [
        f"{scan.source}: {_count(scan.num_images, 'image')}, {scan.num_usable:,} usable",
        f"  sizes       {_frequent(scan.sizes)}",
        f"  modes       {_frequent(scan.modes)}",
    ]
    if scan.labels_from is not None:
        classes = f": {_frequent(scan.class_counts, 12)}" if scan.class_counts else ""
        number = f"{_count(len(scan.class_counts), 'class', 'es')} " if scan.class_counts else ""
        lines.append(f"  labels      {number}from {scan.labels_from}{classes}")
    if scan.transparent and scan.mode != "RGBA":
        lines.append(
            f"  transparent {_count(scan.transparent, 'image')}, laid on --background; --channels rgba keeps them so"
        )
    if scan.bad_profiles:
        worst = [f"{name} ({problem})" for name, problem in scan.bad_profiles.items()]
        lines.append(
            f"  profiles    of {_count(len(worst), 'image')} ignored, colours kept as they are: {_some(worst)}"
        )
    if scan.enlarged:
        worst = [f"{name} ({factor:.2f} times)" for name, factor in scan.enlarged.items()]
        lines.append(f"  enlarged    {_count(len(worst), 'image')}, kept: {_some(worst)}")
    if scan.distorted:
        lines.append(f"  distorted   {_count(scan.distorted, 'image')}, kept; --transform center-crop or fit does not")
    for word, groups in (("equal", scan.exact_duplicates), ("look alike", scan.near_duplicates)):
        if groups:
            extra = sum(map(len, groups)) - len(groups)
            shown = _some([" = ".join(_short(group)) for group in groups], 3, "; ")
            lines.append(f"  {word:<11} {_count(extra, 'image')} more than once, kept: {shown}")
    if scan.label_conflicts:
        shown = _some([" = ".join(_short(group)) for group in scan.label_conflicts], 3, "; ")
        lines.append(f"  labels      differ between images that look alike, kept: {shown}")
    if scan.label_problems:
        lines.append(f"  labels      {_count(len(scan.label_problems), 'problem')}, passed over:")
        lines += _listed(scan.label_problems, listed_in)
    if scan.skipped:
        lines.append(f"  LEFT OUT    {_count(len(scan.skipped), 'image')}:")
        lines += _listed([f"{name}: {reason}" for name, reason in scan.skipped], listed_in)
    if scan.ignored:
        kinds = [f"{count:,} x {kind}" for kind, count in count_by_suffix(scan.ignored).items()]
        are = "that is no image" if len(scan.ignored) == 1 else "that are no images"
        lines.append(f"  ignored     {_count(len(scan.ignored), 'file')} {are} ({_some(kinds)})")
    lines += [f"  note        {note}" for note in scan.notes]
    return lines


def _listed(items: Sequence[str], listed_in: str | None) -> list[str]:
    shown = len(items) if listed_in is None else MAX_LISTED
    lines = [f"    {item}" for item in items[:shown]]
    if len(items) > shown:
        lines.append(f"    and {len(items) - shown:,} more, all of them in {listed_in}")
    return lines


def _frequent(counts: Mapping[str, int], few: int = _FEW) -> str:
    """`400x533 (1,203), 533x400 (302) and 4 others (12)`."""
    common = Counter(counts).most_common(few) if few == _FEW else list(counts.items())[:few]
    shown = ", ".join(f"{name} ({count:,})" for name, count in common)
    rest = sum(counts.values()) - sum(count for _, count in common)
    return f"{shown} and {len(counts) - few} others ({rest:,})" if len(counts) > few else shown


def _some(items: Sequence[str], few: int = _FEW, between: str = ", ") -> str:
    return between.join(items[:few]) + (f"{between}..." if len(items) > few else "")


def _short(names: Sequence[str]) -> list[str]:
    return [*names[:3], f"{len(names) - 3} more"] if len(names) > 3 else list(names)


def _count(number: int, thing: str, plural: str = "s") -> str:
    return f"{number:,} {thing}{'' if number == 1 else plural}"
