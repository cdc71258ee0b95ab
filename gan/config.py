"""What a training run is: the options that a user types, and the configuration that follows.

`TrainOptions` is the command line, `DataInfo` what the dataset turned out to be, `resolve` makes a `TrainConfig` out of
them and a preset, or lists everything that is wrong. No torch in here: `--dry-run` and `--help` are instant.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
from pathlib import Path
from typing import Any

from gan.errors import GanError, UsageError
from gan.image_size import describe_image, nominal_resolution
from gan.presets import AUGMENT_PIPES, DEMO_PRESET, PRESETS, PRETRAINED, Preset

AUGMENT_MODES = ("ada", "fixed", "noaug")
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
CUDA_GRAPHS = ("auto", "on", "off")
CACHES = ("auto", "device", "disk", "ram", "off")
DIVERGENCE = ("stop", "rollback", "ignore")


def _opt(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The command line of `train.py`. None means: not given, the preset decides."""

    data: str | None = _opt(None, "Dataset: a zip or folder made by dataset_tool.py  [required for a new run]")
    outdir: str = _opt("training-runs", "Folder that holds the runs")
    gpus: int = _opt(1, "Number of processes, one per GPU")
    cfg: str = _opt("auto", "Preset of hyperparameters")
    demo: bool = _opt(False, "Preset for trying the program: a tiny network, minutes on a CPU")
    cond: bool = _opt(False, "Train a class-conditional model on the labels of the dataset")
    mirror: bool = _opt(False, "Add a horizontally flipped copy of every image")
    subset: int | None = _opt(None, "Train on a random choice of this many images  [default: all]")
    gamma: float | None = _opt(None, "Weight of the R1 regularisation")
    kimg: int | None = _opt(None, "Length of the run in thousands of images shown to the discriminator")
    batch: int | None = _opt(None, "Images per optimiser step, over all processes")
    batch_gpu: int | str | None = _opt(None, "Images per process at a time, same result; auto: the most that fit")
    aug: str | None = _opt(None, "Augmentation: ada adapts its probability, fixed keeps --p, noaug has none")
    p: float | None = _opt(None, "Augmentation probability for --aug fixed")
    target: float | None = _opt(None, "Target of --aug ada for the mean sign of D on real images  [default: 0.6]")
    augpipe: str = _opt("bgc", "Which augmentations: b blit, g geometric, c colour, f filter, n noise, c cutout")
    p_max: float = _opt(0.85, "Bound of the augmentation probability for --aug ada")
    resume: str | None = _opt(
        None, "Continue: alone the newest run of --outdir, RUN_DIR that run; FILE, URL or NAME starts from it"
    )
    at: float | None = _opt(
        None, "With --resume: go back to the newest kept state not beyond KIMG; move later files aside"
    )
    freezed: int = _opt(0, "Freeze-D: keep this many of D's first layers fixed")
    snap: int | None = _opt(None, "Ticks between snapshots  [default: 50]")
    keep: int | None = _opt(None, "Newest snapshots to keep; the best by each metric are kept too  [default: all]")
    keep_every: int | None = _opt(None, "With --keep: also keep a snapshot every so many kimg")
    save_every: float = _opt(10.0, "Minutes between training states, which --resume goes on from")
    keep_states: int = _opt(2, "Newest training states to keep")
    on_divergence: str = _opt("stop", "If training fails for good: stop, rollback (once, at half the rates), or ignore")
    tick: float | None = _opt(None, "Thousands of images between status lines  [default: 4]")
    seed: int = _opt(0, "Random seed of the run")
    fp32: bool = _opt(False, "The same as --precision fp32")
    workers: int | None = _opt(None, "Processes that decode images ahead  [default: 2 with a GPU, 0 without]")
    cache: str = _opt("auto", "Where decoded images are kept; auto takes the GPU, a file, memory, by what has room")
    cache_dir: str | None = _opt(None, "Folder of the cache file  [default: that of the dataset]")
    desc: str | None = _opt(None, "Text to add to the name of the run folder")
    glr: float | None = _opt(None, "Learning rate of G")
    dlr: float | None = _opt(None, "Learning rate of D")
    cbase: int | None = _opt(None, "Channels of a layer: cbase / resolution, at most --cmax")
    cmax: int | None = _opt(None, "Largest number of channels of a layer  [default: 512]")
    map_depth: int | None = _opt(None, "Layers of the mapping network")
    mbstd_group: int | None = _opt(None, "Group size of the minibatch standard deviation")
    device: str = _opt("auto", "Where to compute; auto takes cuda, then mps, then cpu")
    precision: str = _opt("auto", "Of the high resolutions: auto is fp16 on CUDA, bf16 on CPUs that have it, else fp32")
    tf32: bool = _opt(True, "Allow TF32 in float32 products on NVIDIA GPUs; --tf32=0 is exact and slower")
    cuda_graphs: str = _opt("auto", "Launch each phase of a step as one on NVIDIA GPUs; auto does if it can")
    allow_partial: bool = _opt(False, "With --resume FILE: start from what fits, even if that is not all of it")
    pretrained_base: str | None = _opt(None, "Folder or address of the networks that have names")


