"""Packing a source into the dataset that training reads: a zip file, or a folder, of equal-sized 8-bit PNG files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gan.data.contact_sheet import MAX_PICTURES, contact_sheet
from gan.data.dataset_files import LABEL_FILE
from gan.data.pack_options import PackOptions, dest_problems
from gan.data.pack_plan import Plan, Progress, Skipped, make_plan, nothing_usable
from gan.data.packed_image import ImagePacker, PackedImage, packed_images
from gan.data.process_pool import default_workers
from gan.data.scan_report import scan_lines
from gan.data.scan_result import Scan, summarise
from gan.data.sources import Source, open_source
from gan.data.sources.folder import SCAN_FILE, SHEET_FILE
from gan.data.unfinished import Unfinished, open_unfinished
from gan.errors import GanError, UsageError
from gan.files import write_png, write_text

Report = Callable[[str], None]  # takes a line for people


@dataclass(frozen=True)
class PackSummary:
    """What was packed, and what was found on the way."""

    dest: str
    num_images: int
    width: int
    height: int
    channels: int
    has_labels: bool
    scan: Scan

    @property
    def skipped(self) -> list[Skipped]:
        """The images of the source that were left out, each as (name, reason)."""
        return self.scan.skipped


def pack(
    source: str | Path | Source,
    dest: str | Path,
    *,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
    **options: Any,
) -> PackSummary:
    """Write the source's images to `dest`, a .zip file or a new folder, and say what was done.

    Images that cannot be read, or lack the label that others have, are left out, and listed in the dataset's
    dataset.json under "skipped". Equal input gives equal bytes. `dest` appears only when it is complete; until then
    the work is kept beside it, and the same call goes on from there, however the last one ended.

        pack("photos/", "mine.zip", resolution=(256, 256), labels="folders", report=print)

    Args:
        source: a folder, a zip, an LSUN, CIFAR or MNIST file, or `demo`.
        strict: if any image would be left out or any label is bad, write nothing.
        workers: processes; by default one for each processor. 0: none but this one.
        progress: called with what is being done, images done and images in all.
        report: takes lines for people.
        options: those of `PackOptions`.

    Raises UsageError for bad settings; GanError where nothing can be read, or `dest` cannot be written.
    """
    settings, say = PackOptions(**options), report or _say_nothing
    opened = _opened(source, settings, dest)
    count = default_workers() if workers is None else workers
    plan = make_plan(opened, settings, count, progress=progress)
    with contextlib.closing(open_unfinished(Path(dest), plan.key())) as unfinished:
        for line in (unfinished.unlocked, unfinished.started_over):
            if line is not None:
                say(line)
        images, names = _pack_all(plan, unfinished, count, progress, say)
        scan = summarise(plan, images, progress)
        for line in scan_lines(scan, f"{LABEL_FILE} of {dest}" if names and not strict else None):
            say(line)
        if not names:
            unfinished.discard()
            raise nothing_usable(opened, scan.skipped)
        if strict and scan.num_problems:
            unfinished.discard()  # what could not be read today may be readable tomorrow
            raise GanError(
                f"--strict: {scan.problems_in_words()}; {dest} was not made; mend them, or leave out --strict"
            )
        unfinished.finish({LABEL_FILE: _label_file(plan, names, scan)})
    assert plan.size is not None
    width, height = plan.size
    return PackSummary(str(dest), len(names), width, height, len(plan.mode), plan.labels is not None, scan)


def scan(
    source: str | Path | Source,
    folder: str | Path | None = None,
    *,
    workers: int | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
    **options: Any,
) -> Scan:
    """Look at everything that `pack` would look at, and pack nothing.

    With `folder` scan.json, and scan.png, a sheet of images as they would be packed, are written there. Without a
    resolution images may have any sizes. The other arguments are those of `pack`.
    """
    settings, say = PackOptions(**options), report or _say_nothing
    opened = _opened(source, settings)
    count = default_workers() if workers is None else workers
    plan = make_plan(opened, settings, count, to_look=True, progress=progress)
    indices = list(plan.headers)
    sample = range(MAX_PICTURES if indices else 0)
    shown = frozenset(indices[i * len(indices) // MAX_PICTURES] for i in sample)
    images: list[PackedImage] = []
    thumbnails: list[np.ndarray] = []
    for image in packed_images(ImagePacker(plan, thumbnails_of=shown), indices, count, say):
        if image.png is not None and folder is not None:
            thumbnails.append(np.asarray(Image.open(io.BytesIO(image.png))))
        images.append(dataclasses.replace(image, png=None))
        if progress is not None:
            progress("scanning", len(images), len(indices))
    found = summarise(plan, images, progress)
    for line in scan_lines(found, SCAN_FILE if folder is not None else None):
        say(line)
    if folder is not None:
        path = Path(folder) / SCAN_FILE
        write_text(path, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        say(f"Written: {path}")
        path = Path(folder) / SHEET_FILE
        path.unlink(missing_ok=True)  # of an earlier scan
        if thumbnails:
            write_png(path, contact_sheet(thumbnails).transpose(2, 0, 1))
            say(f"Written: {path}, images as they would be packed")
    return found


def checked(
    source: str | Path | Source, options: PackOptions, dest: str | Path | None = None
) -> tuple[Source | None, list[str]]:
    """The source, opened, and everything that is wrong with what was asked for."""
    problems = options.problems()
    name = source.name if isinstance(source, Source) else str(source)
    opened = None
    try:
        opened = source if isinstance(source, Source) else open_source(name)
    except GanError as error:
        problems.append(str(error))
    if dest is not None:
        problems += dest_problems(name, dest)
    return opened, problems


def _opened(source: str | Path | Source, options: PackOptions, dest: str | Path | None = None) -> Source:
    opened, problems = checked(source, options, dest)
    if problems or opened is None:
        raise UsageError(problems)
    return opened


def _pack_all(
    plan: Plan, unfinished: Unfinished, workers: int, progress: Progress | None, say: Report
) -> tuple[list[PackedImage], dict[int, str]]:
    """Pack what an earlier run has not. What became of all images, and the names of those that were packed."""
    indices = list(plan.headers)
    images = [PackedImage.of(record) for record in unfinished.records]
    if images:
        say(f"Going on after {len(images):,} of {len(indices):,} images, which an earlier run has packed")
    usable = (image.index for image in images if image.problem is None)
    names = {index: _image_name(number) for number, index in enumerate(usable)}
    try:
        for image in packed_images(ImagePacker(plan), indices[len(images) :], workers, say):
            if image.png is None:
                unfinished.add(image.record())
            else:
                names[image.index] = _image_name(len(names))
                unfinished.add(image.record(), names[image.index], image.png)
            images.append(dataclasses.replace(image, png=None))
            if progress is not None:
                progress("packing", len(images), len(indices))
    except KeyboardInterrupt:
        say(f"Stopped after {len(images):,} of {len(indices):,} images; the same command goes on from there")
        raise
    return images, names


def _image_name(number: int) -> str:
    digits = f"{number:08d}"
    return f"{digits[:5]}/img{digits}.png"


def _label_file(plan: Plan, names: dict[int, str], scan: Scan) -> bytes:
    """The dataset.json: labels of the images as they are named in it, how they got their size, what was left out."""
    content: dict[str, object] = {"labels": None}
    if plan.labels is not None:
        content["labels"] = [[name, plan.label(index)] for index, name in names.items()]
        if plan.labels.class_names is not None:
            content["class_names"] = plan.labels.class_names
    transform = plan.options.effective_transform
    resize_filter = None if transform == "none" else plan.options.resize_filter  # FID depends on it
    content["packed"] = {"transform": transform, "resize_filter": resize_filter}
    content["skipped"] = scan.skipped
    if scan.label_problems:
        content["label_problems"] = scan.label_problems
    return json.dumps(content).encode()


def _say_nothing(line: str) -> None: ...
