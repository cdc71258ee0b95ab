"""What a command line of train.py and its dataset come to: a run that can be started, or everything that is wrong."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

from gan.cli.download_bar import opened
from gan.cli.options import LATEST
from gan.config import DataInfo, SourceInfo, TrainConfig
from gan.continuation import Continuation, continued
from gan.errors import GanError, UsageError, printable
from gan.image_size import describe_image
from gan.resolve import resolve
from gan.train_options import TrainOptions, check_options, check_resume_name, check_values
from torch_utils import distributed
from torch_utils.distributed import Place

if TYPE_CHECKING:
    from gan.data.dataset import ImageDataset
    from gan.models import Snapshot, TransferReport


@dataclasses.dataclass(frozen=True)
class Order:
    """What the command line and the dataset come to."""

    config: TrainConfig
    dataset: ImageDataset
    run_dir: Path | None = None
    """of a run that continues"""
    at: float | None = None
    outdir: str = ""
    source: Snapshot | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    """for the start of the run"""
    of_source: list[str] = dataclasses.field(default_factory=list)
    """what is said of the file that the networks come from"""
    misfits: list[str] = dataclasses.field(default_factory=list)
    """the same, if that file does not fit"""
    refused: list[str] = dataclasses.field(default_factory=list)
    """problems with it, which do not keep it from being planned"""


def order_of(
    options: TrainOptions, typed: set[str], problems: list[str], list_tensors: bool, run_dir: Path | None = None
) -> Order:
    """What is to be done; `run_dir`: whatever else, this run is to go on. Raises UsageError with all problems."""
    run_dir = run_dir or run_to_continue(options, problems)
    if list_tensors and (options.resume is None or run_dir is not None):
        problems.append("--list-tensors goes with --resume FILE; add it, or leave --list-tensors out")
    source, misfits = None, []
    refused = _problems_of_at(options)
    if run_dir is not None:
        going_on = _continued(options, typed, run_dir, problems)
        config, notes = going_on.config, [f"Changed:   {line}" for line in going_on.changed]
        of_source = _to_begin_with(run_dir, config)
        dataset = dataset_of(config)
    else:
        source = _source(options, problems)
        config, dataset = _resolved(options, source, problems)
        dataset = _chosen(dataset, config)
        notes, of_source = [], []
    if source is not None:
        report, problem = _transfer(source, config)
        refused += problem
        notes = report.listing() if list_tensors else []
        of_source = [*report.lines(), *map(printable, source.notes), *notes]
        misfits = [] if report.whole else of_source
    if "max_restarts" in typed and not distributed.launched():
        notes = [*notes, "Restarts:  --max-restarts counts with --gpus N; torchrun has an option of its own"]
    return Order(config, dataset, run_dir, options.at, options.outdir, source, notes, of_source, misfits, refused)


def run_to_continue(options: TrainOptions, problems: list[str]) -> Path | None:
    """The run folder that --resume means; None for a new run."""
    from gan.training import run_folder

    resume = options.resume
    try:
        if resume == LATEST:
            return run_folder.newest(options.outdir)
        if resume is not None and os.path.isdir(resume):
            run_folder.read_options(Path(resume))
            return Path(resume)
    except GanError as error:
        raise UsageError([*problems, *check_options(options), str(error)]) from error
    return None


def _continued(options: TrainOptions, typed: set[str], run_dir: Path, problems: list[str]) -> Continuation:
    """How the run in `run_dir` goes on, with what the command line may change."""
    from gan.training import run_folder

    names = [field.name for field in dataclasses.fields(TrainOptions) if field.name in typed]
    going_on = continued(run_folder.read_options(run_dir), options, names)
    problems = [*problems, *check_values(options), *going_on.problems]
    if problems:
        raise UsageError(problems)
    return going_on


def _to_begin_with(run_dir: Path, config: TrainConfig) -> list[str]:
    """What is said of the file that a run begins anew from, if it does."""
    from gan.training.run import begins_anew_from

    file = begins_anew_from(run_dir, config)
    return [] if file is None else [f"the run has no training state yet: it begins anew from {file}"]


def _source(options: TrainOptions, problems: list[str]) -> Snapshot | None:
    """The networks that a new run starts from; None if it starts from nothing, or there is a problem with them."""
    if options.resume is None:
        return None
    misnamed = check_resume_name(options.resume)
    if misnamed is not None:
        problems.append(misnamed)
        return None
    refused = problems or options.data is None or not os.path.exists(options.data) or check_options(options)
    if refused and not os.path.exists(options.resume):
        return None  # nothing is fetched for a command line that will not do
    try:
        source = opened(options.resume, options.pretrained_base)
        source.require_generator()
    except GanError as error:
        problems.append(f"--resume {error}")
        return None
    return source


def _transfer(source: Snapshot, config: TrainConfig) -> tuple[TransferReport, list[str]]:
    """What the networks of the run take from those of the file, and the problem with that."""
    from gan.models.transfer import frozen_but_new, plan_transfer
    from gan.training.disk import network_shapes

    G, D = network_shapes(config)
    report = plan_transfer(source, G, D, G, config.data.class_names)
    if not report.whole and not config.allow_partial:
        return report, [f"--resume {report.refusal}"]
    frozen = frozen_but_new(report, D)
    if frozen:
        number = config.network.freeze_layers
        return report, [f"--freezed {number}: D's layers {frozen} are not in the file; leave it out"]
    return report, []


def _info(source: Snapshot) -> SourceInfo:
    from gan.models.transfer import source_info

    return source_info(source)


def _resolved(options: TrainOptions, source: Snapshot | None, problems: list[str]) -> tuple[TrainConfig, ImageDataset]:
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
        raise UsageError([*problems, *check_options(options)])
    assert options.data is not None
    shape = (dataset.height, dataset.width, dataset.channels)
    info = DataInfo(options.data, dataset.name, len(dataset), *shape, dataset.label_dim, dataset.class_names)
    try:
        config = resolve(options, info, None if source is None else _info(source))
    except UsageError as error:
        raise UsageError([*problems, *error.problems]) from error
    if problems:
        raise UsageError(problems)
    return config, dataset


def dataset_of(config: TrainConfig) -> ImageDataset:
    """The images of a run. Raises GanError if they are not what the run was started with."""
    data = config.data
    return _chosen(_open(data.path, data.cond, config.cache, config.cache_dir), config)


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


def _problems_of_at(options: TrainOptions) -> list[str]:
    if options.at is None or options.resume is None or names_run(options.resume):
        return []
    return [f"--at {options.at:g} goes back in a run: --resume {options.resume} is no run folder; leave --at out"]


def names_run(resume: str | None) -> bool:
    return resume is not None and (resume == LATEST or os.path.isdir(resume))


def problems_here(config: TrainConfig, place: Place | None) -> list[str]:
    """What keeps this configuration from running on this machine; `--dry-run` may plan for another one."""
    from gan.training import devices

    try:
        devices.check(config, place)
    except UsageError as error:
        return error.problems
    return []
