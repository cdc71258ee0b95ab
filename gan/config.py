"""What a training run is, resolved: it goes into training_options.json and comes back out of it.

No torch in here: `--dry-run` and `--help` are instant.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from gan.errors import GanError
from gan.image_size import describe_image, nominal_resolution


@dataclasses.dataclass(frozen=True)
class DataInfo:
    """What the dataset turned out to be."""

    path: str
    name: str
    num_images: int
    """before --subset and --mirror"""
    height: int
    width: int
    channels: int
    label_dim: int = 0
    """columns of a label; 0 without --cond"""
    class_names: list[str] | None = None
    """what the columns stand for, if that is known"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceInfo:
    """What the networks are that a new run starts from."""

    channel_base: int
    channel_max: int
    mapping_layers: int
    use_noise: bool
    z_dim: int
    w_dim: int
    d_architecture: str | None
    """None: there is no discriminator"""
    generator: dict[str, Any]
    """further arguments of its constructor, as far as they were given"""
    discriminator: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which images."""

    path: str
    name: str
    height: int
    width: int
    channels: int
    num_images: int
    label_dim: int
    cond: bool
    mirror: bool
    subset: int | None
    class_names: list[str] | None = None

    @property
    def resolution(self) -> int:
        """What the images count as where a preset asks for "the resolution"."""
        return nominal_resolution((self.width, self.height))

    @property
    def img_resolution(self) -> int | list[int]:
        """The size as networks take it: one number for squares of a power of two, else `[height, width]`."""
        is_plain = self.width == self.height == self.resolution
        return self.resolution if is_plain else [self.height, self.width]

    @property
    def described(self) -> str:
        """`96x64 RGBA`."""
        return describe_image(self.height, self.width, self.channels)

    @property
    def shown_images(self) -> int:
        """Images in an epoch."""
        chosen = min(self.subset or self.num_images, self.num_images)
        return chosen * (2 if self.mirror else 1)


@dataclasses.dataclass(frozen=True)
class NetworkConfig:
    """The architecture of both networks."""

    channel_base: int
    channel_max: int
    mapping_layers: int
    num_fp16_res: int
    conv_clamp: float | None
    mbstd_group_size: int
    d_architecture: str
    freeze_layers: int
    use_noise: bool = True
    z_dim: int = 512
    w_dim: int = 512
    inherited: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """arguments of "generator" and "discriminator" that come from the file that the run started from"""

    def generator_kwargs(self, data: DataConfig) -> dict[str, Any]:
        """Constructor arguments of `gan.networks.Generator`."""
        noise = {} if self.use_noise else {"use_noise": False}
        kwargs = {
            "z_dim": self.z_dim,
            "c_dim": data.label_dim,
            "w_dim": self.w_dim,
            "img_resolution": data.img_resolution,
            "img_channels": data.channels,
            "mapping_kwargs": {"num_layers": self.mapping_layers},
            "synthesis_kwargs": {**self._common(), "fp16_channels_last": True, **noise},
        }
        return _merged(kwargs, self.inherited.get("generator", {}))

    def discriminator_kwargs(self, data: DataConfig) -> dict[str, Any]:
        """Constructor arguments of `gan.networks.Discriminator`."""
        kwargs = {
            "c_dim": data.label_dim,
            "img_resolution": data.img_resolution,
            "img_channels": data.channels,
            "architecture": self.d_architecture,
            **self._common(),
            "block_kwargs": {"freeze_layers": self.freeze_layers, "fp16_channels_last": True},
            "mapping_kwargs": {},
            "epilogue_kwargs": {"mbstd_group_size": self.mbstd_group_size},
        }
        return _merged(kwargs, self.inherited.get("discriminator", {}))

    def _common(self) -> dict[str, Any]:
        return {
            "channel_base": self.channel_base,
            "channel_max": self.channel_max,
            "num_fp16_res": self.num_fp16_res,
            "conv_clamp": self.conv_clamp,
        }


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """Weights of the losses."""

    r1_gamma: float
    pl_weight: float
    style_mixing_prob: float
    pl_batch_shrink: int = 2
    pl_decay: float = 0.01


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimisers and the moving average of G."""

    glr: float
    dlr: float
    ema_kimg: float
    ema_rampup: float | None
    betas: tuple[float, float] = (0.0, 0.99)
    eps: float = 1e-8
    g_reg_interval: int = 4
    d_reg_interval: int = 16


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Discriminator augmentation. multipliers None: none; target None: p stays at `initial_p`."""

    multipliers: dict[str, float] | None
    target: float | None
    initial_p: float
    ada_kimg: int
    p_max: float
    ada_interval: int = 4

    @property
    def adaptive_p_max(self) -> float | None:
        """The bound of p; None if p stays as it is."""
        return self.p_max if self.multipliers is not None and self.target is not None else None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Everything that a run is, resolved. Goes into training_options.json and comes back out of it."""

    desc: str
    data: DataConfig
    network: NetworkConfig
    loss: LossConfig
    optim: OptimConfig
    augment: AugmentConfig
    total_kimg: int
    batch_size: int
    batch_gpu: int
    gpus: int
    tick_kimg: float
    snap: int
    seed: int
    workers: int | None
    device: str
    precision: str
    tf32: bool
    init_from: str | None = None
    """model file whose weights the run starts from: its path, address or name"""
    cache: str = "auto"
    cache_dir: str | None = None
    cuda_graphs: str = "auto"
    ops: str = "auto"
    """--ops: which kernels"""
    keep: int | None = None
    """newest snapshots that stay; None: all"""
    keep_every: int | None = None
    """one snapshot every so many kimg stays too"""
    save_every: float = 10.0
    """minutes"""
    keep_states: int = 2
    on_divergence: str = "stop"
    fit_batch_gpu: bool = False
    """`batch_gpu` is only the most there can be: what fits is to be found when the run starts"""
    preset: str | None = None
    """--cfg, or demo; None: not known, the run was started by an earlier version"""
    allow_partial: bool = False
    """`init_from` need not fit as a whole"""
    pretrained_base: str | None = None
    """where `init_from` is if it is a name; None: where all of them are"""
    max_restarts: int = 3
    """how often processes that died are started again"""
    dist_timeout: float = 600.0
    """seconds that processes wait for one another"""
    metrics: str = "auto"
    """measured of each snapshot: a list of names, auto or none"""
    detectors: str | None = None
    """folder in which those of metrics are looked for first"""
    metrics_budget: float = 10.0
    """percent of the run's time that metrics may take"""

    def phase_intervals(self) -> dict[str, int]:
        """{phase: every how many steps}, in their order within a step; a phase without weight is left out."""
        every = {"Gmain": 1, "Greg": self.optim.g_reg_interval, "Dmain": 1, "Dreg": self.optim.d_reg_interval}
        weights = {"Greg": self.loss.pl_weight, "Dreg": self.loss.r1_gamma}
        return {name: interval for name, interval in every.items() if weights.get(name, 1) > 0}

    def to_json(self) -> str:
        """Text for training_options.json."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @staticmethod
    def from_json(text: str, where: str) -> TrainConfig:
        """The inverse of `to_json`. Raises GanError naming `where`."""
        groups = {
            "data": DataConfig,
            "network": NetworkConfig,
            "loss": LossConfig,
            "optim": OptimConfig,
            "augment": AugmentConfig,
        }
        try:
            values = json.loads(text)
            if "resolution" in values["data"]:  # by a version that knew squares only
                side = values["data"].pop("resolution")
                values["data"].update(height=side, width=side)
            values = {k: groups[k](**v) if k in groups else v for k, v in values.items()}
            optim = values["optim"]
            values["optim"] = dataclasses.replace(optim, betas=tuple(optim.betas))
            return TrainConfig(**values)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise GanError(f"{where}: not the options of a run that this version can continue ({error})") from error

    def reference_options(self) -> dict[str, Any]:
        """The hyperparameters under the names of the reference's option sets, for --dry-run --json."""
        n, o, a, lo = self.network, self.optim, self.augment, self.loss
        return {
            "run_desc": self.desc,
            "total_kimg": self.total_kimg,
            "batch_size": self.batch_size,
            "batch_gpu": self.batch_gpu,
            "ema_kimg": o.ema_kimg,
            "ema_rampup": o.ema_rampup,
            "lr": o.glr,
            "betas": list(o.betas),
            "eps": o.eps,
            "r1_gamma": lo.r1_gamma,
            "pl_weight": lo.pl_weight,
            "style_mixing_prob": lo.style_mixing_prob,
            "channel_base": n.channel_base,
            "channel_max": n.channel_max,
            "mapping_layers": n.mapping_layers,
            "num_fp16_res": n.num_fp16_res,
            "conv_clamp": n.conv_clamp,
            "mbstd_group_size": n.mbstd_group_size,
            "d_architecture": n.d_architecture,
            "freeze_layers": n.freeze_layers,
            "ada_target": a.target,
            "augment_p": a.initial_p if a.multipliers is not None and a.target is None else None,
            "ada_kimg": a.ada_kimg,
            "snap": self.snap,
            "augment": a.multipliers,
        }


