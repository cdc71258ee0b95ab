"""What happens to runs, through the command line: whatever it is, the run goes on as it would have."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny import TINY

from gan import models
from gan.cli.train import train
from gan.training import grid, run_files, trainer
from gan.training.health import Health, Vitals
from gan.training.state_files import NEWEST, read_state

RUN = [*TINY, "--tick", "0.25", "--snap", "2"]  # 8 steps of 0.125 kimg; snapshots after steps 1, 5 and 8


def make_light(patch: pytest.MonkeyPatch) -> None:
    """Neither MLflow nor large sheets: the rest of a tiny run takes a second."""
    patch.setitem(sys.modules, "mlflow", None)
    patch.setattr(grid, "sheet_shape", lambda resolution: (4, 2))


@pytest.fixture(autouse=True)
def _light_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make_light(monkeypatch)


@pytest.fixture
def after_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Has something happen right after the n-th step of the next runs."""

    undisturbed = trainer.TrainStep

    def arrange(step: int, happen: Callable[[], object]) -> None:
        class Disturbed(undisturbed):  # type: ignore[valid-type, misc]
            def __call__(self, *args: Any) -> None:
                super().__call__(*args)
                if self.state.progress.nimg == step * self.config.batch_size:
                    happen()

        monkeypatch.setattr(trainer, "TrainStep", Disturbed)

    return arrange


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(train, [str(a) for a in arguments], catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def new_run(dataset: Path, *arguments: object) -> tuple[Result, Path]:
    result = run("--data", dataset, *RUN, *arguments)
    return result, max(Path("training-runs").glob("0*"))


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    timed = ("Timing/", "Resources/", "timestamp")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    assert untimed(one) == untimed(other)
    for picture in one.glob("*.png"):
        assert (other / picture.name).read_bytes() == picture.read_bytes(), picture.name
    for path in one.glob("*.pkl"):
        a, b = models.load(path), models.load(other / path.name)
        for network in ("G", "D", "G_ema"):
            tensors = getattr(b, network).state_dict()
            assert all(torch.equal(t, tensors[name]) for name, t in getattr(a, network).state_dict().items())


def kimg(run_dir: Path) -> float:
    return read_state(run_dir / NEWEST).nimg / 1000


@pytest.fixture(scope="module")
def whole(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was never disturbed."""
    outdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        make_light(patch)
        assert run("--data", tiny_dataset, *RUN, "--outdir", outdir).exit_code == 0
    return next(outdir.glob("0*"))


def test_sigusr1_saves_and_goes_on(tiny_dataset: Path, whole: Path, after_step: Any) -> None:
    after_step(3, lambda: signal.raise_signal(signal.SIGUSR1))
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 0
    assert "Saved at 0.375 kimg" in result.output
    assert_same(whole, run_dir)


def test_states_are_saved_by_the_clock_in_the_middle_of_a_tick(
    tiny_dataset: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    save = run_files.StateFiles.save
    monkeypatch.setattr(run_files.StateFiles, "save", lambda self, s: (saved.append(s.nimg), save(self, s)))
    _, run_dir = new_run(tiny_dataset, "--save-every", 1e-9, "--keep-states", 3)
    assert {125, 625, 1000} < set(saved)  # one at a time is written, so that it is not known which others
    assert len(list(run_dir.glob("training-state*.pt"))) == 3
    assert_same(whole, run_dir)


@pytest.mark.parametrize("at", [0.125, 0.7])
def test_going_back_to_a_kept_state(at: float, tiny_dataset: Path, whole: Path) -> None:
    _, run_dir = new_run(tiny_dataset, "--keep-states", 3)
    result = run("--resume", run_dir, "--at", at)
    assert result.exit_code == 0, result.output
    aside, from_ = run_dir / "set-aside-01", 0.125 if at < 0.6 else 0.625
    assert f"gone back to {from_:g} kimg; what came after it is in {aside}" in result.output
    assert {"network-snapshot-000001.pkl", "fakes000001.png", "training-state.pt"} <= {p.name for p in aside.iterdir()}
    assert untimed(aside) == untimed(whole)
    assert_same(whole, run_dir)
    assert read_state(run_dir / NEWEST).state["progress"]["branch"] == 1


def test_a_state_that_is_not_kept_is_named_with_those_that_are(tiny_dataset: Path) -> None:
    _, run_dir = new_run(tiny_dataset)
    result = run("--resume", run_dir, "--at", 0.1)
    assert result.exit_code == 1
    assert f"error: --at 0.1: {run_dir} keeps no state of that time; there are states of 0.625, 1 kimg" in result.output
    result = run("--at", 0.1)
    assert result.exit_code == 2
    assert "--at 0.1 goes with --resume" in result.output
    result = run("--data", tiny_dataset, "--resume", run_dir / "network-snapshot-000001.pkl", "--at", 1)
    assert result.exit_code == 2
    assert "is no run folder" in result.output


def test_a_torn_newest_state_costs_the_time_since_the_one_before(
    tiny_dataset: Path, whole: Path, after_step: Any
) -> None:
    after_step(7, lambda: signal.raise_signal(signal.SIGTERM))
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 130
    content = (run_dir / NEWEST).read_bytes()
    (run_dir / NEWEST).write_bytes(content[: len(content) // 2])
    after_step(0, lambda: None)
    result = run("--resume")
    assert result.exit_code == 0
    assert "training-state.pt: damaged" in result.output
    assert "going on from the state before it, training-state-000000.625.pt at 0.625 kimg" in result.output
    assert_same(whole, run_dir)


def test_a_run_stopped_before_its_first_state_begins_anew_in_its_folder(
    tiny_dataset: Path, whole: Path, after_step: Any
) -> None:
    after_step(1, lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 130
    assert not (run_dir / NEWEST).exists()
    after_step(0, lambda: None)
    result = run("--resume")
    assert result.exit_code == 0, result.output
    assert "begins anew" in result.output
    assert_same(whole, run_dir)


def test_states_that_are_gone_are_not_mistaken_for_a_beginning(tiny_dataset: Path) -> None:
    _, run_dir = new_run(tiny_dataset)
    for path in run_dir.glob("training-state*.pt"):
        path.unlink()
    result = run("--resume")
    assert result.exit_code == 1
    assert "its training states are gone" in result.output


def test_another_division_of_the_batch_goes_on_from_everything(tiny_dataset: Path, after_step: Any) -> None:
    # No noise inputs and no augmentation: those are drawn for a micro-batch.
    without_draws = ["--demo", "--kimg", 1, "--tick", 0.25]
    _, undisturbed = new_run(tiny_dataset, *without_draws)
    after_step(5, lambda: signal.raise_signal(signal.SIGINT))
    _, run_dir = new_run(tiny_dataset, *without_draws)
    after_step(0, lambda: None)
    result = run("--resume", "--batch-gpu", 5, "--workers", 1, "--cache", "off")
    assert result.exit_code == 0, result.output
    for line in ("--batch-gpu 5, which was 25", "--workers 1, which was 0", "--cache off, which was auto"):
        assert f"Changed:   {line}" in result.output
    one, other = (read_state(folder / NEWEST).state for folder in (undisturbed, run_dir))
    for name in ("nimg", "tick", "tick_nimg"):
        assert one["progress"][name] == other["progress"][name]
    for name, tensor in one["G_ema"].items():  # up to the order of sums
        torch.testing.assert_close(other["G_ema"][name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for network in ("G_opt", "D_opt"):
        for moments, others in zip(*(state[network]["state"].values() for state in (one, other)), strict=True):
            assert moments["step"] == others["step"]
            torch.testing.assert_close(moments["exp_avg_sq"], others["exp_avg_sq"], rtol=1e-2, atol=1e-4)


def test_an_image_that_is_gone_in_the_middle_costs_nothing(
    tiny_dataset: Path, tmp_path: Path, whole: Path, after_step: Any
) -> None:
    folder = tmp_path / "images"
    shutil.unpack_archive(tiny_dataset, folder)
    images = sorted(folder.rglob("*.png"))
    after_step(3, lambda: [image.rename(image.with_suffix(".away")) for image in images])
    result, run_dir = new_run(folder, "--cache", "off")
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "img000000" in line
    assert line.endswith(f"mend the dataset, then python train.py --resume {run_dir}")
    assert kimg(run_dir) >= 0.375
    for image in images:
        image.with_suffix(".away").rename(image)
    after_step(0, lambda: None)
    assert run("--resume").exit_code == 0
    assert_same(whole, run_dir)


def test_two_trainers_cannot_share_a_folder(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def held(*_: object) -> None:
        raise BlockingIOError

    monkeypatch.setattr(fcntl, "lockf", held)
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 1
    assert f"error: {run_dir}: is being trained by another process" in result.output


def fail_from(nimg: int, monkeypatch: pytest.MonkeyPatch, branch: int | None = None) -> None:
    """Have training fail for good from that moment on; with `branch`: unless the run has gone back so many times."""

    def assess(history: list[Vitals], p_max: float | None) -> Health:
        failed = bool(history) and history[-1].kimg * 1000 >= nimg and branch not in branches
        word = "D overpowers G: scores +99/-99" if failed else "ok"
        return Health(word, failing=failed, failed=failed, advice="raise --gamma" * failed, healthy=not failed)

    branches: list[int] = []
    open_trackers = trainer.Trainer._open_trackers

    def opened(self: trainer.Trainer) -> None:
        branches.append(self.state.progress.branch)
        open_trackers(self)

    monkeypatch.setattr(trainer.Trainer, "_open_trackers", opened)
    monkeypatch.setattr(trainer, "assess", assess)


def test_training_that_has_failed_stops_and_says_what_can_be_done(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_from(700, monkeypatch)
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: training has failed: D overpowers G: scores +99/-99; ")
    assert f"--resume {run_dir} --on-divergence rollback goes back to 0.625 kimg" in line
    assert "health D overpowers G: scores +99/-99" in result.output
    assert kimg(run_dir) == 0.625
    result = run("--resume", "--on-divergence", "ignore")
    assert result.exit_code == 0
    assert kimg(run_dir) == 1


def test_rollback_goes_back_once_with_half_the_rates(
    tiny_dataset: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_from(700, monkeypatch, branch=1)
    result, run_dir = new_run(tiny_dataset, "--on-divergence", "rollback")
    assert result.exit_code == 0, result.output
    assert "Health:    training has failed: D overpowers G" in result.output
    assert "gone back to 0.625 kimg" in result.output
    assert "Rates:     halved" in result.output
    state, before = read_state(run_dir / NEWEST).state, read_state(whole / NEWEST).state
    for name in ("G_opt", "D_opt"):
        assert state[name]["param_groups"][0]["lr"] == before[name]["param_groups"][0]["lr"] / 2
    assert (state["progress"]["branch"], state["progress"]["rollbacks"]) == (1, 1)
    assert [tick["Progress/tick"] for tick in untimed(run_dir)] == [tick["Progress/tick"] for tick in untimed(whole)]
    assert untimed(run_dir)[:3] == untimed(whole)[:3]
    assert untimed(run_dir)[3:] != untimed(whole)[3:]
    assert untimed(run_dir / "set-aside-01")[-1]["health"].startswith("D overpowers G")


def test_a_second_failure_stops(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_from(700, monkeypatch)
    result, _ = new_run(tiny_dataset, "--on-divergence", "rollback")
    assert result.exit_code == 1
    assert result.output.count("gone back to") == 1
    assert "it had gone back once already" in result.output
