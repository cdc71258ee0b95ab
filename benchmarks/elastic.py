"""Machines that leave a run and come: `python benchmarks/elastic.py`, in about two minutes.

Two agents of torchrun (`--nnodes=1:2`) on this machine stand for two machines. One of them and its worker are killed
(-9) in the middle of a tiny run; later another comes. The run that comes out is compared with one that a single process
made undisturbed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import psutil
import torch
from processes import ROOT, free_port, records

from gan.bench.images import random_dataset
from gan.training.state_files import NEWEST, read_state

# 60 steps of 100 images; with 50 at a time one process sums as two do.
RUN = ["--cbase", 64, "--cmax", 8, "--map-depth", 1, "--batch", 100, "--batch-gpu", 50, "--mbstd-group", 5, "--kimg", 6]
RUN += [
    "--tick",
    0.3,
    "--save-every",
    0.02,
    "--device",
    "cpu",
    "--precision",
    "fp32",
    "--workers",
    0,
    "--metrics",
    "none",
]
# PyTorch's agents take a machine for lost after 15 s without a sign of life, and wait so long for further ones.
LAST_CALL = 3
KILLED_AT, COMES_AT = 1.0, 2.5  # kimg


class Agent:
    """torchrun, with what it says in a file."""

    def __init__(self, port: int, folder: Path, number: int, train: list[str]) -> None:
        self.file = folder / f"agent{number}.txt"
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1"]
        command += ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=elastic"]
        command += ["--max-restarts=5", "--rdzv-conf", f"last_call_timeout={LAST_CALL}", *train]
        # Without it, PyTorch 2.13's agents do not find one that comes (docs/scaling.md).
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.file, "w") as file:
            self.process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def kill(self) -> None:
        """The machine is gone."""
        for process in (*psutil.Process(self.process.pid).children(recursive=True), self.process):
            process.kill()
        self.process.wait()

    def starts(self) -> int:
        """How often its workers have begun to train."""
        return len(re.findall(r"^Run: .*\((?:starting|continuing)", self.file.read_text(), re.MULTILINE))


def wait(happened: Callable[[], bool], seconds: float = 120) -> float:
    """Wait until something is so; for how many seconds."""
    begin = time.monotonic()
    while not happened():
        if time.monotonic() > begin + seconds:
            raise TimeoutError(f"it did not happen within {seconds:g} s")
        time.sleep(0.05)
    return time.monotonic() - begin


def kimg(outdir: Path) -> float:
    """How far a run is."""
    return max((record["Progress/kimg"]["mean"] for record in records(outdir)), default=0)


def differences(one: Path, other: Path) -> int:
    """Tensors of the newest states that are not the same to the bit."""
    states = [read_state(next(outdir.glob("0*")) / NEWEST).state for outdir in (one, other)]
    return sum(
        not torch.equal(tensor, states[1][network][name])
        for network in ("G", "D", "G_ema")
        for name, tensor in states[0][network].items()
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_dataset(folder / "data.zip", (16, 16))

        def train(outdir: str) -> list[str]:
            words = [ROOT / "train.py", "--data", folder / "data.zip", *RUN, "--outdir", folder / outdir]
            return [str(word) for word in words]

        alone, pair, port = folder / "alone", folder / "pair", free_port()
        silent = {"stdout": subprocess.DEVNULL, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}
        subprocess.run([sys.executable, *train("alone")], check=True, **silent)
        first = Agent(port, folder, 1, train("pair"))
        time.sleep(1)
        second = Agent(port, folder, 2, train("pair"))
        found: dict[str, Any] = {"last_call_timeout": LAST_CALL}
        try:
            wait(lambda: kimg(pair) >= KILLED_AT)
            second.kill()
            found["seconds_from_leaving_to_training"] = wait(lambda: first.starts() == 2)
            wait(lambda: kimg(pair) >= COMES_AT)
            second = Agent(port, folder, 3, train("pair"))
            found["seconds_from_coming_to_training"] = wait(lambda: first.starts() == 3)
            wait(lambda: None not in (first.process.poll(), second.process.poll()))
            assert (first.process.poll(), second.process.poll()) == (0, 0), first.file.read_text()
        finally:
            for agent in (first, second):
                if agent.process.poll() is None:
                    agent.kill()
        ticks = [[record["Progress/kimg"]["mean"] for record in records(outdir)] for outdir in (alone, pair)]
        found |= {"ticks_are_the_same": ticks[0] == ticks[1], "tensors_that_differ": differences(alone, pair)}
    print(json.dumps(found, indent=1))
    harness.write("elastic", found)


if __name__ == "__main__":
    main()
