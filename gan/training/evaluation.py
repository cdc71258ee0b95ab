"""Metrics beside the training: a portion of a snapshot's evaluation between two steps, within a share of the time."""

from __future__ import annotations

import copy
import dataclasses
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.errors import GanError, one_line
from gan.metrics.detectors import Detectors
from gan.metrics.measure import Measuring, Reals
from gan.networks import Generator
from gan.tracking import jsonl, measurements
from gan.training import retention
from gan.training.results import Results
from gan.training.run_files import RunFiles
from gan.training.tracked import tracked
from gan.training.turns import Asked
from torch_utils.user_cache import user_cache
from torch_utils.world import ALONE, DistributedError, World

_AT_ONCE = 32  # images, at most; without gradients four times as many fit as in a step
_BETWEEN_STEPS = 0.3  # seconds after which no further portion begins before the next step
_PROGRESS_SECONDS = 60


@dataclasses.dataclass(eq=False)
class _Evaluation:
    """Of one snapshot."""

    snapshot: str
    nimg: int
    make_G: Callable[[], Generator]
    metrics: list[str]
    measuring: Measuring | None = None
    broken: bool = False
    """by an error that `Measuring` is not to let through"""
    num_recorded: int = 0
    num_failures: int = 0


class Evaluation:
    """Measures the snapshots of a run: `add` takes one, `follow` does a portion after a step.

    `requests` says before a step what is to be done after it, so that several processes, which all take the same
    snapshots, do it together. Rank 0 alone asks, keeps the time and has the results. While one snapshot is measured the
    newest of the others waits. Nothing that happens to a metric ends the run: a line says what is left out.

    Args:
        dataset: the images; all of them count, whatever part of them is trained on.
        report: takes a line for people.
        free_memory: gives back what can be done without for now.
    """

    lines: list[str]
    """what is measured, and why not more; for the start of the run"""

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: ImageDataset,
        device: torch.device,
        report: Callable[[str], None],
        free_memory: Callable[[], None],
        world: World = ALONE,
    ) -> None:
        self._config, self._run_dir, self._device, self._world = config, run_dir, device, world
        self._report, self._free_memory = report, free_memory
        self._detectors = Detectors(config.detectors)
        self._metrics, self.lines = tracked(config, self._detectors, world)
        self._dataset = dataset.view()
        self._reals = Reals(dataset, self._detectors, cache=user_cache("metrics"))
        self._current: _Evaluation | None = None
        self._waiting: _Evaluation | None = None
        self._files: RunFiles | None = None
        self._results: Results | None = None
        self._spent, self._begun = 0.0, time.monotonic()
        self._in_use: tuple[str, ...] = ()

    def in_use(self) -> tuple[str, ...]:
        """Names of the snapshots that are measured, or wait for it; on any thread."""
        return self._in_use

    def open(self, files: RunFiles, nimg: int) -> None:
        """Where results go, on rank 0; those of snapshots after `nimg` images were dropped with what they measured."""
        self._files = files
        self._results = Results(
            self._run_dir, self._dataset, self._metrics, self._world.size, self._say, lambda: files.trackers
        )
        self._results.drop_beyond(nimg)

    def add(self, snapshot: str, nimg: int, G: Generator) -> None:
        """Measure a snapshot. Every process adds it, with the same G, which is changed by nobody.

        Args:
            snapshot: name of the file, which need not be written yet.
            nimg: images shown until then.
        """
        self._take(_Evaluation(snapshot, nimg, lambda: G, self._metrics))

    def catch_up(self, nimg: int, G_ema: Generator) -> None:
        """Measure the newest snapshot by what it was not before the run was stopped, from its file on rank 0.

        Args:
            nimg: images shown until then.
            G_ema: a network of the same kind; every process has one.
        """
        if not self._metrics or nimg == 0:
            return
        found = self._unmeasured(nimg) if self._world.is_first else None
        found = self._world.share(found, "a snapshot to measure")
        if found is None:
            return
        snapshot, its_nimg, metrics, state = found

        def make_G() -> Generator:
            G = copy.deepcopy(G_ema)
            G.load_state_dict(state)
            return G

        self._take(_Evaluation(snapshot, its_nimg, make_G, metrics))

    def requests(self, at_once: bool = False) -> Asked:
        """What this process asks for; `at_once`: whatever share of the time was spent."""
        current = self._current
        if current is None:
            return Asked(0)
        if current.broken:
            return Asked.MEASURED
        if not self._world.is_first:
            return Asked(0)
        assert current.measuring is not None
        assert self._files is not None
        if current.measuring.done:  # which snapshot is the best is known when it is there
            return Asked(0) if self._files.outputs.has("snapshot") else Asked.MEASURED
        return Asked.MEASURE if at_once or self._may_spend(0.0) else Asked(0)

    def follow(self, asked: Asked) -> float:
        """Do what all processes have asked for; the seconds that it took."""
        if self._current is None or not asked & (Asked.MEASURE | Asked.MEASURED):
            return 0.0
        self._world.meet("a portion of the metrics")  # before the device is waited for
        _wait_for(self._device)
        begin = time.monotonic()
        if asked & Asked.MEASURED:
            self._finish_current()
        else:
            self._advance_while_there_is_time(self._current)
        seconds = time.monotonic() - begin
        self._spent += seconds
        return seconds

    def finish(self, stop_requested: Callable[[], bool]) -> None:
        """Measure what was added to its end, unless that is to stop; then say which snapshot is the best."""
        if self._current is not None:
            self._say(f"finishing {' and '.join(self._in_use)}; Ctrl-C ends that, and nothing else is lost")
        say_at = time.monotonic() + _PROGRESS_SECONDS
        while self._current is not None:
            own = Asked.STOP if stop_requested() else self.requests(at_once=True)
            asked = Asked(self._world.agree(own, "the metrics"))
            if asked & Asked.STOP:
                self.leave(goes_on=False)
                break
            self.follow(asked)
            if time.monotonic() > say_at and self._current is not None and self._current.measuring is not None:
                say_at = time.monotonic() + _PROGRESS_SECONDS
                self._say(f"{self._current.snapshot}: {100 * self._current.measuring.share:.0f} % done")
        best = None if self._results is None else self._results.best()
        if best is not None:
            self._report(best.line)

    def leave(self, goes_on: bool) -> None:
        """Drop what is under way; `goes_on`: the newest will be measured when the run goes on."""
        if self._current is not None and self._current.measuring is not None and self._current.measuring.done:
            self._tell(self._current)
            self._current = None
        left = [evaluation for evaluation in (self._current, self._waiting) if evaluation is not None]
        self._current = self._waiting = None
        self._note_use()
        if left and goes_on:
            self._say(f"{left.pop().snapshot} is measured when the run goes on")
        for evaluation in left:
            self._say_left_out(evaluation)

    def _take(self, evaluation: _Evaluation) -> None:
        """Begin with it, or have it wait in place of another one."""
        if not self._metrics:
            return
        if self._current is None:
            self._begin(evaluation)
            return
        if self._waiting is not None and self._waiting.snapshot != evaluation.snapshot:
            self._say_left_out(self._waiting, ", as the one before it takes long")
        self._waiting = evaluation
        self._note_use()

    def _begin(self, evaluation: _Evaluation | None) -> None:
        self._current = evaluation
        self._note_use()
        if evaluation is None:
            return

        def make() -> None:
            evaluation.measuring = Measuring(
                evaluation.make_G(),
                self._reals,
                evaluation.metrics,
                device=self._device,
                world=self._world,
                images_at_once=min(_AT_ONCE, 4 * self._config.batch_gpu),
                force_fp32=self._device.type != "cuda",  # as pictures of the snapshot are computed
                free_memory=self._free_memory,
            )

        self._guarded(evaluation, make)

    def _may_spend(self, seconds: float) -> bool:
        """Whether it would be within the budget still to begin with a portion after so many more seconds."""
        elapsed = time.monotonic() - self._begun
        return self._spent + seconds <= self._config.metrics_budget / 100 * elapsed

    def _advance_while_there_is_time(self, evaluation: _Evaluation) -> None:
        """A portion at least; more while they are short, as rank 0 says: steps may be few and long."""
        begin = time.monotonic()
        while True:
            self._advance(evaluation)
            _wait_for(self._device)
            seconds, measuring = time.monotonic() - begin, evaluation.measuring
            over = measuring is None or measuring.done or evaluation.broken or not self._world.is_first
            again = not over and seconds < _BETWEEN_STEPS and self._may_spend(seconds)
            if not self._world.agree(int(again), "a portion of the metrics"):
                break

    def _advance(self, evaluation: _Evaluation) -> None:
        """One portion, and what is new of the results."""
        if not evaluation.broken:
            assert evaluation.measuring is not None
            self._guarded(evaluation, evaluation.measuring.advance)
            self._guarded(evaluation, lambda: self._record(evaluation))

    def _guarded(self, evaluation: _Evaluation, work: Callable[[], None]) -> None:
        """Whatever happens in there, training goes on, and this process asks the others for the next snapshot."""
        try:
            work()
        except DistributedError:
            raise
        except Exception as error:
            evaluation.broken = True
            self._report(f"Metrics:   {evaluation.snapshot}: {type(error).__name__}: {one_line(error)}")

    def _finish_current(self) -> None:
        assert self._current is not None
        self._tell(self._current)
        following, self._waiting = self._waiting, None
        self._begin(following)

    def _record(self, evaluation: _Evaluation) -> None:
        """What is new of the results, to the files of the run; on rank 0."""
        measuring, results = evaluation.measuring, self._results
        if measuring is None or results is None:
            return
        for measurement in measuring.measurements[evaluation.num_recorded :]:
            evaluation.num_recorded += 1
            results.add(evaluation.snapshot, evaluation.nimg, measurement)
        for failure in measuring.failures[evaluation.num_failures :]:
            evaluation.num_failures += 1
            results.add_failure(failure)

    def _tell(self, evaluation: _Evaluation) -> None:
        """That a snapshot has been measured; on rank 0."""
        measuring, results = evaluation.measuring, self._results
        if measuring is not None and results is not None:
            name, nimg = evaluation.snapshot, evaluation.nimg
            self._guarded(evaluation, lambda: results.complete(name, nimg, measuring.measurements))

    def _unmeasured(self, nimg: int) -> tuple[str, int, list[str], dict[str, torch.Tensor]] | None:
        """The newest snapshot until `nimg` images, when it was made, by what it was not measured; tensors of G_ema."""
        kimgs = [kimg for kimg in retention.snapshots_in(self._run_dir) if kimg <= nimg // 1000]
        if not kimgs:
            return None
        name = f"network-snapshot-{kimgs[-1]:06d}.pkl"  # cut to thousands; stats.jsonl knows it to the image
        ticks = map(jsonl.record_nimg, jsonl.read_records(self._run_dir / jsonl.FILE_NAME))
        its_nimg = max((tick for tick in ticks if tick and tick // 1000 == kimgs[-1]), default=1000 * kimgs[-1])
        done = {measured.metric for measured in measurements.read(self._run_dir) if measured.snapshot == name}
        metrics = [metric for metric in self._metrics if metric not in done]
        if not metrics:
            return None
        try:
            return name, its_nimg, metrics, models.load(self._run_dir / name).require_generator().state_dict()
        except GanError as error:
            self._say(str(error))
            return None

    def _note_use(self) -> None:
        both = (self._current, self._waiting)
        self._in_use = tuple(evaluation.snapshot for evaluation in both if evaluation is not None)

    def _say_left_out(self, evaluation: _Evaluation, why: str = "") -> None:
        path = str(self._run_dir / evaluation.snapshot)
        command = f"; {shlex.join(['python', '-m', 'gan', 'metrics', '--network', path])} measures it"
        self._say(f"{evaluation.snapshot} is left out{why}{command if self._config.keep is None else ''}")

    def _say(self, line: str) -> None:
        if self._world.is_first:
            self._report(f"Metrics:   {line}")


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
