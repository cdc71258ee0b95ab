"""Packing a source into the dataset that training reads: a zip file, or a folder, of equal-sized 8-bit PNG files."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import warnings
import zipfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from gan.data.scan import Progress, Scan, Skipped, is_trainable, nothing_readable, reason, scan, trainable_side
from gan.data.sources import LABEL_FILE, Label, Source
from gan.data.transforms import RESIZE_FILTERS, TRANSFORMS, Size, Transform, make_transform, output_size, to_8bit
from gan.errors import UsageError
from gan.files import atomic_path, explain_os_error

# Zip entries carry a time; one that never changes makes equal input give equal bytes. It is the oldest a zip can hold.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)
OTHER_ARCHIVES = {".tar", ".gz", ".tgz", ".bz2", ".xz", ".7z", ".rar"}

Write = Callable[[str, bytes], None]
Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class PackSummary:
    """What was packed, and which images of the source were left out, each as (name, reason)."""

    dest: str
    num_images: int
    width: int
    height: int
    channels: int
    has_labels: bool
    skipped: list[Skipped]


def pack(
    source: Source,
    dest: str | Path,
    *,
    resolution: Size | None = None,
    transform: str | None = None,
    resize_filter: str = "lanczos",
    max_images: int | None = None,
    progress: Progress | None = None,
) -> PackSummary:
    """Write the source's images to `dest`, a .zip file or a new folder, and say what was done.

    `resolution` is (width, height) in pixels; without it the images stay as they are and must already be equal in
    size, square and a power of two. All images become grey if all are grey, otherwise all become RGB. Images that
    cannot be read are left out. Equal input gives equal bytes. `dest` appears only when it is complete.

    Raises UsageError for bad settings; GanError where nothing can be read, or `dest` cannot be written.
    """
    transform = transform or "none"
    problems = settings_problems(resolution, transform, resize_filter, max_images) + dest_problems(source.name, dest)
    if problems:
        raise UsageError(problems)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of harmless oddities, such as unusual metadata, file by file
        found = scan(source, resolution, transform, max_images, progress)
        pixels_of = make_transform(transform, resolution, resize_filter)
        with _writer(Path(dest)) as write:
            names, skipped = _write_images(source, found, pixels_of, write, progress)
            if not names:
                raise nothing_readable(source, skipped)
            labels = None
            if source.labels is not None:
                labels = [[name, source.labels[source.names[index]]] for index, name in names.items()]
            write(LABEL_FILE, _label_file(labels))
    return PackSummary(
        dest=str(dest),
        num_images=len(names),
        width=found.size[0],
        height=found.size[1],
        channels=len(found.mode),
        has_labels=labels is not None,
        skipped=sorted(found.skipped + skipped),
    )


def settings_problems(resolution: Size | None, transform: str, resize_filter: str, max_images: int | None) -> list[str]:
    """What is wrong with the settings of `pack`, each problem with its flag, value and remedy."""
    problems = []
    if transform not in TRANSFORMS:
        problems.append(f"--transform {transform}: is not one of {', '.join(TRANSFORMS)}")
    elif transform != "none" and resolution is None:
        problems.append(f"--transform {transform}: needs a size; add --resolution WxH, such as --resolution 256x256")
    elif resolution is not None:
        problems += _resolution_problems(resolution, transform)
    if resize_filter not in RESIZE_FILTERS:
        problems.append(f"--resize-filter {resize_filter}: is not one of {', '.join(RESIZE_FILTERS)}")
    if max_images is not None and max_images < 1:
        problems.append(f"--max-images {max_images}: must be at least 1")
    return problems


def dest_problems(source: str, dest: str | Path) -> list[str]:
    """Why `dest` cannot take a dataset made from `source`, as far as can be told without writing."""
    path = Path(dest)
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not parent.is_dir():
        return [f"--dest {dest}: {parent} is a file, not a folder; choose another place"]
    if not os.access(parent, os.W_OK):
        return [f"--dest {dest}: {parent} cannot be written to; choose a folder that you may write to"]
    if os.path.exists(source) and path.exists() and os.path.samefile(source, path):
        return [f"--dest {dest}: is the --source itself; choose another name"]
    if path.suffix.lower() == ".zip":
        return [f"--dest {dest}: is a folder; name a file that ends in .zip"] if path.is_dir() else []
    if path.suffix.lower() in OTHER_ARCHIVES:
        return [f"--dest {dest}: only .zip files and folders can be written; name one of these"]
    if path.is_file():
        return [f"--dest {dest}: is a file; name a file that ends in .zip, or a new folder"]
    if path.is_dir() and any(path.iterdir()):
        return [f"--dest {dest}: is a folder that is not empty; empty it, or name a new one"]
    return []


def _resolution_problems(resolution: Size, transform: str) -> list[str]:
    width, height = resolution
    given = f"--resolution {width}x{height}"
    if min(resolution) < 1:
        return [f"{given}: must be at least 1 pixel each way"]
    if transform == "center-crop-wide" and height > width:
        return [f"{given}: --transform center-crop-wide needs a width of at least the height"]
    if not is_trainable(output_size(transform, resolution)):
        side = trainable_side(width)
        better = f"{side}x{max(1, side * height // width)}" if transform == "center-crop-wide" else f"{side}x{side}"
        return [f"{given}: training needs squares with a power of two as their side; try --resolution {better}"]
    return []


def _write_images(
    source: Source, found: Scan, pixels_of: Transform, write: Write, progress: Progress | None
) -> tuple[dict[int, str], list[Skipped]]:
    """Write the images of a scan; return the names given to those that could be read, and those that could not."""

    def encode(index: int) -> bytes | str:
        try:
            with source.read(index) as image:
                pixels = pixels_of(to_8bit(image, found.mode))
        except Exception as error:  # as in the scan: one damaged file never ends the run
            return reason(error)
        if pixels.shape[:2] != (found.size[1], found.size[0]):
            return f"is {pixels.shape[1]}x{pixels.shape[0]}, unlike its header says"
        return _png(pixels)

    names: dict[int, str] = {}
    skipped: list[Skipped] = []
    for done, (index, data) in enumerate(_in_threads(encode, found.indices), start=1):
        if isinstance(data, str):
            skipped.append((source.names[index], data))
        else:
            names[index] = _image_name(len(names))
            write(names[index], data)
        if progress is not None:
            progress("packing", done, len(found.indices))
    return names, skipped


def _in_threads(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) in order, computed a few items ahead; Pillow's decoders run in parallel."""
    workers = min(8, os.cpu_count() or 1)
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for item in items:
            waiting.append((item, pool.submit(function, item)))
            if len(waiting) > 2 * workers:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _image_name(number: int) -> str:
    digits = f"{number:08d}"
    return f"{digits[:5]}/img{digits}.png"