def flag(option: str) -> str:
    """The flag of a field of TrainOptions."""
    return "--" + option.replace("_", "-")


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


def check_options(options: TrainOptions) -> list[str]:
    """Everything that is wrong with the options of a new run whatever the dataset is, with flag, value and remedy."""
    return check_values(options) + _check_combinations(options)


def check_values(options: TrainOptions) -> list[str]:
    """What no run can have, one that continues neither."""
    o = options
    problems = []

    def require(name: str, value: Any, ok: bool, what: str) -> None:
        if value is not None and not ok:
            problems.append(f"{name} {value}: {what}")

    for name, value in (
        ("--gpus", o.gpus),
        ("--kimg", o.kimg),
        ("--batch", o.batch),
        ("--batch-gpu", o.batch_gpu if isinstance(o.batch_gpu, int) else None),
        ("--subset", o.subset),
        ("--snap", o.snap),
        ("--keep", o.keep),
        ("--keep-every", o.keep_every),
        ("--keep-states", o.keep_states),
        ("--cbase", o.cbase),
        ("--cmax", o.cmax),
        ("--map-depth", o.map_depth),
        ("--mbstd-group", o.mbstd_group),
    ):
        require(name, value, value is None or value >= 1, "must be a whole number from 1 on")
    for name, value in (("--freezed", o.freezed), ("--seed", o.seed), ("--workers", o.workers)):
        require(name, value, value is None or value >= 0, "must be a whole number from 0 on")
    for name, rate in (("--glr", o.glr), ("--dlr", o.dlr), ("--tick", o.tick), ("--save-every", o.save_every)):
        require(name, rate, rate is None or rate > 0, "must be greater than 0")
    require("--gamma", o.gamma, o.gamma is None or o.gamma >= 0, "must be at least 0")
    for name, share in (("--p", o.p), ("--p-max", o.p_max)):
        require(name, share, share is None or 0 <= share <= 1, "must be from 0 to 1")
    require("--target", o.target, o.target is None or -1 <= o.target <= 1, "must be from -1 to 1; 0.6 is usual")
    require("--at", o.at, o.at is None or o.at >= 0, "must be at least 0")
    if o.at is not None and o.resume is None:
        problems.append(f"--at {o.at:g} goes with --resume [RUN_DIR]; add it, or leave --at out")
    if o.fp32 and o.precision not in ("auto", "fp32"):
        problems.append(f"--precision {o.precision} contradicts --fp32; leave one of them out")
    if o.resume is None:
        for option in ("allow_partial", "pretrained_base"):
            if getattr(o, option):
                problems.append(f"{flag(option)} goes with --resume FILE; add it, or leave {flag(option)} out")
    if o.desc is not None and ("/" in o.desc or "\\" in o.desc):
        problems.append(f"--desc {o.desc}: becomes part of a folder name; leave out the slashes")
    return problems + check_cache(o.cache, o.cache_dir)


def _check_combinations(o: TrainOptions) -> list[str]:
    """What does not go together, as far as the command line says it all."""
    problems = []
    aug = o.aug or _preset(o).aug
    if aug == "fixed" and o.p is None:
        problems.append("--aug fixed needs a probability; add --p 0.2, for example")
    if aug != "fixed" and o.p is not None:
        problems.append(f"--p {o.p} goes with --aug fixed only, not --aug {aug}; leave it out or add --aug fixed")
    if aug != "ada" and o.target is not None:
        problems.append(f"--target {o.target} goes with --aug ada only, not --aug {aug}; leave it out")
    if aug == "noaug" and o.augpipe != _default("augpipe"):
        problems.append(f"--augpipe {o.augpipe} needs augmentation, but --aug is noaug; change one of them")
    if o.demo and o.cfg != _default("cfg"):
        problems.append(f"--demo is a preset of its own; leave out --cfg {o.cfg}")
    return problems + check_keep(o.keep, o.keep_every)


