"""The best snapshot of a run, which `network-snapshot-best.pkl` is."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from gan.errors import GanError
from gan.files import explain_os_error, temporary_beside
from gan.metric_names import METRICS
from gan.snapshot_names import BEST
from gan.tracking import measurements
from gan.training import retention


@dataclasses.dataclass(frozen=True)
class Best:
    """The best snapshot of a run, by the first number of a metric."""

    snapshot: str
    """name of its file"""
    metric: str
    number: float
    linked: bool = dataclasses.field(default=True, compare=False)
    """whether `network-snapshot-best.pkl` is this one"""

    @property
    def line(self) -> str:
        """For people."""
        number = METRICS[self.metric].results[0]
        return f"Best:      {self.snapshot} by {number} {self.number:.4g}{f' ({BEST})' if self.linked else ''}"


def best_snapshot(run_dir: Path, metrics: Sequence[str]) -> Best | None:
    """The best of the snapshots that are still there, by the first of these metrics that any of them was measured by.

    None if none was.
    """
    there = retention.snapshot_names(run_dir)
    for metric in metrics:
        found = measurements.best(run_dir, metric, there)
        if found is not None:
            return Best(found[0], metric, found[1], _is_linked(run_dir, found[0]))
    return None


def renew(run_dir: Path, metrics: Sequence[str]) -> Best | None:
    """Have `network-snapshot-best.pkl` be the best snapshot by the first of these metrics; without one there is none.

    A relative link, as snapshots never change; a copy where the file system knows no links. Raises GanError.
    """
    best, path = best_snapshot(run_dir, metrics), run_dir / BEST
    if path.is_dir():
        raise GanError(f"{path}: is a folder, where the best snapshot is to be; move it away")
    try:
        if best is None:
            if path.is_symlink():  # a file may be all that is left of a network
                path.unlink()
        elif not _is_it(path, run_dir / best.snapshot):
            _replace(path, best.snapshot)
    except OSError as error:
        raise explain_os_error(error, path) from error
    return None if best is None else dataclasses.replace(best, linked=True)


def _is_linked(run_dir: Path, snapshot: str) -> bool:
    with contextlib.suppress(OSError):
        return _is_it(run_dir / BEST, run_dir / snapshot)
    return False


def _is_it(path: Path, snapshot: Path) -> bool:
    """Whether `path` is a link to this file, or a copy of it."""
    if path.is_symlink():
        return os.readlink(path) == snapshot.name
    if not path.exists():
        return False
    one, other = path.stat(), snapshot.stat()
    return (one.st_size, one.st_mtime_ns) == (other.st_size, other.st_mtime_ns)


def _replace(path: Path, name: str) -> None:
    """Put a link to the file `name` beside it, or that file once more, in place of `path`. Raises OSError."""
    temporary, snapshot = temporary_beside(path), path.parent / name
    links = (lambda: os.symlink(name, temporary), lambda: os.link(snapshot, temporary))
    try:
        temporary.unlink()
        for link in links:
            with contextlib.suppress(OSError):  # a file system that has none, or a system that allows none
                link()
                break
        else:
            shutil.copy2(snapshot, temporary)  # with its time, by which it is known to be a copy
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
