"""Runs whose snapshots are measured, through the command line: with real metrics, of 40 small images."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import RUN, assert_same, interrupted, measure_again, run_train
from tiny import TINY

from gan import models
from gan.data.dataset import ImageDataset
from gan.metric_names import INCEPTION
from gan.metrics.detectors import Detectors
from gan.metrics.measure import Measuring, Reals
from gan.training import evaluation

METRICS = ["--metrics", "swd,diversity", "--metrics-budget", "100"]
# Snapshots of 0, 1 and 2 kimg, after steps 1, 3 and 4.
LONG = [*TINY, "--batch", 500, "--kimg", 2, "--tick", 1, "--snap", 1, "--keep-states", 4, "--aug", "noaug"]


@pytest.fixture(autouse=True)
def _here(light_runs: pytest.MonkeyPatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure_again(light_runs)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("GAN_DETECTORS", raising=False)
    monkeypatch.chdir(tmp_path)


def lines(run_dir: Path, metric: str = "swd") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"metric-{metric}.jsonl").read_text().splitlines()]


def the_run() -> Path:
    (run_dir,) = Path("training-runs").glob("0*")
    return run_dir


def measured_by_hand(run_dir: Path, name: str, dataset: Path) -> dict[str, float]:
    G = models.load(run_dir / name).require_generator().eval().requires_grad_(False)
    reals = Reals(ImageDataset(dataset), Detectors())
    measuring = Measuring(G, reals, ["swd"], device=torch.device("cpu"))
    while not measuring.done:
        measuring.advance()
    return measuring.measurements[0].results


def test_a_run_that_is_measured_is_the_same_run(tiny_dataset: Path, whole: Path) -> None:
    result = run_train("--data", tiny_dataset, *RUN, *METRICS)
    assert result.exit_code == 0, result.output
    run_dir = the_run()
    assert_same(whole, run_dir)
    last = "network-snapshot-000001.pkl"
    for metric in ("swd", "diversity"):
        line = lines(run_dir, metric)[-1]
        assert (line["snapshot_pkl"], line["num_reals"], line["detector"]) == (last, 40, None)
    assert lines(run_dir)[-1]["results"] == pytest.approx(measured_by_hand(run_dir, last, tiny_dataset))
    assert "Metrics:   swd, diversity at each snapshot, in up to 100 % of the time" in result.output
    assert f"{last}: swd " in result.output
    best = (run_dir / "network-snapshot-best.pkl").resolve().name
    assert f"Best:      {best} by swd " in result.output
    ticks = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    assert ticks[0]["Timing/metrics"]["mean"] == 0
    assert sum(tick["Timing/metrics"]["mean"] for tick in ticks) > 0


def test_a_snapshot_of_a_run_that_was_stopped_is_measured_when_it_goes_on(tiny_dataset: Path) -> None:
    result = interrupted(3, "--data", tiny_dataset, *LONG, "--metrics", "swd", "--metrics-budget", 1e-9)
    name = "network-snapshot-000001.pkl"
    assert f"Metrics:   {name} is measured when the run goes on" in result.output
    assert not list(the_run().glob("metric-*"))
    result = run_train("--resume", "--metrics-budget", 100, "--kimg", 4, "--snap", 9)
    assert result.exit_code == 0, result.output
    measured = {line["snapshot_pkl"]: line["results"] for line in lines(the_run())}
    assert measured.keys() == {name, "network-snapshot-000004.pkl"}
    assert measured[name] == pytest.approx(measured_by_hand(the_run(), name, tiny_dataset))


def test_ctrl_c_at_the_end_leaves_a_complete_run_and_resume_makes_up_for_it(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = evaluation.Evaluation.finish

    def interrupt_then_finish(self: evaluation.Evaluation, stop_requested: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        finish(self, stop_requested)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation.Evaluation, "finish", interrupt_then_finish)
        result = run_train("--data", tiny_dataset, *RUN, "--metrics", "swd", "--metrics-budget", 1e-9)
    assert result.exit_code == 0
    assert "Done: 1 kimg" in result.output
    assert "network-snapshot-000001.pkl is left out" in result.output
    result = run_train("--resume")
    assert result.exit_code == 0
    assert [line["snapshot_pkl"] for line in lines(the_run())] == ["network-snapshot-000001.pkl"]
    (the_run() / "fakes000001.png").unlink()
    assert run_train("--resume").exit_code == 0
    assert (the_run() / "fakes000001.png").exists()
    assert len(lines(the_run())) == 1


def test_the_best_snapshot_stays_and_going_back_sets_numbers_aside(tiny_dataset: Path) -> None:
    result = run_train("--data", tiny_dataset, *LONG, *METRICS, "--keep", 1)
    assert result.exit_code == 0, result.output
    run_dir = the_run()
    there = {path.name for path in run_dir.glob("network-snapshot-[0-9]*.pkl")}
    best = (run_dir / "network-snapshot-best.pkl").resolve()
    assert best.exists()
    by_diversity = max(lines(run_dir, "diversity"), key=lambda line: line["results"]["diversity"])["snapshot_pkl"]
    assert there == {"network-snapshot-000002.pkl", best.name, by_diversity}
    before = lines(run_dir)
    (run_dir / "metric-odd.jsonl").mkdir()  # which cannot be read
    result = interrupted(4, "--resume", "--at", 1.5, "--metrics", "none", "--kimg", 3)
    assert result.exit_code == 130
    assert "metric-odd.jsonl: Is a directory" in result.output
    assert lines(run_dir / "set-aside-01") == before
    kept = [line for line in before if line["snapshot_pkl"] <= "network-snapshot-000001.pkl"]
    assert lines(run_dir) == kept
    link = run_dir / "network-snapshot-best.pkl"
    there = {path.name for path in run_dir.glob("network-snapshot-[0-9]*.pkl")}
    assert link.is_symlink() == link.exists() == bool(there & {line["snapshot_pkl"] for line in kept})


def test_a_broken_detector_costs_its_metrics_and_nothing_else(tiny_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "detectors"
    folder.mkdir()
    (folder / INCEPTION).write_bytes(b"<html>not found</html>")
    result = run_train("--data", tiny_dataset, *RUN, "--metrics", "fid50k_full,pr50k3_full,swd", "--detectors", folder)
    assert result.exit_code == 0, result.output
    said = [line for line in result.output.splitlines() if line.startswith("Metrics:")]
    assert any("pr50k3_full left out: vgg16.pt is not here" in line for line in said)
    assert sum(f"fid50k_full left out: {folder / INCEPTION}: it is a web page" in line for line in said) == 1
    assert not list(the_run().glob("metric-fid*"))
    assert "Best:      network-snapshot-000001.pkl by swd" in result.output or lines(the_run())
    shutil.rmtree(folder)  # a folder that a run remembers may be gone when it goes on
    result = run_train("--resume", "--kimg", 2)
    assert result.exit_code == 0, result.output
    assert "fid50k_full, pr50k3_full left out" in result.output
