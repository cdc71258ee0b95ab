"""The training loop.

With several processes each runs it on its share of every batch, and all of them take the same turns.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.labels import LabelTable
from gan.data.loader import BatchStream
from gan.errors import FailedRunError, GanError, printable
from gan.tracking import Console, jsonl
from gan.training import resources, run_folder, state_files
from gan.training.announce import announcement, with_topic
from gan.training.batches import batches_on
from gan.training.devices import prepare
from gan.training.evaluation import Evaluation
from gan.training.fit import fitted
from gan.training.health import what_can_be_done
from gan.training.micro_batch import copied
from gan.training.run_files import RunFiles
from gan.training.run_folder import in_kimg
from gan.training.signals import Signals
from gan.training.state import TrainingState
from gan.training.state_files import SavedState, StateFiles
from gan.training.step import TrainStep
from gan.training.ticks import Ticks
from gan.training.turns import Asked, Batch, Turns
from torch_utils.world import ALONE, DifferentError, DistributedError, World


class Outcome(enum.Enum):
    """How `Trainer.run` ended; the value is the status of the run in MLflow."""

    COMPLETE = "FINISHED"
    STOPPED = "KILLED"
    FAILED = "FAILED"
    """training itself has failed, and is to go back to a healthy state"""


class Trainer:
    """One run: `run` trains until it is complete, is asked to stop, or has failed.

    Of several processes the first alone has the run's files and trackers, and `start` and `saved`, which it shares.

    Args:
        config: what to train; already written to the run folder.
        run_dir: folder of the run.
        dataset: the images.
        states: the training states in the run folder.
        signals: what was asked from outside; open.
        start: weights to start from, for a run that begins.
        saved: the state to continue from.
        continued: the run was started before, even if no state of it was saved.
        notes: lines to say at the start.
        world: the processes that train together.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: ImageDataset,
        states: StateFiles,
        signals: Signals,
        *,
        start: models.Snapshot | None = None,
        saved: SavedState | None = None,
        continued: bool = False,
        notes: Sequence[str] = (),
        world: World = ALONE,
    ) -> None:
        self.run_dir, self.dataset, self.world = run_dir, dataset, world
        self.console = Console(run_dir, config.total_kimg, logs=world.is_first)
        self.device, self.half_dtype = prepare(config, world.place)
        self.config = config = self._with_micro_batch(config)
        self.state = TrainingState(config, self.device)
        self.state.set_half_dtype(self.half_dtype)
        self._notes = list(notes)
        if start is not None:
            self._notes += self._start_from(start)
        self._tracker_state: dict[str, Any] = {}
        if saved is not None:
            self.state.load_state_dict(saved.state)
            self._tracker_state = saved.tracker
        self._share_state()
        self._continued = continued
        labels = LabelTable.of(dataset, self.device)
        self.step = TrainStep(self.state, config, labels, self.print, self._remember_micro_batch, world)
        self._signals, self._turns = signals, Turns(world, signals, self._own_requests)
        self.evaluation = Evaluation(
            config,
            run_dir,
            dataset,
            self.device,
            self.print,
            self.step.give_way,
            lambda: self.files.trackers,
            lambda: self.files.outputs.has("snapshot"),
            world,
        )
        waits, in_use = self._turns.any_waits, self.evaluation.in_use
        self.files = RunFiles(config, run_dir, dataset, labels, self.state, states, self.console, world, waits, in_use)
        healthy_until = 0 if saved is None else saved.healthy_until
        self.ticks = Ticks(config, self.state, self.step.timer, healthy_until, world)
        self._states = states
        self._all_end = False  # every process knows that this is the end, and how
        self._start_nimg = self.state.progress.nimg
        self._state_saved_at = time.monotonic()

    def run(self) -> Outcome:
        """Train."""
        outcome = Outcome.FAILED
        opened: BatchStream | None = None
        try:
            batches = batches_on(
                self.device, self.dataset, self.config, self._start_nimg, report=self._says, place=self.world.place
            )
            opened = batches  # its processes were forked before the thread of MLflow starts
            self._open_trackers()
            self._announce(batches.lines)
            batch = self._next(batches)
            if self._start_nimg == 0:
                self._add_first_sheets()
            while batch is not None:
                self.step(*batch)
                if self.state.progress.nimg == self._start_nimg + self.config.batch_size:
                    self._compare("after the first step")
                    self.evaluation.catch_up(self._start_nimg, self.state.G_ema)
                if self.ticks.is_due():
                    self._end_tick()
                self.files.outputs.advance()
                self.ticks.measuring += self.evaluation.follow(self._turns.asked)
                batch = self._next(batches)
            outcome = self._end()
            self._all_end = True
            return outcome
        except KeyboardInterrupt:
            outcome = Outcome.STOPPED
            raise
        except Exception as error:
            self._finish_what_was_due()
            if isinstance(error, (GanError, DistributedError)):
                self.console.log(f"error: {printable(str(error))}")
            raise
        finally:
            if opened is not None:
                opened.close()
            self._close(outcome)

    def settle(self) -> None:
        """What is left to do for a run that was complete: the last files and MLflow may not have been."""
        self._open_trackers()
        try:
            last = (self.run_dir / self.files.sheet_name, self.run_dir / self.files.snapshot_name)
            if self.world.share(not all(path.exists() for path in last), "the last files"):
                self._save(self._add_snapshot(measured=False))
                self.files.outputs.finish()
            self.evaluation.catch_up(self._start_nimg, self.state.G_ema)
            self._finish_last_files()
            self.print("There is nothing left to train; --kimg N makes the run longer")
            self._all_end = True
        finally:
            self._close(Outcome.COMPLETE)

    @property
    def complete(self) -> bool:
        """Whether all images have been shown."""
        return self.state.progress.nimg >= self.config.total_kimg * 1000

    def print(self, text: str) -> None:
        """To the screen and log.txt."""
        self.console.print(text)

    def _start_from(self, source: models.Snapshot) -> list[str]:
        """Take over the weights of a file; what to say of that."""
        G, D, G_ema = self.state.G, self.state.D, self.state.G_ema
        names = self.config.data.class_names
        report = models.transfer(source, G, D, G_ema, self.config.allow_partial, names)
        return with_topic("Weights:", [*report.lines(), *map(printable, source.notes)])

    def _with_micro_batch(self, config: TrainConfig) -> TrainConfig:
        """The configuration with the micro-batch of `--batch-gpu auto` found, for good."""
        config, line = fitted(config, self.device, self.half_dtype, self.dataset, self.world)
        if line is not None:
            self.print(f"Memory:    {line}")
            if self.world.is_first:
                run_folder.write_options(self.run_dir, config)
        return config

    def _remember_micro_batch(self, batch_gpu: int) -> None:
        """Memory ran out: when the run continues, it begins with what fits."""
        self.config = dataclasses.replace(self.config, batch_gpu=batch_gpu)
        if self.world.is_first:
            with contextlib.suppress(GanError):  # a full disk is no reason to stop now: it would be found out again
                run_folder.write_options(self.run_dir, self.config)

    def _share_state(self) -> None:
        """What the first process has made or loaded becomes that of all; sums of statistics are its own."""
        if self.world.size == 1:
            return
        state = self.world.share(self.state.state_dict() if self.world.is_first else None, "the networks")
        if not self.world.is_first:
            self.state.load_state_dict({**state, "stats": {}})

    def _compare(self, when: str) -> None:
        """Raises what is to be said if processes have come to different networks."""
        try:
            self.world.require_same(self.state.tensors(), when)
        except DifferentError as error:
            self._all_end = True
            if self.state.progress.nimg > self._start_nimg + self.config.batch_size:
                raise  # a fault of a machine: the last state may be as good as any
            raise GanError(
                f"{error}; give all machines the same program, the same PyTorch and the same files"
            ) from error

    @property
    def _kimg(self) -> str:
        return in_kimg(self.state.progress.nimg)

    def _next(self, batches: BatchStream) -> Batch | None:
        """The next batch; None: the run is to end here. Requests are followed also while images do not come."""
        while not self.complete:
            batch, asked = self._turns.look(batches), self._turns.asked
            self.ticks.data_wait += self._turns.seconds
            if asked & Asked.NO_IMAGES:
                self._end_without_images()
            if asked & (Asked.STOP | Asked.FAILED):
                return None
            if asked & (Asked.SAVE | Asked.SAVE_QUIETLY):
                self._save(said=bool(asked & Asked.SAVE))
            if not asked & Asked.WAIT:
                return batch
        return None

    def _own_requests(self) -> Asked:
        """What the first process asks for: a state, every so many minutes but not while a slow disk takes the last."""
        asked = self.evaluation.requests()
        if not self.world.is_first:
            return asked
        due = time.monotonic() > self._state_saved_at + self.config.save_every * 60
        if due and self.state.progress.nimg > self._start_nimg and not self.files.outputs.has("state"):
            asked |= Asked.SAVE_QUIETLY
        if self.ticks.health.failed and self.config.on_divergence != "ignore":
            asked |= Asked.FAILED
        return asked

    def _end_without_images(self) -> NoReturn:
        """A file that is gone or damaged is no reason to lose what was learned."""
        problem = self._turns.problem()
        if self.state.progress.nimg == self._start_nimg:
            raise self._of_all(problem)
        self._save_and_finish()
        resume = run_folder.resume_command(self.run_dir)
        saved = f"{problem}; the run is saved at {self._kimg} kimg: mend the dataset, then {resume}"
        raise self._of_all(GanError(saved)) from problem

    def _of_all(self, error: GanError) -> GanError:
        """An error that every process raises now."""
        self._all_end = True
        return error

    def _open_trackers(self) -> None:
        if not self.world.is_first:
            return
        self.evaluation.go_on_from(self.state.progress.nimg)  # MLflow is not to be sent lines that are dropped
        self.files.open_trackers(self._tracker_state, self._continued)
        self.ticks.recall(jsonl.read_records(self.run_dir / jsonl.FILE_NAME))

    def _says(self, topic: str, line: str) -> None:
        self.print(f"{topic + ':':<11}{line}")

    def _announce(self, cache_lines: list[str]) -> None:
        if not self.world.is_first:
            self._says("Computing", resources.computing(self.device, self.state.G, self.half_dtype))
            self._says("Kernels", resources.kernels_in_use())
            return
        metric_lines = self.evaluation.lines
        lines = announcement(
            self.config, self.run_dir, self.dataset, self.state, self.half_dtype, cache_lines, metric_lines
        )
        for line in (*self._notes, *lines):
            self.print(line)

    def _add_first_sheets(self) -> None:
        if self.world.is_first:
            self.files.add_reals()
        self.files.add_fakes("fakes_init.png", copy.deepcopy(self.state.G_ema), self.config.batch_gpu)

    def _end_tick(self) -> None:
        """Report, write what is due, and begin the next tick."""
        progress = self.state.progress
        self.files.trackers.tick(progress.nimg, self.ticks.record())
        smallest = min(self.world.gather(self.step.batch_gpu, "the end of a tick"))
        if smallest < self.config.batch_gpu:
            self._remember_micro_batch(smallest)
        maintenance = time.monotonic()
        snapshot_due = self.complete or progress.tick % self.config.snap == 0
        if snapshot_due:
            self._compare(f"at {self._kimg} kimg")
        networks = self._add_snapshot() if snapshot_due else None
        self.ticks.begin_next()
        if snapshot_due:
            self._save(networks)
        progress.maintenance_seconds = time.monotonic() - maintenance

    def _add_snapshot(self, measured: bool = True) -> dict[str, Any]:
        """Snapshot and sheet; returns the copies of the networks that are in them.

        `measured`: the snapshot is to be, when there is time.
        """
        self.files.outputs.make_room("snapshot")
        copies = self.state.copy_networks if self.world.is_first else self._copy_for_the_sheet
        networks = self._with_memory(copies)
        self.files.add_fakes(self.files.sheet_name, networks["G_ema"], self.config.batch_gpu)
        if self.world.is_first:
            self.files.add_snapshot(networks)
        if measured:
            self.evaluation.add(self.files.snapshot_name, self.state.progress.nimg, networks["G_ema"])
        return networks

    def _copy_for_the_sheet(self) -> dict[str, Any]:
        return {"G_ema": copy.deepcopy(self.state.G_ema)}

    def _save(self, networks: dict[str, Any] | None = None, said: bool = False) -> None:
        """The training state of this moment; `networks`: copies that were made of them already."""
        self.state.progress.seconds = self.ticks.seconds
        self.files.outputs.make_room("state")
        stats = self.state.stats.total(self.world)
        if self.world.is_first:
            state = self._with_memory(functools.partial(self.state.copy, networks))
            self.files.add_state({**state, "stats": stats}, self.ticks.healthy_until, said)
            self._state_saved_at = time.monotonic()

    def _with_memory(self, copy: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A copy on the device, for which recorded phases give way if they must."""
        smaller = run_folder.resume_command(self.run_dir, "--batch-gpu", "auto")
        return copied(copy, self.step.give_way, remedy=smaller)

    def _save_and_finish(self) -> None:
        self._save()
        self.files.outputs.finish()
        self._require(state_files.NEWEST)

    def _require(self, *names: str) -> None:
        """Raises GanError, in every process, if one of these files could not be written."""
        problem = self.world.share(self.files.problem_with(*names), "the last files")
        if problem is not None:
            raise self._of_all(GanError(problem))

    def _finish_what_was_due(self) -> None:
        """What fell due before an error is worth having, as far as it takes no process that may be gone."""
        try:
            if self.world.size == 1 or self._all_end:
                self.files.outputs.finish()
            else:
                self.files.outputs.finish_alone()
        except Exception:  # the error comes first
            self._all_end = False

    def _close(self, outcome: Outcome) -> None:
        self.files.outputs.close()
        self.files.trackers.close(outcome.value)
        if self._all_end:
            with contextlib.suppress(DistributedError):  # who ends early has the others killed by what started them
                self.world.gather(None, "the end of the run")

    def _end(self) -> Outcome:
        """Finish the files of a run that is complete, has failed, or was asked to stop."""
        if self.complete:
            self._finish_last_files()
            return Outcome.COMPLETE
        if self._turns.asked & Asked.FAILED:
            self.files.outputs.finish()
            self._give_up_or_roll_back()
            return Outcome.FAILED
        self._save_and_finish()
        self.evaluation.leave(goes_on=True)
        self.print(f"Stopped at {self._kimg} kimg, saved; go on with: {run_folder.resume_command(self.run_dir)}")
        return Outcome.STOPPED

    def _may_roll_back(self) -> bool:
        wanted = self.config.on_divergence == "rollback" and not self.state.progress.rollbacks
        return wanted and self._states.healthy_nimg(self.ticks.healthy_until) is not None

    def _give_up_or_roll_back(self) -> None:
        """Training has failed. Raises FailedRunError unless it may go back."""
        lost = f"training has failed at {self._kimg} kimg: {self.ticks.health.word}"
        verdict = self.world.share(None if self._may_roll_back() else lost, "whether to go back")
        if verdict is None:
            return
        if self.world.is_first:
            healthy, went_back = self._states.healthy_nimg(self.ticks.healthy_until), self.state.progress.rollbacks > 0
            for line in what_can_be_done(self.ticks.health, self.run_dir, healthy, went_back):
                self.print(line)
        raise self._of_all(FailedRunError(verdict))

    def _finish_last_files(self) -> None:
        self.files.outputs.finish()
        self._require(self.files.sheet_name, self.files.snapshot_name, state_files.NEWEST)
        self.evaluation.finish(lambda: self._signals.stop_requested)
        if self.world.is_first:
            self.files.prune()
        self.print(f"Done: {self._kimg} kimg in {self.run_dir}")
