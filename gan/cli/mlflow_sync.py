"""The command that sends MLflow what it missed: `python -m gan mlflow-sync RUN_DIR`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from gan.cli.command import Command, problems_of
from gan.errors import UsageError


@click.command("mlflow-sync", cls=Command, context_settings={"max_content_width": 120})
@click.argument("run_dir", required=False)
@click.pass_context
def mlflow_sync(ctx: click.Context, run_dir: str | None) -> None:
    """Send MLflow what it missed of a run, ticks, measurements, pictures: it was not there, or the run was killed.

    Where to: the server that MLFLOW_TRACKING_URI names, or the database beside RUN_DIR.

    \b
    python -m gan mlflow-sync training-runs/00000-metfaces-auto1
    """
    problems = problems_of(ctx)
    if run_dir is None:
        problems.append("RUN_DIR: is missing; name the folder of a run, such as training-runs/00000-metfaces-auto1")
    elif run_dir.startswith("-"):
        problems.append(f"{run_dir}: no such option; see --help")
    if problems or run_dir is None:
        raise UsageError(problems)

    from gan.tracking.mlflow_store import count, listed
    from gan.tracking.mlflow_sync import sync
    from gan.training import run_folder

    config = run_folder.read_options(Path(run_dir))
    with run_folder.locked(Path(run_dir), click.echo):  # one that is being trained sends what is missing itself
        sent = sync(Path(run_dir), config.data.name, dataclasses.asdict(config), config.total_kimg)
    parts = {"tick": sent.ticks, "measurement": sent.measurements, "picture": sent.pictures}
    missing = listed([count(number, noun) for noun, number in parts.items() if number])
    begin = f"sent {missing} to {sent.uri}" if missing else f"nothing was missing at {sent.uri}"
    click.echo(f"{begin}; it has every tick up to kimg {sent.newest_kimg:.1f}")
