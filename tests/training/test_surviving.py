"""What happens to runs, through the command line: whatever it is, the run goes on as it would have."""

from __future__ import annotations

import json
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from runs import RUN, after_step, assert_same, held, kimg, run_train, untimed

from gan.data.loader import BatchStream
from gan.training import run_files, ticks, trainer
from gan.training.health import Health, Vitals
from gan.training.state import TrainingState
from gan.training.state_files import NEWEST, read_state

pytestmark = pytest.mark.usefixtures("light_runs", "_here")


@pytest.fixture
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def finished(whole: Path, tmp_path: Path) -> Path:
    """A copy of a run that is complete, where a run of this test would be."""
    return shutil.copytree(whole, Path("training-runs") / whole.name)


def new_run(dataset: Path, *arguments: object) -> tuple[Result, Path]:
    result = run_train("--data", dataset, *RUN, *arguments)
    return result, max(Path("training-runs").glob("0*"))


def test_sigusr1_saves_and_goes_on(tiny_dataset: Path, whole: Path) -> None:
    with after_step(3, lambda: signal.raise_signal(signal.SIGUSR1)):
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
    _, run_dir = new_run(tiny_dataset, "--save-every", 1e-9)
    assert {125, 625, 1000} < set(saved)  # one at a time is written, so that it is not known which others
    assert len(list(run_dir.glob("training-state*.pt"))) == 3
    assert_same(whole, run_dir)


@pytest.mark.parametrize("at", [0.125, 0.7])
def test_going_back_to_a_kept_state(at: float, finished: Path, whole: Path) -> None:
    result = run_train("--resume", finished, "--at", at)
    assert result.exit_code == 0, result.output
    aside, from_ = finished / "set-aside-01", 0.125 if at < 0.6 else 0.625
    assert f"gone back to {from_:g} kimg; what came after it is in {aside}" in result.output
    assert {"network-snapshot-000001.pkl", "fakes000001.png", "training-state.pt"} <= {p.name for p in aside.iterdir()}
    assert untimed(aside) == untimed(whole)
    assert_same(whole, finished)
    assert read_state(finished / NEWEST).state["progress"]["branch"] == 1


def test_a_state_that_is_not_kept_is_named_with_those_that_are(tiny_dataset: Path, finished: Path) -> None:
    result = run_train("--resume", finished, "--at", 0.1)
    assert result.exit_code == 1
    problem = f"error: --at 0.1: {finished} keeps no state of that time; there are states of 0.125, 0.625, 1 kimg"
    assert problem in result.output
    result = run_train("--at", 0.1)
    assert result.exit_code == 2
    assert "--at 0.1 goes with --resume" in result.output
    result = run_train("--data", tiny_dataset, "--resume", finished / "network-snapshot-000001.pkl", "--at", 1)
    assert result.exit_code == 2
    assert "is no run folder" in result.output


