"""The store that runs are recorded in, and what is wrong with it in one line."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from gan.errors import without_password

URI_VARIABLE = "MLFLOW_TRACKING_URI"


def store_of(outdir: Path) -> tuple[str, str | None]:
    """The store for the runs in `outdir` and where a new experiment keeps its files.

    That is what MLFLOW_TRACKING_URI says, which then decides about files itself (None), or a database in `outdir`.
    """
    chosen = os.environ.get(URI_VARIABLE)
    if chosen:
        return chosen, None
    return f"sqlite:///{(outdir / 'mlflow.db').as_posix()}", str(outdir / "mlartifacts")


def public_uri(uri: str) -> str:
    """The address of a store as it may be shown and noted."""
    return without_password(uri).rstrip("/")


def import_problem(error: Exception) -> str:
    """Why MLflow cannot be used, from what importing it raised."""
    if isinstance(error, ModuleNotFoundError) and error.name == "mlflow":
        return "MLflow is not installed (pip install mlflow)"
    return f"MLflow cannot be imported ({reason(error)})"


def store_problem(uri: str, error: Exception) -> str:
    """What is wrong with the store at `uri`, from what using it raised."""
    shown = public_uri(uri)
    silent = shown.startswith("http") and _system_error(error) is not None
    return f"MLflow at {shown} {'does not answer' if silent else 'failed'} ({reason(error)})"


def reason(error: BaseException) -> str:
    """The cause in a few words: "Connection refused" and not the six lines around it."""
    system_error = _system_error(error)
    if system_error is not None:
        return system_error.strerror or str(system_error)
    from_server = [e for e in _causes(error) if type(e).__module__.startswith("urllib3.")]
    lines = str(from_server[-1] if from_server else error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def count(number: int, noun: str) -> str:
    """So many of something: `1 tick`, `2 ticks`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def listed(parts: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(parts[:-1]), *parts[-1:]]))


def _system_error(error: BaseException) -> OSError | None:
    """The error of the operating system behind this one; those of libraries that derive from OSError have no text."""
    found = [e for e in _causes(error) if isinstance(e, OSError) and (e.strerror or isinstance(e, TimeoutError))]
    return found[-1] if found else None


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what led to it, innermost last."""
    errors = [error]
    for outer in errors:
        for inner in (outer.__context__, outer.__cause__):
            if inner is not None and inner not in errors:
                errors.append(inner)
    return errors
