from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gan.errors import DiskFullError, GanError
from gan.training import state_files
from gan.training.state_files import NEWEST, SavedState, StateFiles, read_state


def saved(nimg: int, healthy_until: int | None = None, branch: int = 0) -> SavedState:
    """By default all was well until then."""
    state = {"progress": {"nimg": nimg, "branch": branch}, "weights": torch.full([5000], float(nimg))}
    return SavedState(state, {"run": "a"}, nimg if healthy_until is None else healthy_until)


def opened(folder: Path, keep: int = 2) -> StateFiles:
    """As a process that continues the run opens them."""
    states = StateFiles(folder, keep)
    states.load_newest(print)
    return states


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def said() -> list[str]:
    return []


def test_the_newest_two_are_kept_and_the_newest_comes_back(tmp_path: Path, said: list[str]) -> None:
    states = StateFiles(tmp_path, 2)
    for nimg in (125, 4125, 1_234_567_000):
        states.save(saved(nimg))
    assert names(tmp_path) == ["training-state-000004.125.pt", NEWEST]
    found = StateFiles(tmp_path, 2).load_newest(said.append)
    assert found is not None
    assert (found.nimg, found.tracker, found.healthy_until, said) == (1_234_567_000, {"run": "a"}, 1_234_567_000, [])
    assert torch.equal(found.state["weights"], torch.full([5000], 1_234_567_000.0))


def test_a_process_that_continues_goes_on_keeping_two(tmp_path: Path, said: list[str]) -> None:
    for nimg in (1000, 2000, 3000, 4000):
        states = StateFiles(tmp_path, 2)
        states.load_newest(said.append)
        states.save(saved(nimg))
    assert names(tmp_path) == ["training-state-000003.000.pt", NEWEST]


def test_the_same_moment_saved_twice_is_one_state(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, 3)
    for nimg in (1000, 2000, 2000, 3000):
        states.save(saved(nimg))
    assert names(tmp_path) == ["training-state-000001.000.pt", "training-state-000002.000.pt", NEWEST]


def test_without_any_there_is_none(tmp_path: Path, said: list[str]) -> None:
    assert StateFiles(tmp_path, 2).load_newest(said.append) is None
    with pytest.raises(GanError, match=r"--at 3: .* keeps no state of that time, nor any other"):
        StateFiles(tmp_path, 2).load_at(3)


