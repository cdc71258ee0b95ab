"""From the options that a user typed, the dataset and perhaps a model file to the configuration of a new run.

Everything that is wrong is listed at once. No torch in here.
"""

from __future__ import annotations

import os
from typing import Any

from gan.config import (
    AugmentConfig,
    DataConfig,
    DataInfo,
    LossConfig,
    NetworkConfig,
    OptimConfig,
    SourceInfo,
    TrainConfig,
    check_division,
    with_batch_gpu,
)
from gan.errors import UsageError
from gan.image_size import nominal_resolution
from gan.presets import AUGMENT_PIPES, PRETRAINED, Preset
from gan.train_options import TrainOptions, check_options, default, preset_of


def resolve(options: TrainOptions, data: DataInfo, source: SourceInfo | None = None) -> TrainConfig:
    """The configuration of a new run. What was not typed is that of the networks that it starts from, then the preset.

    Raises UsageError with every problem, those of `check_options` included.
    """
    o = options
    preset = preset_of(o)
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
        ops=o.ops,
        keep=o.keep,
        keep_every=o.keep_every,
        save_every=o.save_every,
        keep_states=o.keep_states,
        on_divergence=o.on_divergence,
        preset="demo" if o.demo else o.cfg,
        allow_partial=o.allow_partial,
        pretrained_base=absolute(o.pretrained_base),
        max_restarts=o.max_restarts,
        dist_timeout=o.dist_timeout,
        metrics=o.metrics,
        detectors=absolute(o.detectors),
        metrics_budget=o.metrics_budget,
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
    if o.augpipe != default("augpipe"):
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


def _first(*values: Any) -> Any:
    return next(value for value in values if value is not None)
