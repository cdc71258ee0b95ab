"""The training loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset, decoder
from gan.data.loader import BatchStream, LabelTable
from gan.errors import GanError
from gan.networks import Generator, set_half_dtype
from gan.tracking import Console, JsonlTracker, MlflowTracker, Trackers
from gan.training import resources, run_folder
from gan.training.devices import prepare
from gan.training.grid import SampleGrid
from gan.training.outputs import Output, Outputs
from gan.training.signals import StopRequest
from gan.training.state import TrainingState, read_state, save_state
from gan.training.step import TrainStep

STATE_SECONDS = 600  # the most training that a crash can cost


class Trainer:
    """One run: `run` trains until it is complete or asked to stop.

    Args:
        config: what to train; already written to the run folder.
        run_dir: folder of the run.
        dataset: the images.
        start: weights to start from, for a new run.
        resume: continue from the training state in the run folder.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: ImageDataset,
        start: models.Snapshot | None = None,
        resume: bool = False,
    ) -> None:
        self.config, self.run_dir, self.dataset = config, run_dir, dataset
        self.device, self.half_dtype = prepare(config)
        self.state = TrainingState(config, self.device)
        for network in (self.state.G, self.state.D, self.state.G_ema):
            set_half_dtype(network, self.half_dtype)
        self._tracker_state: dict[str, Any] = {}
        if start is not None:
            models.transfer(start, self.state.G, self.state.D, self.state.G_ema)
        if resume:
            saved = read_state(run_dir / run_folder.STATE_FILE)
            self.state.load_state_dict(saved["state"])
            self._tracker_state = saved["tracker"]
        self.resumed = resume
        self.labels = LabelTable.of(dataset, self.device)
        self.step = TrainStep(self.state, config, self.labels, self.print)
        self.grid = SampleGrid.choose(dataset, config.network.z_dim, config.seed)
        self.clock = _Clock(self.state.progress.seconds)
        self._state_saved_at = time.monotonic()
        self._data_wait = 0.0

    def run(self) -> bool:
        """Train. Returns whether the run is complete (False: it was asked to stop, and can be continued)."""
        self.console = Console(self.run_dir, self.config.total_kimg)
        self.trackers = Trackers([self.console], self.console.print)
        self.outputs = Outputs(self.device, self.console.print)
        status = "FAILED"
        opened: BatchStream | None = None
        try:
            nimg = self.state.progress.nimg
            opened = batches = batches_on(self.device, self.dataset, self.config, start=nimg, report=self._cache_says)
            images, indices = next(batches)  # worker processes start before the thread of MLflow does
            self._open_trackers()
            with StopRequest() as stop:
                self._announce(batches.lines)
                if not self.resumed:
                    self._add_first_sheets()
                while not self.complete:
                    self.step(images, indices)
                    if self._tick_is_due():
                        self._end_tick()
                    self.outputs.advance()
                    if stop.requested and not self.complete:
                        status = "KILLED"
                        return self._stop_early()
                    if not self.complete:
                        images, indices = self._next(batches)
                self.outputs.finish()
            status = "FINISHED"
            self.print(f"Done: {self.state.progress.nimg / 1000:g} kimg in {self.run_dir}")
            return True
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except Exception as error:
            with contextlib.suppress(Exception):  # what fell due before the error is worth having
                self.outputs.finish()
            if isinstance(error, GanError):
                self.console.log(f"error: {error}")
            raise
        finally:
            if opened is not None:
                opened.close()
            self.outputs.close()
            self.trackers.close(status)

    @property
    def complete(self) -> bool:
        """Whether all images have been shown."""
        return self.state.progress.nimg >= self.config.total_kimg * 1000

    def print(self, text: str) -> None:
        """To the screen and log.txt."""
        self.console.print(text)

    def _next(self, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
        begin = time.perf_counter()
        batch = next(batches)
        self._data_wait += time.perf_counter() - begin
        return batch

    def _open_trackers(self) -> None:
        nimg = self.state.progress.nimg
        mlflow = MlflowTracker(
            self.run_dir.name,
            experiment=self.config.data.name,
            outdir=self.run_dir.parent,
            params=dataclasses.asdict(self.config),
            tags=resources.versions(self.device),
            run_id=self._tracker_state.get("run_id"),
            nimg=nimg,
            report=self.console.print,
            wait_for_tick=True,
        )
        self.trackers = Trackers([self.console, JsonlTracker(self.run_dir, nimg), mlflow], self.console.print)

    def _cache_says(self, line: str) -> None:
        self.print(f"Cache:     {line}")

    def _announce(self, cache_lines: list[str]) -> None:
        """What runs, on what, and why: one line each."""
        config, data, progress = self.config, self.config.data, self.state.progress
        sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (self.state.G, self.state.D)]
        shown = f"{data.resolution}x{data.resolution}, {'grey' if data.channels == 1 else 'RGB'}"
        classes = f", {data.label_dim} label values" if data.label_dim else ""
        begin = f"continuing at {progress.nimg / 1000:g} kimg" if self.resumed else "starting"
        self.print(f"Run:       {self.run_dir} ({begin}, {config.total_kimg} kimg in all)")
        self.print(f"Data:      {data.path}: {len(self.dataset)} images, {shown}{classes}; decoded by {decoder()}")
        for line in cache_lines:
            self._cache_says(line)
        self.print(f"Networks:  G {sizes[0]:.2f} M parameters, D {sizes[1]:.2f} M")
        self.print(f"Batch:     {config.batch_size}, {config.batch_gpu} at a time")
        self.print(f"Computing: {resources.computing(self.device, self.state.G, self.half_dtype)}")
        if not resources.can_measure_memory():
            self.print("Memory:    cpumem reads 0, because psutil is not installed")
        if config.init_from and not self.resumed:
            self.print(f"Weights:   from {config.init_from}")
        self.print("Stop with Ctrl-C: the run is saved, and python train.py --resume goes on where it was")

    def _add_first_sheets(self) -> None:
        path = self.run_dir / "reals.png"

        def write() -> None:
            self.grid.save_reals(self.dataset, path)
            self.trackers.image("reals", path, 0)

        self.outputs.add(Output("reals.png", "sheet", write))
        self._add_fakes("fakes_init.png", copy.deepcopy(self.state.G_ema))

    def _tick_is_due(self) -> bool:
        progress = self.state.progress
        return progress.tick == 0 or self.complete or progress.nimg >= progress.tick_nimg + self.config.tick_kimg * 1000

    def _end_tick(self) -> None:
        """Report, write what is due, and begin the next tick."""
        progress = self.state.progress
        self.trackers.tick(progress.nimg, self._tick_record())
        maintenance = time.monotonic()
        snapshot_due = self.complete or progress.tick % self.config.snap == 0
        networks = None
        if snapshot_due:
            self.outputs.make_room("snapshot")
            networks = self.state.copy_networks()
            kimg = progress.nimg // 1000
            self._add_fakes(f"fakes{kimg:06d}.png", networks["G_ema"])
            self._add_snapshot(self.run_dir / f"network-snapshot-{kimg:06d}.pkl", networks)
        progress.tick += 1
        progress.tick_nimg = progress.nimg
        progress.tick_start_seconds = self.clock.seconds
        if snapshot_due or time.monotonic() - self._state_saved_at > STATE_SECONDS:
            self._add_state(networks)
        progress.maintenance_seconds = time.monotonic() - maintenance

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

    def _add_fakes(self, name: str, G: Generator) -> None:
        """The sheet of what G, which nobody else changes, generates."""
        path, nimg = self.run_dir / name, self.state.progress.nimg
        labels = self.labels.take(torch.from_numpy(self.grid.indices).to(self.device))
        sheet = self.grid.fakes(G, labels, self.config.batch_gpu)

        def write() -> None:
            sheet.write(path)
            self.trackers.image("fakes", path, nimg)

        self.outputs.add(Output(name, "sheet", write, sheet.portions))

    def _add_snapshot(self, path: Path, networks: dict[str, Any]) -> None:
        data = self.config.data
        kwargs = {
            "path": data.path,
            "use_labels": data.cond,
            "max_size": data.subset,
            "xflip": data.mirror,
            "resolution": data.resolution,
        }
        write = functools.partial(models.save, path, **networks, training_set_kwargs=kwargs)
        self.outputs.add(Output(path.name, "snapshot", write))

    def _add_state(self, networks: dict[str, Any] | None = None) -> None:
        """The training state of this moment; `networks`: copies that were made of them already."""
        self.outputs.make_room("state")
        self.state.progress.seconds = self.clock.seconds
        known = {name: value for name, value in self.trackers.state().items() if value is not None}
        self._tracker_state.update(known)
        path, tracker = self.run_dir / run_folder.STATE_FILE, dict(self._tracker_state)
        write = functools.partial(save_state, path, self.state.copy(networks), tracker)
        self.outputs.add(Output(path.name, "state", write))
        self._state_saved_at = time.monotonic()

    def _stop_early(self) -> bool:
        self._add_state()
        self.outputs.finish()
        kimg = self.state.progress.nimg / 1000
        self.print(f"Stopped at {kimg:g} kimg, saved; go on with: python train.py --resume {self.run_dir}")
        return False


def batches_on(
    device: torch.device,
    dataset: ImageDataset,
    config: TrainConfig,
    start: int,
    report: Callable[[str], None] = print,
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
    )


class _Clock:
    """Seconds spent on a run, earlier starts of it included."""

    def __init__(self, before: float) -> None:
        self._origin = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Now."""
        return time.monotonic() - self._origin
