"""The command that measures training on this machine: `python -m gan bench`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.cli.command import Command, Option, given, problems_of
from gan.cli.options import SizeType, limit_spinning, parsed, train_options
from gan.config import DataInfo, TrainConfig
from gan.errors import GanError, UsageError
from gan.image_size import Size, is_trainable, largest_trainable
from gan.resolve import resolve
from gan.train_options import TrainOptions

if TYPE_CHECKING:
    from gan.data.dataset import ImageDataset

# The fields of TrainOptions that change the speed of a step.
_OPTIONS = (
    "data",
    "cfg",
    "demo",
    "cond",
    "mirror",
    "gamma",
    "batch",
    "batch_gpu",
    "aug",
    "p",
    "augpipe",
    "freezed",
    "seed",
    "fp32",
    "workers",
    "cache",
    "cache_dir",
    "cbase",
    "cmax",
    "map_depth",
    "mbstd_group",
    "device",
    "precision",
    "tf32",
    "cuda_graphs",
    "ops",
)
_P = 0.2  # where no --p is given; p is held there, for --aug ada too
_HELPS = {
    "data": "Dataset to train on  [default: random images of --resolution]",
    "p": f"Augmentation probability, held there, for --aug ada too  [default: {_P}]",
}
_SIZE = (64, 64)
_LARGEST = 2048  # pixels of a side
_SECONDS = {False: 140.0, True: 50.0}  # by --quick: for all of the command
_PERIODS = {False: 7, True: 3}


def _options() -> list[click.Parameter]:
    size, kinds = "{}x{}".format(*_SIZE), SizeType(or_side=True)
    text = "Size of the random images that stand in for --data, such as 64 or 96x64"
    resolution = Option(["--resolution"], type=kinds, metavar="N|WxH", default=size, show_default=True, help=text)
    choices = click.Choice(["plain"])
    text = "Also measure a plain implementation of the same step, in turn with ours (4 times the time)"
    return [
        *train_options(_OPTIONS, _HELPS),
        resolution,
        Option(["--against"], type=choices, metavar="plain", help=text),
        Option(["--quick"], is_flag=True, help="Less than a minute; without it, two to three"),
        Option(["--json", "as_json"], is_flag=True, help="Print one JSON object"),
    ]


@click.pass_context
def _bench(
    ctx: click.Context,
    resolution: Size | None,
    against: str | None,
    quick: bool,
    as_json: bool,
    **values: Any,
) -> None:
    """Measure training on this machine: step time by phase, images per second, memory, and what would be faster.

    \b
    python -m gan bench --quick                        random images of 64x64
    python -m gan bench --data my.zip --batch-gpu 8    your own, and any option of train.py that changes the speed
    """
    begin = time.monotonic()
    limit_spinning()
    problems = list(problems_of(ctx))
    broken = {problem.split()[0].rstrip(":") for problem in problems}
    options = parsed(values, problems)
    if options.data is not None and given(ctx, "resolution"):
        problems.append("--resolution: goes with random images only; leave it out, --data has its own")
    if resolution is None:
        resolution = _SIZE
    problems += _size_problems(resolution)
    if options.data is None and options.cond:
        problems.append("--cond: random images have no labels; add --data DATASET")
    if options.p is None and "--p" not in broken:
        options = dataclasses.replace(options, p=_P if _mode(options) != "noaug" else None)
    p, options = _without_p_for_ada(options)
    if p is not None and not 0 <= p <= 1:
        problems.append(f"--p {p}: must be from 0 to 1")
    info, dataset = _opened(options, resolution, problems)
    config = _config(options, info, problems)
    if p is not None:
        config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, initial_p=p))
    _measure(config, dataset, against == "plain", quick, as_json, begin)


def _mode(options: TrainOptions) -> str:
    from gan.presets import DEMO_PRESET, PRESETS

    return options.aug or (DEMO_PRESET if options.demo else PRESETS[options.cfg]).aug


def _without_p_for_ada(options: TrainOptions) -> tuple[float | None, TrainOptions]:
    """A run with --aug ada takes no --p, but a measurement does: p beside the options that a run would have."""
    if _mode(options) != "ada":
        return None, options
    return options.p, dataclasses.replace(options, p=None)


def _size_problems(size: Size) -> list[str]:
    width, height = size
    if is_trainable(size) and max(size) <= _LARGEST:
        return []
    better = largest_trainable((min(width, _LARGEST), min(height, _LARGEST)))
    rule = f"training needs a small size doubled some times, no side beyond {_LARGEST}"
    return [f"--resolution {width}x{height}: {rule}; try {better[0]}x{better[1]}"]


def _opened(options: TrainOptions, size: Size, problems: list[str]) -> tuple[DataInfo, ImageDataset | None]:
    """What is known of the images, and the dataset if the user gave one."""
    from gan.bench.images import count_at
    from gan.data.cache import folder_for
    from gan.data.dataset import ImageDataset

    width, height = size if not problems else _SIZE
    stand_in = DataInfo("random images", "random", count_at((width, height)), height, width, 3)
    if options.data is None:
        return stand_in, None
    try:
        folder = folder_for(Path(options.data), options.cache, options.cache_dir)
        data = ImageDataset(options.data, use_labels=options.cond, mirror=options.mirror, cache_folder=folder)
    except GanError as error:
        problems.append(f"--data {error}")
        return stand_in, None
    shape = (data.height, data.width, data.channels)
    return DataInfo(options.data, data.name, data.num_unflipped, *shape, data.label_dim, data.class_names), data


def _config(options: TrainOptions, info: DataInfo, problems: list[str]) -> TrainConfig:
    """The configuration, or every problem with it."""
    from gan.training import devices

    config = None
    try:
        config = resolve(options, info)
        devices.check(config)
    except UsageError as error:
        problems += error.problems
    if problems or config is None:
        raise UsageError(problems)
    return config


def _measure(
    config: TrainConfig,
    dataset: ImageDataset | None,
    against_plain: bool,
    quick: bool,
    as_json: bool,
    begin: float,
) -> None:
    from gan.bench.advice import advise
    from gan.bench.measure import measure
    from gan.bench.report import table

    def report(text: str) -> None:
        if not as_json and (dataset is not None or not text.startswith("Cache:")):
            click.echo(text)

    report(f"Data:      {config.data.path} of {config.data.described}")
    report(f"Options:   {_described(config)}")
    with _images(config, dataset) as images, _enough_memory(config):
        result = measure(
            config,
            images,
            against_plain=against_plain,
            seconds=_SECONDS[quick] - (time.monotonic() - begin),
            firm=quick,
            periods=_PERIODS[quick],
            report=report,
        )
    advice = advise(result)
    if as_json:
        click.echo(json.dumps({**result.to_dict(), "advice": advice, "seconds": time.monotonic() - begin}))
    else:
        click.echo(table(result, advice))


def _described(config: TrainConfig) -> str:
    """The options that the user most likely wants to compare, in one line."""
    network, augment = config.network, config.augment
    p = "none" if augment.multipliers is None else f"at p {augment.initial_p:g}, held there"
    at_a_time = "as many at a time as fit" if config.fit_batch_gpu else f"{config.batch_gpu} at a time"
    return (
        f"batch {config.batch_size}, {at_a_time}; channels {network.channel_base}/resolution up to "
        f"{network.channel_max}; augmentation {p}"
    )


@contextlib.contextmanager
def _images(config: TrainConfig, dataset: ImageDataset | None) -> Iterator[ImageDataset]:
    """The user's images, or random ones, packed into a temporary file, so that reading them takes what it takes."""
    if dataset is not None:
        yield dataset
        return
    from gan.bench.images import random_dataset

    try:
        temporary = tempfile.TemporaryDirectory(prefix="gan-bench-")
    except OSError as error:
        raise GanError(f"random images: no folder for temporary files ({error}); set TMPDIR, or give --data") from error
    with temporary as folder:
        size = config.data.width, config.data.height
        yield random_dataset(Path(folder) / "random.zip", size, config.data.mirror)


@contextlib.contextmanager
def _enough_memory(config: TrainConfig) -> Iterator[None]:
    """A step that does not fit is an answer too."""
    import torch

    smaller = max(config.batch_gpu // 2, 1)
    text = f"--batch-gpu {config.batch_gpu}: a step needs more memory than there is; try --batch-gpu {smaller}"
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise GanError(text) from error
    except RuntimeError as error:  # what PyTorch says of a CPU
        if "allocate memory" not in str(error):
            raise
        raise GanError(text) from error


bench = Command(
    "bench",
    params=_options(),
    callback=_bench,
    help=_bench.__doc__,
    context_settings={"max_content_width": 120},
)
