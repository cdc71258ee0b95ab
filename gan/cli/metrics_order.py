"""What a command line of `gan metrics` comes to: which files are measured, by what, against which images."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gan.errors import GanError, UsageError, without_password
from gan.metric_names import AUTO, METRICS, NONE, chosen, detectors_of
from gan.presets import PRETRAINED
from gan.train_options import TrainOptions, check_values

if TYPE_CHECKING:
    from gan.config import TrainConfig
    from gan.data.dataset import ImageDataset
    from gan.metrics.detectors import Detectors
    from gan.tracking.measurements import Measured

_SNAPSHOT = re.compile(r"network-snapshot-(\d{6,})\.pkl")


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line as typed; None: not given."""

    networks: list[str]
    data: str | None = None
    metrics: str | None = None
    detectors: str | None = None
    seed: int = 0
    device: str = "auto"
    ops: str = "auto"
    batch: int = 32
    gpus: int = 1
    plot: str | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Item:
    """A model file that is to be measured."""

    source: str
    """path, address or name"""
    data: str
    """the images that it is compared with"""
    cond: bool | None
    """whether their labels are used; None: the network says it"""
    run_dir: str | None = None
    """of the run that it is a snapshot of, if its results belong there"""
    metrics: list[str] = dataclasses.field(default_factory=list)
    """by which it has not been measured yet"""

    @property
    def shown(self) -> str:
        """Its name for people."""
        return Path(self.source).name if self.run_dir is not None else without_password(self.source)

    @property
    def kimg(self) -> int | None:
        """Of a snapshot, as its name says."""
        match = _SNAPSHOT.fullmatch(Path(self.source).name)
        return int(match[1]) if match else None


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be done."""

    items: list[Item]
    metrics: list[str]
    detectors: str | None
    """folder in which they are looked for first"""
    digests: dict[str, str]
    """sha256 of the detectors that are used"""
    seed: int
    lines: list[str]
    """to be said at the start"""
    left_out: list[str]
    """what cannot be measured, and why: a line each"""
    first_by: list[str]
    """metrics in the order in which they say which snapshot of a run is the best"""

    def is_of(self, measured: Measured, num_images: int, fingerprint: str) -> bool:
        """Whether a line of a run was measured as it would be now: with that detector, seed and images."""
        metric, record = METRICS[measured.metric], measured.record
        detector = record.get("detector")
        sha256 = detector.get("sha256") if isinstance(detector, dict) else None
        reals = None if metric.max_reals == 0 else min(metric.max_reals or num_images, num_images)
        expected = (self.digests.get(metric.detector or ""), self.seed, reals, fingerprint)
        return (sha256, record.get("seed"), record.get("num_reals"), record.get("dataset")) == expected


class Datasets:
    """The datasets of a command, each opened once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, bool], ImageDataset] = {}

    def get(self, path: str, cond: bool) -> ImageDataset:
        """The whole dataset, with labels if `cond`. Raises GanError."""
        from gan.data.cache import folder_for
        from gan.data.dataset import ImageDataset

        key = (os.path.abspath(path), cond)
        if key not in self._opened:
            folder = folder_for(Path(path), TrainOptions.cache, None)
            self._opened[key] = ImageDataset(path, use_labels=cond, cache_folder=folder)
        return self._opened[key]


def order_of(request: Request, datasets: Datasets, problems: Sequence[str]) -> Order:
    """What is to be done. Raises UsageError with everything that is wrong, GanError if nothing can be measured."""
    problems = [*problems, *_problems_of_values(request)]
    sources = list(_sources(request, problems))
    configs = {run: config for _, run, config in sources if run is not None and config is not None}
    config = next(iter(configs.values()), None)
    items = list(_items(request, sources, datasets, problems))
    if problems:
        raise UsageError(problems)
    from gan.metrics.detectors import Detectors

    folder = request.detectors or (None if config is None else config.detectors)
    detectors = Detectors(folder)
    asked = request.metrics or (AUTO if config is None or config.metrics == NONE else config.metrics)
    names, lines, left_out = _measurable(asked, detectors)
    digests = {name: _digest(detectors, name) for name in detectors_of(names)}
    tracked = [] if config is None else chosen(config.metrics, lambda name: detectors.path(name) is not None)
    first_by = list(dict.fromkeys([*tracked, *names, *METRICS]))
    order = Order(items, names, folder, digests, request.seed, lines, left_out, first_by)
    items = [
        dataclasses.replace(item, metrics=_missing(order, item, datasets) if not request.force else names)
        for item in items
    ]
    return dataclasses.replace(order, items=items)


def known(order: Order, run_dir: Path, dataset: ImageDataset) -> Iterator[Measured]:
    """What a run was measured by, oldest first, as far as it can be compared with what is measured now."""
    from gan.tracking import measurements

    fingerprint = dataset.fingerprint_anywhere
    for metric in order.metrics:
        for measured in measurements.read(run_dir, metric):
            if order.is_of(measured, len(dataset), fingerprint):
                yield measured


def _problems_of_values(request: Request) -> list[str]:
    r = request
    problems = check_values(TrainOptions(gpus=r.gpus, detectors=r.detectors, metrics=r.metrics or AUTO))
    if r.metrics == NONE:
        problems.append("--metrics none: there is nothing to do then; name some, or leave it out")
    if r.batch < 1:
        problems.append(f"--batch {r.batch}: must be a whole number from 1 on")
    if r.seed < 0:
        problems.append(f"--seed {r.seed}: must be a whole number from 0 on")
    if r.plot is not None and not r.plot.lower().endswith(".png"):
        problems.append(f"--plot {r.plot}: is written as a PNG; let the name end in .png")
    if r.plot is not None:
        from gan.packages import install, is_there

        if not is_there("matplotlib"):
            problems.append(f"--plot {r.plot}: matplotlib is not installed; {install('matplotlib')}")
    return problems