def with_batch_gpu(config: TrainConfig, batch_gpu: int | str) -> TrainConfig:
    """The configuration with this --batch-gpu; `auto` takes the most there can be, and has the run find what fits."""
    if isinstance(batch_gpu, int):
        return dataclasses.replace(config, batch_gpu=batch_gpu, fit_batch_gpu=False)
    return dataclasses.replace(config, batch_gpu=max(usable_batch_gpu(config), default=1), fit_batch_gpu=True)


def usable_batch_gpu(config: TrainConfig) -> list[int]:
    """Micro-batches that divide the batch of a process into whole minibatch-stddev groups, from 1 on.

    Those below the size of a group are groups of their own.
    """
    share, group = config.batch_size // config.gpus, config.network.mbstd_group_size
    return [d for d in range(1, share + 1) if share % d == 0 and d % min(group, d) == 0]


def check_division(config: TrainConfig) -> list[str]:
    """What does not divide: the batch over processes and rounds, the micro-batch over minibatch-stddev groups."""
    batch, batch_gpu, gpus = config.batch_size, config.batch_gpu, config.gpus
    if batch % gpus != 0:
        return [f"--batch {batch} is not divisible by --gpus {gpus}; try {_multiples(batch, gpus)}"]
    share, group = batch // gpus, config.network.mbstd_group_size
    usable = usable_batch_gpu(config)
    if batch_gpu > share or share % batch_gpu != 0:
        shown = ", ".join(map(str, usable[-6:]))
        return [
            f"--batch-gpu {batch_gpu} does not divide --batch {batch} / --gpus {gpus} = {share}; try one of {shown}"
        ]
    if batch_gpu % min(group, batch_gpu) != 0:
        smaller = max(d for d in usable if d < batch_gpu)
        divisor = max(d for d in range(1, group + 1) if batch_gpu % d == 0)
        return [
            f"--batch-gpu {batch_gpu} is not divisible by --mbstd-group {group}; "
            f"try --batch-gpu {smaller}, or --mbstd-group {divisor}"
        ]
    return []


def _multiples(value: int, of: int) -> str:
    below, above = value // of * of, (value // of + 1) * of
    return f"{below} or {above}" if below else str(above)


def _merged(kwargs: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Arguments, with those of nested dicts, and others that win."""
    nested = {name: {**kwargs.get(name, {}), **value} for name, value in others.items() if isinstance(value, dict)}
    return {**kwargs, **others, **nested}
