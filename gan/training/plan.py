"""What a run will be, before it is started."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gan.config import TrainConfig
from gan.files import free_bytes
from gan.image_size import base_size, nominal_resolution
from gan.training import disk, retention
from gan.training.announce import with_topic

# Fitted to whole runs on a CPU, whose peaks the estimate gives within 25 % (docs/experiments.md).
_MAP_COPIES = 10  # tensors that a layer keeps until the backward pass is over
_PROGRAM = 0.5  # GB: Python, PyTorch, MLflow


def describe_plan(config: TrainConfig, folder: str | Path = ".", source: Sequence[str] = ()) -> list[str]:
    """The plan in lines for the screen.

    Args:
        folder: that of the runs; for a run that continues, its own.
        source: what is said of the file that the networks come from.
    """
    data, network, optim, augment = config.data, config.network, config.optim, config.augment
    present = retention.snapshots_in(Path(folder))
    free, nimg = free_bytes(Path(folder)), 1000 * max(present, default=0)
    room, warning = disk.forecast(config, free, nimg, present)
    p = "none" if augment.multipliers is None else f"adaptive, target {augment.target:g}, p at most {augment.p_max:g}"
    if augment.multipliers is not None and augment.target is None:
        p = f"fixed, p {augment.initial_p:g}"
    rounds = config.batch_size // config.gpus // config.batch_gpu
    in_rounds = f"{config.batch_gpu} at a time in {rounds} round{'s' * (rounds > 1)}"
    if config.fit_batch_gpu:
        in_rounds = f"as many at a time as fit, at most {config.batch_gpu}"
    return [
        f"run        {config.desc}",
        f"data       {data.path}: {data.shown_images} images an epoch, {data.described}, {data.label_dim} label values",
        f"length     {config.total_kimg} kimg = {config.total_kimg * 1000 / data.shown_images:.0f} epochs, "
        f"{len(disk.snapshots_due(config))} snapshots",
        f"batch      {config.batch_size} on {config.gpus} process{'es' * (config.gpus > 1)}, {in_rounds}",
        f"networks   channels {network.channel_base}/resolution up to {network.channel_max}, mapping of "
        f"{network.mapping_layers} layers, D {network.d_architecture}, "
        f"minibatch-stddev groups of {network.mbstd_group_size}",
        *with_topic("weights", source),
        f"rates      G {optim.glr:g}, D {optim.dlr:g}; R1 gamma {config.loss.r1_gamma:g}; path length weight "
        f"{config.loss.pl_weight:g}; EMA over {optim.ema_kimg:g} kimg",
        f"augment    {p}",
        f"memory     about {estimate_memory_gb(config):.1f} GB a process (estimated)",
        f"disk       {room}",
        *([f"           {warning}"] if warning else []),
    ]


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Rough peak memory of a process: networks, optimisers, and the activations of the largest phase."""

    fixed: float
    """GB whatever the micro-batch"""
    per_image: float
    """GB for each image at a time"""

    @staticmethod
    def of(config: TrainConfig) -> MemoryEstimate:
        """The estimate for this run."""
        data, network = config.data, config.network
        g, d = (sum(p.numel() for p in net.parameters()) for net in disk.network_shapes(config))
        # float32: weights, gradients, two moments each and the moving average of G; prepared weights; copies of all but
        # the gradients for the files.
        fixed = 4 * (5 * g + 4 * d + g + d + 4 * g + 3 * d)
        width, height = base_size((data.width, data.height))
        levels = (data.width // width).bit_length()
        activations = 0
        for level in range(levels):
            size = width << level, height << level
            channels = min(network.channel_base // nominal_resolution(size), network.channel_max)
            is_half = level >= max(levels - network.num_fp16_res, 1)
            activations += 2 * channels * size[0] * size[1] * (2 if is_half else 4)
        # Both networks hold their maps in the phase of G; D alone holds twice the images in its own.
        return MemoryEstimate(fixed / 2**30 + _PROGRAM, 2 * _MAP_COPIES * activations / 2**30)

    def total(self, batch_gpu: int) -> float:
        """GB with so many images at a time."""
        return self.fixed + self.per_image * batch_gpu


def estimate_memory_gb(config: TrainConfig) -> float:
    """Rough peak memory of a process, GB."""
    return MemoryEstimate.of(config).total(config.batch_gpu)
