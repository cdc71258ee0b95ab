"""What training needs besides a device: packages, memory, room on disks, and MLflow's store. No torch in here."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from gan.doctor.facts import Fact, unset
from gan.errors import GanError, one_line, without_password
from gan.packages import NEEDED, install, is_there

_LITTLE_MEMORY = 2e9  # a run at 64 px takes as much (docs/performance.md)
_LITTLE_ROOM = 5e9
_SERVER_SECONDS = 2.0
_USEFUL = {  # module: its package, and what goes without it
    "pyspng": ("pyspng", "PNGs are decoded by Pillow, more slowly"),
    "psutil": ("psutil", "memory reads 0, and --gpus N does not work"),
    "requests": ("requests", "no networks from the web"),
    "imageio_ffmpeg": ("imageio-ffmpeg", "for videos, of which there are none yet"),
}
_SCHEMES = ("file", "sqlite", "mysql", "postgresql", "mssql", "databricks", "databricks-uc", "uc")
_EXTRAS = {"safetensors": "safetensors", "onnx": "onnx", "onnxruntime": "onnxruntime", "lmdb": "lmdb"}


def program() -> Iterator[Fact]:
    """What runs, on what."""
    own = _version("stylegan2-ada-trainer") or "in a checkout"
    system = f"{platform.system()} {platform.release()} on {platform.machine()}"
    yield Fact("Program", f"stylegan2-ada-trainer {own}, Python {platform.python_version()}, {system}")


def packages() -> Iterator[Fact]:
    """Which are there, and what goes without those that are not."""
    needed = {module: package for module, package in NEEDED.items() if package not in ("click", "torch")}
    absent = [package for module, package in needed.items() if not is_there(module)]
    if absent:
        text = f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        yield Fact("Packages", text, install(*absent), fatal=True)
    missing = {package: without for module, (package, without) in _USEFUL.items() if not is_there(module)}
    if missing:
        text = "; ".join(f"{package} ({without})" for package, without in missing.items())
        yield Fact("Packages", f"not installed: {text}", install(*missing))
    known = [*needed.items(), *((module, package) for module, (package, _) in _USEFUL.items()), *_EXTRAS.items()]
    found = [f"{package} {_version(package) or ''}".strip() for module, package in known if is_there(module)]
    extras = [package for module, package in _EXTRAS.items() if not is_there(module)]
    without = f"; without {', '.join(extras)}, which only gan convert and LSUN need" if extras else ""
    yield Fact("Packages", f"{', '.join(found)}{without}")


def memory() -> Iterator[Fact]:
    """What this process may still take."""
    from gan.memory import available_bytes

    free = available_bytes()
    if not free:
        yield Fact("Memory", "not known, because psutil is not installed")
        return
    total = f" of {_total_memory() / 2**30:.1f}" if is_there("psutil") else ""
    text = f"{free / 2**30:.1f} GB free{total}"
    if free < _LITTLE_MEMORY:
        remedy = (
            "end other programs, raise the container's limit, or train with a small --cbase, --cmax and --batch-gpu"
        )
        yield Fact("Memory", f"{text}, which is little", remedy)
    else:
        yield Fact("Memory", text)


def disk(outdir: Path) -> Iterator[Fact]:
    """Whether runs, and what is kept for this user, can be written."""
    yield _room("Disk", outdir, "runs", "give --outdir FOLDER")
    from torch_utils.user_cache import user_cache

    try:
        cache = user_cache("kernels").parent
    except RuntimeError:
        text = "there is no home folder: kernels are built at each start, downloads fail, and metrics keep nothing"
        yield Fact("Disk", text, _SET_CACHE)
        return
    yield _room("Disk", cache, "kernels and downloads", _SET_CACHE)


def data(path: str | None, gpu_free: int | None) -> Iterator[Fact]:
    """Where the decoded images of a dataset would be cached; `gpu_free`: bytes, None without a GPU."""
    if path is None:
        yield Fact("Data", "decoded images are cached beside the dataset; --data DATASET says whether they can be")
        return
    from gan.data.cache import choose, folder_for
    from gan.data.dataset import ImageDataset

    try:
        dataset = ImageDataset(path, cache_folder=folder_for(Path(path), "auto", None))
    except GanError as error:
        text, _, remedy = str(error).rpartition("; ")  # it ends with what to do
        if not text:
            text, remedy = remedy, "pack it with python dataset_tool.py --source IMAGES --dest NEW.zip"
        yield Fact("Data", text, remedy, fatal=True)
        return
    yield Fact("Data", f"{path}: {len(dataset)} images of {dataset.width}x{dataset.height}")
    choice = choose(dataset, "auto", None, gpu_free)
    for line in choice.lines:  # what there is to do about it stands in them
        yield Fact("Data", f"cache: {line}", good=choice.mode != "off")


def metrics() -> Iterator[Fact]:
    """Which detectors are there, for metrics such as FID. Nothing is wrong without: training goes by swd then."""
    from gan.metric_names import INCEPTION, VGG
    from gan.metrics.detectors import Detectors

    detectors, missing = Detectors(), []
    for name, serves in ((INCEPTION, "FID, KID and IS"), (VGG, "precision, recall and PPL")):
        path, problem = detectors.path(name), detectors.problem_with(name)
        if path is None:
            missing.append(f"no {name} for {serves}")
        elif problem is not None:
            yield Fact("Metrics", f"no {serves}: {problem}", good=False)
        else:
            yield Fact("Metrics", f"{serves} by {path}")
    if missing:
        fetch = "python -m gan metrics --prefetch fetches what is missing"
        yield Fact("Metrics", f"{'; '.join(missing)}; swd needs none; {fetch}")


def mlflow(outdir: Path) -> Iterator[Fact]:
    """Whether there is MLflow, and whether its store answers."""
    from gan.tracking.mlflow_store import URI_VARIABLE, public_uri, store_of

    if not is_there("mlflow"):
        text = "is not installed: figures and pictures are in the run's folder only"
        yield Fact("MLflow", text, install("mlflow"))
        return
    uri, _ = store_of(outdir)
    version, shown = _version("mlflow") or "installed", public_uri(uri)
    text = f"{version}; {f'{URI_VARIABLE} is' if os.environ.get(URI_VARIABLE) else 'records in'} {shown}"
    is_server = uri.startswith(("http://", "https://"))
    problem, remedy = _problem_of_server(uri) if is_server else _problem_of_file(uri)
    if problem is None:
        yield Fact("MLflow", f"{text}, which answers" if is_server else text)
    else:
        text += f", which {problem}; training does without, and gan mlflow-sync sends it later"
        yield Fact("MLflow", text, remedy)


def _problem_of_server(uri: str) -> tuple[str | None, str | None]:
    """What is wrong with a server, and what to do."""
    import requests

    from gan.tracking.mlflow_store import URI_VARIABLE, reason

    other = f"{unset(URI_VARIABLE)} to record in a file beside the runs"
    try:
        answer = requests.get(f"{uri.rstrip('/')}/health", timeout=_SERVER_SECONDS)
    except (requests.RequestException, ValueError) as error:
        return f"does not answer ({without_password(reason(error))})", f"start it; or {other}"
    status = answer.status_code
    if status in (401, 403):
        return f"refuses us (HTTP {status})", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
    if status >= 500:
        return f"fails (HTTP {status})", f"look at its log; or {other}"
    if status != 200 or answer.text.strip() != "OK":
        return f"does not answer as MLflow does (HTTP {status} for /health)", f"look at the address; or {other}"
    return None, None


def _problem_of_file(uri: str) -> tuple[str | None, str | None]:
    """What is wrong with a store that is no server, as far as can be told without MLflow, and what to do."""
    from gan.tracking.mlflow_store import URI_VARIABLE

    scheme = uri.partition(":")[0].partition("+")[0] if ":" in uri else "file"
    plugins = (entry.name for entry in importlib.metadata.entry_points(group="mlflow.tracking_store"))
    if scheme not in {*_SCHEMES, *plugins}:
        return f"is no address that MLflow knows ({scheme})", f"{unset(URI_VARIABLE)} to record in a file"
    database = Path(uri.partition("///")[2].partition("?")[0])
    if scheme != "sqlite" or not database.is_file() or not database.stat().st_size:
        return None, None
    try:
        address = f"{database.absolute().as_uri()}?mode=ro"
        with contextlib.closing(sqlite3.connect(address, timeout=1, uri=True)) as connection:
            connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    except sqlite3.OperationalError:  # in use, or on a disk of its own kind: MLflow will say
        return None, None
    except sqlite3.DatabaseError as error:
        return f"is no database ({one_line(error)})", f"move {database} away: a new one is made"
    return None, None


_SET_CACHE = "set XDG_CACHE_HOME to a folder that can be written to"


def _room(topic: str, folder: Path, what: str, elsewhere: str) -> Fact:
    """Whether there is room in a folder, which need not be there yet."""
    from gan.files import free_bytes, nearest_existing, readable_size

    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return Fact(topic, f"{folder} cannot be written to ({what})", elsewhere)
    try:
        free = free_bytes(folder)
    except GanError as error:
        return Fact(topic, str(error), elsewhere)
    text = f"{readable_size(free)} free in {_short(folder)}, for {what}"
    if free < _LITTLE_ROOM:
        return Fact(topic, f"{text}, which is little", f"free some, or {elsewhere}")
    return Fact(topic, text)


def _short(folder: Path) -> str:
    """A path for a report that others read: the home folder has no name."""
    try:
        return f"~/{folder.relative_to(Path.home()).as_posix()}"
    except (ValueError, RuntimeError):
        return str(folder)


def _total_memory() -> int:
    import psutil

    return psutil.virtual_memory().total


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
