"""Everything that wants a GPU, in order of importance, within minutes: `python benchmarks/gpu.py --out FOLDER`.

What the kernels say of themselves, the tests marked gpu, the operations, a profile, whole steps. Each part is a process
of its own whose end stops nothing else, and writes what it finds at once: log.txt and ops_cuda, profile_cuda and
train_step_cuda.json in FOLDER. A later call goes on with the steps that are missing there and in benchmarks/results.
Nothing has to be installed but PyTorch, numpy, Pillow and click. `--rehearse` does the same on a CPU with tiny cases.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TextIO

ROOT = Path(__file__).parents[1]
PARTS = ("doctor", "tests", "ops", "profile", "steps")
# A part may take this share of what is left, so that one that hangs leaves time to the others.
SHARES = {"doctor": 0.2, "tests": 0.5, "ops": 0.4, "profile": 0.4, "steps": 1.0}


def command_of(part: str, device: str, rehearse: bool, out: Path, seconds: float) -> list[str]:
    tiny = ["--rehearse"] if rehearse else []
    match part:
        case "doctor":
            return ["-m", "gan", "doctor"]
        case "tests":
            options = ["-m", "not gpu" if rehearse else "gpu", "--maxfail=25", "-p", "no:cacheprovider"]
            options += ["-n", "4"] if importlib.util.find_spec("xdist") and not rehearse else []
            return ["-m", "pytest", *options, *(["tests/training/test_step_gpu.py"] if rehearse else [])]
        case "ops" | "profile":
            script = {"ops": "ops", "profile": "profile_step"}[part]
            return [f"benchmarks/{script}.py", "--device", device, *tiny, "--out", str(out)]
        case _:
            short = ["--seconds", "5", "--periods", "1"] if rehearse else []
            minutes = f"{seconds / 60 - 0.1:.2f}"
            return [
                "benchmarks/train_step.py",
                "--device",
                device,
                *tiny,
                *short,
                "--minutes",
                minutes,
                "--out",
                str(out),
            ]


def run(command: list[str], seconds: float, log: TextIO) -> str:
    """How a process ended; what it says goes to the log and to the terminal."""
    begin, ended = time.monotonic(), ""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that it can be stopped with all that it started
    ) as process:
        passing = threading.Thread(target=_pass_on, args=[process.stdout, log], daemon=True)
        passing.start()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            ended = "stopped, as there was no more time; "
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        passing.join()
    return f"{ended}ended with {process.returncode} after {time.monotonic() - begin:.0f} s"


def _pass_on(output: TextIO, log: TextIO) -> None:
    for line in output:
        for stream in (sys.stdout, log):
            stream.write(line)
            stream.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything")
    parser.add_argument("--parts", default=",".join(PARTS), help="of: " + " ".join(PARTS))
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, with tiny cases")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    out = arguments.out.absolute()
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if arguments.rehearse else "cuda"
    with open(out / "log.txt", "a", encoding="utf-8") as log:
        for part in PARTS:
            if part not in arguments.parts.split(","):
                continue
            seconds = (end - time.monotonic()) * SHARES[part]
            command = command_of(part, device, arguments.rehearse, out, seconds)
            if part == "tests" and importlib.util.find_spec("pytest") is None:
                outcome = "left out: there is no pytest"
            elif seconds < 5:
                outcome = "left out: there is no time"
            else:
                outcome = run(command, seconds, log)
            line = f"== {part}: {outcome}; {max(math.floor(end - time.monotonic()), 0)} s left\n"
            for stream in (sys.stdout, log):
                stream.write(line)


if __name__ == "__main__":
    main()
