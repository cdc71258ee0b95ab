from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gan.errors import GanError
from gan.training import branch
from gan.training.branch import finish_going_back, go_back
from gan.training.state_files import NEWEST, SavedState, StateFiles

SHEETS = [f"fakes{kimg:06d}.png" for kimg in (0, 4, 8)] + [f"network-snapshot-{kimg:06d}.pkl" for kimg in (0, 4, 8)]
OTHERS = ["stats.jsonl", "log.txt", "reals.png", "fakes_init.png", "training_options.json"]


def saved(nimg: int) -> SavedState:
    groups = {"param_groups": [{"lr": 0.1, "betas": [0, 1]}], "state": {}}
    progress = {"nimg": nimg, "branch": 0, "rollbacks": 0}
    return SavedState({"progress": progress, "G_opt": groups, "D_opt": groups}, {"run_id": "a"}, nimg)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of 8.5 kimg with states at 2, 4.125, 8 and 8.5."""
    for name in SHEETS + OTHERS:
        (tmp_path / name).write_text(name)
    states = StateFiles(tmp_path, 4)
    for nimg in (2000, 4125, 8000, 8500):
        states.save(saved(nimg))
    return tmp_path


def opened(run: Path) -> tuple[StateFiles, SavedState]:
    states = StateFiles(run, 4)
    newest = states.load_newest(print)
    assert newest is not None
    return states, newest


def test_what_came_later_is_aside_and_the_rest_where_it_was(run: Path) -> None:
    states, _ = opened(run)
    state, aside = go_back(run, states, states.load_at(5), above=0)
    assert aside == run / "set-aside-01"
    assert (state.nimg, state.branch, state.tracker, state.state["progress"]["rollbacks"]) == (4125, 1, {}, 0)
    later = {"fakes000008.png", "network-snapshot-000008.pkl", "training-state-000008.000.pt", NEWEST}
    either = {"fakes000004.png", "network-snapshot-000004.pkl", "stats.jsonl", "training_options.json"}
    assert names(aside) == later | either
    kept = {"training-state-000002.000.pt", "training-state-000004.125.pt", NEWEST, "set-aside-01"}
    assert names(run) == {*OTHERS, *SHEETS} - later | kept
    _, newest = opened(run)
    assert (newest.nimg, newest.branch) == (4125, 1)
    _, before = opened(aside)
    assert before.nimg == 8500


def test_a_rollback_lowers_the_rates_and_counts(run: Path) -> None:
    states, _ = opened(run)
    state, aside = go_back(run, states, states.load_at(5), above=6, rate=0.5)
    assert aside.name == "set-aside-07"
    assert [state.state[name]["param_groups"][0]["lr"] for name in ("G_opt", "D_opt")] == [0.05, 0.05]
    assert state.state["progress"]["rollbacks"] == 1


def test_folders_of_the_user_are_no_branches(run: Path) -> None:
    (run / "set-aside-05.tar.gz").touch()
    (run / "set-aside-old").mkdir()
    states, _ = opened(run)
    assert go_back(run, states, states.load_at(5), above=0)[1].name == "set-aside-01"


@pytest.mark.parametrize("moment", range(1, 10))
def test_a_kill_while_going_back_leaves_it_undone_or_done(
    moment: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before the n-th change of a name on the disk."""
    left = [moment]

    def killing(change: Callable[..., None]) -> Callable[..., None]:
        def changed(*args: Any) -> None:
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            change(*args)

        return changed

    everything = {path.name: path.read_bytes() for path in run.iterdir()}
    states, _ = opened(run)
    older = states.load_at(5)
    with monkeypatch.context() as patch:
        for name in ("replace", "link"):
            patch.setattr(os, name, killing(getattr(os, name)))
        with pytest.raises(KeyboardInterrupt):
            go_back(run, states, older, above=0)
    states, newest = opened(run)
    if newest.branch == 0:
        assert newest.nimg == 8500
        newest, _ = go_back(run, states, states.load_at(5), above=newest.branch)
    else:
        finish_going_back(run, states, newest)
    assert newest.nimg == 4125
    assert not {"fakes000008.png", "training-state-000008.000.pt"} & names(run)
    folders = [run, *run.glob("set-aside-*")]
    for name, content in everything.items():  # nothing is lost
        assert any((folder / name).exists() and (folder / name).read_bytes() == content for folder in folders), name


def test_without_room_nothing_is_half_copied(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    states, _ = opened(run)
    older = states.load_at(5)
    monkeypatch.setattr(branch.shutil, "copyfile", full)
    with pytest.raises(GanError, match="no space left"):
        go_back(run, states, older, above=0)
    assert names(run / "set-aside-01") == set()
    assert opened(run)[1].nimg == 8500
