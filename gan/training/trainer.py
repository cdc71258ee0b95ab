"""The training loop."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset, decoder
from gan.data.loader import LabelTable, batch_stream
from gan.errors import GanError
from gan.networks import set_half_dtype
from gan.tracking import Console, JsonlTracker, MlflowTracker, Trackers
from gan.training import resources, run_folder
from gan.training.devices import allow_tf32, choose_device, choose_half_dtype, keep_freed_memory
from gan.training.grid import SampleGrid
from gan.training.signals import StopRequest
from gan.training.state import TrainingState, read_state, save_state
from gan.training.step import TrainStep

STATE_SECONDS = 600  # the most training that a crash can cost
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


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
        self.device = choose_device(config.device)
        self.half_dtype = choose_half_dtype(config.precision, self.device)
        allow_tf32(config.tf32)
        if self.device.type == "cpu":
            keep_freed_memory()
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
        self.step = TrainStep(self.state, config, self.labels)
        self.grid = SampleGrid.choose(dataset, config.network.z_dim, config.seed)
        self.clock = _Clock(self.state.progress.seconds)
        self._state_saved_at = time.monotonic()
        self._data_wait = 0.0

    def run(self) -> bool:
        """Train. Returns whether the run is complete (False: it was asked to stop, and can be continued)."""
        self.console = Console(self.run_dir, self.config.total_kimg)
        self.trackers = Trackers([self.console], self.console.print)
        status = "FAILED"
        try:
            batches = self._batches()
            images, indices = next(batches)  # worker processes start before the thread of MLflow does
            self._open_trackers()
            with StopRequest() as stop:
                self._announce()
                if not self.resumed:
                    self._save_first_images()
                while not self.complete:
                    self.step(images, indices)
                    if self._tick_is_due():
                        self._end_tick()
                    if stop.requested and not self.complete:
                        status = "KILLED"
                        return self._stop_early()
                    if not self.complete:
                        images, indices = self._next(batches)
            status = "FINISHED"
            self.print(f"Done: {self.state.progress.nimg / 1000:g} kimg in {self.run_dir}")
            return True
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        except GanError as error:
            self.console.log(f"error: {error}")
            raise
        finally:
            self.trackers.close(status)

    @property
    def complete(self) -> bool:
        """Whether all images have been shown."""
        return self.state.progress.nimg >= self.config.total_kimg * 1000

    def print(self, text: str) -> None:
        """To the screen and log.txt."""
        self.console.print(text)

    def _batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        config = self.config
        workers = config.workers
        if workers is None:  # on a CPU they would take cores from the training that they wait for
            workers = 0 if self.device.type == "cpu" else 2
        stream = batch_stream(
            self.dataset,
            config.batch_size,
            config.seed,
            start=self.state.progress.nimg,
            workers=workers,
            pin_memory=self.device.type == "cuda",
        )
        for images, indices in stream:
            yield images.to(self.device, non_blocking=True), indices.to(self.device, non_blocking=True)

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
        )
        self.trackers = Trackers([self.console, JsonlTracker(self.run_dir, nimg), mlflow], self.console.print)

    def _announce(self) -> None:
        """What runs, on what, and why: one line each."""
        config, data, progress = self.config, self.config.data, self.state.progress
        sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (self.state.G, self.state.D)]
        half_from = [b.resolution for b in self.state.G.synthesis.children() if b.use_fp16]
        precision = "float32"
        if half_from and self.half_dtype != torch.float32:
            precision = f"{_DTYPE_NAMES[self.half_dtype]} from {half_from[0]}x{half_from[0]} on, float32 below"
        shown = f"{data.resolution}x{data.resolution}, {'grey' if data.channels == 1 else 'RGB'}"
        classes = f", {data.label_dim} label values" if data.label_dim else ""
        begin = f"continuing at {progress.nimg / 1000:g} kimg" if self.resumed else "starting"
        self.print(f"Run:       {self.run_dir} ({begin}, {config.total_kimg} kimg in all)")
        self.print(f"Data:      {data.path}: {len(self.dataset)} images, {shown}{classes}; decoded by {decoder()}")
        self.print(f"Networks:  G {sizes[0]:.2f} M parameters, D {sizes[1]:.2f} M")
        self.print(f"Batch:     {config.batch_size}, {config.batch_gpu} at a time")
        device = resources.device_name(self.device)
        self.print(f"Computing: {device}, {precision}; PyTorch operations, no CUDA kernels yet")
        if not resources.can_measure_memory():
            self.print("Memory:    cpumem reads 0, because psutil is not installed")
        if config.init_from and not self.resumed:
            self.print(f"Weights:   from {config.init_from}")
        self.print("Stop with Ctrl-C: the run is saved, and python train.py --resume goes on where it was")

    def _save_first_images(self) -> None:
        self.print("Writing reals.png and fakes_init.png first")
        self.grid.save_reals(self.dataset, self.run_dir / "reals.png")
        self.trackers.image("reals", self.run_dir / "reals.png", 0)
        self._save_fakes("fakes_init.png")

    def _tick_is_due(self) -> bool:
        progress = self.state.progress
        return progress.tick == 0 or self.complete or progress.nimg >= progress.tick_nimg + self.config.tick_kimg * 1000

    def _end_tick(self) -> None:
        """Report, write what is due, and begin the next tick."""
        progress = self.state.progress
        self.trackers.tick(progress.nimg, self._tick_record())
        maintenance = time.monotonic()
        snapshot_due = self.complete or progress.tick % self.config.snap == 0
        if snapshot_due:
            kimg = progress.nimg // 1000
            self._save_fakes(f"fakes{kimg:06d}.png")
            self._save_snapshot(self.run_dir / f"network-snapshot-{kimg:06d}.pkl")
        progress.tick += 1
        progress.tick_nimg = progress.nimg
        progress.maintenance_seconds = time.monotonic() - maintenance
        progress.tick_start_seconds = self.clock.seconds
        if snapshot_due or time.monotonic() - self._state_saved_at > STATE_SECONDS:
            self._save_state()

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

    def _save_fakes(self, name: str) -> None:
        labels = self.labels.take(torch.from_numpy(self.grid.indices).to(self.device))
        self.grid.save_fakes(self.state.G_ema, labels, self.config.batch_gpu, self.run_dir / name)
        self.trackers.image("fakes", self.run_dir / name, self.state.progress.nimg)

    def _save_snapshot(self, path: Path) -> None:
        state, data = self.state, self.config.data
        kwargs = {
            "path": data.path,
            "use_labels": data.cond,
            "max_size": data.subset,
            "xflip": data.mirror,
            "resolution": data.resolution,
        }
        models.save(
            path, G=state.G, D=state.D, G_ema=state.G_ema, augment_pipe=state.augment, training_set_kwargs=kwargs
        )

    def _save_state(self) -> None:
        self.state.progress.seconds = self.clock.seconds
        known = {name: value for name, value in self.trackers.state().items() if value is not None}
        self._tracker_state.update(known)
        save_state(self.run_dir / run_folder.STATE_FILE, self.state, self._tracker_state)
        self._state_saved_at = time.monotonic()

    def _stop_early(self) -> bool:
        self._save_state()
        kimg = self.state.progress.nimg / 1000
        self.print(f"Stopped at {kimg:g} kimg, saved; go on with: python train.py --resume {self.run_dir}")
        return False


class _Clock:
    """Seconds spent on a run, earlier starts of it included."""

    def __init__(self, before: float) -> None:
        self._origin = time.monotonic() - before

    @property
    def seconds(self) -> float:
        """Now."""
        return time.monotonic() - self._origin
