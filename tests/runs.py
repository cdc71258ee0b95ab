"""Runs of the train command: made, made light, disturbed and compared."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image
from tiny import TINY

from gan import models
from gan.cli.train import train
from gan.training import evaluation, grid, trainer
from gan.training.state_files import NEWEST, read_state
from gan.training.tracked import tracked

ROOT = Path(__file__).parents[1]
# 8 steps of 0.125 kimg; ticks end after steps 1, 3, 5, 7 and 8, snapshots and states are due after 1, 5 and 8.
RUN = [*TINY, "--tick", "0.25", "--snap", "2", "--keep-states", "3"]


def run_train(*arguments: object) -> Result:
    """What `python train.py` says to these arguments."""
    result = CliRunner().invoke(train, [str(a) for a in arguments], catch_exceptions=False)
    assert "Traceback" not in result.output
    return result


def make_light(patch: pytest.MonkeyPatch) -> None:
    """Neither MLflow, nor metrics, nor large sheets: the rest of a tiny run takes a second."""
    patch.setitem(sys.modules, "mlflow", None)
    patch.setattr(evaluation, "tracked", lambda config, detectors, world: ([], []))
    small_sheets(patch)


def measure_again(patch: pytest.MonkeyPatch) -> None:
    """In light runs: do measure the snapshots, with as much time for it as it takes."""
    patch.setattr(evaluation, "tracked", tracked)


def small_sheets(patch: pytest.MonkeyPatch) -> None:
    """Sheets of 8 images in place of 1024."""
    patch.setattr(grid, "sheet_shape", lambda width, height: (4, 2))


@contextlib.contextmanager
def after_step(step: int, happen: Callable[[], object]) -> Iterator[None]:
    """While open, something happens right after the n-th step of runs."""

    class Disturbed(trainer.TrainStep):
        def __call__(self, *args: Any) -> None:
            super().__call__(*args)
            if self.state.progress.nimg == step * self.config.batch_size:
                happen()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "TrainStep", Disturbed)
        yield


def interrupted(step: int, *arguments: object) -> Result:
    """A run that receives Ctrl-C in its `step`-th step."""
    with after_step(step, lambda: signal.raise_signal(signal.SIGINT)):
        result = run_train(*arguments)
    assert result.exit_code == 130
    return result


_HOLD = """
import sys, time
from pathlib import Path
from gan.training import run_folder
with run_folder.locked(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def held(run_dir: Path) -> Iterator[int]:
    """While open, another process trains in that folder; its number. It is killed in the end."""
    command = [sys.executable, "-c", _HOLD, str(run_dir.absolute())]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder.pid
        finally:
            holder.kill()


def kimg(run_dir: Path) -> float:
    """How far the newest state of a run is."""
    return read_state(run_dir / NEWEST).nimg / 1000


def untimed(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of stats.jsonl without what depends on the machine."""
    lines = [json.loads(line) for line in (run_dir / "stats.jsonl").read_text().splitlines()]
    timed = ("Timing/", "Resources/", "timestamp")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines]


def assert_same(one: Path, other: Path, divided: bool = False) -> None:
    """Two runs have come to the same, bit for bit: statistics, sheets, snapshots and the newest state.

    divided: by another number of processes, so that statistics are summed in another order, and sheets, which are
    computed in other portions, may be off by one here and there.
    """
    for line, their in zip(untimed(one), untimed(other), strict=True):
        assert line.keys() == their.keys()
        for name, value in line.items():
            close = pytest.approx(value, rel=1e-12) if divided and isinstance(value, dict) else value
            assert their[name] == close, name
    for picture in one.glob("*.png"):
        if divided:
            pixels = [np.asarray(Image.open(run / picture.name)).astype(int) for run in (one, other)]
            np.testing.assert_allclose(*pixels, atol=1, err_msg=picture.name)
        else:
            assert (other / picture.name).read_bytes() == picture.read_bytes(), picture.name
    for path in one.glob("*.pkl"):
        a, b = models.load(path), models.load(other / path.name)
        for network in ("G", "D", "G_ema"):
            _assert_equal(getattr(a, network).state_dict(), getattr(b, network).state_dict(), f"{path.name} {network}")
    states = [read_state(run / NEWEST).state for run in (one, other)]
    for state in states:  # when it ran, and whether it once went back, may differ
        state["progress"] = {name: state["progress"][name] for name in ("nimg", "tick", "tick_nimg")}
    _assert_equal(*states, NEWEST)


def _assert_equal(one: Any, other: Any, name: str) -> None:
    """Of nested dicts and lists; `name`: where in them."""
    if isinstance(one, dict):
        assert one.keys() == other.keys(), name
        for key in one:
            _assert_equal(one[key], other[key], f"{name} {key}")
    elif isinstance(one, (list, tuple)):
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _assert_equal(a, b, f"{name} {i}")
    else:
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, name
