from __future__ import annotations

from pathlib import Path

import pytest
from runs import held

from gan.config import DataInfo
from gan.errors import DiskFullError, GanError
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import run_folder


def test_two_processes_cannot_train_in_one_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    with held(tmp_path) as pid:
        said = f"is being trained by process {pid} on "
        with pytest.raises(GanError, match=said), run_folder.locked(tmp_path, print):
            pass
    with run_folder.locked(tmp_path, print):
        pass


def test_a_folder_that_cannot_be_locked_is_used_with_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def unsupported(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    said: list[str] = []
    with run_folder.locked(tmp_path, said.append):
        assert "cannot be locked (Operation not supported)" in said[0]


def test_commands_can_be_typed_as_they_are_printed() -> None:
    assert run_folder.resume_command(Path("my runs/00000-x")) == "python train.py --resume 'my runs/00000-x'"


@pytest.mark.parametrize(("nimg", "text"), [(125, "0.125"), (1_234_592, "1234.592"), (25_000_128, "25000.128")])
def test_kimg_are_shown_to_the_image(nimg: int, text: str) -> None:
    assert run_folder.in_kimg(nimg) == text


def test_a_folder_whose_options_cannot_be_written_is_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, text: str) -> None:
        raise DiskFullError("no space left")

    monkeypatch.setattr(run_folder, "write_text", full)
    config = resolve(TrainOptions(data="x"), DataInfo("x", "x", 10, 16, 16, 3))
    with pytest.raises(DiskFullError):
        run_folder.create(tmp_path / "runs", config)
    assert list((tmp_path / "runs").iterdir()) == []
