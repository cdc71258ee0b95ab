"""What tests of several floors share: a tiny dataset, tiny runs, and GPU tests that skip without a GPU."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import write_dataset

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
torch.set_num_threads(1)  # tensors this small gain nothing from threads, and lose much when the cores are busy


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """An MLflow database without runs, made once: making one takes seconds. None without mlflow."""
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        return None
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def outdir(tmp_path: Path, empty_store: Path | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs with an MLflow database in it, and the working directory beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "training-runs"
    folder.mkdir()
    if empty_store is not None:
        shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    folder = Path(__file__).parent / "golden"
    return lambda name: dict(np.load(folder / name))
