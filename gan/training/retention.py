"""Which snapshots of a run stay: the newest, the best by each metric, and one in so many kimg."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path

from gan.errors import GanError
from gan.metric_names import METRICS
from gan.snapshot_names import kimg_of
from gan.tracking import measurements

_HIGHER_IS_BETTER = ("is50k", "pr50k3")  # inception score; precision and recall


def snapshots_to_remove(
    kimgs: Sequence[int], keep: int | None, keep_every: int | None, best: Collection[int]
) -> list[int]:
    """All but the newest `keep` of these snapshots, those that `keep_every` names, and the `best`.

    Args:
        kimgs: the snapshots that there are.
        keep: None keeps all; the newest stays in any case.
        keep_every: kimg, see `milestones`.
        best: snapshots that stay whatever their age.
    """
    if keep is None:
        return []
    older = sorted(kimgs)[: -max(keep, 1)]
    stay = milestones(kimgs, keep_every) | set(best)
    return [kimg for kimg in older if kimg not in stay]


def milestones(kimgs: Collection[int], keep_every: int | None) -> set[int]:
    """Of each multiple of `keep_every` kimg, 0 included, the first snapshot at or after it."""
    if keep_every is None:
        return set()
    first: dict[int, int] = {}
    for kimg in sorted(kimgs):
        first.setdefault(kimg // keep_every, kimg)
    return set(first.values())


def best_snapshots(run_dir: Path) -> set[str]:
    """By each metric in the metric-*.jsonl files of a run, the best snapshot that is still there; names of files.

    Of a metric that is known its first number counts, of others every one. Of equally good ones the newest is the best.
    Lines that are torn, or that say something else, are passed over.
    """
    there = snapshot_names(run_dir)
    known = (measurements.best(run_dir, metric, there) for metric in METRICS)
    return {found[0] for found in known if found is not None} | _best_by_others(run_dir, there)


def _best_by_others(run_dir: Path, there: Collection[str]) -> set[str]:
    """By each number of metrics that are not known."""
    best: dict[str, tuple[float, str]] = {}
    for measured in measurements.read(run_dir):
        if measured.metric in METRICS or measured.snapshot not in there:
            continue
        for name, number in measured.results.items():
            if not name.endswith("_std"):
                goodness = (number if name.startswith(_HIGHER_IS_BETTER) else -number, measured.snapshot)
                best[name] = max(goodness, best.get(name, goodness))
    return {snapshot for _, snapshot in best.values()}


def snapshots_in(run_dir: Path) -> list[int]:
    """The snapshots of a run, in kimg, oldest first."""
    return sorted(_snapshots(run_dir))


def snapshot_names(run_dir: Path) -> set[str]:
    """The names of the snapshots of a run; that of the best, which is one of them, is not among these."""
    return set(_snapshots(run_dir).values())


def prune_snapshots(run_dir: Path, keep: int | None, keep_every: int | None, in_use: Collection[str] = ()) -> list[str]:
    """Remove the snapshots of a run that are not to stay; the names of those that are gone. Sheets stay.

    Nothing that happens to one of them is an error: it is only too many.

    `in_use`: names of snapshots that stay for now.

    Raises GanError, and removes none, if a file does not say now which of them are the best.
    """
    names, good = _snapshots(run_dir), set[str]()
    if keep is not None:
        problem = measurements.unreadable(run_dir)
        if problem is not None:
            raise GanError(
                f"{problem}; snapshots stay until it can be read, as it says which are the best"
            ) from problem
        good = {*best_snapshots(run_dir), *in_use}
    best = [kimg for kimg, name in names.items() if name in good]
    removed = []
    for kimg in snapshots_to_remove(list(names), keep, keep_every, best):
        with contextlib.suppress(OSError):
            (run_dir / names[kimg]).unlink()
            removed.append(names[kimg])
    return removed


def _snapshots(run_dir: Path) -> dict[int, str]:
    """{kimg: name} of the snapshots of a run; an empty dict where there is no folder."""
    with contextlib.suppress(OSError):
        names = [path.name for path in run_dir.iterdir()]
        return {kimg: name for name in names if (kimg := kimg_of(name)) is not None}
    return {}
