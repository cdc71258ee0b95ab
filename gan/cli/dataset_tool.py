"""The command that packs images into a dataset: `python dataset_tool.py`."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path
from typing import Any

import click

from gan.cli.command import Command, Option, printable, problems_of
from gan.data.pack import PackSummary, dest_problems, pack, settings_problems
from gan.data.scan import Progress
from gan.data.sources import LABEL_FILE, Source, count_by_suffix, open_source
from gan.data.transforms import RESIZE_FILTERS, TRANSFORMS, Size
from gan.errors import GanError, UsageError

SETTINGS = ("--resolution", "--width", "--height", "--transform", "--resize-filter", "--max-images")
MAX_LISTED = 20  # skipped files that are listed by name


class SizeType(click.ParamType):
    """Width and height in pixels, such as 256x256."""

    name = "WxH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        if isinstance(value, tuple):
            return value
        match = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", value)
        if match is None:
            self.fail("is not a width and a height; write it like 256x256", param, ctx)
        return int(match[1]), int(match[2])


@click.command(cls=Command, context_settings={"max_content_width": 120})
@click.option("--source", cls=Option, required=True, metavar="PATH", help="a folder or .zip of images, or demo")
@click.option("--dest", cls=Option, required=True, metavar="PATH", help="the .zip file or the new folder to write")
@click.option("--resolution", cls=Option, type=SizeType(), metavar="WxH", help="size to pack, such as 256x256")
@click.option("--width", cls=Option, type=int, metavar="N", help="with --height: the same as --resolution")
@click.option("--height", cls=Option, type=int, metavar="N", help="with --width: the same as --resolution")
@click.option(
    "--transform",
    cls=Option,
    type=click.Choice(TRANSFORMS),
    default="none",
    show_default=True,
    help="how images get their size: none scales the whole image, center-crop scales its largest centred part of the "
    "right proportions, center-crop-wide pads such a wide part to a square and leaves out images smaller than it",
)
@click.option(
    "--resize-filter", cls=Option, type=click.Choice(list(RESIZE_FILTERS)), default="lanczos", show_default=True
)
@click.option("--max-images", cls=Option, type=int, metavar="N", help="pack the first N images only")
@click.pass_context
def dataset_tool(
    ctx: click.Context,
    source: str | None,
    dest: str | None,
    resolution: Size | None,
    width: int | None,
    height: int | None,
    transform: str | None,
    resize_filter: str | None,
    max_images: int | None,
) -> None:
    """Pack images into a dataset: a .zip file or a folder of equal-sized PNG files, in sorted order.

    Images that cannot be read are left out and listed. To try it without images of your own:

        python dataset_tool.py --source demo --dest demo.zip
    """
    problems = list(problems_of(ctx))
    if not any(problem.startswith(SETTINGS) for problem in problems):
        resolution, size_problems = _chosen_size(resolution, width, height)
        problems += size_problems or settings_problems(resolution, str(transform), str(resize_filter), max_images)
    opened: Source | None = None
    if source is not None:
        try:
            opened = open_source(source)
        except GanError as error:
            problems.append(str(error))
    if source is not None and dest is not None:
        problems += dest_problems(source, dest)
    if problems or opened is None or dest is None:
        raise UsageError(problems)
    summary = pack(
        opened,
        dest,
        resolution=resolution,
        transform=transform,
        resize_filter=str(resize_filter),
        max_images=max_images,
        progress=_progress_bar() if sys.stderr.isatty() else None,
    )
    click.echo(_report(opened, summary))


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


def _progress_bar() -> Progress:
    """A progress bar on the terminal for each stage of the work."""
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


def _report(source: Source, summary: PackSummary) -> str:
    """What was packed, what was not, and what to do next."""
    dest = summary.dest
    images = f"{summary.num_images:,} image{'' if summary.num_images == 1 else 's'}"
    labels = "yes, from dataset.json" if summary.has_labels else "none"
    mode = "RGB" if summary.channels == 3 else "grey"
    lines = [
        f"Packed {images} into {dest} ({_bytes_below(Path(dest)) / 1e6:,.1f} MB)",
        f"  size    {summary.width}x{summary.height} {mode}",
        f"  labels  {labels}",
    ]
    if summary.skipped:
        lines.append(f"  skipped {len(summary.skipped):,} that could not be used:")
        lines += [f"    {printable(name)}: {reason}" for name, reason in summary.skipped[:MAX_LISTED]]
        if len(summary.skipped) > MAX_LISTED:
            lines.append(f"    and {len(summary.skipped) - MAX_LISTED:,} more")
    others = [name for name in source.ignored if Path(name).name != LABEL_FILE]
    if others:
        kinds = ", ".join(f"{count:,} x {kind}" for kind, count in list(count_by_suffix(others).items())[:4])
        lines.append(f"  ignored {len(others):,} that are no images by name ({printable(kinds)})")
    lines.append(f"Next: python train.py --data {shlex.quote(dest)}")
    return "\n".join(lines)


def _bytes_below(path: Path) -> int:
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.rglob("*.*"))
