"""Importing MLflow so that it prints nothing, sends nothing home, and never hangs a forked process."""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import os
import sys
import threading
from collections.abc import Iterator
from types import ModuleType

# What a server that is down or hung may cost: by default one call blocks for minutes.
_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",  # seconds
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_QUIET_LOGGERS = ("mlflow", "alembic", "sqlalchemy", "urllib3.connectionpool")

# What MLflow would import on its first use of a database.
_IMPORTED_LATER = ("alembic.command", "mlflow.store.tracking.sqlalchemy_store")

_fork_gate = threading.RLock()
_fork_gate_installed = False


def set_environment_defaults() -> None:
    """Set what MLflow reads from the environment, as far as the user has not; call it on the main thread."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def import_mlflow() -> ModuleType:
    """The mlflow module, with its loggers quiet. Takes seconds the first time. Raises what the import raises.

    A process forked while another thread imports inherits locked modules and hangs when it needs one of them, so a
    fork (of a data loader, say) waits until the import is over.
    """
    _install_fork_gate()
    with _fork_gate, _without_collector():
        is_first = "mlflow" not in sys.modules
        import mlflow

        for name in _IMPORTED_LATER:
            with contextlib.suppress(ImportError):  # the small mlflow package talks to servers only
                importlib.import_module(name)
        if is_first:
            gc.freeze()  # nor later: nothing of it is garbage, and training steps leave none
    if "MLFLOW_LOGGING_LEVEL" not in os.environ:
        for name in _QUIET_LOGGERS:
            logging.getLogger(name).setLevel(logging.CRITICAL)  # errors reach us as exceptions
    return mlflow


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """No garbage collection: one that goes through all that is imported halts training for 0.1 s to 0.6 s."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _install_fork_gate() -> None:
    global _fork_gate_installed
    if not _fork_gate_installed and hasattr(os, "register_at_fork"):
        _fork_gate_installed = True
        os.register_at_fork(
            before=_fork_gate.acquire, after_in_parent=_fork_gate.release, after_in_child=_fork_gate.release
        )
