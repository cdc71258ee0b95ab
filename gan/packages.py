"""The packages that nothing goes without, and the commands that install what is missing."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path

NEEDED = {"click": "click", "torch": "torch", "numpy": "numpy", "PIL": "pillow"}
"""modules and their packages"""


def is_there(module: str) -> bool:
    """Whether a package can be imported, as far as can be told without doing so."""
    return importlib.util.find_spec(module) is not None


def install(*packages: str) -> str:
    """The command that installs these, with the versions that are tested, where they are at hand."""
    constraints = "-c constraints.txt " if Path("constraints.txt").is_file() else ""
    return f"python -m pip install {constraints}{' '.join(packages)}"


def lacking(error: ModuleNotFoundError) -> list[str]:
    """All needed packages that are not installed, if it is one of them that could not be imported."""
    if (error.name or "").partition(".")[0] not in NEEDED:
        return []
    return [package for module, package in NEEDED.items() if not is_there(module)]


@contextlib.contextmanager
def required() -> Iterator[None]:
    """End the program with one line, and no traceback, where a needed package turns out not to be installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        packages = lacking(error)
        if not packages:
            raise
        verb = "is" if len(packages) == 1 else "are"
        raise SystemExit(f"error: {', '.join(packages)} {verb} not installed; {install(*packages)}") from error
