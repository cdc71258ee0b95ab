"""Packing a source into the dataset that training reads: a zip file, or a folder, of equal-sized 8-bit PNG files."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from gan.data.contact_sheet import contact_sheet
from gan.data.pack_options import PackOptions, dest_problems
from gan.data.plan import Plan, Progress, Skipped, make_plan, nothing_usable, sample
from gan.data.processes import default_workers
from gan.data.scan_report import scan_lines
from gan.data.scanning import Look, Looker, Scan, look_at, summarise
from gan.data.sources import LABEL_FILE, Source, open_source
from gan.data.unfinished import open_unfinished
from gan.errors import GanError, UsageError
from gan.files import write_png, write_text
from gan.image_size import Size

Report = Callable[[str], None]  # takes a line for people

SCAN_FILE, SHEET_FILE = "scan.json", "scan.png"
_SHEET_IMAGES = 48


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
    resolution: Size | None = None,
    transform: str | None = None,
    resize_filter: str = "lanczos",
    channels: str = "auto",
    background: str = "white",
    labels: str | None = None,
    max_images: int | None = None,
    strict: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
) -> PackSummary:
    """Write the source's images to `dest`, a .zip file or a new folder, and say what was done.

    Images that cannot be read, or lack the label that others have, are left out, and listed in the dataset's
    dataset.json under "skipped". Equal input gives equal bytes. `dest` appears only when it is complete; until then
    the work is kept beside it, and the same call goes on from there, however the last one ended.

    Args:
        source: what `open_source` takes: a folder, a zip, an LSUN, CIFAR or MNIST file, `demo`.
        resolution, transform, resize_filter, channels, background, labels, max_images: see `PackOptions`.
        strict: if any image would be left out or any row of labels is wrong, write nothing.
        workers: processes; by default one for each processor. 0: none but this one.
        progress: called with what is being done, images done and images in all.
        report: takes lines for people.

    Raises UsageError for bad settings; GanError where nothing can be read, or `dest` cannot be written.
    """
    options = PackOptions(resolution, transform, resize_filter, channels, background, labels, max_images)
    opened = _opened(source, options, dest)
    count = default_workers() if workers is None else workers
    say = report or (lambda line: None)
    plan = make_plan(opened, options, count, progress=progress)
    with contextlib.closing(open_unfinished(Path(dest), plan.key())) as unfinished:
        indices = list(plan.headers)
        looks = [Look.of(record) for record in unfinished.records]
        for line in (unfinished.unlocked, unfinished.started_over):
            if line is not None:
                say(line)
        if looks:
            say(f"Going on after {len(looks):,} of {len(indices):,} images, which an earlier run has packed")
        names = {look.index: _image_name(i) for i, look in enumerate(x for x in looks if x.problem is None)}
        try:
            for look in look_at(Looker(plan), indices[len(looks) :], count, say):
                if look.png is None:
                    unfinished.add(look.record())
                else:
                    names[look.index] = _image_name(len(names))
                    unfinished.add(look.record(), names[look.index], look.png)
                looks.append(dataclasses.replace(look, png=None))
                if progress is not None:
                    progress("packing", len(looks), len(indices))
        except KeyboardInterrupt:
            say(f"Stopped after {len(looks):,} of {len(indices):,} images; the same command goes on from there")
            raise
        scan = summarise(plan, looks, progress)
        for line in scan_lines(scan, f"{LABEL_FILE} of {dest}" if names and not strict else None):
            say(line)
        if not names:
            unfinished.discard()
            raise nothing_usable(opened, scan.skipped)
        if strict and scan.num_problems:
            raise GanError(
                f"--strict: {len(scan.skipped)} images would be left out and {len(scan.label_problems)} rows of labels "
                f"are wrong; {dest} was not made. Mend them, or leave out --strict to go on without them"
            )
        unfinished.finish({LABEL_FILE: _label_file(plan, names, scan)})
    assert plan.size is not None
    width, height = plan.size
    return PackSummary(str(dest), len(names), width, height, len(plan.mode), plan.labels is not None, scan)


def scan(
    source: str | Path | Source,
    folder: str | Path | None = None,
    *,
    resolution: Size | None = None,
    transform: str | None = None,
    resize_filter: str = "lanczos",
    channels: str = "auto",
    background: str = "white",
    labels: str | None = None,
    max_images: int | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
    report: Report | None = None,
) -> Scan:
    """Look at everything that `pack` would look at, and pack nothing.

    With `folder` scan.json and scan.png, a sheet of images as they would be packed, are written there. Without a
    resolution images may have any sizes. The other arguments are those of `pack`.
    """
    options = PackOptions(resolution, transform, resize_filter, channels, background, labels, max_images)
    opened = _opened(source, options)
    count = default_workers() if workers is None else workers
    plan = make_plan(opened, options, count, any_size=True, progress=progress)
    indices = list(plan.headers)
    looks: list[Look] = []
    shown: list[np.ndarray] = []
    for look in look_at(Looker(plan, thumbnails_of=sample(indices, _SHEET_IMAGES)), indices, count, report):
        if look.png is not None and folder is not None:
            shown.append(np.asarray(Image.open(io.BytesIO(look.png))))
        looks.append(dataclasses.replace(look, png=None))
        if progress is not None:
            progress("scanning", len(looks), len(indices))
    found = summarise(plan, looks, progress)
    if report is not None:
        for line in scan_lines(found, SCAN_FILE):
            report(line)
    if folder is not None:
        write_text(Path(folder) / SCAN_FILE, json.dumps(dataclasses.asdict(found), indent=1) + "\n")
        if shown:
            write_png(Path(folder) / SHEET_FILE, contact_sheet(shown).transpose(2, 0, 1))
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


def _image_name(number: int) -> str:
    digits = f"{number:08d}"
    return f"{digits[:5]}/img{digits}.png"


def _label_file(plan: Plan, names: dict[int, str], scan: Scan) -> bytes:
    """The dataset.json: labels of the images as they are named in the dataset, and what was left out."""
    content: dict[str, object] = {"labels": None}
    if plan.labels is not None:
        content["labels"] = [[name, plan.label(index)] for index, name in names.items()]
        if plan.labels.class_names is not None:
            content["class_names"] = plan.labels.class_names
    content["skipped"] = scan.skipped
    return json.dumps(content).encode()
