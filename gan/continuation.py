"""What may change when a run continues: where, how fast and how long it runs, what it keeps. The rest is the run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from gan.config import TrainConfig, check_division, usable_batch_gpu, with_batch_gpu
from gan.presets import AUGMENT_PIPES
from gan.resolve import absolute
from gan.train_options import TrainOptions, check_cache, check_keep, flag

_HONOURED: dict[str, str] = {  # option: where it goes
    "kimg": "total_kimg",
    "tick": "tick_kimg",
    **{name: name for name in ("snap", "keep", "keep_every", "save_every", "keep_states", "on_divergence")},
    **{name: name for name in ("gpus", "workers", "device", "tf32", "cache", "cache_dir", "cuda_graphs", "ops")},
    **{name: name for name in ("max_restarts", "dist_timeout", "metrics", "detectors", "metrics_budget")},
    "pretrained_base": "pretrained_base",  # for a run that was stopped before its first state, and so begins anew
}

_NETWORKS, _LOSS = "the networks are what they are", "what is learned depends on it"
_REFUSED: dict[str, tuple[Callable[[TrainConfig], Any], str]] = {  # option: (what the run has, why it stays)
    "cfg": (lambda c: c.preset, _LOSS),
    "demo": (lambda c: c.preset == "demo", _LOSS),
    "cond": (lambda c: c.data.cond, _NETWORKS),
    "cbase": (lambda c: c.network.channel_base, _NETWORKS),
    "cmax": (lambda c: c.network.channel_max, _NETWORKS),
    "map_depth": (lambda c: c.network.mapping_layers, _NETWORKS),
    "mbstd_group": (lambda c: c.network.mbstd_group_size, _NETWORKS),
    "freezed": (lambda c: c.network.freeze_layers, _NETWORKS),
    "mirror": (lambda c: c.data.mirror, "the order of the images depends on it"),
    "subset": (lambda c: c.data.subset, "the order of the images depends on it"),
    "seed": (lambda c: c.seed, "the order of the images depends on it"),
    "batch": (lambda c: c.batch_size, "the moving average, the schedules and what is learned depend on it"),
    "gamma": (lambda c: c.loss.r1_gamma, _LOSS),
    "glr": (lambda c: c.optim.glr, _LOSS),
    "dlr": (lambda c: c.optim.dlr, _LOSS),
    "aug": (lambda c: _augment_mode(c), _LOSS),
    "augpipe": (lambda c: _augment_pipe(c), _LOSS),
    "p": (lambda c: c.augment.initial_p, _LOSS),
    "target": (lambda c: c.augment.target, _LOSS),
    "p_max": (lambda c: c.augment.p_max, _LOSS),
    "desc": (lambda c: c.desc, "it is part of the name of the folder"),
    "allow_partial": (lambda c: c.allow_partial, "which weights it started from is settled"),
}


@dataclasses.dataclass(frozen=True)
class Continuation:
    """How a run goes on."""

    config: TrainConfig
    changed: list[str]
    """what differs from before and is honoured, a line each"""
    problems: list[str]
    """what is refused, and why; all of it"""


def continued(config: TrainConfig, options: TrainOptions, given: Collection[str]) -> Continuation:
    """The configuration of a run that goes on; `given`: the options that were typed. Repeating what it has is fine."""
    changed: list[str] = []
    problems: list[str] = []
    changes: dict[str, Any] = {}

    def honour(name: str, field: str, value: Any) -> None:
        before = getattr(config, field)
        if value != before:
            changes[field] = value
            changed.append(f"{name} {_shown(value)}, which was {_shown(before)}")

    for option in given:
        value = getattr(options, option)
        if option in ("pretrained_base", "detectors"):
            value = absolute(value)
        if option in _HONOURED:
            honour(flag(option), _HONOURED[option], value)
        elif option in _REFUSED:
            has, why = _REFUSED[option][0](config), _REFUSED[option][1]
            if value != has and not (option == "desc" and has.endswith(f"-{value}")):
                problems.append(
                    f"{flag(option)} {_shown(value)}: the run has {_shown(has)}, and {why}; leave it out, or start a "
                    f"new run from its weights with --data DATASET --resume SNAPSHOT"
                )
    if "data" in given and options.data is not None and options.data != config.data.path:
        changes["data"] = dataclasses.replace(config.data, path=options.data)
        changed.append(f"--data {options.data}, which was {config.data.path}")
    precision = _precision(config, options, given)
    if config.network.num_fp16_res == 0 and precision not in ("fp32", config.precision):
        problems.append(
            f"--precision {precision}: the run was started in fp32, its networks have no layers for less; leave it out"
        )
    else:
        honour("--precision", "precision", precision)
    divided = _divided(dataclasses.replace(config, **changes), options, given)
    honour("--batch-gpu auto, at most" if divided.fit_batch_gpu else "--batch-gpu", "batch_gpu", divided.batch_gpu)
    config = dataclasses.replace(config, **changes, fit_batch_gpu=divided.fit_batch_gpu)
    problems += check_division(config) + check_keep(config.keep, config.keep_every)
    if "cache_dir" in given and "cache" not in given:
        problems += check_cache(config.cache, config.cache_dir)
    return Continuation(config, changed, problems)


def _precision(config: TrainConfig, options: TrainOptions, given: Collection[str]) -> str:
    if "fp32" in given and options.fp32:
        return "fp32"
    return options.precision if "precision" in given else config.precision


def _divided(config: TrainConfig, options: TrainOptions, given: Collection[str]) -> TrainConfig:
    """--batch-gpu as given; after a change of --gpus the largest that was possible before and still is."""
    if "batch_gpu" in given and options.batch_gpu is not None:
        return with_batch_gpu(config, options.batch_gpu)
    if config.batch_size % config.gpus == 0 and check_division(config):
        fitting = [size for size in usable_batch_gpu(config) if size <= config.batch_gpu]
        return with_batch_gpu(config, max(fitting, default=config.batch_gpu))
    return config


def _augment_mode(config: TrainConfig) -> str:
    if config.augment.multipliers is None:
        return "noaug"
    return "fixed" if config.augment.target is None else "ada"


def _augment_pipe(config: TrainConfig) -> str | None:
    names = set(config.augment.multipliers or ())
    return next((pipe for pipe, parts in AUGMENT_PIPES.items() if set(parts) == names), None)


def _shown(value: Any) -> str:
    if value is None:
        return "not given"
    return f"{value:g}" if isinstance(value, float) else str(value)
