"""How much room the files of a run take: the estimates against real files, and what happens on a disk that is full."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import RUN, run_train

from gan import models
from gan.config import DataInfo, TrainConfig
from gan.errors import DiskFullError, GanError
from gan.files import atomic_path
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import disk, plan, run_folder
from gan.training.state import TrainingState

ROOT = Path(__file__).parents[2]


def config_of(res: int = 16, channels: int = 3, label_dim: int = 0, **options: Any) -> TrainConfig:
    options = {"cbase": 64, "cmax": 8, "map_depth": 1, "batch": 8, **options}
    return resolve(
        TrainOptions(data="x", cond=label_dim > 0, **options), DataInfo("x", "x", 10, res, res, channels, label_dim)
    )


def space(total: int, free: int) -> Any:
    return lambda folder: type("Usage", (), {"total": total, "free": free})


@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(32, 1, 10, cbase=512, cmax=64, map_depth=2),
        config_of(aug="noaug", cmax=2, freezed=1),
    ],
)
def test_snapshots_and_states_are_as_large_as_estimated(tmp_path: Path, config: TrainConfig) -> None:
    state = TrainingState(config, torch.device("cpu"))
    for optimizer, network in ((state.G_opt, state.G), (state.D_opt, state.D)):
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
    models.save(tmp_path / "snapshot", **state.copy_networks(), training_set_kwargs={"path": "x"})
    torch.save({"state": state.state_dict()}, tmp_path / "state")
    assert disk.snapshot_bytes(config) == pytest.approx((tmp_path / "snapshot").stat().st_size, rel=0.05)
    assert disk.state_bytes(config) == pytest.approx((tmp_path / "state").stat().st_size, rel=0.05)
    assert disk.tensor_bytes(state.state_dict()) == pytest.approx((tmp_path / "state").stat().st_size, rel=0.05)


def test_a_whole_run_takes_what_was_forecast(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    options = ["--data", tiny_dataset, "--outdir", tmp_path, *RUN, "--keep-states", 2, "--metrics", "none"]
    result = run_train(*options)
    assert result.exit_code == 0, result.output
    (run_dir,) = tmp_path.glob("0*")
    config = run_folder.read_options(run_dir)
    due = disk.snapshots_due(config)
    assert due == [0, 1]  # after 125, 625 (the file of kimg 0 again) and 1000 images
    snapshots = {path.name: path.stat().st_size for path in run_dir.glob("*.pkl")}
    assert snapshots.keys() == {f"network-snapshot-{kimg:06d}.pkl" for kimg in due}
    assert all(size == pytest.approx(disk.snapshot_bytes(config), rel=0.05) for size in snapshots.values())
    states = [path.stat().st_size for path in run_dir.glob("training-state*.pt")]
    assert len(states) == config.keep_states
    assert all(size == pytest.approx(disk.state_bytes(config), rel=0.05) for size in states)
    sheets = [path.stat().st_size for path in run_dir.glob("*.png")]
    assert len(sheets) == len(due) + 2
    assert max(sheets) < disk.sheet_bytes(config) < 10 * max(sheets)
    line, warning = disk.forecast(config, free=10**9)
    assert line.startswith("2 snapshots of ")
    assert "4 sheets of up to " in line
    assert warning is None


def test_a_forecast_names_what_stays_and_what_is_free() -> None:
    config = config_of(kimg=1000, keep=3, keep_every=400, tick=4.0, snap=25, keep_states=1)
    line, warning = disk.forecast(config, free=10**12)
    # 0, 100, ..., 1000: the newest three, and 0, 400 (800 is one of the three)
    assert line.startswith("5 of 11 snapshots of 2.5 MB, 13 sheets of up to 0.6 MB")
    assert ", 1 state of 4.8 MB: up to " in line
    assert line.endswith(" when the run is complete; 1000.0 GB are free")
    assert warning is None


def test_pictures_in_mlflow_count_where_it_keeps_them_beside_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("mlflow") is None:
        pytest.skip("needs MLflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with_mlflow, _ = disk.forecast(config_of(), free=10**12)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    without, _ = disk.forecast(config_of(), free=10**12)
    assert " (and 1.2 MB in MLflow)" in with_mlflow
    assert "MLflow" not in without

    def total(line: str) -> float:
        match = re.search(r"up to ([\d.]+) MB when", line)
        assert match is not None
        return float(match[1])

    num_sheets = len(disk.snapshots_due(config_of())) + 2
    assert total(with_mlflow) - total(without) == pytest.approx(
        num_sheets * 2 * disk.sheet_bytes(config_of()) / 1e6, rel=0.01
    )


def test_a_warning_says_when_the_disk_will_be_full_and_what_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    config = config_of(kimg=1000, tick=4.0, snap=25)
    snapshot, sheet, state = disk.snapshot_bytes(config), disk.sheet_bytes(config), disk.state_bytes(config)
    first = snapshot + 3 * sheet + 3 * state  # reals.png, fakes_init.png, fakes000000.png; two states and a new one
    all_of_them = first + 10 * (snapshot + sheet)

    def warning(free: int, **options: Any) -> str | None:
        return disk.forecast(dataclasses.replace(config, **options), free)[1]

    assert warning(all_of_them) is None
    assert warning(all_of_them - 1) == (
        "the disk may be full at about 1000 kimg: free some of it, or name another place with --outdir, "
        "or keep fewer snapshots with --keep 5"
    )
    assert "at about 100 kimg" in str(warning(first))
    assert "at about 0 kimg" in str(warning(first - 1))
    assert "with a larger --snap" in str(warning(first - 1))
    # The newest one is written before the oldest one goes.
    assert warning(first + 10 * sheet + 2 * snapshot, keep=2) is None
    assert "at about 1000 kimg" in str(warning(first + 10 * sheet + 2 * snapshot - 1, keep=2))
    assert "with --keep 1" in str(warning(first + 10 * sheet + 2 * snapshot - 1, keep=2))
    assert warning(first + 10 * sheet + 3 * snapshot, keep=2, keep_every=1000) is None
    assert warning(first + 10 * sheet + 3 * snapshot - 1, keep=2, keep_every=1000) is not None


def test_what_a_run_that_continues_has_on_disk_needs_no_more_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    config = config_of(kimg=1000, tick=4.0, snap=25)
    left = 4 * (disk.snapshot_bytes(config) + disk.sheet_bytes(config)) + disk.state_bytes(config)
    present = range(0, 601, 100)
    line, warning = disk.forecast(config, left, 650_000, present)
    assert line.startswith("11 snapshots")
    assert warning is None
    _, warning = disk.forecast(config, left - 1, 650_000, present)
    assert "at about 1000 kimg" in str(warning)
    assert "--outdir" not in str(warning)  # it stays where it is


def test_the_plan_and_the_start_of_a_run_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(kimg=1000, tick=4.0, snap=25)
    monkeypatch.setattr(shutil, "disk_usage", space(10**9, 10**9))
    lines = plan.describe_plan(config, tmp_path / "new" / "runs")
    assert [line for line in lines if line.startswith("disk       11 snapshots of 2.5 MB, 13 sheets")]
    assert [line for line in lines if line.startswith("length ") and line.endswith("11 snapshots")]
    assert disk.outlook(config, tmp_path)[0].startswith("Disk:      11 snapshots")
    assert len(disk.outlook(config, tmp_path)) == 1
    monkeypatch.setattr(shutil, "disk_usage", space(10**9, 10**6))
    assert plan.describe_plan(config, tmp_path)[-1].startswith("           the disk may be full at about 0 kimg")
    assert disk.outlook(config, tmp_path)[1].startswith("WARNING:   the disk may be full at about 0 kimg")


@pytest.mark.parametrize(
    ("total", "free", "needed", "fits"),
    [
        (10**12, 10**9, 9 * 10**8, True),
        (10**12, 10**9, 95 * 10**7, False),  # 5 % and 16 MB more
        (4_000_000, 2_000_000, 1_800_000, True),
        (4_000_000, 2_000_000, 1_900_000, False),
        (10**12, 0, 1, False),
        (0, 0, 10**9, True),  # a file system that says nothing
    ],
)
def test_room_is_looked_for_before_a_file_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total: int, free: int, needed: int, fits: bool
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", space(total, free))
    path = tmp_path / "new" / "net.pkl"
    if fits:
        disk.check_room(path, needed)
    else:
        with pytest.raises(
            DiskFullError, match=r"net\.pkl: no space left on the device: about [\d.]+ [MG]B are needed"
        ):
            disk.check_room(path, needed)


def test_a_disk_that_is_gone_is_an_error_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(folder: Path) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shutil, "disk_usage", gone)
    with pytest.raises(GanError, match=os.strerror(errno.ESTALE)):
        disk.check_room(tmp_path / "net.pkl", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_what_torch_save_says_of_a_full_disk_is_understood(tmp_path: Path) -> None:
    def write() -> None:
        with atomic_path(tmp_path / "state.pt"), open("/dev/full", "wb") as file:
            torch.save(torch.zeros(100_000), file)

    with pytest.raises(DiskFullError, match=r"state\.pt: no space left on the device; free some"):
        write()
    assert list(tmp_path.iterdir()) == []


ON_A_SMALL_DISK = """
import sys, numpy as np, torch
from pathlib import Path
from gan import models
from gan.config import DataInfo
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.errors import DiskFullError
from gan.files import atomic_path, write_png, write_text
from gan.training import disk
from gan.training.state import TrainingState

