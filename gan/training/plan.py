"""What a run will be, before it is started."""

from __future__ import annotations

from gan.config import TrainConfig
from gan.networks import Discriminator, Generator

# Tensors that a layer keeps until the backward pass is over. Fitted to three CPU runs, whose peaks it gives within 20 %
# (docs/experiments.md).
_MAP_COPIES = 9


def describe_plan(config: TrainConfig) -> list[str]:
    """The plan in lines for the screen."""
    data, network, optim, augment = config.data, config.network, config.optim, config.augment
    ticks = -(-config.total_kimg // config.tick_kimg) + 1
    snapshots = int((ticks - 1) // config.snap + 2)
    p = "none" if augment.multipliers is None else f"adaptive, target {augment.target:g}, p at most {augment.p_max:g}"
    if augment.multipliers is not None and augment.target is None:
        p = f"fixed, p {augment.initial_p:g}"
    shown = f"{data.resolution}x{data.resolution} {'grey' if data.channels == 1 else 'RGB'}"
    rounds = config.batch_size // config.gpus // config.batch_gpu
    return [
        f"run        {config.desc}",
        f"data       {data.path}: {data.shown_images} images an epoch, {shown}, {data.label_dim} label values",
        f"length     {config.total_kimg} kimg = {config.total_kimg * 1000 / data.shown_images:.0f} epochs, about "
        f"{snapshots} snapshots",
        f"batch      {config.batch_size} on {config.gpus} process{'es' * (config.gpus > 1)}, {config.batch_gpu} at a "
        f"time in {rounds} round{'s' * (rounds > 1)}",
        f"networks   channels {network.channel_base}/resolution up to {network.channel_max}, mapping of "
        f"{network.mapping_layers} layers, D {network.d_architecture}, "
        f"minibatch-stddev groups of {network.mbstd_group_size}",
        f"rates      G {optim.glr:g}, D {optim.dlr:g}; R1 gamma {config.loss.r1_gamma:g}; path length weight "
        f"{config.loss.pl_weight:g}; EMA over {optim.ema_kimg:g} kimg",
        f"augment    {p}",
        f"memory     about {estimate_memory_gb(config):.1f} GB a process (estimated)",
    ]


def estimate_memory_gb(config: TrainConfig) -> float:
    """Rough peak memory of a process: networks, optimisers, and the activations of the largest phase."""
    data, network = config.data, config.network
    g = sum(p.numel() for p in Generator(**network.generator_kwargs(data)).parameters())
    d = sum(p.numel() for p in Discriminator(**network.discriminator_kwargs(data)).parameters())
    fixed = 4 * (5 * g + 4 * d)  # float32: weights, gradients, two moments each; the moving average of G
    first_half = 2 ** (data.resolution.bit_length() - network.num_fp16_res) if network.num_fp16_res else 2**31
    activations, res = 0, 4
    while res <= data.resolution:
        channels = min(network.channel_base // res, network.channel_max)
        activations += 2 * channels * res**2 * (2 if res >= max(first_half, 8) else 4)
        res *= 2
    # Both networks hold their maps in the phase of G; D alone holds twice the images in its own.
    return (fixed + 2 * _MAP_COPIES * activations * config.batch_gpu) / 2**30 + 0.4  # 0.4: Python, PyTorch
