"""Metrics beside the training: a portion of a snapshot's evaluation between two steps, within a share of the time."""

from __future__ import annotations

import copy
import dataclasses
import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.metrics.detectors import Detectors
from gan.metrics.measure import Measuring, Reals
from gan.networks import Generator
from gan.snapshot_names import kimg_of
from gan.tracking import Trackers
from gan.training.budget import Budget
from gan.training.results import Results, text_of
from gan.training.tracked import tracked
from gan.training.turns import Asked
from torch_utils.world import ALONE, DistributedError, World

_AT_ONCE = 32  # images, at most; without gradients four times as many fit as in a step
_BETWEEN_STEPS = 0.3  # seconds after which no further portion begins before the next step
_PROGRESS_SECONDS = 60
_FAR = 0.5  # done of an evaluation, from where on it is worth going on with, whatever waits

_Found = tuple[str, int, list[str], dict[str, torch.Tensor]]


@dataclasses.dataclass(eq=False)
class _Evaluation:
    """Of one snapshot."""

    snapshot: str
    nimg: int
    make_G: Callable[[], Generator]
    metrics: list[str]
    measuring: Measuring | None = None
    problem: str | None = None
    """an error on this process that `Measuring` is not to let through"""
    num_recorded: int = 0
    num_failures: int = 0

    @property
    def share(self) -> float:
        """How far it is."""
        return 0.0 if self.measuring is None else self.measuring.share


