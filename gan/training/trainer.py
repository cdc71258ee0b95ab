"""The training loop."""

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

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.labels import LabelTable
from gan.data.loader import BatchStream
from gan.errors import FailedRunError, GanError, printable
from gan.tracking import Console, JsonlTracker, MlflowTracker, Trackers, jsonl
from gan.training import resources, run_folder, state_files
from gan.training.announce import announcement, with_topic
from gan.training.batches import batches_on
from gan.training.devices import prepare
from gan.training.fit import fitted
from gan.training.micro_batch import is_out_of_memory
from gan.training.run_files import RunFiles
from gan.training.run_folder import in_kimg
from gan.training.signals import Signals
from gan.training.state import TrainingState
from gan.training.state_files import SavedState, StateFiles
from gan.training.step import TrainStep
from gan.training.ticks import Ticks

_SIGNAL_SECONDS = 1.0  # after which a request is noticed while images do not come


class Outcome(enum.Enum):
    """How `Trainer.run` ended; the value is the status of the run in MLflow."""

    COMPLETE = "FINISHED"
    STOPPED = "KILLED"
    FAILED = "FAILED"
    """training itself has failed, and is to go back to a healthy state"""


class Trainer:
    """One run: `run` trains until it is complete, is asked to stop, or has failed.

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
    ) -> None:
        self.run_dir, self.dataset = run_dir, dataset
        self.console = Console(run_dir, config.total_kimg)
        self.device, self.half_dtype = prepare(config)
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
        self._continued = continued
        labels = LabelTable.of(dataset, self.device)
        self.step = TrainStep(self.state, config, labels, self.print, self._remember_micro_batch)
        self.files = RunFiles(config, run_dir, dataset, labels, self.state, states, self.print)
        healthy_until = 0 if saved is None else saved.healthy_until
        self.ticks = Ticks(config, self.state, self.step.timer, healthy_until)
        self._states, self._signals = states, signals
        self._start_nimg = self.state.progress.nimg
        self._state_saved_at = time.monotonic()

    def run(self) -> Outcome:
        """Train."""
        outcome = Outcome.FAILED
        opened: BatchStream | None = None
        try:
            batches = batches_on(self.device, self.dataset, self.config, self._start_nimg, report=self._says)
            opened = batches  # its processes were forked before the thread of MLflow starts
            self._open_trackers()
            self._announce(batches.lines)
            batch = self._next(batches)
            if self._start_nimg == 0:
                self._add_first_sheets()
            while batch is not None:
                self.step(*batch)
                if self.ticks.is_due():
                    self._end_tick()
                self.files.outputs.advance()
                self._save_if_due()
                batch = self._next(batches)
            outcome = self._end()
            return outcome
        except KeyboardInterrupt:
            outcome = Outcome.STOPPED
            raise
        except Exception as error:
            with contextlib.suppress(Exception):  # what fell due before the error is worth having
                self.files.outputs.finish()
            if isinstance(error, GanError):
                self.console.log(f"error: {printable(str(error))}")
            raise
        finally:
            if opened is not None:
                opened.close()
            self.files.outputs.close()
            self.files.trackers.close(outcome.value)

    def settle(self) -> None:
        """What is left to do for a run that was complete: the last files and MLflow may not have been."""
        self._open_trackers()
        try:
            last = (self.run_dir / self.files.sheet_name, self.run_dir / self.files.snapshot_name)
            if not all(path.exists() for path in last):
                self._save(self._add_snapshot())
            self._finish_last_files()
            self.print("There is nothing left to train; --kimg N makes the run longer")
        finally:
            self.files.outputs.close()
            self.files.trackers.close(Outcome.COMPLETE.value)

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
        config, line = fitted(config, self.device, self.half_dtype, self.dataset)
        if line is not None:
            self.print(f"Memory:    {line}")
            run_folder.write_options(self.run_dir, config)
        return config

    def _remember_micro_batch(self, batch_gpu: int) -> None:
        """Memory ran out: when the run continues, it begins with what fits."""
        self.config = dataclasses.replace(self.config, batch_gpu=batch_gpu)
        with contextlib.suppress(GanError):  # a full disk is no reason to stop now: it would be found out again
            run_folder.write_options(self.run_dir, self.config)

    @property
    def _has_failed(self) -> bool:
        return self.ticks.health.failed and self.config.on_divergence != "ignore"

    @property
    def _kimg(self) -> str:
        return in_kimg(self.state.progress.nimg)

    @property
    def _is_over(self) -> bool:
        return self.complete or self._has_failed or self._signals.stop_requested

    def _next(self, batches: BatchStream) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The next batch; None: the run is to end here."""
        begin = time.perf_counter()
        try:
            while not self._is_over and not batches.wait(_SIGNAL_SECONDS):
                self._save_if_due()
            if self._is_over:
                return None
            batch = next(batches)
        except GanError as error:  # a file that is gone or damaged is no reason to lose what was learned
            if self.state.progress.nimg == self._start_nimg:
                raise
            self._save_and_finish()
            raise GanError(
                f"{error}; the run is saved at {self._kimg} kimg: mend the dataset, then "
                f"{run_folder.resume_command(self.run_dir)}"
            ) from error
        self.ticks.data_wait += time.perf_counter() - begin
        return batch

    def _open_trackers(self) -> None:
        progress = self.state.progress
        stats = JsonlTracker(self.run_dir, progress.nimg, self._tracker_state.get("unwritten_ticks"))
        mlflow = MlflowTracker(
            self.run_dir,
            experiment=self.config.data.name,
            params=dataclasses.asdict(self.config),
            tags=resources.versions(self.device),
            run_id=self._tracker_state.get("run_id"),
            nimg=progress.nimg,
            continued=self._continued,
            branch=progress.branch,
            report=self.console.print,
        )
        self.files.trackers = Trackers([self.console, stats, mlflow], self.console.print)
        self.files.remember(self._tracker_state)
        self.ticks.recall(jsonl.read_records(self.run_dir / jsonl.FILE_NAME))

    def _says(self, topic: str, line: str) -> None:
        self.print(f"{topic + ':':<11}{line}")

    def _announce(self, cache_lines: list[str]) -> None:
        lines = announcement(
            self.config, self.run_dir, self.dataset, self.state, self.half_dtype, cache_lines=cache_lines
        )
        for line in (*self._notes, *lines):
            self.print(line)

    def _add_first_sheets(self) -> None:
        self.files.add_reals()
        self.files.add_fakes("fakes_init.png", copy.deepcopy(self.state.G_ema), self.step.batch_gpu)

    def _end_tick(self) -> None:
        """Report, write what is due, and begin the next tick."""
        progress = self.state.progress
        self.files.trackers.tick(progress.nimg, self.ticks.record())
        maintenance = time.monotonic()
        snapshot_due = self.complete or progress.tick % self.config.snap == 0
        networks = self._add_snapshot() if snapshot_due else None
        self.ticks.begin_next()
        if snapshot_due:
            self._save(networks)
        progress.maintenance_seconds = time.monotonic() - maintenance

    def _add_snapshot(self) -> dict[str, Any]:
        """Snapshot and sheet; returns the copies of the networks that are in them."""
        self.files.outputs.make_room("snapshot")
        networks = self._with_memory(self.state.copy_networks)
        self.files.add_fakes(self.files.sheet_name, networks["G_ema"], self.step.batch_gpu)
        self.files.add_snapshot(networks)
        return networks

    def _save_if_due(self) -> None:
        """When asked to, and every so many minutes, wherever the tick is; then not while a slow disk takes the last."""
        asked = self._signals.take_save_request()
        due = time.monotonic() > self._state_saved_at + self.config.save_every * 60
        if asked or (due and not self.files.outputs.has("state")):
            self._save(said=asked)

    def _save(self, networks: dict[str, Any] | None = None, said: bool = False) -> None:
        """The training state of this moment; `networks`: copies that were made of them already."""
        self.state.progress.seconds = self.ticks.seconds
        self.files.outputs.make_room("state")
        state = self._with_memory(functools.partial(self.state.copy, networks))
        self.files.add_state(state, self.ticks.healthy_until, said)
        self._state_saved_at = time.monotonic()

    def _with_memory(self, copy: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A copy on the device, for which recorded phases give way if they must."""
        try:
            return copy()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.step.give_way()  # here, where the error refers to nothing any more
        try:
            return copy()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            smaller = run_folder.resume_command(self.run_dir, "--batch-gpu", "auto")
            raise GanError(f"out of memory beside the training, for a copy to write: {smaller}") from error

    def _save_and_finish(self) -> None:
        self._save()
        self.files.outputs.finish()
        self.files.require(state_files.NEWEST)

    def _end(self) -> Outcome:
        """Finish the files of a run that is complete, has failed, or was asked to stop."""
        if self.complete:
            self._finish_last_files()
            return Outcome.COMPLETE
        if self._has_failed:
            self.files.outputs.finish()
            if not self._may_roll_back():
                self._give_up()
            return Outcome.FAILED
        self._save_and_finish()
        self.print(f"Stopped at {self._kimg} kimg, saved; go on with: {run_folder.resume_command(self.run_dir)}")
        return Outcome.STOPPED

    def _may_roll_back(self) -> bool:
        wanted = self.config.on_divergence == "rollback" and not self.state.progress.rollbacks
        return wanted and self._states.healthy_nimg(self.ticks.healthy_until) is not None

    def _give_up(self) -> NoReturn:
        """Training has failed: say what can be done."""
        healthy = self._states.healthy_nimg(self.ticks.healthy_until)
        command = functools.partial(run_folder.resume_command, self.run_dir)
        self.print(f"Health:    training has failed: {self.ticks.health.word}")
        if healthy is None:
            self.print("           no healthy state is kept")
        elif self.state.progress.rollbacks:
            self.print("           it had gone back once already")
        else:
            back = command("--on-divergence", "rollback")
            self.print(f"           back to {in_kimg(healthy)} kimg, where it was healthy, at half the rates: {back}")
        self.print(f"           on as it is: {command('--on-divergence', 'ignore')}")
        self.print(f"           in a new run: {self.ticks.health.advice or 'lower --glr and --dlr'}")
        raise FailedRunError(f"training has failed at {self._kimg} kimg: {self.ticks.health.word}")

    def _finish_last_files(self) -> None:
        self.files.outputs.finish()
        self.files.require(self.files.sheet_name, self.files.snapshot_name, state_files.NEWEST)
        self.print(f"Done: {self._kimg} kimg in {self.run_dir}")