def _png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] as an uncompressed PNG, which is the fastest to read again."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def _label_file(labels: list[list[str | Label]] | None) -> bytes:
    return json.dumps({"labels": labels}).encode()


@contextlib.contextmanager
def _writer(dest: Path) -> Iterator[Write]:
    """Yield the function that adds a file to `dest`, which appears at the end of the block, or not at all."""
    kind = _zip_writer if dest.suffix.lower() == ".zip" else _folder_writer
    with kind(dest) as write:
        yield write


@contextlib.contextmanager
def _zip_writer(dest: Path) -> Iterator[Write]:
    with atomic_path(dest) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:

        def write(name: str, data: bytes) -> None:
            entry = zipfile.ZipInfo(name, ZIP_TIME)
            entry.create_system = 3  # the same on every system, for equal bytes; 3 makes the next line's meaning Unix
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)

        yield write


@contextlib.contextmanager
def _folder_writer(dest: Path) -> Iterator[Write]:
    temporary: Path | None = None
    try:
        dest.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{dest.name}.", suffix=".tmp", dir=dest.parent))
        content = temporary / "content"  # mkdtemp's own folder is private, this one has the usual permissions
        content.mkdir()

        def write(name: str, data: bytes) -> None:
            path = content / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)

        yield write
        if dest.is_dir():
            dest.rmdir()  # it is empty, and not every system replaces an empty folder
        os.replace(content, dest)
    except OSError as error:
        raise explain_os_error(error, dest) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
