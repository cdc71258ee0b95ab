"""The command that packs images into a dataset: `python dataset_tool.py`."""

from __future__ import annotations

import contextlib
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click

from gan.cli.command import Command, Option, problems_of
from gan.cli.options import SizeType, accepted
from gan.data.pack_options import CHANNELS, PackOptions
from gan.data.pack_plan import Progress, nothing_usable
from gan.data.packing import PackSummary, checked, pack, scan
from gan.data.scan_result import counted
from gan.data.sources.folder import SCAN_FILE, SHEET_FILE
from gan.data.transforms import RESIZE_FILTERS, TRANSFORMS
from gan.errors import GanError, UsageError, printable
from gan.files import readable_size
from gan.image_size import Size, describe_image

_SECONDS_BETWEEN_LINES = 60  # of progress, where there is no terminal


@click.command(cls=Command, context_settings={"max_content_width": 120})
@click.option(
    "--source",
    cls=Option,
    required=True,
    metavar="PATH",
    help="a folder or .zip of images, an LSUN lmdb folder, cifar-10-python.tar.gz, an MNIST-style idx file, or demo",
)
@click.option(
    "--dest",
    cls=Option,
    metavar="PATH",
    help="the .zip file or the new folder to write; with --scan-only the folder for its two files",
)
@click.option(
    "--resolution",
    cls=Option,
    type=SizeType(),
    metavar="WxH",
    help="size to pack: a small size doubled some times, such as 256x256 or 384x256",
)
@click.option("--width", cls=Option, type=int, metavar="N", help="with --height: the same as --resolution")
@click.option("--height", cls=Option, type=int, metavar="N", help="with --width: the same as --resolution")
@click.option(
    "--transform",
    cls=Option,
    type=click.Choice(TRANSFORMS),
    help="how images get their size: center-crop (default) scales the largest centred part of the right proportions, "
    "center-crop-wide pads such a wide part to a square and leaves out images smaller than it, fit scales the whole "
    "image and fills up with the background, stretch (or none) distorts it",
)
@click.option(
    "--resize-filter",
    cls=Option,
    type=click.Choice(list(RESIZE_FILTERS)),
    default=PackOptions.resize_filter,
    show_default=True,
)
@click.option(
    "--channels",
    cls=Option,
    type=click.Choice(list(CHANNELS)),
    default=PackOptions.channels,
    show_default=True,
    help="auto: grey if all images are, otherwise rgb; rgba keeps transparency",
)
@click.option(
    "--background",
    cls=Option,
    metavar="COLOUR",
    default=PackOptions.background,
    show_default=True,
    help="what transparent images lie on, and the borders of fit: a name or #rrggbb",
)
@click.option(
    "--labels",
    cls=Option,
    metavar="WHAT",
    help="folders (each a class), a CSV or JSON file, or none  [default: those of the source, such as dataset.json]",
)
@click.option("--max-images", cls=Option, type=int, metavar="N", help="look at the first N readable images only")
@click.option("--strict", is_flag=True, help="write nothing if any image would be left out or a label is wrong")
@click.option(
    "--scan-only", is_flag=True, help=f"pack nothing; say what is there, and write {SCAN_FILE} and {SHEET_FILE}"
)
@click.option("--workers", cls=Option, type=int, metavar="N", help="processes to use  [default: all processors]")
@click.pass_context
def dataset_tool(
    ctx: click.Context,
    source: str | None,
    dest: str | None,
    width: int | None,
    height: int | None,
    strict: bool,
    scan_only: bool,
    workers: int | None,
    **settings: Any,
) -> None:
    """Pack images into a dataset: a .zip file or a folder of equal-sized PNG files, in sorted order.

    Images that cannot be read are left out and listed. A run that was stopped goes on where it was when it is started
    again. To try it without images of your own:

        python dataset_tool.py --source demo --dest demo.zip
    """
    problems = list(problems_of(ctx))
    size_problems = [problem for problem in problems if problem.startswith(("--resolution", "--width", "--height"))]
    if not size_problems:
        settings["resolution"], size_problems = _chosen_size(settings["resolution"], width, height)
        problems += size_problems
    if size_problems:
        settings.update(resolution=None, transform=None)  # what hangs on the size is not judged without it
    options = PackOptions(**accepted(settings, problems))
    if workers is not None and workers < 0:
        problems.append(f"--workers {workers}: must be at least 1, or 0 for no other process")
    if scan_only:
        problems += _folder_problems(dest)
    elif dest is None:
        problems.append("--dest: is missing; name the .zip file or the new folder to write")
    opened = None
    if source is not None:
        opened, more = checked(source, options, None if scan_only else dest)
        problems += more
    if problems or opened is None:
        raise UsageError(problems)
    common: dict[str, Any] = {**vars(options), "workers": workers, "progress": _progress(), "report": _say}
    if scan_only:
        found = scan(opened, dest or ".", **common)
        if not found.num_usable:
            raise nothing_usable(opened, found.skipped)
        if strict and found.num_problems:
            raise GanError(f"--strict: {found.problems_in_words()}, see above")
        return
    assert dest is not None
    for line in _result(pack(opened, dest, strict=strict, **common)):
        _say(line)


