"""What a run reports every few thousand images: when a tick ends, its line of statistics, and how training is doing."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from gan.config import TrainConfig
from gan.training import resources
from gan.training.health import Vitals, assess
from gan.training.state import TrainingState
from gan.training.timing import PhaseTimer
from torch_utils.world import ALONE, World


class Ticks:
    """The ticks of a run. Counters and times survive in the state's progress, health in the records of stats.jsonl.

    With several processes the statistics are those of all, and rank 0 knows how training is doing.

    `healthy_until`: images at the end of the last tick that was healthy.
    """

    def __init__(
        self,
        config: TrainConfig,
        state: TrainingState,
        timer: PhaseTimer,
        healthy_until: int,
        world: World = ALONE,
    ) -> None:
        self._config, self._state, self._timer, self._world = config, state, timer, world
        self._origin = time.monotonic() - state.progress.seconds
        self._vitals: list[Vitals] = []  # of all ticks
        self.health = assess([], None)
        self.healthy_until = healthy_until
        self.data_wait = 0.0  # seconds in this tick
        self.measuring = 0.0  # seconds in this tick, for metrics

    @property
    def seconds(self) -> float:
        """Spent on the run until now, earlier starts of it included."""
        return time.monotonic() - self._origin

    def recall(self, records: Iterable[dict[str, Any]]) -> None:
        """The ticks of earlier starts."""
        self._vitals = [Vitals.of(record) for record in records]
        self._assess()  # the last one: those before it were assessed when they ended

    def is_due(self) -> bool:
        """Whether a tick ends with this step."""
        progress, config = self._state.progress, self._config
        complete = progress.nimg >= config.total_kimg * 1000
        return progress.tick == 0 or complete or progress.nimg >= progress.tick_nimg + config.tick_kimg * 1000

    def record(self) -> dict[str, Any]:
        """The line of stats.jsonl for the tick that ends; its health is then known, on rank 0."""
        progress, total = self._state.progress, self.seconds
        tick_seconds = total - progress.tick_start_seconds
        images = progress.nimg - progress.tick_nimg
        record: dict[str, Any] = dict(self._state.stats.flush(self._world))
        peak_gpu_mem = resources.peak_gpu_memory_gb(self._state.device)
        data_wait, measuring, peak_gpu_mem = self._worst(self.data_wait, self.measuring, peak_gpu_mem)
        scalars = {
            "Progress/tick": progress.tick,
            "Progress/kimg": progress.nimg / 1000,
            "Progress/augment": float(self._state.p),
            "Timing/sec_per_tick": tick_seconds,
            "Timing/sec_per_kimg": max(tick_seconds - measuring, 0) / images * 1000,
            "Timing/total_sec": total,
            "Timing/total_hours": total / 3600,
            "Timing/total_days": total / 86400,
            "Timing/maintenance_sec": progress.maintenance_seconds,
            "Timing/data_wait": data_wait,
            "Timing/metrics": measuring,
            **{f"Timing/{phase}": ms for phase, ms in self._timer.flush().items()},
            "Resources/cpu_mem_gb": resources.cpu_memory_gb(),
            "Resources/peak_gpu_mem_gb": peak_gpu_mem,
        }
        record.update({name: {"num": 1, "mean": value, "std": 0.0} for name, value in scalars.items()})
        if self._world.is_first:
            self._vitals.append(Vitals.of(record))
            self._assess()
        if self.health.healthy:
            self.healthy_until = progress.nimg
        return {**record, "timestamp": time.time(), "health": self.health.word}

    def begin_next(self) -> None:
        """Count from here on."""
        progress = self._state.progress
        progress.tick += 1
        progress.tick_nimg = progress.nimg
        progress.tick_start_seconds = self.seconds
        self.data_wait = self.measuring = 0.0

    def _worst(self, *own: float) -> list[float]:
        """The largest of each number that any rank has: all wait for the slowest, and no more fits than into each."""
        return [max(numbers) for numbers in zip(*self._world.gather(own, "the end of a tick"), strict=True)]

    def _assess(self) -> None:
        self.health = assess(self._vitals, self._config.augment.adaptive_p_max)
