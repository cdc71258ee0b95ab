"""Several processes on this machine, through the command lines that people type."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from runs import ROOT, assert_same, interrupted, make_light, run_train
from tiny import TINY

pytestmark = [
    pytest.mark.skipif(not torch.distributed.is_available(), reason="PyTorch without torch.distributed"),
    pytest.mark.skipif(os.name != "posix", reason="signals and sessions of POSIX"),
]

# 10 steps of 100 images. Ticks end after steps 1, 4, 7 and 10, states are due after 1, 7 and 10. With 50 images at a
# time one process sums in the same order as two, so that their runs are equal to the bit.
RUN = [*TINY, "--batch", "100", "--batch-gpu", "50", "--tick", "0.3", "--snap", "2"]
TRAIN = [sys.executable, str(ROOT / "tests" / "train_disturbed.py")]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
SECONDS = 90  # after which a command hangs


class Command:
    """A command that runs, with everything that it says in one file."""

    def __init__(self, folder: Path, *words: object, **environment: object) -> None:
        self._said = folder / f"said{len(list(folder.glob('said*')))}.txt"
        ours = {"OMP_NUM_THREADS": 1, "PYTHONPATH": ROOT, **environment}
        with open(self._said, "w") as file:
            self.process = subprocess.Popen(
                [str(word) for word in words],
                env={**os.environ, **{name: str(value) for name, value in ours.items()}},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self._said.read_text()

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Wait until something is so, but not for ever, and leave no process behind then."""
        end = time.monotonic() + SECONDS
        while not happened():
            if time.monotonic() > end:
                for process in [*psutil.Process(self.process.pid).children(recursive=True), self.process]:
                    process.kill()
                pytest.fail(f"it hangs\n{self.said}")
            time.sleep(0.05)

    def end(self, exit_code: int | None = 0) -> str:
        """What it has said, when it has ended with that code, whatever it is if None."""
        self.wait_for(lambda: self.process.poll() is not None)
        if exit_code is not None:
            assert self.process.returncode == exit_code, self.said
            assert "Traceback" not in self.said
        return self.said


def run_dir_in(outdir: Path) -> Path:
    (run_dir,) = outdir.glob("0*")
    return run_dir


@pytest.fixture(scope="module")
def alone(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    outdir = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        make_light(patch)
        result = run_train("--data", tiny_dataset, *RUN, "--outdir", outdir)
    assert result.exit_code == 0, result.output
    return run_dir_in(outdir)


@pytest.fixture(scope="module")
def pair(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of two, undisturbed; what they said is in said.txt beside it."""
    outdir = tmp_path_factory.mktemp("pair")
    said = Command(outdir, *TRAIN, "--data", tiny_dataset, *RUN, "--gpus", 2, "--outdir", outdir).end()
    (outdir / "said.txt").write_text(said)
    return run_dir_in(outdir)


def test_two_processes_make_the_run_of_one(alone: Path, pair: Path) -> None:
    assert_same(alone, pair, divided=True)
    files, expected = ({path.name for path in run.iterdir()} for run in (pair, alone))
    assert files == {*expected, "log-rank1.txt"}
    assert "Traceback" not in (pair / "log-rank1.txt").read_text()
    said = (pair.parent / "said.txt").read_text()
    assert len(re.findall(r"^tick 0 ", said, re.MULTILINE)) == 1  # rank 0 alone speaks
    assert re.search(r"^Processes: 2 on this machine, over gloo$", said, re.MULTILINE)
    last = json.loads((pair / "stats.jsonl").read_text().splitlines()[-1])
    assert last["Timing/reduce"]["mean"] > 0


def test_two_nodes_with_agents_of_their_own(tiny_dataset: Path, pair: Path, tmp_path: Path) -> None:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    agent = [*TORCHRUN, "--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--max-restarts=1"]
    agent += [f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=test", f"--log-dir={tmp_path / 'agents'}"]
    command = [*TRAIN[1:], "--data", tiny_dataset, *RUN, "--outdir", tmp_path]
    disturbed = f"1 8 SIGKILL self {tmp_path / 'done'}"
    nodes = [Command(tmp_path, *agent, *command, DISTURBED=disturbed) for _ in range(2)]
    for node in nodes:
        node.end()
    assert (tmp_path / "done").exists()
    assert_same(pair, run_dir_in(tmp_path))


@pytest.mark.usefixtures("light_runs")
def test_the_number_of_processes_may_change_and_one_be_killed_and_nothing_is_lost(
    tiny_dataset: Path, alone: Path, tmp_path: Path
) -> None:
    agent = [*TORCHRUN, "--standalone", "--nproc-per-node=2", f"--log-dir={tmp_path / 'agent'}"]
    command = [*TRAIN[1:], "--data", tiny_dataset, *RUN, "--outdir", tmp_path]
    disturbed = f"1 3 SIGTERM launcher {tmp_path / 'done'}"
    said = Command(tmp_path, *agent, *command, DISTURBED=disturbed).end(None)  # PyTorch's agent is loud then
    run_dir = run_dir_in(tmp_path)
    assert re.search(r"^Stopped at 0\.[34] kimg, saved", said, re.MULTILINE), said
    interrupted(6, "--resume", run_dir, "--gpus", 1, "--batch-gpu", 50)
    disturbed = f"0 8 SIGKILL self {tmp_path / 'killed'}"
    said = Command(tmp_path, *TRAIN, "--resume", run_dir, "--gpus", 2, DISTURBED=disturbed).end()
    assert "--gpus 2, which was 1" in said
    (line,) = [line for line in said.splitlines() if "SIGKILL" in line]
    assert line.startswith("rank 0 was killed")
    assert_same(alone, run_dir, divided=True)


def test_a_rank_that_hangs_is_named(tiny_dataset: Path, tmp_path: Path) -> None:
    command = [*TRAIN, "--data", tiny_dataset, *RUN, "--gpus", 2, "--outdir", tmp_path]
    command += ["--dist-timeout", 3, "--max-restarts", 0]
    said = Command(tmp_path, *command, DISTURBED=f"1 3 SIGSTOP self {tmp_path / 'done'}").end(75)
    line = next(line for line in said.splitlines() if line.startswith("error: "))
    assert re.match(r"error: rank 1\b.* did not come to the start of a step within 3 s", line)
    assert "--dist-timeout" in line