_Source = tuple[str, "Path | None", "TrainConfig | None"]


def _sources(request: Request, problems: list[str]) -> Iterator[_Source]:
    """Each model file once, with the run that it is in and its configuration."""
    names = request.networks
    if not names:
        try:
            names = [_newest_run()]
        except GanError as error:
            problems.append(str(error))
    seen = set()
    for name in names:
        try:
            for path, run_dir, config in _sources_of(name):
                key = os.path.realpath(path) if os.path.exists(path) else path
                if key not in seen:
                    seen.add(key)
                    yield path, run_dir, config
        except GanError as error:
            problems.append(f"--network {error}")


def _newest_run() -> str:
    from gan.training import run_folder

    outdir = TrainOptions.outdir
    try:
        return str(run_folder.newest(outdir))
    except GanError as error:
        raise GanError(
            f"--network: is missing, and {outdir} holds no run; name a snapshot or the folder of a run"
        ) from error


def _sources_of(name: str) -> Iterator[_Source]:
    """The file of that name, or the snapshots of a run, oldest first. Raises GanError if there is none."""
    from gan.models.download import local_path
    from gan.training import best, retention, run_folder

    path = Path(name)
    if os.path.isdir(name):
        config = run_folder.read_options(path)
        kimgs = retention.snapshots_in(path)
        if not kimgs:
            raise GanError(f"{name}: holds no snapshot yet; wait for one, or name another run")
        yield from ((str(path / f"network-snapshot-{kimg:06d}.pkl"), path, config) for kimg in kimgs)
        return
    if not os.path.exists(name):
        if name not in PRETRAINED and "://" not in name:
            local_path(name)  # which says what is wrong
        yield name, None, None
        return
    if not (path.parent / run_folder.OPTIONS_FILE).exists():
        yield name, None, None
        return
    if path.name == best.FILE_NAME:
        path = _linked(path)
    yield str(path), path.parent, run_folder.read_options(path.parent)


def _linked(path: Path) -> Path:
    """The snapshot that `network-snapshot-best.pkl` is a link to, or a copy of."""
    if path.is_symlink():
        return path.parent / os.readlink(path)
    with contextlib.suppress(OSError):
        own = path.stat()
        for other in path.parent.glob("network-snapshot-[0-9]*.pkl"):
            its = other.stat()
            if (its.st_size, its.st_mtime_ns) == (own.st_size, own.st_mtime_ns):
                return other
    return path


def _items(request: Request, sources: Sequence[_Source], datasets: Datasets, problems: list[str]) -> Iterator[Item]:
    refused = set()  # a line for each dataset
    for path, run_dir, config in sources:
        data = request.data or (None if config is None else config.data.path)
        cond = None if config is None else config.data.cond
        if data is None:
            data = ""
            where = f"{without_password(path)} is in no run folder"
            problem: str | None = f"--data: is missing; {where}, so name the images to compare with"
        else:
            problem = _problem_with_data(request, data, cond, run_dir, datasets)
        if problem is not None:
            if data not in refused:
                problems.append(problem)
            refused.add(data)
            continue
        is_snapshot = _SNAPSHOT.fullmatch(Path(path).name) is not None
        belongs = is_snapshot and config is not None and _is_of_run(datasets.get(data, bool(cond)), config)
        yield Item(path, data, cond, str(run_dir) if belongs else None)


def _problem_with_data(
    request: Request, data: str, cond: bool | None, run_dir: Path | None, datasets: Datasets
) -> str | None:
    if request.data is None and not os.path.exists(data):
        return f"--data: {data}, with the images of {run_dir}, is not there; name the dataset where it is now"
    try:
        datasets.get(data, bool(cond))
    except GanError as error:
        return f"--data {error}"
    return None


def _is_of_run(dataset: ImageDataset, config: TrainConfig) -> bool:
    """Whether these are the images of a run: the same file, or one like it where that is gone."""
    data = config.data
    with contextlib.suppress(OSError):
        if os.path.samefile(dataset.path, data.path):
            return True
    like = (len(dataset), *dataset.image_shape, dataset.label_dim)
    return not os.path.exists(data.path) and like == (
        data.num_images,
        data.channels,
        data.height,
        data.width,
        data.label_dim,
    )


def _measurable(asked: str, detectors: Detectors) -> tuple[list[str], list[str], list[str]]:
    """(metrics, lines to be said, lines of what is left out) of what is asked for, as detectors are there."""
    names = chosen(asked, lambda name: detectors.path(name) is not None)
    absent = [name for name in detectors_of(names) if detectors.path(name) is None]
    there = [name for name in names if METRICS[name].detector not in absent]
    lines, left_out = [], []
    if asked == AUTO and not detectors_of(there):
        lines.append(f"Metrics:   {', '.join(there)} (no detector here: python -m gan metrics --prefetch)")
    if absent:
        without = ", ".join(name for name in names if name not in there)
        left_out.append(f"{without} left out: {detectors.missing_line(absent)}")
    if not there:
        raise GanError("\n".join(left_out))
    return there, lines, left_out


def _missing(order: Order, item: Item, datasets: Datasets) -> list[str]:
    """The metrics that a file has not been measured by."""
    if item.run_dir is None:
        return order.metrics
    found = known(order, Path(item.run_dir), datasets.get(item.data, bool(item.cond)))
    there = {measured.metric for measured in found if measured.snapshot == Path(item.source).name}
    return [metric for metric in order.metrics if metric not in there]


def _digest(detectors: Detectors, name: str) -> str:
    with contextlib.suppress(GanError):  # whoever loads it says so
        return detectors.sha256(name) or ""
    return ""
