"""The command that says what works on this machine: `python -m gan doctor`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from gan.cli.command import Command, Option, problems_of
from gan.cli.options import limit_spinning, parsed, train_options
from gan.errors import UsageError

_HELPS = {
    "data": "Dataset to look at too: whether it opens, and where its decoded images would be cached",
    "outdir": "Folder that the runs would be in",
    "device": "Which device to examine; auto takes cuda, then mps, then cpu",
}


@click.pass_context
def _doctor(ctx: click.Context, as_json: bool, **values: Any) -> None:
    """Say what works on this machine, what does not and why, and what to type about it.

    Exit code 1 if training cannot run at all. Nothing is changed but for CUDA kernels, which are compiled and kept as
    training would. For a report of a problem, send all that it prints.
    """
    limit_spinning()
    problems = problems_of(ctx)
    if problems:
        raise UsageError(problems)
    from gan.doctor.examine import examine

    options = parsed(values, problems)
    report = examine(options.device, Path(options.outdir), options.data)
    click.echo(json.dumps(report.to_dict()) if as_json else "\n".join(report.lines()))
    if not report.can_train:
        ctx.exit(1)


doctor = Command(
    "doctor",
    params=[
        *train_options(tuple(_HELPS), _HELPS),
        Option(["--json", "as_json"], is_flag=True, help="Print one JSON object"),
    ],
    callback=_doctor,
    help=_doctor.__doc__,
    context_settings={"max_content_width": 120},
)
