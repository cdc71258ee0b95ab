"""The model files that `gan metrics` is to measure, and the images that each is compared with."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gan import snapshot_names
from gan.errors import GanError, without_password
from gan.image_size import describe_image
from gan.presets import PRETRAINED
from gan.train_options import TrainOptions

if TYPE_CHECKING:
    from gan.config import TrainConfig
    from gan.data.dataset import ImageDataset


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
        return snapshot_names.kimg_of(Path(self.source).name)


class Datasets:
    """The datasets of a command, each opened once."""

    def __init__(self) -> None:
        self._opened: dict[tuple[str, bool], ImageDataset] = {}
        self._fingerprints: dict[tuple[str, bool], str] = {}

    def get(self, path: str, cond: bool | None) -> ImageDataset:
        """The whole dataset, with labels if `cond`. Raises GanError."""
        from gan.data.cache import folder_for
        from gan.data.dataset import ImageDataset

        key = (os.path.abspath(path), bool(cond))
        if key not in self._opened:
            folder = folder_for(Path(path), TrainOptions.cache, None)
            self._opened[key] = ImageDataset(path, use_labels=bool(cond), cache_folder=folder)
        return self._opened[key]

    def fingerprint(self, path: str, cond: bool | None) -> str:
        """Of what `get` opens, as results name it; taken once, as it looks at each file of a folder."""
        key = (os.path.abspath(path), bool(cond))
        if key not in self._fingerprints:
            self._fingerprints[key] = self.get(path, cond).fingerprint_anywhere
        return self._fingerprints[key]


@dataclasses.dataclass(frozen=True)
class Source:
    """A model file, and the run that it is in; None: in none."""

    path: str
    """or address, or name"""
    run_dir: Path | None = None
    config: TrainConfig | None = None


def sources_of(names: Sequence[str], problems: list[str]) -> list[Source]:
    """Each model file once, of a run all its snapshots; without names those of the newest run."""
    if not names:
        try:
            names = [_newest_run()]
        except GanError as error:
            problems.append(str(error))
    found: dict[str, Source] = {}
    for name in names:
        try:
            for source in _sources_of(name):
                key = os.path.realpath(source.path) if os.path.exists(source.path) else source.path
                found.setdefault(key, source)
        except GanError as error:
            problems.append(f"--network {error}")
    return list(found.values())


def items_of(sources: Sequence[Source], data: str | None, datasets: Datasets, problems: list[str]) -> Iterator[Item]:
    """What each file is compared with; `data`: --data."""
    refused = set()  # a line for each dataset
    for source in sources:
        config = source.config
        where = data or ("" if config is None else config.data.path)
        problem = _problem_with_data(source, data, datasets)
        if problem is not None:
            if where not in refused:
                problems.append(problem)
            refused.add(where)
            continue
        cond = None if config is None else config.data.cond
        is_snapshot = snapshot_names.kimg_of(Path(source.path).name) is not None
        belongs = is_snapshot and config is not None and _is_of_run(datasets.get(where, cond), config)
        yield Item(source.path, where, cond, str(source.run_dir) if belongs else None)


def _newest_run() -> str:
    from gan.training import run_folder

    outdir = TrainOptions.outdir
    try:
        return str(run_folder.newest(outdir))
    except GanError as error:
        raise GanError(
            f"--network: is missing, and {outdir} holds no run; name a snapshot or the folder of a run"
        ) from error


def _sources_of(name: str) -> Iterator[Source]:
    """The file of that name, or the snapshots of a run, oldest first. Raises GanError if there is none."""
    from gan.models.download import local_path
    from gan.training import retention, run_folder

    path = Path(name)
    if os.path.isdir(name):
        config = run_folder.read_options(path)
        kimgs = retention.snapshots_in(path)
        if not kimgs:
            raise GanError(f"{name}: holds no snapshot yet; wait for one, or name another run")
        yield from (Source(str(path / snapshot_names.name_of(kimg)), path, config) for kimg in kimgs)
        return
    if not os.path.exists(name):
        if name not in PRETRAINED and "://" not in name:
            local_path(name)  # which says what is wrong
        yield Source(name)
        return
    if not (path.parent / run_folder.OPTIONS_FILE).exists():
        yield Source(name)
        return
    if path.name == snapshot_names.BEST:
        path = _linked(path)
    yield Source(str(path), path.parent, run_folder.read_options(path.parent))


def _linked(path: Path) -> Path:
    """The snapshot that `network-snapshot-best.pkl` is a link to, or a copy of."""
    from gan.training import retention

    if path.is_symlink():
        return path.parent / os.readlink(path)
    with contextlib.suppress(OSError):
        own = path.stat()
        for name in retention.snapshot_names(path.parent):
            its = (path.parent / name).stat()
            if (its.st_size, its.st_mtime_ns) == (own.st_size, own.st_mtime_ns):
                return path.parent / name
    return path


def _problem_with_data(source: Source, data: str | None, datasets: Datasets) -> str | None:
    """What is wrong with the images that a file is to be compared with; `data`: --data."""
    config = source.config
    if data is None:
        if config is None:
            where = f"{without_password(source.path)} is in no run folder"
            return f"--data: is missing; {where}, so name the images to compare with"
        path = config.data.path
        from_where = "" if os.path.isabs(path) else " (a path from where the run was started)"
        if not os.path.exists(path):
            return (
                f"--data: {path}{from_where}, with the images of {source.run_dir}, is not there; "
                "name the dataset where it is now"
            )
    try:
        dataset = datasets.get(data or path, None if config is None else config.data.cond)
    except GanError as error:
        return f"--data {error}"
    if data is None and config is not None and not _is_like(dataset, config):
        holds = f"{len(dataset)} images, {describe_image(dataset.height, dataset.width, dataset.channels)}"
        return (
            f"--data: {path}{from_where} has other images ({holds}) than when {source.run_dir} was started; "
            "name the dataset with --data, this one if it is meant"
        )
    return None


def _is_of_run(dataset: ImageDataset, config: TrainConfig) -> bool:
    """Whether these are the images of a run: the same file, or one like it where that is gone."""
    with contextlib.suppress(OSError):
        if os.path.samefile(dataset.path, config.data.path):
            return True
    return not os.path.exists(config.data.path) and _is_like(dataset, config)


def _is_like(dataset: ImageDataset, config: TrainConfig) -> bool:
    """Whether a dataset may be that of a run, as far as its options tell."""
    data = config.data
    of_run = (data.num_images, data.channels, data.height, data.width, data.label_dim)
    return (len(dataset), *dataset.image_shape, dataset.label_dim) == of_run
