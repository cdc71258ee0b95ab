"""Open a model file; how far its download is, on the screen."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from gan.models import Snapshot


def opened(where: str, base: str | None = None) -> Snapshot:
    """The networks of a file, an address or a name (`base`: of which folder or site). Raises GanError."""
    from gan import models

    with download_bar() as progress:
        return models.load(where, base=base, progress=progress)


@contextlib.contextmanager
def download_bar() -> Iterator[Callable[[int, int | None], None]]:
    """What `gan.models` is given as `progress`: a bar on a terminal, elsewhere a line."""
    with contextlib.ExitStack() as stack:
        bars: list[Any] = []  # one, once something is fetched
        told = False

        def update(done: int, total: int | None) -> None:
            from gan.files import readable_size  # not for --help

            nonlocal told
            if not told and not sys.stderr.isatty():
                size = "" if total is None else f" {readable_size(total)}"
                click.echo(f"Downloading{size} ...", err=True)
            elif not told:
                bar = click.progressbar(length=total or 0, label="Downloading", file=sys.stderr)
                bars.append(stack.enter_context(bar))
            told = True
            for bar in bars:
                bar.pos = min(bar.pos, done)  # a download that has to begin anew: steps back are not counted
                bar.update(done - bar.pos)

        yield update
