"""metric-<name>.jsonl in the run folder: what its snapshots were measured by, a line for each. No torch."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gan.metric_names import METRICS
from gan.tracking import jsonl
from gan.tracking.console import format_time

if TYPE_CHECKING:
    from gan.metrics.measure import Measurement

Comparable = tuple[str, ...]

_FILE = re.compile(r"metric-(.+)\.jsonl")
_SNAPSHOT = re.compile(r"network-snapshot-(\d{6,})\.pkl")


@dataclasses.dataclass(frozen=True)
class Measured:
    """A line of such a file."""

    metric: str
    snapshot: str
    """its file, relative to the run folder"""
    results: dict[str, float]
    """those that are finite"""
    record: Mapping[str, Any]
    """the whole line, as `record_of` made it; of other programs it may hold less, and anything"""

    @property
    def comparable(self) -> Comparable:
        """What has to be the same for a comparison of numbers."""
        record, detector = self.record, self.record.get("detector")
        sha256 = detector.get("sha256") if isinstance(detector, dict) else None
        facts = (sha256, *(record.get(name) for name in ("num_reals", "num_fakes", "seed", "dataset")))
        return tuple(map(str, facts))

    @property
    def kimg(self) -> int | None:
        """What the snapshot's name says; None for a file of another name."""
        match = _SNAPSHOT.fullmatch(self.snapshot)
        return int(match[1]) if match else None


def record_of(
    measurement: Measurement, snapshot: str, num_gpus: int, *, dataset: str, nimg: int | None = None
) -> dict[str, Any]:
    """A line, of now: the fields of the lineage, then what makes a number comparable with another one.

    Args:
        snapshot: its file, relative to the run folder.
        num_gpus: processes that measured.
        dataset: fingerprint of the real images.
        nimg: images that training had seen, where that is known.
    """
    m = measurement
    return {
        "results": dict(m.results),
        "metric": m.metric,
        "total_time": m.seconds,
        "total_time_str": format_time(m.seconds),
        "num_gpus": num_gpus,
        "snapshot_pkl": snapshot,
        "timestamp": time.time(),
        "num_reals": m.num_reals,
        "num_fakes": m.num_fakes,
        "seed": m.seed,
        "detector": None if m.detector is None else {"file": m.detector, "sha256": m.detector_sha256},
        "resize_filter": m.resize_filter,
        "dataset": dataset,
        **({} if nimg is None else {"nimg": nimg}),
    }


def append(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Add a line to the file of its metric, whole or not at all. Raises GanError when it cannot be written."""
    jsonl.append(run_dir / f"metric-{record['metric']}.jsonl", jsonl.line_of(record))


def read(run_dir: Path, metric: str | None = None) -> Iterator[Measured]:
    """What was measured, one metric after the other, oldest lines first; of `metric` alone if it is given.

    Lines that are torn, or that say something else, are passed over.
    """
    for name, path in _files(run_dir).items():
        if metric in (None, name):
            for record in jsonl.read_records(path):
                if (measured := _measured(name, record)) is not None:
                    yield measured


def drop_beyond(run_dir: Path, nimg: int) -> None:
    """Remove the lines on snapshots after `nimg` images, which will be made again; the others stay, byte for byte.

    Raises GanError when a file cannot be replaced.
    """
    for name, path in _files(run_dir).items():

        def is_beyond(record: dict[str, Any], name: str = name) -> bool:
            measured = _measured(name, record)
            return measured is not None and (measured.kimg or 0) * 1000 > nimg

        jsonl.drop_lines(path, is_beyond)


def best(run_dir: Path, metric: str, there: Collection[str]) -> tuple[str, float] | None:
    """The best of the snapshots `there` by the first number of a metric, and that number; None: none was measured.

    Of several lines on a snapshot the last counts, and of equally good snapshots the newest. Numbers of another
    detector, seed, dataset or number of images say something else: those count that most snapshots have.
    """
    info, alike = METRICS[metric], dict[Comparable, dict[str, Measured]]()
    if not info.decides:
        return None
    for measured in read(run_dir, metric):
        if measured.snapshot in there:
            of_kind = alike.pop(measured.comparable, {})
            alike[measured.comparable] = {**of_kind, measured.snapshot: measured}  # the kind of the newest line is last
    most = max(reversed(alike.values()), key=len, default={})
    number, sign = info.results[0], 1 if info.higher_is_better else -1
    ranked = [(sign * m.results[number], m.kimg or 0, name) for name, m in most.items() if number in m.results]
    if not ranked:
        return None
    name = max(ranked)[2]
    return name, most[name].results[number]


def _files(run_dir: Path) -> dict[str, Path]:
    """{metric: its file}; empty where there is no folder."""
    found = sorted(run_dir.glob("metric-*.jsonl"))
    return {match[1]: path for path in found if (match := _FILE.fullmatch(path.name))}


def _measured(metric: str, record: dict[str, Any]) -> Measured | None:
    results, snapshot = record.get("results"), record.get("snapshot_pkl")
    if not isinstance(results, dict) or not isinstance(snapshot, str):
        return None
    finite = {name: float(number) for name, number in results.items() if _is_finite(number)}
    return Measured(metric, snapshot, finite, record)


def _is_finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
