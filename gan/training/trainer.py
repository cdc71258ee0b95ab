"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import enum
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream, LabelTable
from gan.errors import GanError
from gan.networks import set_half_dtype
from gan.tracking import Console, JsonlTracker, MlflowTracker, Trackers, jsonl
from gan.training import resources, run_folder, state_files
from gan.training.announce import announcement
from gan.training.devices import prepare
from gan.training.fit import fitted
from gan.training.health import Vitals, assess
from gan.training.run_files import RunFiles
from gan.training.signals import Signals
from gan.training.state import TrainingState
from gan.training.state_files import SavedState, StateFiles
from gan.training.step import TrainStep


class Outcome(enum.Enum):
    """How `Trainer.run` ended; the value is the status of the run in MLflow."""

    COMPLETE = "FINISHED"
    STOPPED = "KILLED"
    FAILED = "FAILED"
    """training itself has failed: `Trainer.health` says how"""


class Trainer:
    """One run: `run` trains until it is complete, is asked to stop, or has failed.

    Args:
        config: what to train; already written to the run folder.
        run_dir: folder of the run.
        dataset: the images.
        states: the training states in the run folder.
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
        for network in (self.state.G, self.state.D, self.state.G_ema):
            set_half_dtype(network, self.half_dtype)
        if start is not None:
            models.transfer(start, self.state.G, self.state.D, self.state.G_ema)
        self._tracker_state: dict[str, Any] = {}
        if saved is not None:
            self.state.load_state_dict(saved.state)
            self._tracker_state = saved.tracker
        self._begun, self._continued, self._notes = saved is not None, continued, notes
        labels = LabelTable.of(dataset, self.device)
        self.step = TrainStep(self.state, config, labels, self.print, self._remember_micro_batch)
        self.files = RunFiles(config, run_dir, dataset, labels, self.state, states, self.print)
        self.clock = _Clock(self.state.progress.seconds)
        self.health = assess([], None)
        self._vitals: list[Vitals] = []  # of all ticks
        self._state_saved_at = time.monotonic()
        self._data_wait = 0.0

    def run(self) -> Outcome:
        """Train."""
        outcome = Outcome.FAILED
        opened: BatchStream | None = None
        try:
            nimg = self.state.progress.nimg
            places = (self.device, self.dataset, self.config)
            opened = batches = batches_on(*places, nimg, report=self._cache_says, notice=self._data_says)
            images, indices = next(batches)  # worker processes start before the thread of MLflow does
            self._open_trackers()
            with Signals() as signals:
                self._announce(batches.lines)
                if not self._begun:
                    self._add_first_sheets()
                while True:
                    self.step(images, indices)
                    if self._tick_is_due():
                        self._end_tick()
                    self.files.outputs.advance()
                    if self.complete or self._has_failed or signals.stop_requested:
                        break
                    self._save_if_due(signals.take_save_request())
                    images, indices = self._next(batches)
                outcome = self._end()
            return outcome
        except KeyboardInterrupt:
            outcome = Outcome.STOPPED
            raise
        except Exception as error:
            with contextlib.suppress(Exception):  # what fell due before the error is worth having
                self.files.outputs.finish()
            if isinstance(error, GanError):
                self.console.log(f"error: {error}")
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
            if not self.files.snapshot_path.exists():
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
        return self.health.failed and self.config.on_divergence != "ignore"

    @property
    def _kimg(self) -> float:
        return self.state.progress.nimg / 1000

    def _next(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        begin = time.perf_counter()
        try:
            batch = next(batches)
        except GanError as error:  # a file that is gone or damaged is no reason to lose what was learned
            self._save()
            self.files.outputs.finish()
            self.files.require(state_files.NEWEST)
            raise GanError(
                f"{error}; the run is saved at {self._kimg:g} kimg: mend the dataset, then "
                f"python train.py --resume {self.run_dir}"
            ) from error
        self._data_wait += time.perf_counter() - begin
        return batch

    def _open_trackers(self) -> None:
        progress = self.state.progress
        stats = JsonlTracker(self.run_dir, progress.nimg, self._tracker_state.get("unwritten_ticks"))
        mlflow = MlflowTracker(
            self.run_dir.name,
            experiment=self.config.data.name,
            outdir=self.run_dir.parent,
            params=dataclasses.asdict(self.config),
            tags=resources.versions(self.device),
            run_id=self._tracker_state.get("run_id"),
            nimg=progress.nimg,
            continued=self._continued,
            branch=progress.branch,
            report=self.console.print,
            wait_for_tick=True,
        )
        self.files.trackers = Trackers([self.console, stats, mlflow], self.console.print)
        self.files.remember(self._tracker_state)
        self._vitals = [Vitals.of(record) for record in jsonl.read_records(self.run_dir / jsonl.FILE_NAME)]

    def _cache_says(self, line: str) -> None:
        self.print(f"Cache:     {line}")

    def _data_says(self, line: str) -> None:
        self.print(f"Data:      {line}")

    def _announce(self, cache_lines: list[str]) -> None:
        for line in self._notes:
            self.print(line)
        about = (self.config, self.run_dir, self.dataset, self.state, self.half_dtype, cache_lines)
        for line in announcement(*about, continuing=self._continued):
            self.print(line)

    def _add_first_sheets(self) -> None:
        self.files.add_reals()
        self.files.add_fakes("fakes_init.png", copy.deepcopy(self.state.G_ema), self.step.batch_gpu)

    def _tick_is_due(self) -> bool:
        progress = self.state.progress
        return progress.tick == 0 or self.complete or progress.nimg >= progress.tick_nimg + self.config.tick_kimg * 1000

    def _end_tick(self) -> None:
        """Report, write what is due, and begin the next tick."""
        progress = self.state.progress
        record = self._tick_record()
        self._vitals.append(Vitals.of(record))
        self.health = assess(self._vitals, self.config.augment.adaptive_p_max)
        self.files.trackers.tick(progress.nimg, {**record, "health": self.health.word})
        maintenance = time.monotonic()
        snapshot_due = self.complete or progress.tick % self.config.snap == 0
        networks = self._add_snapshot() if snapshot_due else None
        progress.tick += 1
        progress.tick_nimg = progress.nimg
        progress.tick_start_seconds = self.clock.seconds
        if snapshot_due:
            self._save(networks)
        progress.maintenance_seconds = time.monotonic() - maintenance

    def _add_snapshot(self) -> dict[str, Any]:
        """Snapshot and sheet; returns the copies of the networks that are in them."""
        self.files.outputs.make_room("snapshot")
        networks = self.state.copy_networks()
        self.files.add_fakes(f"fakes{self.state.progress.nimg // 1000:06d}.png", networks["G_ema"], self.step.batch_gpu)
        self.files.add_snapshot(networks)
        return networks

    def _tick_record(self) -> dict[str, Any]:
        """One line of stats.jsonl."""
        progress, total = self.state.progress, self.clock.seconds
        tick_seconds = total - progress.tick_start_seconds
        images = progress.nimg - progress.tick_nimg
        record: dict[str, Any] = dict(self.state.stats.flush())
        scalars = {
            "Progress/tick": progress.tick,
            "Progress/kimg": progress.nimg / 1000,
            "Progress/augment": float(self.state.p),
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": tick_seconds / images * 1000,
            "Timing/total_sec": total,
            "Timing/total_hours": total / 3600,
            "Timing/total_days": total / 86400,
            "Timing/maintenance_sec": progress.maintenance_seconds,
            "Timing/data_wait": self._data_wait,
            **{f"Timing/{phase}": ms for phase, ms in self.step.timer.flush().items()},
            "Resources/cpu_mem_gb": resources.cpu_memory_gb(),
            "Resources/peak_gpu_mem_gb": resources.peak_gpu_memory_gb(self.device),
        }
        self._data_wait = 0.0
        record.update({name: {"num": 1, "mean": value, "std": 0.0} for name, value in scalars.items()})
        return {**record, "timestamp": time.time()}

    def _save_if_due(self, asked: bool) -> None:
        """Every so many minutes, wherever the tick is; not while a slow disk still takes the one before."""
        due = time.monotonic() > self._state_saved_at + self.config.save_every * 60
        if asked or (due and not self.files.outputs.has("state")):
            self._save(said=asked)

    def _save(self, networks: dict[str, Any] | None = None, said: bool = False) -> None:
        """The training state of this moment; `networks`: copies that were made of them already."""
        self.state.progress.seconds = self.clock.seconds
        self.files.add_state(self.health.healthy, networks, said)
        self._state_saved_at = time.monotonic()

    def _end(self) -> Outcome:
        """Finish the files of a run that is complete, has failed, or was asked to stop."""
        if self.complete:
            self._finish_last_files()
            return Outcome.COMPLETE
        if self._has_failed:
            self.files.outputs.finish()
            return Outcome.FAILED
        self._save()
        self.files.outputs.finish()
        self.files.require(state_files.NEWEST)
        self.print(f"Stopped at {self._kimg:g} kimg, saved; go on with: python train.py --resume {self.run_dir}")
        return Outcome.STOPPED

    def _finish_last_files(self) -> None:
        self.files.outputs.finish()
        self.files.require(self.files.snapshot_path.name, state_files.NEWEST)
        self.print(f"Done: {self._kimg:g} kimg in {self.run_dir}")


def batches_on(
    device: torch.device,
    dataset: ImageDataset,
    config: TrainConfig,
    start: int,
    report: Callable[[str], None] = print,
    notice: Callable[[str], None] = print,
) -> BatchStream:
    """Endless batches (images, indices) on the device, from the `start`-th image of the run on."""
    workers = config.workers
    if workers is None:  # on a CPU they would take cores from the training that they wait for
        workers = 0 if device.type == "cpu" else 2
    return BatchStream(
        dataset,
        config.batch_size,
        config.seed,
        start,
        device=device,
        workers=workers,
        cache=config.cache,
        cache_dir=config.cache_dir,
        report=report,
        notice=notice,
    )


class _Clock:
    """Seconds spent on a run, earlier starts of it included."""

    def __init__(self, before: float) -> None:
        self._origin = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Now."""
        return time.monotonic() - self._origin
