from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from runs import RUN, assert_same, interrupted, run_train, small_sheets

from gan.config import DataInfo
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import run_folder
from gan.training.state import TrainingState
from gan.training.state_files import NEWEST, SavedState, StateFiles, read_state


@pytest.mark.usefixtures("light_runs")
def test_eight_steps_equal_four_and_resuming_for_the_rest(tiny_dataset: Path, whole: Path, outdir: Path) -> None:
    interrupted(4, "--data", tiny_dataset, *RUN)
    assert run_train("--resume").exit_code == 0
    assert_same(whole, next(outdir.glob("0*")))


def test_the_files_of_a_run_that_was_resumed_are_those_of_one_that_was_not(tiny_dataset: Path, outdir: Path) -> None:
    new_run = ["--data", tiny_dataset, *RUN, "--batch-gpu", 25, "--keep-states", 2, "--metrics", "none"]
    assert run_train(*new_run).exit_code == 0
    assert "Stopped at 0.625 kimg" in interrupted(5, *new_run).output
    whole, parts = sorted(outdir.glob("0*"))
    assert not list(parts.glob("network-snapshot-000001.pkl"))
    assert "continuing at 0.625 kimg" in run_train("--resume").output
    assert {p.name for p in parts.iterdir()} == {p.name for p in whole.iterdir()}
    assert_same(whole, parts)


def test_resuming_goes_on_in_the_same_mlflow_run(
    tiny_dataset: Path, outdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    small_sheets(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(outdir / "cache"))
    interrupted(5, "--data", tiny_dataset, *RUN, "--metrics", "swd")
    assert run_train("--resume").exit_code == 0
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{outdir / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "Progress/kimg")
    assert sorted(m.step for m in history) == [125, 375, 625, 875, 1000]
    assert client.get_metric_history(run.info.run_id, "Metrics/swd")[-1].step == 1000
    assert run.data.params["total_kimg"] == "1"
    assert run.data.tags["gan.run_dir"].endswith(next(outdir.glob("0*")).name)
    names = [a.path for a in client.list_artifacts(run.info.run_id, "images")]
    assert any("fakes" in name for name in names)


@pytest.mark.usefixtures("light_runs")
def test_starting_from_a_snapshot_is_a_new_run_with_its_weights(tiny_dataset: Path, whole: Path, outdir: Path) -> None:
    snapshot = whole / "network-snapshot-000001.pkl"
    result = run_train("--data", tiny_dataset, *RUN, "--resume", snapshot)
    assert result.exit_code == 0
    (second,) = outdir.glob("0*")
    assert "resumecustom" in second.name
    assert f"from {snapshot}" in result.output
    assert (second / "fakes_init.png").read_bytes() == (whole / "fakes000001.png").read_bytes()
    config = run_folder.read_options(second)
    assert config.augment.ada_kimg == 100
    assert config.optim.ema_rampup is None


def test_everything_in_the_state_comes_back(tmp_path: Path) -> None:
    options = TrainOptions(data="x", cbase=64, cmax=8, map_depth=1, batch=8)
    config = resolve(options, DataInfo("x", "x", 10, 16, 16, 3))
    state = TrainingState(config, torch.device("cpu"))
    assert state.augment is not None
    state.augment.p.fill_(0.3)
    state.pl_mean.fill_(1.5)
    state.ada_signs.copy_(torch.tensor([3.0, 4.0]))
    state.stats.report("a", torch.tensor([1.0, 2.0]))
    state.progress.nimg, state.progress.tick = 88, 3
    StateFiles(tmp_path, 2).save(SavedState(state.state_dict(), {"run_id": "abc"}, 0))
    other = TrainingState(dataclasses.replace(config, seed=5), torch.device("cpu"))
    content = read_state(tmp_path / NEWEST)
    other.load_state_dict(content.state)
    assert content.tracker == {"run_id": "abc"}
    assert other.progress == state.progress
    assert float(other.p) == pytest.approx(0.3)
    assert float(other.pl_mean) == 1.5
    assert other.ada_signs.tolist() == [3, 4]
    assert other.stats.flush() == {"a": {"num": 2, "mean": 1.5, "std": 0.5}}
    assert all(torch.equal(p, q) for p, q in zip(other.G.parameters(), state.G.parameters(), strict=True))
