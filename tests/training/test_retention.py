"""Which snapshots of a run stay."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from gan.errors import GanError
from gan.training.retention import best_snapshots, milestones, prune_snapshots, snapshots_in, snapshots_to_remove
from gan.training.run_files import RunFiles

RUN = [0, 200, 400, 600, 800, 1000, 1200]


def snapshot(kimg: int) -> str:
    return f"network-snapshot-{kimg:06d}.pkl"


def make_run(folder: Path, kimgs: Sequence[int]) -> None:
    for kimg in kimgs:
        (folder / snapshot(kimg)).write_bytes(b"x")
        (folder / f"fakes{kimg:06d}.png").write_bytes(b"x")


def record(folder: Path, metric: str, kimg: int, value: Any, **more: Any) -> None:
    line = {"results": {metric: value}, "metric": metric, "snapshot_pkl": snapshot(kimg), **more}
    with open(folder / f"metric-{metric}.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


@pytest.mark.parametrize(
    ("keep", "keep_every", "best", "left"),
    [
        (None, None, [], RUN),
        (None, 500, [400], RUN),
        (1, None, [], [1200]),
        (2, None, [], [1000, 1200]),
        (2, None, [400, 1200], [400, 1000, 1200]),
        (2, None, [300], [1000, 1200]),
        (7, None, [], RUN),
        (99, None, [], RUN),
        (1, 500, [], [0, 600, 1000, 1200]),  # 600 is the first at or after 500
        (2, 400, [200], [0, 200, 400, 800, 1000, 1200]),
        (1, 1, [], RUN),
        (1, 10_000, [], [0, 1200]),
    ],
)
def test_the_newest_the_best_and_one_in_so_many_stay(
    keep: int | None, keep_every: int | None, best: list[int], left: list[int]
) -> None:
    removed = snapshots_to_remove(RUN, keep, keep_every, best)
    assert sorted({*RUN} - {*removed}) == left
    assert removed == sorted(removed)
    assert snapshots_to_remove(RUN[::-1], keep, keep_every, best) == removed


@pytest.mark.parametrize("kimgs", [[], [0], [5], [0, 5]])
def test_the_newest_is_never_removed(kimgs: list[int]) -> None:
    assert snapshots_to_remove(kimgs, 1, None, []) == kimgs[:-1]


@pytest.mark.parametrize(("keep", "keep_every"), [(1, None), (2, 500), (3, 300), (1, 450), (2, 50)])
def test_removing_after_each_snapshot_leaves_what_removing_at_the_end_does(keep: int, keep_every: int | None) -> None:
    run = [13 + 97 * i for i in range(60)]
    there: list[int] = []
    for kimg in run:
        there.append(kimg)
        gone = snapshots_to_remove(there, keep, keep_every, [])
        there = [kimg for kimg in there if kimg not in gone]
    assert there == sorted({*run} - {*snapshots_to_remove(run, keep, keep_every, [])})


def test_a_milestone_is_the_first_snapshot_at_or_after_a_multiple() -> None:
    assert milestones([3, 99, 101, 150, 300, 420], 100) == {3, 101, 300, 420}
    assert milestones([3, 99], None) == set()


def test_the_best_by_each_metric_that_is_still_there(tmp_path: Path) -> None:
    make_run(tmp_path, [200, 400, 600])
    for kimg, fid in ((0, 1.0), (200, 30.5), (400, 12), (600, 15.0)):  # 0 is gone
        record(tmp_path, "fid50k_full", kimg, fid)
    for kimg, score in ((0, 9.0), (200, 3.0), (400, 2.0), (600, 1.0)):
        record(tmp_path, "is50k_mean", kimg, score)
        record(tmp_path, "is50k_std", kimg, -score)
    assert best_snapshots(tmp_path) == {snapshot(400), snapshot(200)}
    for kimg, precision in ((200, 0.1), (400, 0.2), (600, 0.3)):
        record(tmp_path, "pr50k3_full_precision", kimg, precision)
    assert best_snapshots(tmp_path) == {snapshot(200), snapshot(400), snapshot(600)}


def test_of_equally_good_ones_the_newest_is_the_best(tmp_path: Path) -> None:
    make_run(tmp_path, [200, 400, 600])
    for kimg, fid in ((200, 12.0), (600, 12.0), (400, 12.0)):
        record(tmp_path, "fid50k_full", kimg, fid)
    assert best_snapshots(tmp_path) == {snapshot(600)}


def test_lines_that_say_something_else_are_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path, [200, 400])
    assert best_snapshots(tmp_path) == set()
    record(tmp_path, "fid50k_full", 200, 12.0)
    for odd in (float("nan"), float("inf"), None, "0.1", [0.1]):
        record(tmp_path, "fid50k_full", 400, odd)
    record(tmp_path, "fid50k_full", 400, 1.0, snapshot_pkl=None)
    record(tmp_path, "fid50k_full", 400, 1.0, snapshot_pkl=f"../other/{snapshot(400)}")
    record(tmp_path, "fid50k_full", 400, 1.0, results=1.0)
    (tmp_path / "metric-torn.jsonl").write_bytes(
        b'\xff\xfe\n[1]\n3\n{"results": {"torn": 1}, "snapshot_pkl": "network-'
    )
    assert best_snapshots(tmp_path) == {snapshot(200)}


def test_pruning_removes_snapshots_and_nothing_else(tmp_path: Path) -> None:
    make_run(tmp_path, RUN)
    record(tmp_path, "fid50k_full", 200, 12.0)
    others = [
        "network-snapshot-best.pkl",
        "network-snapshot-12.pkl",
        "xnetwork-snapshot-000200.pkl",
        "training-state.pt",
    ]
    for name in others:
        (tmp_path / name).touch()
    assert prune_snapshots(tmp_path, None, None) == []
    assert prune_snapshots(tmp_path, 2, 600) == [snapshot(400), snapshot(800)]
    assert snapshots_in(tmp_path) == [0, 200, 600, 1000, 1200]
    assert len(list(tmp_path.glob("fakes*.png"))) == len(RUN)
    assert all((tmp_path / name).exists() for name in others)
    assert prune_snapshots(tmp_path, 2, 600) == []


def test_as_long_as_the_best_is_not_known_none_is_removed(tmp_path: Path) -> None:
    make_run(tmp_path, [0, 200, 400])
    (tmp_path / "metric-fid50k_full.jsonl").mkdir()
    with pytest.raises(GanError, match=r"metric-fid50k_full\.jsonl.*snapshots stay"):
        prune_snapshots(tmp_path, 1, None)
    assert snapshots_in(tmp_path) == [0, 200, 400]
    said: list[str] = []
    config = SimpleNamespace(keep=1, keep_every=None)
    run = SimpleNamespace(_config=config, _run_dir=tmp_path, _in_use=tuple, _report=said.append, _said=set())
    for _ in range(2):
        RunFiles.prune(run)  # type: ignore[arg-type]
    (line,) = said
    assert line.startswith(f"WARNING:   --keep 1: {tmp_path}")


def test_one_that_cannot_be_removed_does_not_stop_the_others(tmp_path: Path) -> None:
    make_run(tmp_path, [0, 400])
    (tmp_path / snapshot(200)).mkdir()  # unlink fails, for root too
    assert prune_snapshots(tmp_path, 1, None) == [snapshot(0)]
    assert snapshots_in(tmp_path) == [200, 400]


def test_a_folder_that_is_not_there_holds_no_snapshots(tmp_path: Path) -> None:
    assert snapshots_in(tmp_path / "new") == []
    assert prune_snapshots(tmp_path / "new", 1, None) == []
