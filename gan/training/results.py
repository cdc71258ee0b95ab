"""What a snapshot was measured by: into the files of the run, to MLflow, and in words. For the first process alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from gan.data.dataset import ImageDataset
from gan.errors import GanError, printable
from gan.metric_names import METRICS
from gan.metrics.measure import Measurement
from gan.tracking import Trackers, measurements
from gan.training.best import Best, best_snapshot, renew

_ALIKE = 0.4  # diversity below which fakes are much more alike than the images
_OPENING_NIMG = 20_000  # images in which the pictures of new networks are grey, and all the same


class Results:
    """Takes the measurements of a run.

    Args:
        metrics: by which it is measured; the first says which snapshot is the best, as long as there is none of them
            those by which it was measured before.
        num_processes: that measure together.
        say: takes a line for people.
        trackers: those of the run.
    """

    def __init__(
        self,
        run_dir: Path,
        dataset: ImageDataset,
        metrics: Sequence[str],
        num_processes: int,
        say: Callable[[str], None],
        trackers: Callable[[], Trackers],
    ) -> None:
        self._run_dir, self._dataset, self._num_processes = run_dir, dataset, num_processes
        self._deciding = [*metrics, *METRICS]
        self._say, self._trackers = say, trackers
        self._said: set[str] = set()

    def drop_beyond(self, nimg: int) -> None:
        """Forget what was measured of snapshots after `nimg` images: they are made again, or have been set aside."""
        try:
            measurements.drop_beyond(self._run_dir, nimg)
        except (GanError, OSError) as error:
            self._say(printable(str(error)))
        self._renew_best()

    def add(self, snapshot: str, nimg: int, measurement: Measurement) -> None:
        """One measurement of a snapshot."""
        dataset = self._dataset.fingerprint_anywhere
        record = measurements.record_of(measurement, snapshot, self._num_processes, dataset=dataset, nimg=nimg)
        try:
            measurements.append(self._run_dir, record)
        except GanError as error:
            self._say(f"{snapshot}: {measurement.metric} WAS NOT WRITTEN: {error}")
        self._trackers().measured(nimg, measurement.results, record["timestamp"])

    def add_failure(self, failure: str) -> None:
        """What could not be measured, and why; said once, though most likely it is so for each snapshot."""
        if failure not in self._said:
            self._said.add(failure)
            self._say(printable(failure))

    def complete(self, snapshot: str, nimg: int, found: Sequence[Measurement]) -> None:
        """Everything that was measured of a snapshot, which is there now: which one is the best is found anew."""
        top = self._renew_best()
        shown = []
        for measurement in found:
            numbers = [f"{name} {measurement.results[name]:.4g}" for name in METRICS[measurement.metric].results]
            if top is not None and (top.snapshot, top.metric) == (snapshot, measurement.metric):
                numbers[0] += " (best)"
            shown += numbers
        if shown:
            self._say(f"{snapshot}: {', '.join(shown)}")
        for measurement in found:
            diversity = measurement.results.get("diversity")
            if diversity is not None and diversity < _ALIKE and nimg >= _OPENING_NIMG:
                self._say(
                    f"fakes are much more alike than the images (diversity {diversity:.2f}): look at the newest sheet; "
                    "if that lasts, start anew with a lower --glr or a higher --gamma"
                )

    def best(self) -> Best | None:
        """The best snapshot of the run."""
        return best_snapshot(self._run_dir, self._deciding)

    def _renew_best(self) -> Best | None:
        try:
            return renew(self._run_dir, self._deciding)
        except GanError as error:
            self._say(str(error))
            return None
