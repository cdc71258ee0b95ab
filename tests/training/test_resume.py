from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from tiny import TINY

from gan import models
from gan.cli.train import train
from gan.config import DataInfo, TrainOptions, resolve
from gan.training import run_folder, trainer
from gan.training.state import TrainingState
from gan.training.state_files import NEWEST, SavedState, StateFiles, read_state


def run_train(*arguments: object) -> str:
    result = CliRunner().invoke(train, [str(a) for a in arguments], catch_exceptions=False)
    assert result.exit_code in (0, 130), result.output
    return result.output


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the next run receive Ctrl-C in its `steps`-th step."""

    class Counted(trainer.TrainStep):
        def __call__(self, *args: Any) -> None:
            super().__call__(*args)
            if self.state.progress.nimg == steps * self.config.batch_size:
                import signal

                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(trainer, "TrainStep", Counted)


def digest(network: torch.nn.Module) -> str:
    text = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        text.update(name.encode() + tensor.numpy().tobytes())
    return text.hexdigest()


def untimed_stats(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    timed = ("Timing/", "Resources/", "timestamp")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


@pytest.mark.parametrize("stop", [4, 5])
def test_eight_steps_equal_some_and_resuming_for_the_rest_bit_for_bit(
    stop: int, tiny_dataset: Path, outdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new_run = ["--data", tiny_dataset, *TINY, "--tick", 0.25, "--snap", 2]
    run_train(*new_run)
    with monkeypatch.context() as patch:
        stop_after(stop, patch)
        output = run_train(*new_run)
    assert f"Stopped at {stop * 0.125:g} kimg" in output
    whole, parts = sorted(outdir.glob("0*"))
    assert not list(parts.glob("network-snapshot-000001.pkl"))
    output = run_train("--resume")
    assert f"continuing at {stop * 0.125:g} kimg" in output

    assert untimed_stats(parts) == untimed_stats(whole)
    assert {p.name for p in parts.iterdir()} == {p.name for p in whole.iterdir()}
    for picture in whole.glob("*.png"):
        assert (parts / picture.name).read_bytes() == picture.read_bytes(), picture.name
    for path in whole.glob("*.pkl"):
        one, other = models.load(path), models.load(parts / path.name)
        for network in ("G", "D", "G_ema"):
            assert digest(getattr(one, network)) == digest(getattr(other, network)), f"{path.name} {network}"
    states = [read_state(run / NEWEST).state for run in (whole, parts)]
    for a, b in zip(*(state["G_opt"]["state"].values() for state in states), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_resuming_goes_on_in_the_same_mlflow_run(
    tiny_dataset: Path, outdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    with monkeypatch.context() as patch:
        stop_after(5, patch)
        run_train("--data", tiny_dataset, *TINY, "--tick", 0.25)
    run_train("--resume")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{outdir / 'mlflow.db'}")
    (experiment,) = [e for e in client.search_experiments() if e.name == "tiny"]
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    history = client.get_metric_history(run.info.run_id, "Progress/kimg")
    assert sorted(m.step for m in history) == [125, 375, 625, 875, 1000]
    assert run.data.params["total_kimg"] == "1"
    assert run.data.tags["gan.run_dir"].endswith(next(outdir.glob("0*")).name)
    names = [a.path for a in client.list_artifacts(run.info.run_id, "images")]
    assert any("fakes" in name for name in names)


def test_starting_from_a_snapshot_is_a_new_run_with_its_weights(tiny_dataset: Path, outdir: Path) -> None:
    run_train("--data", tiny_dataset, *TINY)
    (first,) = outdir.glob("0*")
    snapshot = first / "network-snapshot-000001.pkl"
    output = run_train("--data", tiny_dataset, *TINY, "--resume", snapshot)
    second = max(outdir.glob("0*"))
    assert second != first
    assert "resumecustom" in second.name
    assert f"from {snapshot}" in output
    assert (second / "fakes_init.png").read_bytes() == (first / "fakes000001.png").read_bytes()
    config = run_folder.read_options(second)
    assert config.augment.ada_kimg == 100
    assert config.optim.ema_rampup is None


def test_everything_in_the_state_comes_back(tmp_path: Path) -> None:
    options = TrainOptions(data="x", cbase=64, cmax=8, map_depth=1, batch=8)
    config = resolve(options, DataInfo("x", "x", 10, 16, 3))
    state = TrainingState(config, torch.device("cpu"))
    assert state.augment is not None
    state.augment.p.fill_(0.3)
    state.pl_mean.fill_(1.5)
    state.ada_signs.copy_(torch.tensor([3.0, 4.0]))
    state.stats.report("a", torch.tensor([1.0, 2.0]))
    state.progress.nimg, state.progress.tick = 88, 3
    StateFiles(tmp_path).save(SavedState(state.state_dict(), {"run_id": "abc"}))
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
