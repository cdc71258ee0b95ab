"""The main job from end to end on pictures that it draws itself: `python -m gan demo`."""

from __future__ import annotations

import shlex
import time
from pathlib import Path

import click

from gan.cli.command import Command, Option

_SEEDS = "0-35"


@click.command(cls=Command, context_settings={"max_content_width": 120})
@click.option("--dir", "folder", cls=Option, default="demo", show_default=True, metavar="DIR", help="Folder for it all")
@click.option("--kimg", cls=Option, type=int, help="Train longer or shorter than the few minutes of the preset")
def demo(folder: str, kimg: int | None) -> None:
    """Draw a few thousand little landscapes, pack them, train on them for minutes, and sample the result.

    Each step is one of the program's own commands, printed before it runs.
    """
    begin = time.monotonic()
    root = Path(folder)
    data, runs, out = root / "landscapes.zip", root / "training-runs", root / "out"
    _run("dataset_tool.py", "--source", "demo", "--dest", data, "--resolution", "64x64")
    longer = [] if kimg is None else ["--kimg", kimg]
    _run("train.py", "--demo", "--data", data, "--outdir", runs, *longer)

    from gan.training.run_folder import newest, newest_snapshot

    run_dir, snapshot = newest(runs), newest_snapshot(runs)
    _run("generate.py", "--seeds", _SEEDS, "--network", snapshot, "--outdir", out)
    fakes = max(run_dir.glob("fakes[0-9]*.png"))
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    click.echo(
        f"""
That was the whole job, in {minutes} min {seconds:02d} s. What it wrote:
  {data}  the packed pictures
  {run_dir / "reals.png"}  a sheet of them
  {fakes}  what the network makes of it
  {snapshot}  the network
  {out / "grid.png"}  seeds {_SEEDS}

What to try next:
  python dataset_tool.py --source YOUR_PHOTOS --dest mine.zip --resolution 256x256
      then: python train.py --data mine.zip
  python train.py --resume {shlex.quote(str(run_dir))} --kimg 200
      goes on with this run; Ctrl-C stops it, and it loses nothing
  mlflow ui --backend-store-uri sqlite:///{shlex.quote((runs / "mlflow.db").as_posix())}
      shows curves and pictures at http://127.0.0.1:5000"""
    )


def _run(script: str, *arguments: object) -> None:
    """Run one of the three commands, as a user would type it, in this process."""
    from gan.cli import main

    args = [str(argument) for argument in arguments]
    click.echo(f"\n$ python {script} {shlex.join(args)}")
    command = main.get_command(click.Context(main), script.removesuffix(".py").replace("_", "-"))
    assert command is not None
    with command.make_context(script, args, parent=None) as ctx:
        command.invoke(ctx)
