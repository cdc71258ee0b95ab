"""Whole steps against a plain implementation, all phases in their proportions: `python benchmarks/train_step.py`.

Each case is a process of its own in which ours and plain take turns (gan.bench.measure, the core of `gan bench`), so
that memory and threads of one do not touch another. Augmentation bgc, p held.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import harness

SMALL = {"cbase": 4096, "cmax": 128, "batch": 16}
CASES: dict[str, dict[str, Any]] = {
    "32 px, float32": {"res": 32, "precision": "fp32", **SMALL},
    "32 px, bfloat16": {"res": 32, "precision": "bf16", **SMALL},
    "64 px, float32": {"res": 64, "precision": "fp32", **SMALL},
    "64 px, bfloat16": {"res": 64, "precision": "bf16", **SMALL},
    "32 px full width, bfloat16": {"res": 32, "precision": "bf16", "batch": 16},
    "64 px full width, bfloat16": {"res": 64, "precision": "bf16", "batch": 16},
    "32 px, bfloat16, p 0": {"res": 32, "precision": "bf16", **SMALL, "p": 0.0, "plain": False},
    "32 px, bfloat16, p 0.6": {"res": 32, "precision": "bf16", **SMALL, "p": 0.6, "plain": False},
    "64 px, bfloat16, p 0": {"res": 64, "precision": "bf16", **SMALL, "p": 0.0, "plain": False},
    "64 px, bfloat16, p 0.6": {"res": 64, "precision": "bf16", **SMALL, "p": 0.6, "plain": False},
    "demo": {"res": 64, "precision": "auto", "demo": True, "plain": False},
}


def run_case(case: dict[str, Any], seconds: float, periods: int) -> dict[str, Any]:
    """Measure in this process."""
    import dataclasses

    from gan.bench.images import random_dataset
    from gan.bench.measure import measure
    from gan.config import DataInfo
    from gan.resolve import resolve
    from gan.train_options import TrainOptions

    case = dict(case)
    res, plain, p = case.pop("res"), case.pop("plain", True), case.pop("p", 0.2)
    with tempfile.TemporaryDirectory() as folder:
        dataset = random_dataset(Path(folder) / "random.zip", (res, res))
        info = DataInfo(str(dataset.path), "random", len(dataset), res, res, 3)
        config = resolve(TrainOptions(data=str(dataset.path), cache="ram", **case), info)
        config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, initial_p=p))
        result = measure(config, dataset, against_plain=plain, seconds=seconds, periods=periods)
    return result.to_dict()


def measured(cases: dict[str, dict[str, Any]], seconds: float, periods: int, script: str) -> dict[str, dict[str, Any]]:
    """Every case in a process of its own."""
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}  # as train.py sets it
    results = {}
    for name, case in cases.items():
        command = [sys.executable, script, "--case", json.dumps(case), "--seconds", str(seconds)]
        command += ["--periods", str(periods)]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout.splitlines()[-1])
        print(line_of(name, results[name]), flush=True)
    return results


def line_of(name: str, result: dict[str, Any]) -> str:
    """A result in one line."""
    step = result["step_ms"]
    text = f"{name:28s} {step['median']:8.1f} ms a step ({step['min']:.1f} to {step['max']:.1f})"
    text += f" {result['sec_per_kimg']:7.2f} sec/kimg"
    if result.get("ratio"):
        text += f"   plain {result['plain']['step_ms']['median']:8.1f} ms   ratio {result['ratio']:.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=240, help="for each case, at most")
    parser.add_argument("--periods", type=int, default=3, help="of 16 steps, for each case")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(run_case(json.loads(arguments.case), arguments.seconds, arguments.periods)))
        return
    cases = {name: case for name, case in CASES.items() if (arguments.only or "") in name}
    results = measured(cases, arguments.seconds, arguments.periods, __file__)
    if not arguments.only:
        harness.write("train_step", results)


if __name__ == "__main__":
    main()
