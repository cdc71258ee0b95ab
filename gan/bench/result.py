"""What a measurement found, with the figures that follow from it."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from gan.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class PhaseTime:
    """How long a phase takes."""

    ms: float
    """a call"""
    calls_per_step: float

    @property
    def ms_per_step(self) -> float:
        """Its part of the average step."""
        return self.ms * self.calls_per_step


@dataclasses.dataclass(frozen=True)
class Timing:
    """The average step, regularisation included."""

    median_ms: float
    min_ms: float
    max_ms: float
    samples: int
    phases: dict[str, PhaseTime]
    """of the median"""
    data_wait_ms: float
    """what waiting for images adds to a step"""
    other_ms: float
    """what is left: moving average, augmentation control, the loop"""
    batch: int

    @property
    def images_per_second(self) -> float:
        """Of the median step."""
        return 1000 * self.batch / self.median_ms

    @property
    def sec_per_kimg(self) -> float:
        """Seconds for 1000 images: milliseconds of one."""
        return self.median_ms / self.batch

    @property
    def spread(self) -> float | None:
        """(max - min) / median; None for fewer than three samples."""
        return (self.max_ms - self.min_ms) / self.median_ms if self.samples > 2 else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        phases = {
            name: {
                "ms": phase.ms,
                "calls_per_step": phase.calls_per_step,
                "ms_per_step": phase.ms_per_step,
                "share": phase.ms_per_step / self.median_ms,
            }
            for name, phase in self.phases.items()
        }
        return {
            "phases": phases,
            "step_ms": {"median": self.median_ms, "min": self.min_ms, "max": self.max_ms, "samples": self.samples},
            "images_per_second": self.images_per_second,
            "sec_per_kimg": self.sec_per_kimg,
            "data_wait_ms": self.data_wait_ms,
            "other_ms": self.other_ms,
        }


@dataclasses.dataclass(frozen=True)
class Memory:
    """In GB (2^30 bytes)."""

    peak: float
    """the most that was taken: of GPU memory, or by the process"""
    before: float
    """what was taken before the networks were made: by the program, and by a cache of images in memory"""
    weights: float
    gradients: float
    optimizer: float
    total: float
    """what there is for training: on a CPU what the process has and what is free; 0 if nobody knows"""

    @property
    def activations(self) -> float:
        """What grows with --batch-gpu."""
        return max(self.peak - self.before - self.weights - self.gradients - self.optimizer, 0.0)

    def to_dict(self) -> dict[str, float]:
        """For JSON."""
        return {f"{name}_gb": value for name, value in dataclasses.asdict(self).items()} | {
            "activations_gb": self.activations
        }


@dataclasses.dataclass(frozen=True)
class Machine:
    """What it was measured on, and what else went on there."""

    name: str
    device: str
    threads: int
    cores: int
    """that this process may use"""
    threads_limited: bool
    """by OMP_NUM_THREADS"""
    busy_cores: float | None
    """cores that other programs kept busy meanwhile; None if nobody knows"""


@dataclasses.dataclass(frozen=True)
class Method:
    """How the times came about."""

    what: str
    left_out: tuple[str, ...] = ()
    cache: tuple[str, ...] = ()
    """where the images came from"""


@dataclasses.dataclass(frozen=True)
class Share:
    """How near to what the hardware can do."""

    matmul: dict[str, float]
    """measured FLOP/s by the name of the precision; tf32 is float32 with TF32 allowed"""
    copy: float
    """measured bytes/s"""
    flop_per_step: dict[str, float]
    """necessary operations of the average step, by the same names"""
    phases: dict[str, float]
    """milliseconds of a call of each phase at the measured rates"""
    ideal_ms: float
    """the average step at the measured rates"""


@dataclasses.dataclass(frozen=True)
class Result:
    """Everything that was measured."""

    config: TrainConfig
    machine: Machine
    computing: str
    method: Method
    ours: Timing
    plain: Timing | None
    share: Share
    memory: Memory
    plain_peak: float | None
    """peak memory of the plain step in GB, on a GPU"""

    @property
    def share_of_ceiling(self) -> float:
        """Necessary operations at the measured rates, over the measured time."""
        return self.share.ideal_ms / self.ours.median_ms

    @property
    def ratio(self) -> float | None:
        """How many times longer the plain step takes; None if it was not measured."""
        return self.plain.median_ms / self.ours.median_ms if self.plain else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON; without advice."""
        ours, share = self.ours.to_dict(), self.share
        for name, phase in ours["phases"].items():
            phase["share_of_ceiling"] = share.phases[name] / phase["ms"]
        result = {
            "hardware": {**dataclasses.asdict(self.machine), "torch": torch.__version__},
            "computing": self.computing,
            "options": options_of(self.config),
            "method": dataclasses.asdict(self.method),
            **ours,
            "ceiling": {
                "matmul_tflops": {name: rate / 1e12 for name, rate in share.matmul.items()},
                "copy_gb_per_second": share.copy / 1e9,
                "tflop_per_step": {name: count / 1e12 for name, count in share.flop_per_step.items()},
                "step_ms": share.ideal_ms,
                "share": self.share_of_ceiling,
            },
            "memory": self.memory.to_dict(),
        }
        plain = None if self.plain is None else {**self.plain.to_dict(), "peak_gb": self.plain_peak}
        return {**result, "plain": plain, "ratio": self.ratio}


def options_of(config: TrainConfig) -> dict[str, Any]:
    """What shapes the speed of a configuration."""
    network, augment = config.network, config.augment
    return {
        "width": config.data.width,
        "height": config.data.height,
        "channels": config.data.channels,
        "batch": config.batch_size,
        "batch_gpu": config.batch_gpu,
        "cbase": network.channel_base,
        "cmax": network.channel_max,
        "map_depth": network.mapping_layers,
        "d_architecture": network.d_architecture,
        "augment": None if augment.multipliers is None else sorted(augment.multipliers),
        "p": augment.initial_p,
        "r1_gamma": config.loss.r1_gamma,
        "pl_weight": config.loss.pl_weight,
        "precision": config.precision,
        "tf32": config.tf32,
        "workers": config.workers,
        "cache": config.cache,
    }
