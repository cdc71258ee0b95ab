from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from click.testing import CliRunner, Result

from gan.cli import main
from gan.config import DataInfo
from gan.metrics.measure import Measurement
from gan.resolve import resolve
from gan.tracking import JsonlTracker, MlflowTracker, measurements
from gan.train_options import TrainOptions
from gan.training import run_folder


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["mlflow-sync", *map(str, arguments)])


def record(nimg: int) -> dict[str, Any]:
    means = {"Loss/G/loss": 0.5, "Progress/kimg": nimg / 1000}
    return {**{name: {"num": 1, "mean": mean, "std": 0.0} for name, mean in means.items()}, "timestamp": 1.7e9 + nimg}


@pytest.fixture
def run_dir(outdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of 4 kimg with a tick at each and the first two sheets, of which MLflow knows nothing."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")  # and is put back, whatever the command sets
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    config = resolve(TrainOptions(data="x.zip", kimg=4), DataInfo("x.zip", "x", 40, 16, 16, 3))
    folder = run_folder.create(outdir, config)
    stats = JsonlTracker(folder)
    for nimg in (1000, 2000, 3000, 4000):
        stats.tick(nimg, record(nimg))
    for name in ("reals", "fakes_init"):
        PIL.Image.new("L", (8, 8)).save(folder / f"{name}.png")
    return folder


@pytest.fixture
def store(outdir: Path) -> Any:
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{outdir / 'mlflow.db'}")


def measure(run_dir: Path, kimg: int, number: float) -> None:
    """As if a snapshot had been measured."""
    found = Measurement("swd", {"swd": number}, 1.0, 4, 4, None, None, 0, None)
    name = f"network-snapshot-{kimg:06d}.pkl"
    measurements.append(run_dir, measurements.record_of(found, name, 1, dataset="abc"))


def recorded(store: Any) -> Any:
    """The only run in the store."""
    (found,) = store.search_runs([store.get_experiment_by_name("x").experiment_id])
    return found


def steps(store: Any) -> list[int]:
    return [metric.step for metric in store.get_metric_history(recorded(store).info.run_id, "Progress/kimg")]


def test_a_run_that_mlflow_does_not_know_is_made(run_dir: Path, outdir: Path, store: Any) -> None:
    uri = f"sqlite:///{outdir / 'mlflow.db'}"
    result = run(run_dir)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"sent 4 ticks and 2 pictures to {uri}; it has every tick up to kimg 4.0\n"
    found = recorded(store)
    assert (found.info.run_name, found.info.status) == (run_dir.name, "FINISHED")
    assert (found.info.start_time, found.info.end_time) == (1700001000000, 1700004000000)
    assert found.data.params["total_kimg"] == "4"
    assert steps(store) == [1000, 2000, 3000, 4000]
    assert len(store.list_artifacts(found.info.run_id, "grids")) == 2
    assert json.loads((run_dir / "mlflow-run.json").read_text())["run_id"] == found.info.run_id
    assert run(run_dir).stdout == f"nothing was missing at {uri}; it has every tick up to kimg 4.0\n"
    assert steps(store) == [1000, 2000, 3000, 4000]


@pytest.mark.parametrize("noted", [True, False])
def test_holes_are_filled_in_the_run_of_the_training(run_dir: Path, outdir: Path, store: Any, noted: bool) -> None:
    tracker = MlflowTracker(run_dir, "x", {}, {}, report=lambda line: None)
    for nimg in (1000, 3000):
        tracker.tick(nimg, record(nimg))
    tracker.image("reals", run_dir / "reals.png", 0)
    tracker.close("FAILED")
    if not noted:
        (run_dir / "mlflow-run.json").unlink()
    (run_dir / "stats.jsonl").write_text("".join(f"{json.dumps(record(nimg))}\n" for nimg in (1000, 2000, 3000)))
    assert run(run_dir).stdout.startswith("sent 1 tick and 1 picture to ")
    assert recorded(store).info.run_id == tracker.state()["run_id"]
    assert recorded(store).info.status == "FAILED"
    assert steps(store) == [1000, 2000, 3000]


def test_measurements_are_sent_once(run_dir: Path, store: Any) -> None:
    tracker = MlflowTracker(run_dir, "x", {}, {}, report=lambda line: None)
    for nimg in (1000, 2000, 3000, 4000):
        tracker.tick(nimg, record(nimg))
    tracker.measured(2000, {"swd": 7.0}, 1.7e9)
    tracker.close("FINISHED")
    for kimg, number in ((2, 7.0), (4, 6.0), (4, 5.0), (9, 1.0)):  # the last one is of a snapshot that went too far
        measure(run_dir, kimg, number)
    assert run(run_dir).stdout.startswith("sent 1 measurement and 2 pictures to ")
    history = store.get_metric_history(recorded(store).info.run_id, "Metrics/swd")
    assert [(metric.step, metric.value) for metric in history] == [(2000, 7.0), (4000, 5.0)]
    assert run(run_dir).stdout.startswith("nothing was missing at ")


def test_everything_that_was_sent_is_listed(run_dir: Path, store: Any) -> None:
    measure(run_dir, 4, 6.0)
    assert run(run_dir).stdout.startswith("sent 4 ticks, 1 measurement and 2 pictures to ")


def test_a_branch_is_sent_to_its_own_run(run_dir: Path, outdir: Path, store: Any) -> None:
    first = MlflowTracker(run_dir, "x", {}, {}, report=lambda line: None)
    first.close("KILLED")
    branch = MlflowTracker(run_dir, "x", {}, {}, continued=True, branch=1, report=lambda line: None)
    branch.close("KILLED")
    assert run(run_dir).stdout.startswith("sent 4 ticks to ")
    assert store.get_run(branch.state()["run_id"]).data.metrics["Progress/kimg"] == 4.0
    assert store.get_run(branch.state()["run_id"]).info.status == "FINISHED"
    assert store.get_run(first.state()["run_id"]).data.metrics == {}


def test_a_picture_that_cannot_be_read_is_named_and_the_rest_sent(run_dir: Path, store: Any) -> None:
    (run_dir / "reals.png").write_bytes(b"not a picture")
    result = run(run_dir)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"error: MLflow does not take 1 picture, the first is {run_dir / 'reals.png'} (")
    assert steps(store) == [1000, 2000, 3000, 4000]
    assert [file.path for file in store.list_artifacts(recorded(store).info.run_id, "grids")] == [
        "grids/fakes_init.png"
    ]
    assert recorded(store).info.status == "FINISHED"


def test_errors_are_one_line(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def error(*arguments: object, code: int = 1) -> str:
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (code, "")
        assert result.stderr.count("\n") == 1
        return result.stderr.removeprefix("error: ").strip()

    assert error(code=2).startswith("RUN_DIR: is missing; name the folder of a run")
    assert error("--now", code=2) == "--now: no such option; see --help"
    assert error(tmp_path) == f"{tmp_path}: not a run folder (training_options.json cannot be read)"
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))  # and nobody listens
        uri = f"http://127.0.0.1:{listener.getsockname()[1]}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri.replace("//", "//me:secret@"))
        remedy = "start it or check MLFLOW_TRACKING_URI, and run this again"
        assert error(run_dir) == f"MLflow at {uri} does not answer (Connection refused); {remedy}"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "mlflow", None)
        assert error(run_dir) == "MLflow is not installed (pip install mlflow); nothing was sent"
    (run_dir / "stats.jsonl").unlink()
    assert "stats.jsonl: holds no tick" in error(run_dir)
