from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from gan.errors import GanError
from gan.snapshot_names import BEST
from gan.tracking import measurements
from gan.training.best import Best, best_snapshot, renew


def snapshot(run: Path, kimg: int, content: str = "") -> str:
    path = run / f"network-snapshot-{kimg:06d}.pkl"
    path.write_text(content or str(kimg))
    return path.name


def measure(run: Path, metric: str, kimg: int, number: float) -> None:
    name = f"network-snapshot-{kimg:06d}.pkl"
    measurements.append(run, {"metric": metric, "results": {metric: number}, "snapshot_pkl": name})


def refused(*_: Any, **__: Any) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.fixture(params=["symbolic link", "hard link", "copy"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of three snapshots, on a file system that knows so much."""
    if request.param != "symbolic link":
        monkeypatch.setattr(os, "symlink", refused)
    if request.param == "copy":
        monkeypatch.setattr(os, "link", refused)
    for kimg in (0, 4, 8):
        snapshot(tmp_path, kimg)
    return tmp_path


def test_it_is_always_the_best_of_those_that_are_there(run: Path) -> None:
    assert renew(run, ["fid50k_full", "swd"]) is None
    assert not (run / BEST).exists()
    measure(run, "swd", 4, 2.0)
    measure(run, "swd", 8, 1.0)
    assert renew(run, ["fid50k_full", "swd"]) == Best("network-snapshot-000008.pkl", "swd", 1.0)
    assert (run / BEST).read_text() == "8"
    measure(run, "fid50k_full", 4, 30.0)  # the first metric counts as soon as there is a number of it
    assert renew(run, ["fid50k_full", "swd"]) == Best("network-snapshot-000004.pkl", "fid50k_full", 30.0)
    assert (run / BEST).read_text() == "4"
    snapshot(run, 4, "made again")
    assert renew(run, ["fid50k_full"])
    assert (run / BEST).read_text() == "made again"
    (run / "network-snapshot-000004.pkl").unlink()
    assert renew(run, ["fid50k_full", "swd"]) == Best("network-snapshot-000008.pkl", "swd", 1.0)
    assert (run / BEST).read_text() == "8"
    (run / "network-snapshot-000008.pkl").unlink()
    was_link = (run / BEST).is_symlink()
    assert renew(run, ["swd"]) is None
    assert (run / BEST).exists() is not was_link  # a file may be all that is left of a network
    assert [path.name for path in run.glob("network-snapshot-0*")] == ["network-snapshot-000000.pkl"]
    assert not list(run.glob(".*"))


def test_what_is_right_already_stays(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measure(run, "swd", 4, 2.0)
    renew(run, ["swd"])
    monkeypatch.setattr(os, "replace", refused)
    assert renew(run, ["swd"]) == best_snapshot(run, ["swd"])


def test_a_folder_can_be_moved(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    snapshot(tmp_path / "run", 4)
    measure(tmp_path / "run", "swd", 4, 0.9)
    renew(tmp_path / "run", ["swd"])
    shutil.move(tmp_path / "run", tmp_path / "moved")
    assert (tmp_path / "moved" / BEST).read_text() == "4"


def test_without_room_the_old_one_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    for kimg, number in ((0, 2.0), (4, 1.0)):
        snapshot(tmp_path, kimg)
        measure(tmp_path, "swd", kimg, number)
        if kimg == 0:
            renew(tmp_path, ["swd"])
    for name in ("symlink", "link"):
        monkeypatch.setattr(os, name, full)
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(GanError, match="no space left"):
        renew(tmp_path, ["swd"])
    assert (tmp_path / BEST).read_text() == "0"
    assert not list(tmp_path.glob(".*"))


def test_a_folder_in_its_place_is_for_whoever_put_it_there(tmp_path: Path) -> None:
    snapshot(tmp_path, 4)
    measure(tmp_path, "swd", 4, 0.9)
    (tmp_path / BEST).mkdir()
    with pytest.raises(GanError, match="is a folder, where the best snapshot is to be; move it away"):
        renew(tmp_path, ["swd"])
    found = best_snapshot(tmp_path, ["swd"])
    assert found is not None
    assert found.line == "Best:      network-snapshot-000004.pkl by swd 0.9"
    (tmp_path / BEST).rmdir()
    assert renew(tmp_path, ["swd"]) == found
    found = best_snapshot(tmp_path, ["swd"])
    assert found is not None
    assert found.line == "Best:      network-snapshot-000004.pkl by swd 0.9 (network-snapshot-best.pkl)"
