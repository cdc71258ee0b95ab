"""The command that trains: `python train.py`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan import config as cfg
from gan.cli.command import Command, Option, given, problems_of
from gan.cli.options import LATEST, limit_spinning, parsed, train_options
from gan.config import TrainConfig, TrainOptions
from gan.continuation import Continuation, continued
from gan.errors import GanError, UsageError
from gan.image_size import describe_image

if TYPE_CHECKING:
    from gan.data.dataset import ImageDataset


def _options() -> list[click.Parameter]:
    return [
        *train_options(),
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
    limit_spinning()
    problems = problems_of(ctx)
    options = parsed(values, problems)
    run_dir = _run_to_continue(options, problems)
    notes: list[str] = []
    if run_dir is not None:
        going_on = _continued(ctx, options, run_dir, problems)
        config, notes = going_on.config, [f"Changed:   {line}" for line in going_on.changed]
        dataset = _open(config.data.path, config.data.cond, config.cache, config.cache_dir)
    else:
        config, dataset = _resolved(options, problems)
    if as_json and not dry_run:
        raise UsageError(["--json goes with --dry-run only; add it, or leave --json out"])
    dataset = _chosen(dataset, config)
    here = _problems_here(config, options)
    if dry_run:
        _print_plan(config, run_dir or Path(options.outdir), bool(as_json), here)
        return
    if here:
        raise UsageError(here)
    _start(config, options, run_dir, dataset, notes)


def _run_to_continue(options: TrainOptions, problems: list[str]) -> Path | None:
    """The run folder that --resume means; None for a new run."""
    from gan.training import run_folder

    resume = options.resume
    try:
        if resume == LATEST:
            return run_folder.newest(options.outdir)
        if resume is not None and Path(resume).is_dir():
            run_folder.read_options(Path(resume))
            return Path(resume)
    except GanError as error:
        raise UsageError([*problems, *cfg.check_options(options), str(error)]) from error
    return None


def _continued(ctx: click.Context, options: TrainOptions, run_dir: Path, problems: list[str]) -> Continuation:
    """How the run in `run_dir` goes on, with what the command line may change."""
    from gan.training import run_folder

    names = [field.name for field in dataclasses.fields(TrainOptions) if given(ctx, field.name)]
    going_on = continued(run_folder.read_options(run_dir), options, names)
    problems = [*problems, *cfg.check_values(options), *going_on.problems]
    if problems:
        raise UsageError(problems)
    return going_on


def _resolved(options: TrainOptions, problems: list[str]) -> tuple[TrainConfig, ImageDataset]:
    """The configuration of a new run and the whole dataset, or every problem with them."""
    problems = list(problems)
    dataset = None
    if options.data is None:
        problems.append("--data: is missing; name the zip that dataset_tool.py wrote")
    else:
        try:
            dataset = _open(options.data, options.cond, options.cache, options.cache_dir)
        except GanError as error:
            problems.append(f"--data {error}")
    if dataset is None:
        raise UsageError([*problems, *cfg.check_options(options)])
    assert options.data is not None
    shape = (dataset.height, dataset.width, dataset.channels)
    info = cfg.DataInfo(options.data, dataset.name, len(dataset), *shape, dataset.label_dim, dataset.class_names)
    try:
        config = cfg.resolve(options, info)
    except UsageError as error:
        raise UsageError([*problems, *error.problems]) from error
    if problems:
        raise UsageError(problems)
    return config, dataset


def _open(path: str, cond: bool, cache: str, cache_dir: str | None) -> ImageDataset:
    """The whole dataset."""
    from gan.data.cache import folder_for
    from gan.data.dataset import ImageDataset

    return ImageDataset(path, use_labels=cond, cache_folder=folder_for(Path(path), cache, cache_dir))


def _chosen(dataset: ImageDataset, config: TrainConfig) -> ImageDataset:
    """The images of a run; for one that continues, they must be what they were."""
    data = config.data
    dataset = dataset.view(subset=data.subset, mirror=data.mirror, seed=config.seed)
    shown = describe_image(dataset.height, dataset.width, dataset.channels)
    found, expected = (
        f"{images} images of {kind} with {label_dim} label values"
        for images, kind, label_dim in (
            (len(dataset), shown, dataset.label_dim),
            (data.shown_images, data.described, data.label_dim),
        )
    )
    if found != expected:
        raise GanError(
            f"{data.path}: holds {found}, but the run was started with {expected}; give the dataset of the run with "
            "--data"
        )
    if data.class_names is not None and dataset.class_names != data.class_names:
        raise GanError(
            f"{data.path}: its classes are {_listed(dataset.class_names)}, but the run was started with "
            f"{_listed(data.class_names)}; give the dataset of the run with --data"
        )
    return dataset


def _listed(class_names: list[str] | None) -> str:
    shown = ", ".join((class_names or ["without names"])[:8])
    return f"{shown}, ..." if len(class_names or []) > 8 else shown


def _problems_here(config: TrainConfig, options: TrainOptions) -> list[str]:
    """What keeps this configuration from running on this machine; `--dry-run` may plan for another one."""
    from gan.training import devices

    problems, resume = [], options.resume
    if options.at is not None and resume is not None and resume != LATEST and not Path(resume).is_dir():
        problems.append(f"--at {options.at:g} goes back in a run: --resume {resume} is no run folder; leave --at out")
    if config.gpus > 1:
        problems.append(f"--gpus {config.gpus}: training on several GPUs is not there yet; use --gpus 1")
    try:
        devices.check(config)
    except UsageError as error:
        problems += error.problems
    if resume is not None and resume != LATEST:
        missing = cfg.check_resume_name(resume)
        if missing is None and not Path(resume).exists():
            missing = f"--resume {resume}: downloads are not there yet; fetch the file and give its path"
        problems += [missing] if missing else []
    return problems


def _print_plan(config: TrainConfig, folder: Path, as_json: bool, here: list[str]) -> None:
    from gan.training.plan import describe_plan

    if as_json:
        click.echo(json.dumps(config.reference_options()))
    else:
        click.echo(config.to_json())
        click.echo("\n".join(["", "Plan", *(f"  {line}" for line in describe_plan(config, folder))]))
    for problem in here:
        click.echo(f"on this machine it would not start: {problem}", err=True)


def _start(
    config: TrainConfig, options: TrainOptions, run_dir: Path | None, dataset: ImageDataset, notes: list[str]
) -> None:
    """Train; everything was checked."""
    from gan import models
    from gan.training import run, run_folder

    if run_dir is not None:
        complete = run.train(config, run_dir, dataset, continued=True, at=options.at, notes=notes)
    else:
        start = models.load(config.init_from) if config.init_from else None
        run_dir = run_folder.create(options.outdir, config)
        complete = run.train(config, run_dir, dataset, start=start)
    if not complete:
        click.get_current_context().exit(130)


train = Command(
    "train",
    params=_options(),
    callback=_train,
    help=_train.__doc__,
    context_settings={"max_content_width": 120},
)
