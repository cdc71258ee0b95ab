"""Whole training steps, all phases in their proportions: `python benchmarks/train_step.py`.

Each configuration runs in a process of its own, so that settings that must precede PyTorch (spinning threads, kept
memory) can differ; the processes take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from typing import Any

CASES: dict[str, dict[str, Any]] = {
    "32 px, cbase 2048, float32": {"res": 32, "precision": "fp32", "cbase": 2048, "cmax": 64},
    "32 px, cbase 2048, bfloat16": {"res": 32, "precision": "bf16", "cbase": 2048, "cmax": 64},
    "64 px, cbase 2048, float32": {"res": 64, "precision": "fp32", "cbase": 2048, "cmax": 64},
    "64 px, cbase 2048, bfloat16": {"res": 64, "precision": "bf16", "cbase": 2048, "cmax": 64},
    "demo": {"res": 64, "precision": "auto", "demo": True},
    "demo, freed memory returned": {"res": 64, "precision": "auto", "demo": True, "keep_memory": False},
}


def measure(case: dict[str, Any], steps: int) -> dict[str, Any]:
    """Seconds per 1000 images and milliseconds per phase, in this process."""
    import time

    import harness  # noqa: F401
    import torch

    from gan.config import DataInfo, TrainOptions, resolve
    from gan.data.loader import LabelTable
    from gan.networks import set_half_dtype
    from gan.training.devices import choose_device, choose_half_dtype, keep_freed_memory
    from gan.training.state import TrainingState
    from gan.training.step import TrainStep

    case = dict(case)
    res, keep_memory = case.pop("res"), case.pop("keep_memory", True)
    config = resolve(TrainOptions(data="x", **case), DataInfo("x", "x", 1000, res, 3))
    device = choose_device("auto")
    if device.type == "cpu" and keep_memory:
        keep_freed_memory()
    state = TrainingState(config, device)
    if state.augment is not None:
        state.augment.p.fill_(0.2)
    for network in (state.G, state.D):
        set_half_dtype(network, choose_half_dtype(config.precision, device))
    labels = LabelTable(torch.zeros([1, 0], device=device), torch.zeros([1000], dtype=torch.long, device=device))
    step = TrainStep(state, config, labels)
    images = torch.randint(0, 256, [config.batch_size, 3, res, res], dtype=torch.uint8).to(device)
    indices = torch.arange(config.batch_size, device=device)
    step(images, indices)
    step.timer.flush()
    begin = time.perf_counter()
    for _ in range(steps):
        step(images, indices)
    phases = step.timer.flush()
    seconds = (time.perf_counter() - begin) / steps / config.batch_size * 1000
    return {"sec_per_kimg": seconds, "phase_ms": phases}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes per case")
    parser.add_argument("--steps", type=int, default=16, help="steps per process; 16 hold each phase in proportion")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(measure(CASES[arguments.case], arguments.steps)))
        return
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}  # as train.py sets it
    for _ in range(arguments.rounds):
        for name in CASES:
            command = [sys.executable, __file__, "--case", name, "--steps", str(arguments.steps)]
            output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
            runs[name].append(json.loads(output.splitlines()[-1]))
    results = {}
    print(f"{'case':32s} {'sec/kimg':>9s} {'min':>7s} {'max':>7s}  phases ms")
    for name, measured in runs.items():
        times = [run["sec_per_kimg"] for run in measured]
        phases = {p: statistics.median(run["phase_ms"][p] for run in measured) for p in measured[0]["phase_ms"]}
        results[name] = {"median": statistics.median(times), "min": min(times), "max": max(times), "phase_ms": phases}
        shown = ", ".join(f"{phase} {ms:.0f}" for phase, ms in phases.items())
        print(f"{name:32s} {statistics.median(times):9.2f} {min(times):7.2f} {max(times):7.2f}  {shown}")
    import harness

    harness.write("train_step", results)


if __name__ == "__main__":
    main()