def test_a_torn_newest_state_costs_the_time_since_the_one_before(tiny_dataset: Path, whole: Path) -> None:
    with after_step(7, lambda: signal.raise_signal(signal.SIGTERM)):
        result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 130
    content = (run_dir / NEWEST).read_bytes()
    (run_dir / NEWEST).write_bytes(content[: len(content) // 2])
    result = run_train("--resume")
    assert result.exit_code == 0
    assert "training-state.pt: damaged" in result.output
    assert "going on from the one before it, training-state-000000.625.pt at 0.625 kimg" in result.output
    assert_same(whole, run_dir)


def test_a_run_stopped_before_its_first_state_begins_anew_in_its_folder(tiny_dataset: Path, whole: Path) -> None:
    with after_step(1, lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
        result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 130
    assert not (run_dir / NEWEST).exists()
    result = run_train("--resume")
    assert result.exit_code == 0, result.output
    assert "begins anew" in result.output
    assert_same(whole, run_dir)


def test_a_run_that_begins_anew_needs_its_file_from_whatever_folder(
    tiny_dataset: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(whole / "network-snapshot-000001.pkl", "net.pkl")
    with after_step(1, lambda: (_ for _ in ()).throw(KeyboardInterrupt)):
        _, run_dir = new_run(tiny_dataset, "--resume", "net.pkl")
    run_dir, elsewhere = run_dir.absolute(), tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    result = run_train("--resume", run_dir, "--dry-run")
    assert result.exit_code == 0
    assert f"the run has no training state yet: it begins anew from {tmp_path / 'net.pkl'}" in result.output
    (tmp_path / "net.pkl").rename("net.pkl")
    for arguments in (["--dry-run"], []):
        result = run_train("--resume", run_dir, *arguments)
        assert result.exit_code == 1
        assert f"error: {tmp_path / 'net.pkl'}: no such file; the run was stopped before its first" in result.output
        assert f"or start again with --data {tiny_dataset} --resume FILE" in result.output
    Path("net.pkl").rename(tmp_path / "net.pkl")
    result = run_train("--resume", run_dir)
    assert result.exit_code == 0, result.output
    assert f"Weights:   from {tmp_path / 'net.pkl'}" in result.output


@pytest.mark.parametrize("sign", ["a later snapshot", "a long time"])
def test_states_that_are_gone_are_not_mistaken_for_a_beginning(sign: str, finished: Path) -> None:
    for path in finished.glob("training-state*.pt"):
        path.unlink()
    if sign == "a long time":
        (finished / "network-snapshot-000001.pkl").unlink()
        tick = {name: {"mean": value} for name, value in (("Progress/kimg", 1), ("Timing/total_sec", 700))}
        (finished / "stats.jsonl").write_text(json.dumps(tick) + "\n")
    for arguments in (["--dry-run"], []):
        result = run_train("--resume", *arguments)
        assert result.exit_code == 1
        assert "its training states are gone" in result.output


def test_another_division_of_the_batch_goes_on_from_everything(tiny_dataset: Path) -> None:
    # No noise inputs and no augmentation: those are drawn for a micro-batch.
    without_draws = ["--demo", "--kimg", 1, "--tick", 0.25]
    _, undisturbed = new_run(tiny_dataset, *without_draws)
    with after_step(5, lambda: signal.raise_signal(signal.SIGINT)):
        _, run_dir = new_run(tiny_dataset, *without_draws)
    result = run_train("--resume", "--batch-gpu", 25, "--workers", 1, "--cache", "off")
    assert result.exit_code == 0, result.output
    for line in ("--batch-gpu 25, which was 125", "--workers 1, which was 0", "--cache off, which was auto"):
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


def test_an_image_that_is_gone_in_the_middle_costs_nothing(tiny_dataset: Path, tmp_path: Path, whole: Path) -> None:
    folder = tmp_path / "images"
    shutil.unpack_archive(tiny_dataset, folder)
    images = sorted(folder.rglob("*.png"))
    with after_step(3, lambda: [image.rename(image.with_suffix(".away")) for image in images]):
        result, run_dir = new_run(folder, "--cache", "off")
    assert result.exit_code == 1
    (line,) = [line for line in result.output.splitlines() if line.startswith("error: ")]
    assert "img000000" in line
    assert line.endswith(f"mend the dataset, then python train.py --resume {run_dir}")
    assert kimg(run_dir) >= 0.375
    for image in images:
        image.with_suffix(".away").rename(image)
    assert run_train("--resume").exit_code == 0
    assert_same(whole, run_dir)


def test_two_trainers_cannot_share_a_folder(finished: Path) -> None:
    pytest.importorskip("fcntl")
    with held(finished) as pid:
        result = run_train("--resume", finished, "--kimg", 2)
    assert result.exit_code == 1
    assert f"error: {finished}: is being trained by process {pid} on " in result.output
    assert kimg(finished) == 1


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
    monkeypatch.setattr(ticks, "assess", assess)


def test_training_that_has_failed_stops_and_says_what_can_be_done(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_from(700, monkeypatch)
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 3
    assert result.output.endswith("error: training has failed at 0.875 kimg: D overpowers G: scores +99/-99\n")
    back = f"python train.py --resume {run_dir} --on-divergence rollback"
    log = (run_dir / "log.txt").read_text()
    for text in (result.output, log):
        assert f"back to 0.625 kimg, where it was healthy, at half the rates: {back}" in text
        assert "in a new run: raise --gamma" in text
        assert "health D overpowers G: scores +99/-99" in text
    assert kimg(run_dir) == 0.625
    result = run_train("--resume", "--on-divergence", "ignore")
    assert result.exit_code == 0
    assert kimg(run_dir) == 1


def test_rollback_goes_back_once_with_half_the_rates(
    tiny_dataset: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_from(700, monkeypatch, branch=1)
    result, run_dir = new_run(tiny_dataset, "--on-divergence", "rollback")
    assert result.exit_code == 0, result.output
    assert "Health:    training had failed: D overpowers G" in result.output
    assert "gone back to 0.625 kimg, where it was healthy" in result.output
    assert result.output.count("Rates:     halved") == 1
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
    assert result.exit_code == 3
    assert result.output.count("gone back to") == 1
    assert "it had gone back once already" in result.output


def test_a_run_that_has_failed_does_not_forget_it_when_continued(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_from(700, monkeypatch)
    _, run_dir = new_run(tiny_dataset)
    result = run_train("--resume")
    assert result.exit_code == 3
    assert "training has failed at 0.625 kimg" not in result.output  # its statistics are dropped with the ticks
    result = run_train("--resume", "--on-divergence", "ignore", "--kimg", 2)
    assert result.exit_code == 0, result.output
    assert read_state(run_dir / NEWEST).healthy_until == 625  # no state since then is one to go back to
    assert any(path.name == "training-state-000000.625.pt" for path in run_dir.iterdir())


def test_stopping_at_the_failing_tick_goes_back_and_stops(tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_from(700, monkeypatch, branch=1)
    with after_step(7, lambda: signal.raise_signal(signal.SIGTERM)):
        result, run_dir = new_run(tiny_dataset, "--on-divergence", "rollback")
    assert result.exit_code == 130
    assert "gone back to 0.625 kimg" in result.output
    assert "Stopped at 0.625 kimg" in result.output
    assert read_state(run_dir / NEWEST).branch == 1
    assert run_train("--resume").exit_code == 0
    assert read_state(run_dir / NEWEST).state["progress"]["rollbacks"] == 1


def test_signals_are_served_while_images_do_not_come(
    tiny_dataset: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arrived: list[float] = []
    wait = BatchStream.wait

    def stalled(self: BatchStream, seconds: float) -> bool:
        """The batch after the third one does not come before the run is stopped."""
        if not arrived and self._position >= 4 * 125:
            arrived.append(seconds)
            signal.raise_signal(signal.SIGTERM)
            return False
        return wait(self, seconds)

    with monkeypatch.context() as patch:
        patch.setattr(BatchStream, "wait", stalled)
        result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 130, result.output
    assert arrived[0] <= 1
    assert 0 < kimg(run_dir) < 1
    assert run_train("--resume").exit_code == 0
    assert_same(whole, run_dir)


def test_files_are_written_where_no_thread_can_be_started(
    tiny_dataset: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_thread(self: threading.Thread) -> None:
        if self.name == "outputs":
            raise RuntimeError("can't start new thread")
        start(self)

    start = threading.Thread.start
    monkeypatch.setattr(threading.Thread, "start", no_thread)
    result, run_dir = new_run(tiny_dataset)
    assert result.exit_code == 0, result.output
    assert_same(whole, run_dir)


def test_the_command_of_the_run_can_be_repeated(tiny_dataset: Path) -> None:
    _, run_dir = new_run(tiny_dataset, "--keep", 5, "--aug", "fixed", "--p", 0, "--desc", "mine")
    again = ["--data", tiny_dataset, *RUN, "--keep-every", 100, "--p", 0, "--desc", "mine"]
    result = run_train("--resume", run_dir, *again, "--kimg", 2)
    assert result.exit_code == 0, result.output
    changed = [line for line in result.output.splitlines() if line.startswith("Changed:")]
    assert changed == ["Changed:   --kimg 2, which was 1", "Changed:   --keep-every 100, which was not given"]
    result = run_train("--resume", run_dir, "--keep-every", 50, "--p", 0.5)
    assert result.exit_code == 2
    assert "--p 0.5: the run has 0, and what is learned depends on it" in result.output
    assert "goes with" not in result.output


@pytest.mark.parametrize("times", [1, 2])
def test_memory_that_is_short_for_a_copy_to_write(
    times: int, tiny_dataset: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [times]
    copy_networks = TrainingState.copy_networks

    def short(self: TrainingState) -> dict[str, Any]:
        if self.progress.nimg > 500 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy_networks(self)

    monkeypatch.setattr(TrainingState, "copy_networks", short)
    result, run_dir = new_run(tiny_dataset)
    if times == 1:
        assert result.exit_code == 0, result.output
        assert_same(whole, run_dir)
    else:
        assert result.exit_code == 1
        assert f"python train.py --resume {run_dir} --batch-gpu auto" in result.output