def _folder_problems(dest: str | None) -> list[str]:
    """Why the files of --scan-only cannot go there."""
    if dest is not None and (Path(dest).suffix.lower() == ".zip" or (Path(dest).exists() and not Path(dest).is_dir())):
        return [f"--dest {dest}: with --scan-only it is the folder for {SCAN_FILE} and {SHEET_FILE}; name a folder"]
    return []


def _chosen_size(resolution: Size | None, width: int | None, height: int | None) -> tuple[Size | None, list[str]]:
    """The size that --resolution, or --width and --height, ask for, and what is wrong with how they ask."""
    if width is None and height is None:
        return resolution, []
    if resolution is not None:
        return None, ["--width and --height: say the same as --resolution; give one or the other"]
    if width is None or height is None:
        given, missing = ("--height", "--width") if width is None else ("--width", "--height")
        return None, [f"{given}: needs {missing} with it; or give --resolution WxH"]
    return (width, height), []


def _say(line: str) -> None:
    """Print a line. A terminal that is gone, or cannot show every letter, ends no work."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    with contextlib.suppress(OSError):
        click.echo(printable(line).encode(encoding, "replace").decode(encoding))


def _progress() -> Progress:
    """A bar on a terminal for each stage of the work; elsewhere a line a minute."""
    return _progress_bar() if sys.stderr.isatty() else _progress_lines()


def _progress_bar() -> Progress:
    bars: dict[str, Any] = {}

    def show(stage: str, done: int, total: int) -> None:
        if stage not in bars:
            for bar in bars.values():
                bar.render_finish()
            bars[stage] = click.progressbar(length=total, label=stage, file=sys.stderr)
            bars[stage].__enter__()
        bars[stage].update(done - bars[stage].pos)
        if done == total:
            bars[stage].render_finish()

    return show


def _progress_lines() -> Progress:
    said = time.monotonic()

    def show(stage: str, done: int, total: int) -> None:
        nonlocal said
        if time.monotonic() - said >= _SECONDS_BETWEEN_LINES:
            said = time.monotonic()
            click.echo(f"{stage}: {done:,} of {total:,}", err=True)

    return show


def _result(summary: PackSummary) -> tuple[str, str]:
    """What was packed, and what to do next."""
    kind = describe_image(summary.height, summary.width, summary.channels)
    images = counted(summary.num_images, "image")
    size = readable_size(_bytes_below(Path(summary.dest)))
    cond = "  (add --cond to train on its labels)" if summary.has_labels else ""
    packed = f"Packed {images} of {kind} into {summary.dest} ({size})"
    return packed, f"Next: python train.py --data {shlex.quote(summary.dest)}{cond}"


def _bytes_below(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)
