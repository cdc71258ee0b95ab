"""metric-<name>.jsonl in the run folder: what its snapshots were measured by, a line for each. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gan.errors import GanError
from gan.files import explain_os_error
from gan.metric_names import METRICS
from gan.snapshot_names import kimg_of
from gan.tracking import jsonl
from gan.tracking.console import format_time

if TYPE_CHECKING:
    from gan.metrics.measure import Measurement

Comparable = tuple[str, ...]
"""what has to be the same for a comparison of numbers; the words for it are of this module"""

_FILE = re.compile(r"metric-(.+)\.jsonl")
_COMPARED = ("num_reals", "num_fakes", "seed", "dataset")


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
        detector = self.record.get("detector")
        sha256 = detector.get("sha256") if isinstance(detector, dict) else None
        return tuple(map(str, (sha256, *(self.record.get(name) for name in _COMPARED))))

    @property
    def kimg(self) -> int | None:
        """What the snapshot's name says; None for a file of another name."""
        return kimg_of(self.snapshot)

    @property
    def nimg(self) -> int | None:
        """Images until then, to the image if the line says it, else to the thousand."""
        nimg = self.record.get("nimg")
        if isinstance(nimg, int):
            return nimg
        return None if self.kimg is None else self.kimg * 1000


def as_measured_now(
    metric: str, num_images: int, dataset: str | None, digests: Mapping[str, str | None], seed: int = 0
) -> Comparable:
    """What `Measured.comparable` is of a line that this metric gets now.

    Args:
        num_images: of the dataset.
        dataset: its fingerprint.
        digests: {detector: its sha256}.
    """
    info = METRICS[metric]
    sha256 = None if info.detector is None else digests.get(info.detector)
    facts = (sha256, info.num_reals(num_images), info.num_fakes_against(num_images), seed, dataset)
    return tuple(map(str, facts))


def record_of(
    measurement: Measurement, snapshot: str, num_gpus: int, *, dataset: str | None, nimg: int | None = None
) -> dict[str, Any]:
    """A line, of now: the fields of the lineage, then what makes a number comparable with another one.

    Args:
        snapshot: its file, relative to the run folder.
        num_gpus: processes that measured.
        dataset: fingerprint of the real images, where that is known.
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

    Files that cannot be read are passed over; so are lines that are torn, or that say something else.
    """
    for name, path in _files(run_dir).items():
        if metric in (None, name):
            with contextlib.suppress(OSError):
                for record in jsonl.read_records(path):
                    if (measured := _measured(name, record)) is not None:
                        yield measured


def unreadable(run_dir: Path) -> GanError | None:
    """What is wrong with a file that `read` passes over, if there is one."""
    for path in _files(run_dir).values():
        try:
            path.read_bytes()
        except OSError as error:
            return explain_os_error(error, path)
    return None


def nimg_of(run_dir: Path, snapshot: str) -> int | None:
    """Images until a snapshot of a run: its name is cut to thousands, stats.jsonl knows them to the image.

    None for a file of another name.
    """
    kimg = kimg_of(snapshot)
    if kimg is None:
        return None
    ticks = map(jsonl.record_nimg, jsonl.read_records(run_dir / jsonl.FILE_NAME))
    return max((nimg for nimg in ticks if nimg and nimg // 1000 == kimg), default=1000 * kimg)


def drop_beyond(run_dir: Path, nimg: int) -> None:
    """Remove the lines on snapshots after `nimg` images, which will be made again; the others stay, byte for byte.

    Raises GanError when a file cannot be read or replaced, after all others.
    """
    problems = []
    for name, path in _files(run_dir).items():

        def is_beyond(record: dict[str, Any], name: str = name) -> bool:
            measured = _measured(name, record)
            return measured is not None and (measured.nimg or 0) > nimg

        try:
            jsonl.drop_lines(path, is_beyond)
        except GanError as error:
            problems.append(error)
        except OSError as error:
            problems.append(explain_os_error(error, path))
    if problems:
        raise problems[0]


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
    numbers = {name: jsonl.finite(number) for name, number in results.items()}
    return Measured(metric, snapshot, {name: n for name, n in numbers.items() if n is not None}, record)