def check_keep(keep: int | None, keep_every: int | None) -> list[str]:
    """What is wrong with --keep-every."""
    if keep_every is None or keep is not None:
        return []
    return [f"--keep-every {keep_every} goes with --keep N; without it all snapshots are kept"]


def check_cache(cache: str, cache_dir: str | None) -> list[str]:
    """What is wrong with --cache-dir."""
    if cache_dir is None:
        return []
    if cache in ("ram", "off"):
        return [f"--cache-dir {cache_dir}: with --cache {cache} there is no file; leave it out, or use --cache disk"]
    if Path(cache_dir).is_file():
        return [f"--cache-dir {cache_dir}: is a file; name a folder"]
    return []


def check_resume_name(resume: str) -> str | None:
    """The problem with a --resume that names neither a file, a folder, nor a pretrained network."""
    if os.path.exists(resume) or resume in PRETRAINED or "://" in resume:
        return None
    close = difflib.get_close_matches(resume, PRETRAINED, n=1)
    hint = (
        f"; did you mean {close[0]}?"
        if close
        else f"; give a run folder, a snapshot, or one of {', '.join(PRETRAINED)}"
    )
    return f"--resume {resume}: no such file or folder{hint}"


def resolve(options: TrainOptions, data: DataInfo, source: SourceInfo | None = None) -> TrainConfig:
    """The configuration of a new run. What was not typed is that of the networks that it starts from, then the preset.

    Raises UsageError with every problem, those of `check_options` included.
    """
    o = options
    preset = _preset(o)
    problems = check_options(o)
    if o.subset is not None and o.subset > data.num_images:
        problems.append(f"--subset {o.subset}: {data.path} holds {data.num_images} images; give at most that many")
    counts = (o.gpus, o.batch, o.batch_gpu, o.mbstd_group, o.cbase)
    if any(isinstance(count, int) and count < 1 for count in counts):
        raise UsageError(problems)  # nothing can be divided by these

    res = nominal_resolution((data.width, data.height))
    batch = o.batch or preset.batch or max(min(o.gpus * min(4096 // res, 32), 64), o.gpus)
    batch_gpu = max(min(batch // (preset.ref_gpus or o.gpus), batch // o.gpus), 1)
    mbstd = o.mbstd_group or preset.mbstd or max(min(batch // o.gpus, 4), 1)
    lr = preset.lr or (0.002 if res >= 1024 else 0.0025)
    precision = "fp32" if o.fp32 else o.precision
    config = TrainConfig(
        desc=describe(o, data.name),
        data=DataConfig(
            path=data.path,
            name=data.name,
            height=data.height,
            width=data.width,
            channels=data.channels,
            num_images=data.num_images,
            label_dim=data.label_dim,
            cond=o.cond,
            mirror=o.mirror,
            subset=o.subset,
            class_names=data.class_names,
        ),
        network=_network_config(o, preset, source, res, mbstd, is_fp32=precision == "fp32"),
        loss=LossConfig(
            r1_gamma=_first(o.gamma, preset.gamma, 0.0002 * (data.height * data.width) / batch),
            pl_weight=preset.pl_weight,
            style_mixing_prob=preset.style_mixing_prob,
        ),
        optim=OptimConfig(
            glr=o.glr or lr,
            dlr=o.dlr or lr,
            ema_kimg=_first(preset.ema_kimg, batch * 10 / 32),
            ema_rampup=None if o.resume else preset.ema_rampup,
        ),
        augment=_augment_config(o, preset),
        total_kimg=o.kimg or preset.kimg,
        batch_size=batch,
        batch_gpu=batch_gpu,
        gpus=o.gpus,
        tick_kimg=o.tick or preset.tick_kimg,
        snap=o.snap or preset.snap,
        seed=o.seed,
        workers=o.workers,
        device=o.device,
        precision=precision,
        tf32=o.tf32,
        init_from=absolute(o.resume),
        cache=o.cache,
        cache_dir=o.cache_dir,
        cuda_graphs=o.cuda_graphs,
        keep=o.keep,
        keep_every=o.keep_every,
        save_every=o.save_every,
        keep_states=o.keep_states,
        on_divergence=o.on_divergence,
        preset="demo" if o.demo else o.cfg,
        allow_partial=o.allow_partial,
        pretrained_base=absolute(o.pretrained_base),
    )
    if o.batch_gpu is not None:
        config = with_batch_gpu(config, o.batch_gpu)
    problems += check_division(config)
    narrowest = min([config.network.channel_base, *_own_widths(config.network)])
    if narrowest < res:
        problems.append(f"--cbase {narrowest}: leaves no channels at {data.width}x{data.height}; give at least {res}")
    if problems:
        raise UsageError(problems)
    return config


def absolute(where: str | None) -> str | None:
    """A path that is there, for runs that continue from another folder; names and addresses stay as they are."""
    return os.path.abspath(where) if where is not None and os.path.exists(where) else where


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


def describe(o: TrainOptions, name: str) -> str:
    """The name of the run: the dataset, then every setting that shapes it."""
    parts = [name]
    parts += ["cond"] * o.cond + ["mirror"] * o.mirror
    if o.subset is not None:
        parts.append(f"subset{o.subset}")
    parts.append("demo" if o.demo else f"{o.cfg}{o.gpus}" if o.cfg == "auto" else o.cfg)
    for key, value in (("gamma", o.gamma), ("kimg", o.kimg), ("batch", o.batch)):
        if value is not None:
            parts.append(f"{key}{value:g}")
    if o.aug not in (None, "ada"):
        parts.append(str(o.aug))
    for key, share in (("p", o.p), ("target", o.target)):
        if share is not None:
            parts.append(f"{key}{share:g}")
    if o.augpipe != _default("augpipe"):
        parts.append(o.augpipe)
    if o.resume is not None:
        parts.append(f"resume{o.resume}" if o.resume in PRETRAINED else "resumecustom")
    if o.freezed:
        parts.append(f"freezed{o.freezed}")
    if o.desc:
        parts.append(o.desc)
    return "-".join(parts)


def _augment_config(o: TrainOptions, preset: Preset) -> AugmentConfig:
    aug = o.aug or preset.aug
    multipliers: dict[str, float] | None = None if aug == "noaug" else dict.fromkeys(AUGMENT_PIPES[o.augpipe], 1)
    return AugmentConfig(
        multipliers=multipliers,
        target=_first(o.target, 0.6) if aug == "ada" else None,
        initial_p=o.p if o.p is not None else 0.0,
        ada_kimg=100 if o.resume else preset.ada_kimg,
        p_max=o.p_max,
    )


def _network_config(
    o: TrainOptions, preset: Preset, source: SourceInfo | None, res: int, mbstd: int, is_fp32: bool
) -> NetworkConfig:
    settings: dict[str, Any] = {
        "num_fp16_res": 0 if is_fp32 else 4,
        "conv_clamp": None if is_fp32 else 256,
        "mbstd_group_size": mbstd,
        "freeze_layers": o.freezed,
    }
    if source is None:
        return NetworkConfig(
            channel_base=o.cbase or preset.channel_base or (32768 if res >= 512 else 16384),
            channel_max=o.cmax or preset.channel_max,
            mapping_layers=o.map_depth or preset.mapping_layers,
            d_architecture=preset.d_architecture,
            use_noise=preset.use_noise,
            **settings,
        )
    typed = {name for name, value in (("channel_base", o.cbase), ("channel_max", o.cmax)) if value is not None}
    discriminator = {name: value for name, value in source.discriminator.items() if name not in typed}
    return NetworkConfig(
        channel_base=o.cbase or source.channel_base,
        channel_max=o.cmax or source.channel_max,
        mapping_layers=o.map_depth or source.mapping_layers,
        d_architecture=source.d_architecture or preset.d_architecture,
        use_noise=source.use_noise,
        z_dim=source.z_dim,
        w_dim=source.w_dim,
        inherited={"generator": source.generator, "discriminator": discriminator},
        **settings,
    )


def _own_widths(network: NetworkConfig) -> list[int]:
    """channel_base of a network that has one of its own."""
    bases = (kwargs.get("channel_base") for kwargs in network.inherited.values())
    return [base for base in bases if base is not None]


def _merged(kwargs: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Arguments, with those of nested dicts, and others that win."""
    nested = {name: {**kwargs.get(name, {}), **value} for name, value in others.items() if isinstance(value, dict)}
    return {**kwargs, **others, **nested}


def _preset(o: TrainOptions) -> Preset:
    return DEMO_PRESET if o.demo else PRESETS[o.cfg]


def _default(name: str) -> Any:
    return TrainOptions.__dataclass_fields__[name].default


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)


def _multiples(value: int, of: int) -> str:
    below, above = value // of * of, (value // of + 1) * of
    return f"{below} or {above}" if below else str(above)