@pytest.mark.parametrize("damage", ["torn", "empty", "a flipped bit", "another file"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(damage: str, tmp_path: Path, said: list[str]) -> None:
    states = StateFiles(tmp_path, 2)
    states.save(saved(1000))
    states.save(saved(2000))
    newest = tmp_path / NEWEST
    content = newest.read_bytes()
    middle = len(content) // 2
    newest.write_bytes(
        {
            "torn": content[:-100],
            "empty": b"",
            "a flipped bit": content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :],
            "another file": b"hello",
        }[damage]
    )
    found = StateFiles(tmp_path, 2).load_newest(said.append)
    assert found is not None
    assert found.nimg == 1000
    (line,) = said
    assert line.startswith(f"WARNING:   {newest}: damaged")
    assert line.endswith("going on from the one before it, training-state-000001.000.pt at 1 kimg")
    assert names(tmp_path) == ["training-state-000001.000.pt", NEWEST + ".damaged"]


def test_a_kill_between_the_two_renames_loses_nothing(tmp_path: Path, said: list[str]) -> None:
    StateFiles(tmp_path, 2).save(saved(1000))
    (tmp_path / NEWEST).rename(tmp_path / "training-state-000001.000.pt")
    states = StateFiles(tmp_path, 2)
    found = states.load_newest(said.append)
    assert found is not None
    assert (found.nimg, said) == (1000, [])
    states.save(saved(2000))
    assert names(tmp_path) == ["training-state-000001.000.pt", NEWEST]


def test_when_all_are_damaged_it_says_so_and_touches_nothing(tmp_path: Path, said: list[str]) -> None:
    states = StateFiles(tmp_path, 2)
    states.save(saved(1000))
    states.save(saved(2000))
    for path in tmp_path.iterdir():
        path.write_bytes(b"hello")
    with pytest.raises(GanError, match=r"training-state\.pt: damaged .* no other one is whole"):
        StateFiles(tmp_path, 2).load_newest(said.append)
    assert len(names(tmp_path)) == 2


def test_the_newest_healthy_state_is_kept_beyond_its_time(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, 2)
    # Ticks at 1400 and 1800 were well, then none: the state at 2000 was saved before anybody knew.
    for nimg, healthy_until in ((1000, 800), (1500, 1400), (2000, 1800), (2500, 1800), (3000, 1800)):
        states.save(saved(nimg, healthy_until))
    assert names(tmp_path) == ["training-state-000001.500.pt", "training-state-000002.500.pt", NEWEST]
    other = opened(tmp_path)
    assert other.healthy_nimg(1800) == 1500
    found = other.load_healthy(1800)
    assert found is not None
    assert found.nimg == 1500
    assert other.load_healthy(1000) is None
    states.save(saved(3500, healthy_until=3200))  # it has recovered
    assert names(tmp_path) == ["training-state-000003.000.pt", NEWEST]


def test_going_back_takes_the_newest_that_is_not_beyond(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, 4)
    for nimg in (1000, 32_032, 1_234_592):
        states.save(saved(nimg))
    other = opened(tmp_path, 4)
    found = [other.load_at(kimg).nimg for kimg in (1, 32.031, 32.032, 1234.592, 1e6)]
    assert found == [1000, 1000, 32_032, 1_234_592, 1_234_592]
    with pytest.raises(GanError, match=r"--at 0\.5: .* there are states of 1, 32\.032, 1234\.592 kimg"):
        other.load_at(0.5)


def test_going_back_passes_over_a_damaged_state(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, 4)
    for nimg in (1000, 2000, 3000):
        states.save(saved(nimg))
    path = tmp_path / "training-state-000002.000.pt"
    content = path.read_bytes()
    path.write_bytes(content[:8000] + bytes([content[8000] ^ 16]) + content[8001:])
    assert opened(tmp_path).load_at(2.5).nimg == 1000


def test_corrupt_bytes_in_an_older_state_do_not_keep_a_run_from_the_newest(tmp_path: Path) -> None:
    states = StateFiles(tmp_path, 4)
    for nimg in (1000, 2000):
        states.save(saved(nimg))
    path = tmp_path / "training-state-000001.000.pt"
    content = path.read_bytes()
    for position in range(0, 1500, 7):
        path.write_bytes(content[:position] + bytes([content[position] ^ 255]) + content[position + 1 :])
        found = StateFiles(tmp_path, 4).load_newest(print)
        assert found is not None
        assert found.nimg == 2000


def test_what_is_later_is_moved_aside(tmp_path: Path) -> None:
    run, aside = tmp_path / "run", tmp_path / "aside"
    run.mkdir()
    aside.mkdir()
    states = StateFiles(run, keep=4)
    for nimg in (1000, 2000, 3000):
        states.save(saved(nimg))
    states.set_aside(1500, aside)
    assert names(aside) == ["training-state-000002.000.pt", NEWEST]
    assert states.newest_nimg == 1000
    states.save(saved(1000))
    assert names(run) == ["training-state-000001.000.pt", NEWEST]


def test_without_room_older_states_go_and_the_newest_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = StateFiles(tmp_path, 3)
    for nimg in (1000, 2000, 3000):
        states.save(saved(nimg))
    monkeypatch.setattr(state_files.disk, "has_room", lambda path, needed: len(names(tmp_path)) < 3)
    assert states.save(saved(4000)) == ["training-state-000001.000.pt"]
    assert names(tmp_path) == ["training-state-000002.000.pt", "training-state-000003.000.pt", NEWEST]


def test_older_states_do_not_go_in_vain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    states = StateFiles(tmp_path, 3)
    for nimg in (1000, 2000, 3000):
        states.save(saved(nimg))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(path: Path, needed: int) -> None:
        assert needed < 0  # what two states would give back is counted
        raise DiskFullError(f"{path}: no space left")

    monkeypatch.setattr(state_files.disk, "check_room", full)
    with pytest.raises(GanError, match="no space left"):
        states.save(saved(4000))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is always full")
def test_a_disk_that_fills_up_during_the_write_keeps_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = StateFiles(tmp_path, 2)
    states.save(saved(1000))
    before = (tmp_path / NEWEST).read_bytes()

    def full(path: Path, mode: str) -> Any:
        return open("/dev/full", mode)

    monkeypatch.setattr(state_files, "open", full, raising=False)
    with pytest.raises(GanError, match=r"training-state\.pt: no space left on the device"):
        states.save(saved(2000))
    assert (tmp_path / NEWEST).read_bytes() == before
    assert names(tmp_path) == [NEWEST]


def test_nothing_in_a_state_is_executed(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'executed'}",)

    torch.save({"format": 2, "state": Payload(), "tracker": {}, "healthy_until": 0}, tmp_path / NEWEST)
    with pytest.raises(GanError, match="damaged or not a training state"):
        read_state(tmp_path / NEWEST)
    assert not (tmp_path / "executed").exists()


def test_a_state_of_another_version_is_named(tmp_path: Path) -> None:
    torch.save({"format": 99}, tmp_path / NEWEST)
    with pytest.raises(GanError, match="not a training state that this version"):
        read_state(tmp_path / NEWEST)
