"""The command line: click and nothing else.

`gan <command>` or `python -m gan <command>`; the three scripts of the repository are doors to the first three.
"""

from __future__ import annotations

import importlib

from gan.packages import required

with required():
    import click

_COMMANDS = {
    "dataset-tool": "dataset_tool",
    "train": "train",
    "generate": "generate",
    "metrics": "metrics",
    "convert": "convert",
    "demo": "demo",
    "bench": "bench",
    "doctor": "doctor",
    "mlflow-sync": "mlflow_sync",
    "build-ops": "build_ops",
}


class _LazyGroup(click.Group):
    """Imports a command only when it is used: help stays instant."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        with required():
            module = importlib.import_module(f"gan.cli.{_COMMANDS[name]}")
        command: click.Command = getattr(module, _COMMANDS[name])
        return command


def door(name: str) -> None:
    """Run one command, as the scripts of the repository do."""
    command = main.get_command(click.Context(main), name)
    assert command is not None
    command()


@click.group(cls=_LazyGroup)
def main() -> None:
    """Train a StyleGAN2-ADA on your own images and work with the result."""
