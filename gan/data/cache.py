"""Where decoded images are kept, so that each is decoded once: on the GPU, in a file, in memory, or not at all."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from gan.data.cache_file import Content, FileStore, FoundStore, problem_with
from gan.data.dataset import ImageDataset
from gan.data.shared_store import SharedStore, can_share
from gan.data.store import Store
from gan.errors import GanError
from gan.files import explain_os_error, free_bytes, nearest_existing, readable_size
from gan.memory import available_bytes
from torch_utils.distributed import Place

_MEMORY = Path("/dev/shm")  # where files are in memory (Linux)


@dataclass(frozen=True)
class Choice:
    """Where decoded images are kept."""

    mode: str
    """device, disk, ram or off"""
    lines: list[str]
    """for people: where, how much, why; then what was ignored"""
    content: Content
    path: Path | None = None
    """the cache file to read, or with mode disk to make"""
    found: bool = False
    """`path` is there and complete"""
    rows: np.ndarray | None = None
    """where in it the images are; None: in order"""
    shared_by: Place | None = None
    """this process, if all of its machine fill one file"""


def choose(
    dataset: ImageDataset,
    mode: str,
    cache_dir: str | None = None,
    gpu_free: int | None = None,
    place: Place | None = None,
) -> Choice:
    """What becomes of --cache `mode` and --cache-dir here.

    Args:
        gpu_free: bytes free on the GPU; None without one.
        place: of several processes, of which those of a machine share what can be shared.
    """
    processes = 1 if place is None else place.local_size
    content, folder = dataset.content(), folder_for(dataset.path, mode, cache_dir)
    found, rows, notes = _find(dataset, folder)
    at = found or (content.file_in(folder) if folder is not None else None)
    size = readable_size(content.num_bytes)
    against: list[str] = []  # why what was preferred is not possible

    def choice(kind: str, text: str, path: Path | None, shared: bool = False) -> Choice:
        reasons = f" ({'; '.join(against)})" if against else ""
        there = path is not None and path == found
        lines = [f"{kind}, {text}{reasons}", *notes]
        return Choice(kind, lines, content, path, there, rows if there else None, place if shared else None)

    kinds = {"auto": ("device", "disk", "ram"), "device": ("device", "ram")}.get(mode, (mode,))
    if processes > 1 and mode == "auto" and not found:
        kinds = ("disk", "ram")  # for its GPU each process would have to decode every image
        if gpu_free is not None:
            against.append("until every image is there, one place serves all processes")
    if processes > 1 and mode == "device" and found:
        kinds = ("device", "disk")  # which is in memory once
    for kind in kinds:
        source = f"read from {found}" if found else "filled as images are first shown"
        if kind == "device":
            problem = _gpu_problem(content.num_bytes, gpu_free, 4 if mode == "auto" else 1)
            if problem is None:
                return choice(kind, f"{size} of the {readable_size(gpu_free or 0)} free on the GPU, {source}", found)
            if mode == "device" or gpu_free is not None:
                against.append(problem)
        elif kind == "disk":
            assert at is not None
            if found:
                return choice(kind, f"{found}, {size}, complete: nothing is decoded", found)
            problem = _disk_problem(content.num_bytes, at.parent, 2 if mode == "auto" else 1)
            if problem is None:
                shared = processes > 1 and can_share()
                return choice(kind, f"{at}, {size}, made as images are first shown", at, shared)
            against.append(problem)
        elif kind == "ram":
            times = 4 if mode == "auto" else 1
            if processes > 1 and can_share() and _has_room(_MEMORY, content.num_bytes):
                problem = _memory_problem(content.num_bytes, times)
                if problem is None:
                    path = content.file_in(_MEMORY).with_suffix(".ram")
                    return choice(kind, f"{size} of memory, the same for all processes, {source}", path, True)
            else:
                problem = _memory_problem(content.num_bytes * processes, times)
                if problem is None:
                    each = " for each process" if processes > 1 else ""
                    return choice(kind, f"{size} of memory{each}, {source}", found)
            against.append(problem)
    return choice("off", "every image is decoded each time it is shown", None)


def open_store(choice: Choice) -> Store | None:
    """The store of a choice other than `device`. Raises OSError or MemoryError if it cannot be had."""
    if choice.mode == "off":
        return None
    if choice.shared_by is not None:
        assert choice.path is not None
        try:
            return SharedStore(choice.content, choice.path, choice.shared_by, in_memory=choice.mode == "ram")
        except OSError as error:
            choice.lines.append(f"each process fills its own: {error.strerror or error}")
    if choice.mode == "disk":
        assert choice.path is not None
        return found_store(choice) if choice.found else FileStore(choice.content, choice.path)
    if choice.found:
        rows = np.arange(choice.content.shape[0])
        array = np.empty(choice.content.shape, dtype=np.uint8)
        found_store(choice).take(rows, array)
        return Store(array, complete=True)
    return Store(np.empty(choice.content.shape, dtype=np.uint8), complete=False)


def found_store(choice: Choice) -> FoundStore:
    """The complete file that was found."""
    assert choice.path is not None
    return FoundStore(choice.path, choice.content.shape[1:], choice.rows)


def folder_for(dataset: Path, mode: str, cache_dir: str | None) -> Path | None:
    """Where the cache file of a dataset is looked for and made; None if it is to have none."""
    if mode in ("ram", "off"):
        return None
    return Path(cache_dir) if cache_dir else Path(os.path.abspath(dataset)).parent


def gave_up(error: Exception, where: Path | None) -> str:
    """The line for people when training goes on without its cache."""
    why = explain_os_error(error, where or "memory") if isinstance(error, OSError) else "not enough memory"
    return f"off, every image is decoded from now on: {why}"


def _find(dataset: ImageDataset, folder: Path | None) -> tuple[Path | None, np.ndarray | None, list[str]]:
    """A complete cache file of these images, or of the whole dataset with where they are in it; what was ignored."""
    notes: list[str] = []
    for content, rows in dataset.contents() if folder is not None else []:
        assert folder is not None
        path = content.file_in(folder)
        problem = problem_with(path, content)
        if problem is None:
            return path, rows, notes
        if problem:
            notes.append(f"{path} is ignored: {problem}")
    return None, None, notes


def _gpu_problem(size: int, free: int | None, times: int) -> str | None:
    if free is None:
        return "there is no CUDA device to keep it on"
    if size * times > free * (1 if times > 1 else 0.9):
        against = "too much for" if times > 1 else "more than"
        return f"{readable_size(size)} is {against} the {readable_size(free)} free on the GPU"
    return None


def _disk_problem(size: int, folder: Path, times: int) -> str | None:
    existing = nearest_existing(folder)
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        return f"{folder} cannot be written to; --cache-dir names another folder"
    try:
        free = free_bytes(existing)
    except GanError as error:
        return str(error)
    if size * times > free:
        sizes = f"{readable_size(size)} is too much for the {readable_size(free)}"
        return f"{sizes} free in {folder}; --cache-dir names another folder"
    return None


def _has_room(folder: Path, size: int) -> bool:
    try:
        return folder.is_dir() and os.access(folder, os.W_OK) and size <= free_bytes(folder)
    except GanError:
        return False


def _memory_problem(size: int, times: int) -> str | None:
    free = available_bytes()
    if size * times > free:
        return f"{readable_size(size)} is too much for the {readable_size(free)} of free memory"
    return None
