"""What tests of several floors share: a tiny dataset, tiny runs, and GPU tests that skip without a GPU."""

from __future__ import annotations

import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

# A network of a few thousand parameters, 8 steps of 125 images to the thousand.
TINY = ["--cbase", "64", "--cmax", "8", "--map-depth", "1", "--batch", "125", "--batch-gpu", "25", "--mbstd-group", "5"]
TINY += ["--kimg", "1", "--workers", "0", "--device", "cpu", "--precision", "fp32"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def write_dataset(path: Path, count: int = 40, size: int = 16, channels: int = 3, classes: int = 0) -> Path:
    """A zip in the layout of dataset_tool.py: coloured gradients, one class after the other."""
    import io
    import json

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        labels = []
        for i in range(count):
            corners = rng.integers(0, 256, [2, 2, channels], dtype=np.uint8)
            image = PIL.Image.fromarray(corners[:, :, 0] if channels == 1 else corners).resize((size, size))
            buffer = io.BytesIO()
            image.save(buffer, format="PNG", compress_level=0)
            name = f"00000/img{i:08d}.png"
            archive.writestr(name, buffer.getvalue())
            labels.append([name, i % classes if classes else 0])
        archive.writestr("dataset.json", json.dumps({"labels": labels if classes else None}))
    return path


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
