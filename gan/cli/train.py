"""The command that trains: `python train.py`."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import click

from gan import config as cfg
from gan.cli.command import Command, Option, given, problems_of
from gan.config import TrainConfig, TrainOptions
from gan.errors import GanError, UsageError
from gan.presets import AUGMENT_PIPES, PRESETS

if TYPE_CHECKING:
    from gan.data.dataset import ImageDataset

_CHOICES = {
    "cfg": list(PRESETS),
    "aug": list(cfg.AUGMENT_MODES),
    "augpipe": list(AUGMENT_PIPES),
    "device": list(cfg.DEVICES),
    "precision": list(cfg.PRECISIONS),
}
_LATEST = "latest"
# What may differ when a run continues: where and how fast it runs, and how long. The rest is what the run is.
_HONOURED = ("data", "outdir", "kimg", "snap", "tick", "workers", "batch_gpu", "device", "precision", "tf32")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    """The command line option of a field of TrainOptions: its name, type, default and help are written there."""
    text = field.metadata["help"]
    kind = next((t for t in (bool, int, float, str) if hint in (t, t | None)), str)
    settings: dict[str, Any] = {"default": field.default, "help": text}
    if field.default not in (None, False):
        settings["show_default"] = True
    if field.name in _CHOICES:
        settings["type"] = click.Choice(_CHOICES[field.name])
    elif kind is bool:  # also --mirror=1, --mirror=true
        settings.update(type=bool, is_flag=False, flag_value=True, metavar="[BOOL]")
    elif field.name == "resume":
        settings.update(type=str, is_flag=False, flag_value=_LATEST, metavar="[RUN_DIR|FILE]")
    else:
        settings["type"] = kind
    return Option([_flag(field.name), field.name], **settings)


def _options() -> list[click.Parameter]:
    hints = get_type_hints(TrainOptions)
    return [
        *(_option(field, hints[field.name]) for field in dataclasses.fields(TrainOptions)),
        Option(["-n", "--dry-run", "dry_run"], is_flag=True, help="Print the configuration and the plan, then exit"),
        Option(["--json", "as_json"], is_flag=True, help="With --dry-run: print the configuration as one JSON object"),
    ]


@click.pass_context
def _train(ctx: click.Context, dry_run: bool | None, as_json: bool | None, **values: Any) -> None:
    """Train a GAN on your images, or continue a run.

    \b
    python train.py --data metfaces.zip              a new run
    python train.py --resume                         continue the newest run
    python train.py --data my.zip --resume net.pkl   a new run from the weights of a snapshot
    """
    _limit_spinning()
    problems = problems_of(ctx)
    broken = {problem.split()[0].rstrip(":") for problem in problems}
    values = {k: _default(k) if v is None and _flag(k) in broken else v for k, v in values.items()}
    options = TrainOptions(**values)
    run_dir = _run_to_continue(options, problems)
    if run_dir is not None:
        config = _continued(ctx, options, run_dir, problems)
    else:
        config = _resolved(options, problems)
    if as_json and not dry_run:
        raise UsageError(["--json goes with --dry-run only; add it, or leave --json out"])
    dataset = _open_dataset(config)
    here = _problems_here(config, options)
    if dry_run:
        _print_plan(config, bool(as_json), here)
        return
    if here:
        raise UsageError(here)
    _start(config, options, run_dir, dataset)


def _run_to_continue(options: TrainOptions, problems: list[str]) -> Path | None:
    """The run folder that --resume means; None for a new run."""
    from gan.training import run_folder

    resume = options.resume
    try:
        if resume == _LATEST:
            return run_folder.newest(options.outdir)
        if resume is not None and Path(resume).is_dir():
            run_folder.read_options(Path(resume))
            return Path(resume)
    except GanError as error:
        raise UsageError([*problems, *cfg.check_options(options), str(error)]) from error
    return None


def _continued(ctx: click.Context, options: TrainOptions, run_dir: Path, problems: list[str]) -> TrainConfig:
    """The configuration of the run in `run_dir`, with what the command line may change."""
    from gan.training import run_folder

    config = run_folder.read_options(run_dir)
    problems = [*problems, *cfg.check_options(options)]
    for field in dataclasses.fields(TrainOptions):
        if field.name not in (*_HONOURED, "resume") and given(ctx, field.name):
            problems.append(
                f"{_flag(field.name)} cannot change when a run continues; leave it out, or start a new run from the "
                f"weights with --data DATASET --resume SNAPSHOT"
            )
    targets = {"kimg": "total_kimg", "tick": "tick_kimg"}
    changes = {
        targets.get(name, name): getattr(options, name)
        for name in _HONOURED
        if name not in ("data", "outdir") and given(ctx, name)
    }
    if given(ctx, "data") and options.data is not None:
        changes["data"] = dataclasses.replace(config.data, path=options.data)
    config = dataclasses.replace(config, **changes)
    problems += cfg.check_division(config)
    if problems:
        raise UsageError(problems)
    return config


def _resolved(options: TrainOptions, problems: list[str]) -> TrainConfig:
    """The configuration of a new run, or every problem with it."""
    problems = list(problems)
    info = None
    if options.data is None:
        problems.append("--data: is missing; name the zip that dataset_tool.py wrote")
    else:
        try:
            info = _inspect(options.data, options.cond)
        except GanError as error:
            problems.append(f"--data {error}")
    if info is None:
        raise UsageError([*problems, *cfg.check_options(options)])
    try:
        config = cfg.resolve(options, info)
    except UsageError as error:
        raise UsageError([*problems, *error.problems]) from error
    if problems:
        raise UsageError(problems)
    return config


def _inspect(path: str, cond: bool) -> cfg.DataInfo:
    from gan.data.dataset import ImageDataset

    data = ImageDataset(path, use_labels=cond)
    return cfg.DataInfo(path, data.name, len(data), data.resolution, data.channels, data.label_dim)


def _open_dataset(config: TrainConfig) -> ImageDataset:
    """The dataset of a run; for one that continues, it must be what it was."""
    from gan.data.dataset import ImageDataset

    data = config.data
    dataset = ImageDataset(data.path, use_labels=data.cond, subset=data.subset, mirror=data.mirror, seed=config.seed)
    found = (dataset.resolution, dataset.channels, dataset.label_dim, len(dataset))
    expected = (data.resolution, data.channels, data.label_dim, data.shown_images)
    if found != expected:
        raise GanError(
            f"{data.path}: (resolution, channels, label values, images) are {found}, but the run was started with "
            f"{expected}; give the dataset of the run with --data"
        )
    return dataset


def _problems_here(config: TrainConfig, options: TrainOptions) -> list[str]:
    """What keeps this configuration from running on this machine; `--dry-run` may plan for another one."""
    from gan.training.devices import choose_device, choose_half_dtype

    problems = []
    if config.gpus > 1:
        problems.append(f"--gpus {config.gpus}: training on several GPUs is not there yet; use --gpus 1")
    try:
        choose_half_dtype(config.precision, choose_device(config.device))
    except UsageError as error:
        problems += error.problems
    resume = options.resume
    if resume is not None and resume != _LATEST:
        missing = cfg.check_resume_name(resume)
        if missing is None and not Path(resume).exists():
            missing = f"--resume {resume}: downloads are not there yet; fetch the file and give its path"
        problems += [missing] if missing else []
    return problems


def _print_plan(config: TrainConfig, as_json: bool, here: list[str]) -> None:
    from gan.training.plan import describe_plan

    if as_json:
        click.echo(json.dumps(config.reference_options()))
    else:
        click.echo(config.to_json())
        click.echo("\n".join(["", "Plan", *(f"  {line}" for line in describe_plan(config))]))
    for problem in here:
        click.echo(f"on this machine it would not start: {problem}", err=True)


def _start(config: TrainConfig, options: TrainOptions, run_dir: Path | None, dataset: ImageDataset) -> None:
    """Train; everything was checked."""
    from gan import models
    from gan.training import run_folder
    from gan.training.trainer import Trainer

    resume = run_dir is not None
    start = models.load(config.init_from) if config.init_from and not resume else None
    if run_dir is None:
        run_dir = run_folder.create(options.outdir, config)
    trainer = Trainer(config, run_dir, dataset, start=start, resume=resume)
    if resume:
        if trainer.complete:
            raise GanError(f"{run_dir}: the run is complete ({config.total_kimg} kimg); --kimg N makes it longer")
        run_folder.write_options(run_dir, config)
    if not trainer.run():
        click.get_current_context().exit(130)


def _limit_spinning() -> None:
    """Have the threads of a CPU run wait for each other less greedily; takes effect before PyTorch is loaded.

    Waiting threads spin, by default so long that any other busy process on the machine slows training down by a factor
    of 15. With this it is 5, and on a quiet machine the cost is below 5 % (docs/experiments.md).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _default(name: str) -> Any:
    return TrainOptions.__dataclass_fields__[name].default if name in TrainOptions.__dataclass_fields__ else None


train = Command(
    "train",
    params=_options(),
    callback=_train,
    help=_train.__doc__,
    context_settings={"max_content_width": 120},
)