class Evaluation:
    """Measures the snapshots of a run: `add` takes one, `follow` does a portion after a step.

    `requests` says before a step what is to be done after it, so that several processes, which all take the same
    snapshots, do it together. Rank 0 alone asks, keeps the time and has the results. While one snapshot is measured the
    newest of the others waits. Nothing that happens to a metric ends the run: a line says what is left out. What is
    raised is the loss of other processes.

    Args:
        dataset: the images; all of them count, whatever part of them is trained on.
        report: takes a line for people.
        free_memory: gives back what can be done without for now.
        trackers: those of the run, when they are open.
        is_writing: whether a snapshot is still being written.
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
        trackers: Callable[[], Trackers],
        is_writing: Callable[[], bool],
        world: World = ALONE,
    ) -> None:
        self._config, self._run_dir, self._device, self._world = config, run_dir, device, world
        self._report, self._free_memory, self._is_writing = report, free_memory, is_writing
        self._detectors = Detectors(config.detectors)
        self._metrics, self.lines = tracked(config, self._detectors, world)
        self._reals = Reals(dataset, self._detectors) if self._metrics else None
        self._current: _Evaluation | None = None
        self._waiting: _Evaluation | None = None
        self._results: Results | None = None
        if world.is_first:
            self._results = Results(run_dir, self._reals, self._metrics, world.size, self._say, trackers)
        self._budget = Budget(config.metrics_budget)
        self._in_use: tuple[str, ...] = ()
        self._num_left_out = 0  # for want of time
        self._swapped = False  # since it was asked what to do next

    def in_use(self) -> tuple[str, ...]:
        """Names of the snapshots that are measured, or wait for it; on any thread."""
        return self._in_use

    def go_on_from(self, nimg: int) -> None:
        """Drop what was measured of snapshots after so many images; they are made again."""
        if self._results is not None:
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
        found = None
        if self._results is not None:
            try:
                found = self._unmeasured(self._results, nimg)
            except Exception as error:
                self._say(text_of(error))
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
        if current.measuring is None or current.problem is not None:
            return Asked.MEASURED
        if not self._world.is_first:
            return Asked(0)
        if current.measuring.done:  # which snapshot is the best is known when it is there
            return Asked(0) if self._is_writing() else Asked.MEASURED
        return Asked.MEASURE if at_once or self._budget.allows() else Asked(0)

    def follow(self, asked: Asked) -> float:
        """Do what all processes have asked for; the seconds that it took."""
        swapped, self._swapped = self._swapped, False
        if self._current is None or swapped or not asked & (Asked.MEASURE | Asked.MEASURED):
            return 0.0
        self._world.meet("a portion of the metrics")  # before the device is waited for
        _wait_for(self._device)
        begin = time.monotonic()
        if asked & Asked.MEASURED:
            self._finish_current()
        else:
            self._advance_while_there_is_time(self._current)
        seconds = time.monotonic() - begin
        self._budget.spend(seconds)
        return seconds

    def finish(self, stop_requested: Callable[[], bool]) -> None:
        """Measure what was added to its end, unless that is to stop; then say which snapshot is the best."""
        if self._waiting is not None and self._has_just_begun():
            self._drop_for_the_waiting_one()
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
            if time.monotonic() > say_at and self._current is not None:
                say_at = time.monotonic() + _PROGRESS_SECONDS
                self._say(f"{self._current.snapshot}: {100 * self._current.share:.0f} % done")
        self._say_how_many_were_left_out()
        best = None if self._results is None else self._results.best()
        if best is not None:
            self._report(best.line)

    def leave(self, goes_on: bool) -> None:
        """Drop what is under way; `goes_on`: the newest will be measured when the run goes on."""
        current = self._current
        if current is not None and current.measuring is not None and current.measuring.done:
            self._tell(current, [current.problem])
            self._current = None
        left = [evaluation for evaluation in (self._current, self._waiting) if evaluation is not None]
        self._current = self._waiting = None
        self._note_use()
        if left and goes_on:
            self._say(f"{left.pop().snapshot} is measured when the run goes on")
        for evaluation in left:
            self._say_left_out(evaluation.snapshot)
        if goes_on:
            self._say_how_many_were_left_out()

    def _take(self, evaluation: _Evaluation) -> None:
        """Begin with it, or have it wait in place of another one.

        What has begun goes on, or where measuring takes long nothing would ever be measured to its end; but not
        networks that have learned nothing.
        """
        if not self._metrics:
            return
        if self._current is None:
            self._begin(evaluation)
            return
        if self._waiting is not None:
            self._leave_out(self._waiting)
        self._waiting = evaluation
        self._note_use()
        if kimg_of(self._current.snapshot) == 0 and self._has_just_begun():
            self._drop_for_the_waiting_one()

    def _has_just_begun(self) -> bool:
        """Whether the evaluation under way is not far, as rank 0 says; every process asks."""
        own = self._current is not None and self._current.share < _FAR
        return bool(self._world.share(own, "how far the metrics are"))

    def _drop_for_the_waiting_one(self) -> None:
        if self._current is not None:
            self._leave_out(self._current)
        following, self._waiting, self._swapped = self._waiting, None, True
        self._begin(following)

    def _begin(self, evaluation: _Evaluation | None) -> None:
        self._current = evaluation
        self._note_use()
        if evaluation is None:
            self._detectors.forget()  # training has the memory until the next snapshot
        else:
            self._guarded(evaluation, lambda: self._make_measuring(evaluation))

    def _make_measuring(self, evaluation: _Evaluation) -> None:
        if self._reals is not None:
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

    def _advance_while_there_is_time(self, evaluation: _Evaluation) -> None:
        """A portion at least; more while they are short, as rank 0 says: steps may be few and long."""
        begin = time.monotonic()
        while True:
            self._advance(evaluation)
            _wait_for(self._device)
            seconds, measuring = time.monotonic() - begin, evaluation.measuring
            over = measuring is None or measuring.done or evaluation.problem is not None or not self._world.is_first
            again = not over and seconds < _BETWEEN_STEPS and self._budget.allows(seconds)
            if not self._world.agree(int(again), "a portion of the metrics"):
                break

    def _advance(self, evaluation: _Evaluation) -> None:
        """One portion, and what is new of the results."""
        if evaluation.measuring is not None and evaluation.problem is None:
            self._guarded(evaluation, evaluation.measuring.advance)
            self._guarded(evaluation, lambda: self._record(evaluation))

    def _guarded(self, evaluation: _Evaluation, work: Callable[[], None]) -> None:
        """Whatever happens in there, training goes on, and this process asks the others for the next snapshot."""
        try:
            work()
        except DistributedError:
            raise
        except Exception as error:
            evaluation.problem = evaluation.problem or text_of(error)

    def _finish_current(self) -> None:
        assert self._current is not None
        self._tell(self._current, self._world.gather(self._current.problem, "how the metrics went"))
        following, self._waiting = self._waiting, None
        self._begin(following)

    def _record(self, evaluation: _Evaluation) -> None:
        """What is new of the results, to the files of the run; on rank 0."""
        measuring, results = evaluation.measuring, self._results
        if measuring is None or results is None or self._reals is None:
            return
        for measurement in measuring.measurements[evaluation.num_recorded :]:
            evaluation.num_recorded += 1
            results.add(evaluation.snapshot, evaluation.nimg, measurement)
        for failure in measuring.failures[evaluation.num_failures :]:
            evaluation.num_failures += 1
            results.say_once(failure)
        for note in self._reals.notes:
            results.say_once(note)
        self._reals.notes.clear()

    def _tell(self, evaluation: _Evaluation, problems: Sequence[str | None]) -> None:
        """That a snapshot has been measured, and what broke that off on each rank; on rank 0."""
        if self._results is not None:
            found = [] if evaluation.measuring is None else evaluation.measuring.measurements
            several = len(problems) > 1
            broken = [f"rank {rank}: {text}" if several else text for rank, text in enumerate(problems) if text]
            self._results.complete(evaluation.snapshot, evaluation.nimg, found, broken)

    def _unmeasured(self, results: Results, nimg: int) -> _Found | None:
        """The newest snapshot until `nimg` images, when it was made, by what it was not measured; tensors of G_ema."""
        found = results.unmeasured(nimg)
        if found is None:
            return None
        return *found, models.load(self._run_dir / found[0]).require_generator().state_dict()

    def _note_use(self) -> None:
        both = (self._current, self._waiting)
        self._in_use = tuple(evaluation.snapshot for evaluation in both if evaluation is not None)

    def _leave_out(self, evaluation: _Evaluation) -> None:
        """For want of time: most likely the first of many, so it is said of the first."""
        self._num_left_out += 1
        if self._num_left_out == 1:
            self._say_left_out(evaluation.snapshot, ", as measuring takes longer than snapshots are apart")

    def _say_left_out(self, snapshot: str, why: str = "") -> None:
        self._say(f"{snapshot} is left out{why}{self._command_for(self._run_dir / snapshot)}")

    def _say_how_many_were_left_out(self) -> None:
        if self._num_left_out > 1:
            self._say(
                f"{self._num_left_out} snapshots were left out for want of time{self._command_for(self._run_dir)}"
            )

    def _command_for(self, path: Path) -> str:
        """What measures it, unless it may be removed."""
        if self._config.keep is not None:
            return ""
        return f"; {shlex.join(['python', '-m', 'gan', 'metrics', '--network', str(path)])} measures what is missing"

    def _say(self, line: str) -> None:
        if self._world.is_first:
            self._report(f"Metrics:   {line}")


def _wait_for(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
