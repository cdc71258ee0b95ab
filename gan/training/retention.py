"""Which snapshots of a run stay: the newest, the best by each metric, and one in so many kimg."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from gan.metric_names import METRICS
from gan.tracking import jsonl, measurements

_SNAPSHOT = re.compile(r"network-snapshot-(\d{6,})\.pkl")
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
    for path in sorted(run_dir.glob("metric-*.jsonl")):
        if path.stem.removeprefix("metric-") in METRICS:
            continue
        for metric, number, name in _measurements(path):
            goodness = (number if metric.startswith(_HIGHER_IS_BETTER) else -number, name)
            if name in there and goodness >= best.get(metric, goodness):
                best[metric] = goodness
    return {name for _, name in best.values()}


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
    """
    names = _snapshots(run_dir)
    good = {*best_snapshots(run_dir), *in_use} if keep is not None else ()
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
        return {int(match[1]): name for name in names if (match := _SNAPSHOT.fullmatch(name))}
    return {}


def _measurements(path: Path) -> Iterator[tuple[str, float, str]]:
    """(metric, number, name of the snapshot) of every number in a file of metrics."""
    for record in jsonl.read_records(path):
        results, name = record.get("results"), record.get("snapshot_pkl")
        if not isinstance(results, dict) or not isinstance(name, str):
            continue
        for metric, number in results.items():
            if isinstance(number, (int, float)) and math.isfinite(number) and not metric.endswith("_std"):
                yield metric, number, name
