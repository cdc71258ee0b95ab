"""The options that a user types for a run, and what is wrong with them whatever the dataset is. No torch in here."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from gan.metric_names import problems_with
from gan.presets import DEMO_PRESET, PRESETS, PRETRAINED, Preset

AUGMENT_MODES = ("ada", "fixed", "noaug")
DEVICES = ("auto", "cuda", "mps", "cpu")
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
CUDA_GRAPHS = ("auto", "on", "off")
OPS = ("auto", "cuda", "ref")
CACHES = ("auto", "device", "disk", "ram", "off")
LONGEST_TIMEOUT = 1e6  # seconds: clocks of libraries overflow not far beyond
DIVERGENCE = ("stop", "rollback", "ignore")


def _opt(default: Any, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": text})


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The command line of `train.py`. None means: not given, the preset decides."""

    data: str | None = _opt(None, "Dataset: a zip or folder made by dataset_tool.py  [required for a new run]")
    outdir: str = _opt("training-runs", "Folder that holds the runs")
    gpus: int = _opt(1, "Number of processes, one per GPU; under torchrun or Slurm as many as were started")
    cfg: str = _opt("auto", "Preset of hyperparameters")
    demo: bool = _opt(False, "Preset for trying the program: a tiny network, minutes on a CPU")
    cond: bool = _opt(False, "Train a class-conditional model on the labels of the dataset")
    mirror: bool = _opt(False, "Add a horizontally flipped copy of every image")
    subset: int | None = _opt(None, "Train on a random choice of this many images  [default: all]")
    gamma: float | None = _opt(None, "Weight of the R1 regularisation")
    kimg: int | None = _opt(None, "Length of the run in thousands of images shown to the discriminator")
    batch: int | None = _opt(None, "Images per optimiser step, over all processes")
    batch_gpu: int | str | None = _opt(
        None, "Images per process at a time: same but for rounding; auto: the most that fit"
    )
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
    metrics: str = _opt("auto", "Measured of each snapshot: auto is FID and KID, or swd without detector; a list; none")
    detectors: str | None = _opt(None, "Folder of the detectors of metrics  [default: GAN_DETECTORS, or the cache]")
    metrics_budget: float = _opt(10.0, "Share of the run's time that metrics may take, in percent")
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
    ops: str = _opt("auto", "Kernels of our own: auto uses what works, cuda insists on all for NVIDIA, ref uses none")
    allow_partial: bool = _opt(False, "With --resume FILE: start from what fits, even if that is not all of it")
    max_restarts: int = _opt(3, "With --gpus: how often processes that died are started again from the last state")
    dist_timeout: float = _opt(600.0, "Seconds after which a process that the others wait for in vain is an error")
    pretrained_base: str | None = _opt(None, "Folder or address of the networks that have names")


def flag(option: str) -> str:
    """The flag of a field of TrainOptions."""
    return "--" + option.replace("_", "-")


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
    for name, value in (
        ("--freezed", o.freezed),
        ("--seed", o.seed),
        ("--workers", o.workers),
        ("--max-restarts", o.max_restarts),
    ):
        require(name, value, value is None or value >= 0, "must be a whole number from 0 on")
    for name, rate in (("--glr", o.glr), ("--dlr", o.dlr), ("--tick", o.tick), ("--save-every", o.save_every)):
        require(name, rate, rate is None or rate > 0, "must be greater than 0")
    bounds = f"must be greater than 0 and at most {LONGEST_TIMEOUT:.0f} seconds"
    require("--dist-timeout", o.dist_timeout, usable_timeout(o.dist_timeout), bounds)
    require("--gamma", o.gamma, o.gamma is None or o.gamma >= 0, "must be at least 0")
    for name, share in (("--p", o.p), ("--p-max", o.p_max)):
        require(name, share, share is None or 0 <= share <= 1, "must be from 0 to 1")
    require("--target", o.target, o.target is None or -1 <= o.target <= 1, "must be from -1 to 1; 0.6 is usual")
    require("--at", o.at, o.at is None or o.at >= 0, "must be at least 0")
    budget = o.metrics_budget
    require("--metrics-budget", f"{budget:g}", 0 < budget <= 100, "must be above 0, and at most 100 percent")
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
    return problems + problems_with(o.metrics) + _check_detectors(o.detectors) + check_cache(o.cache, o.cache_dir)


def _check_detectors(folder: str | None) -> list[str]:
    """A folder that was typed is to be there; one that a run remembers may have gone."""
    if folder is None or os.path.isdir(folder):
        return []
    return [f"--detectors {folder}: no such folder; name the one that holds the detectors, or leave it out"]


def usable_timeout(seconds: float) -> bool:
    """Whether processes can wait for one another so long."""
    return 0 < seconds <= LONGEST_TIMEOUT


def _check_combinations(o: TrainOptions) -> list[str]:
    """What does not go together, as far as the command line says it all."""
    problems = []
    aug = o.aug or preset_of(o).aug
    if aug == "fixed" and o.p is None:
        problems.append("--aug fixed needs a probability; add --p 0.2, for example")
    if aug != "fixed" and o.p is not None:
        problems.append(f"--p {o.p} goes with --aug fixed only, not --aug {aug}; leave it out or add --aug fixed")
    if aug != "ada" and o.target is not None:
        problems.append(f"--target {o.target} goes with --aug ada only, not --aug {aug}; leave it out")
    if aug == "noaug" and o.augpipe != default("augpipe"):
        problems.append(f"--augpipe {o.augpipe} needs augmentation, but --aug is noaug; change one of them")
    if o.demo and o.cfg != default("cfg"):
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


def preset_of(o: TrainOptions) -> Preset:
    return DEMO_PRESET if o.demo else PRESETS[o.cfg]


def default(name: str) -> Any:
    return TrainOptions.__dataclass_fields__[name].default
