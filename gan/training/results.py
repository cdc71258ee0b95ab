"""What a snapshot was measured by: into the files of the run, to MLflow, and in words. For the first process alone."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path

from gan.errors import GanError, one_line, printable
from gan.metric_names import METRICS, detectors_of, in_words
from gan.metrics.measure import Measurement, Reals
from gan.snapshot_names import name_of
from gan.tracking import Trackers, measurements
from gan.training import retention
from gan.training.best import Best, best_snapshot, renew

_ALIKE = 0.4  # diversity below which fakes are much more alike than the images
_OPENING_NIMG = 20_000  # images in which the pictures of new networks are grey, and all the same


class Results:
    """Takes the measurements of a run. Nothing that happens to its files is raised: a line says it, once.

    Args:
        reals: what the run is compared with.
        metrics: by which it is measured; the first says which snapshot is the best, as long as there is none of them
            those by which it was measured before.
        num_processes: that measure together.
        say: takes a line for people.
        trackers: those of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        reals: Reals | None,
        metrics: Sequence[str],
        num_processes: int,
        say: Callable[[str], None],
        trackers: Callable[[], Trackers],
    ) -> None:
        self._run_dir, self._reals, self._num_processes = run_dir, reals, num_processes
        self._metrics = metrics
        self._deciding = [*metrics, *METRICS]
        self._say, self._trackers = say, trackers
        self._said: set[str] = set()

    def drop_beyond(self, nimg: int) -> None:
        """Forget what was measured of snapshots after `nimg` images: they are made again, or have been set aside."""
        try:
            measurements.drop_beyond(self._run_dir, nimg)
        except Exception as error:
            self.say_once(text_of(error))
        self.best()

    def unmeasured(self, nimg: int) -> tuple[str, int, list[str]] | None:
        """The newest snapshot until `nimg` images, when it was made, and by what it was not measured as it is now.

        None if there is none. Raises GanError.
        """
        kimgs = [kimg for kimg in retention.snapshots_in(self._run_dir) if kimg <= nimg // 1000]
        if not kimgs or self._reals is None:
            return None
        name, reals = name_of(kimgs[-1]), self._reals
        lines = [
            line for line in measurements.read(self._run_dir) if line.snapshot == name and line.metric in self._metrics
        ]
        digests = {each: reals.detectors.sha256(each) for each in detectors_of({line.metric for line in lines})}
        done = {
            line.metric
            for line in lines
            if line.comparable == measurements.as_measured_now(line.metric, len(reals), reals.fingerprint, digests)
        }
        metrics = [metric for metric in self._metrics if metric not in done]
        return (name, measurements.nimg_of(self._run_dir, name) or 0, metrics) if metrics else None

    def add(self, snapshot: str, nimg: int, measurement: Measurement) -> None:
        """One measurement of a snapshot."""
        dataset = None
        if self._reals is not None:
            with contextlib.suppress(GanError, OSError):  # it may be gone now, and its number is there
                dataset = self._reals.fingerprint
        record = measurements.record_of(measurement, snapshot, self._num_processes, dataset=dataset, nimg=nimg)
        try:
            measurements.append(self._run_dir, record)
        except GanError as error:
            self._say(f"{snapshot}: {measurement.metric} WAS NOT WRITTEN: {error}")
        self._trackers().measured(nimg, measurement.results, record["timestamp"])

    def say_once(self, line: str) -> None:
        """Of what most likely is so for each snapshot."""
        if line not in self._said:
            self._said.add(line)
            self._say(printable(line))

    def complete(self, snapshot: str, nimg: int, found: Sequence[Measurement], problems: Sequence[str]) -> None:
        """Everything that was measured of a snapshot, which is there now: which one is the best is found anew.

        Args:
            problems: what broke off its evaluation.
        """
        top = self.best()
        is_best = None if top is None or top.snapshot != snapshot else top.metric
        shown = [in_words(m.metric, m.results, " (best)" if m.metric == is_best else "") for m in found]
        if shown:
            self._say(f"{snapshot}: {', '.join(shown)}")
        for problem in problems:
            self._say(f"{snapshot}: {problem}")
        if not shown:
            self._say(f"{snapshot} was not measured")
        for measurement in found:
            diversity = measurement.results.get("diversity")
            if diversity is not None and diversity < _ALIKE and nimg >= _OPENING_NIMG:
                self._say(
                    f"fakes are much more alike than the images (diversity {diversity:.2f}): look at the newest sheet; "
                    "if that lasts, start anew with a lower --glr or a higher --gamma"
                )

    def best(self) -> Best | None:
        """The best snapshot of the run, to which `network-snapshot-best.pkl` now is a link if that can be."""
        for look in (renew, best_snapshot):
            try:
                return look(self._run_dir, self._deciding)
            except Exception as error:
                self.say_once(text_of(error))
        return None


def text_of(error: Exception) -> str:
    """What went wrong, in a line."""
    return printable(str(error)) if isinstance(error, GanError) else f"{type(error).__name__}: {one_line(error)}"