folder = Path(sys.argv[1])
options = TrainOptions(data="x", cbase=64, cmax=8, map_depth=1, batch=8)
config = resolve(options, DataInfo("x", "x", 10, 16, 16, 3))
networks = TrainingState(config, torch.device("cpu")).copy_networks()

def snapshot(path):
    models.save(path, **networks, training_set_kwargs={})

def state(path):
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        torch.save({name: net.state_dict() for name, net in networks.items()}, file)

def sheet(path):
    write_png(path, np.random.default_rng(0).integers(0, 256, [3, 900, 900], dtype=np.uint8))

def refused(write, path):
    try:
        write(path)
    except DiskFullError as error:
        assert str(error) == f"{path}: no space left on the device; free some, or choose another place", error
        assert {p.name: p.read_bytes() for p in folder.iterdir()} == there
        return True

disk.check_room(folder / "one.pkl", disk.snapshot_bytes(config))
snapshot(folder / "one.pkl")
there = {p.name: p.read_bytes() for p in folder.iterdir()}
for write in (snapshot, state, sheet):
    assert refused(write, folder / "two"), write
    assert refused(write, folder / "one.pkl"), write
try:
    disk.check_room(folder / "two", disk.snapshot_bytes(config))
except DiskFullError:
    write_text(folder / "small", "still possible")
    print("held")
"""


def test_a_disk_that_fills_keeps_what_was_whole_and_nothing_else(tmp_path: Path) -> None:
    def on_small_disk(*command: str) -> subprocess.CompletedProcess[str]:
        mount = 'mount -t tmpfs -o size=4m none "$0" && exec "$@"'
        line = ["unshare", "-rm", "sh", "-c", mount, str(tmp_path), *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)

    try:
        may = on_small_disk("true").returncode == 0
    except FileNotFoundError:
        may = False
    if not may:
        pytest.skip("file systems of one's own cannot be mounted here (unshare -rm)")
    result = on_small_disk(sys.executable, "-c", ON_A_SMALL_DISK, str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "held\n"), result.stderr
