"""A scan in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gan.data.image_files import count_by_suffix
from gan.data.scan_result import Scan, counted

MAX_LISTED = 100  # files left out that are listed by name
_FEW, _CLASSES = 5, 12


def scan_lines(scan: Scan, listed_in: str | None) -> list[str]:
    """What a scan found and what becomes of it. `listed_in`: the file that lists all that is left out; None: here."""
    lines = [f"{scan.source}: {counted(scan.num_images, 'image')}, {scan.num_usable:,} usable"]

    def say(topic: str, text: str) -> None:
        lines.append(f"  {topic:<11} {text}")

    if scan.num_usable:
        say("sizes", _frequent(scan.sizes))
        say("modes", _frequent(scan.modes))
    if scan.labels_from is not None:
        kind = f"{counted(scan.label_width, 'number')} each " if scan.label_width is not None else ""
        if scan.class_counts:
            kind = f"{counted(len(scan.class_counts), 'class', 'es')} "
        shares = f": {_frequent(scan.class_counts, _CLASSES)}" if scan.class_counts else ""
        say("labels", f"{kind}from {scan.labels_from}{shares}")
        if empty := sum(not count for count in scan.class_counts.values()):
            say("", f"{counted(empty, 'class', 'es')} of these without an image")
    if scan.transparent and scan.mode != "RGBA":
        say("transparent", f"{counted(scan.transparent, 'image')}, laid on --background; --channels rgba keeps them so")
    if scan.bad_profiles:
        worst = [f"{name} ({problem})" for name, problem in scan.bad_profiles.items()]
        say("profiles", f"of {counted(len(worst), 'image')} ignored, colours kept as they are: {_some(worst)}")
    if scan.enlarged:
        worst = [f"{name} ({factor:.2f} times)" for name, factor in scan.enlarged.items()]
        say("enlarged", f"{counted(len(worst), 'image')}, kept: {_some(worst)}")
    if scan.distorted:
        say("distorted", f"{counted(scan.distorted, 'image')}, kept; --transform center-crop or fit does not distort")
    for topic, groups in (("equal", scan.exact_duplicates), ("look alike", scan.near_duplicates)):
        if groups:
            say(
                topic,
                f"{counted(sum(map(len, groups)) - len(groups), 'image')} more than once, kept: {_groups(groups)}",
            )
    if scan.label_conflicts:
        say("conflicts", f"labels differ between images that look alike, kept: {_groups(scan.label_conflicts)}")
    if scan.label_problems:
        say("bad labels", f"{len(scan.label_problems):,}:")
        lines += _listed(scan.label_problems, listed_in)
    if scan.skipped:
        say("LEFT OUT", f"{counted(len(scan.skipped), 'image')}:")
        lines += _listed([f"{name}: {reason}" for name, reason in scan.skipped], listed_in)
    if scan.ignored:
        kinds = [f"{count:,} x {kind}" for kind, count in count_by_suffix(scan.ignored).items()]
        are = "that is no image" if len(scan.ignored) == 1 else "that are no images"
        say("ignored", f"{counted(len(scan.ignored), 'file')} {are} ({_some(kinds)})")
    for note in scan.notes:
        say("note", note)
    return lines


def _listed(items: Sequence[str], listed_in: str | None) -> list[str]:
    shown = len(items) if listed_in is None else MAX_LISTED
    lines = [f"    {item}" for item in items[:shown]]
    if len(items) > shown:
        lines.append(f"    and {len(items) - shown:,} more, all of them in {listed_in}")
    return lines


def _frequent(counts: Mapping[str, int], few: int = _FEW) -> str:
    """`400x533 (1,203), 533x400 (302) and 4 others (12)`: the first few of the counts."""
    shown = ", ".join(f"{name} ({count:,})" for name, count in list(counts.items())[:few])
    rest = list(counts.values())[few:]
    return f"{shown} and {counted(len(rest), 'other')} ({sum(rest):,})" if rest else shown


def _some(items: Sequence[str], few: int = _FEW, between: str = ", ") -> str:
    return between.join(items[:few]) + (f"{between}..." if len(items) > few else "")


def _groups(groups: Sequence[Sequence[str]]) -> str:
    """`a.jpg = b.jpg; c.jpg = d.jpg`."""
    short = [[*group[:3], f"{len(group) - 3} more"] if len(group) > 3 else group for group in groups]
    return _some([" = ".join(group) for group in short], 3, "; ")
