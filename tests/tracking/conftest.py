import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """No MLflow settings from outside, and none left behind."""
    with mock.patch.dict(os.environ):
        for name in [name for name in os.environ if name.startswith("MLFLOW_")]:
            del os.environ[name]
        yield


@pytest.fixture
def record() -> Callable[..., dict[str, Any]]:
    """Makes a stats.jsonl record at `nimg` images."""

    def make(nimg: int, **means: float) -> dict[str, Any]:
        values = {"Loss/G/loss": 0.5, "Progress/tick": nimg // 4000, "Progress/kimg": nimg / 1000, **means}
        entries: dict[str, Any] = {name: {"num": 1, "mean": mean, "std": 0.0} for name, mean in values.items()}
        return {**entries, "timestamp": 1.7e9 + nimg}

    return make


@pytest.fixture
def outdir(empty_store: Path | None, tmp_path: Path) -> Path:
    """A folder for runs, with an MLflow database and one run folder in it."""
    if empty_store is None:
        pytest.skip("mlflow is not installed")
    shutil.copy(empty_store, tmp_path / "mlflow.db")
    (tmp_path / "00000-test").mkdir()
    return tmp_path


@pytest.fixture
def no_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if MLflow were not installed."""
    monkeypatch.setitem(sys.modules, "mlflow", None)
