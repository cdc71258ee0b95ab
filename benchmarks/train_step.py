"""Whole steps against a plain implementation, all phases in their proportions: `python benchmarks/train_step.py`.

Each case is a process of its own in which ours and plain take turns (gan.bench.measure, the core of `gan bench`), so
that memory and threads of one do not touch another. Augmentation bgc, p held.

`--device cuda`: the sizes that people train, the most telling combinations of precision, CUDA graphs and kernels first;
every result is written at once and not measured again, and `--minutes` ends it in time. `--rehearse` takes the same
cases on whatever device there is with networks that a test could have.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
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


# What auto makes of a resolution for one GPU, and the batches that published figures of 8 GPUs have on each.
SHAPES: dict[str, dict[str, Any]] = {
    "auto 256": {"res": 256},
    "auto 64": {"res": 64},
    "stylegan2 1024 b4": {"res": 1024, "cfg": "stylegan2", "batch": 4, "batch_gpu": 4},
    "auto 512": {"res": 512},
    "paper256 b8": {"res": 256, "cfg": "paper256", "batch": 8, "batch_gpu": 8},
    "auto 128": {"res": 128},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "mixed": {"precision": "auto", "tf32": True},
    "TF32": {"precision": "fp32", "tf32": True},
    "float32": {"precision": "fp32", "tf32": False},
}
GRAPHS = {"graphs": "auto", "no graphs": "off"}
OPS = {"kernels": "auto", "ref": "ref"}
REHEARSAL: dict[str, Any] = {"res": 16, "cbase": 128, "cmax": 8, "map_depth": 2, "batch": 8, "batch_gpu": 8}


def cuda_cases() -> dict[str, dict[str, Any]]:
    """The most telling first."""
    cases: dict[str, dict[str, Any]] = {}

    def add(precision: str, graphs: str, ops: str, shapes: Iterable[str] = SHAPES, **more: Any) -> None:
        label = "".join(f", {key} {value:g}" if key == "p" else f", against {key}" for key, value in more.items())
        for shape in shapes:
            options = {**SHAPES[shape], **PRECISIONS[precision], "cuda_graphs": GRAPHS[graphs], "ops": OPS[ops]}
            name = f"{shape}, {precision}, {graphs}, {ops}{label}"
            cases.setdefault(name, {**options, "plain": False, "device": "cuda", "cache": "auto", **more})

    add("mixed", "graphs", "kernels")
    add("mixed", "graphs", "ref")
    add("TF32", "graphs", "kernels")
    add("float32", "graphs", "kernels")
    add("mixed", "no graphs", "kernels")
    add("mixed", "no graphs", "ref")
    add("mixed", "graphs", "kernels", ["auto 256", "auto 64"], plain=True)
    add("mixed", "graphs", "kernels", ["auto 256"], p=0.0)
    add("mixed", "graphs", "kernels", ["auto 256"], p=0.6)
    for precision, graphs, ops in itertools.product(PRECISIONS, GRAPHS, OPS):
        add(precision, graphs, ops)
    return cases


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
        config = resolve(TrainOptions(**{"data": str(dataset.path), "cache": "ram", **case}), info)
        config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, initial_p=p))
        result = measure(config, dataset, against_plain=plain, seconds=seconds, periods=periods)
    return result.to_dict()


def measured(
    cases: dict[str, dict[str, Any]],
    seconds: float,
    periods: int,
    script: str,
    *,
    done: dict[str, dict[str, Any]] | None = None,
    keep: Callable[[dict[str, dict[str, Any]]], None] = lambda results: None,
    minutes: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Every case in a process of its own; one that fails has {"error": its last line}.

    Args:
        seconds, periods: of each, at most.
        done: results that are there already.
        keep: is given all results after each case.
        minutes: for all; what does not fit is left out.
    """
    environment = {"GOMP_SPINCOUNT": "10000", **os.environ}  # as train.py sets it
    begin, longest = time.monotonic(), 0.0
    results = dict(done or {})
    for name, case in cases.items():
        if name in results and "error" not in results[name]:
            continue
        started = time.monotonic()
        left = 60 * minutes - (started - begin)
        if left < 1.2 * longest or left < 10:
            print(f"no time for {name} and what follows it", flush=True)
            break
        command = [sys.executable, script, "--case", json.dumps(case), "--seconds", str(seconds)]
        command += ["--periods", str(periods)]
        results[name] = outcome(command, environment, None if math.isinf(left) else left)
        print(line_of(name, results[name]), flush=True)
        keep(results)
        longest = max(longest, time.monotonic() - started)
    return results


def outcome(command: list[str], environment: dict[str, str], seconds: float | None) -> dict[str, Any]:
    """What the process of a case found: the last line that it printed, or why there is none."""
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"error": "there was not enough time"}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {"error": next(reversed(done.stderr.splitlines()), f"ended with {done.returncode}")}
    result: dict[str, Any] = json.loads(lines[-1])
    return result | {"said": lines[:-1]} if lines[:-1] else result


def line_of(name: str, result: dict[str, Any]) -> str:
    """A result in one line."""
    if "error" in result:
        return f"{name:28s} {result['error']}"
    step = result["step_ms"]
    text = f"{name:28s} {step['median']:8.1f} ms a step ({step['min']:.1f} to {step['max']:.1f})"
    text += f" {result['sec_per_kimg']:7.2f} sec/kimg {result['ceiling']['share']:4.0%} of the ceiling"
    text += f" {result['memory']['peak_gb']:6.2f} GB"
    if result.get("ratio"):
        text += f"   plain {result['plain']['step_ms']['median']:8.1f} ms   ratio {result['ratio']:.2f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="the cases of CUDA with a tiny network on --device")
    parser.add_argument("--seconds", type=float, help="for each case, at most  [default: 240, on CUDA 60]")
    parser.add_argument("--periods", type=int, help="of 16 steps, for each case  [default: 3, on CUDA 5]")
    parser.add_argument("--only", help="cases whose name contains this")
    parser.add_argument("--minutes", type=float, default=math.inf, help="for all cases")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder; what is there is not measured again")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    seconds, periods = arguments.seconds or (60 if cuda else 240), arguments.periods or (5 if cuda else 3)
    if arguments.case:
        print(json.dumps(run_case(json.loads(arguments.case), seconds, periods)))
        return
    cases, name = CASES, "train_step"
    if cuda or arguments.rehearse:
        cases, name = cuda_cases(), f"train_step_{arguments.device}" + "_rehearsal" * arguments.rehearse
    if arguments.rehearse:
        cases = {key: {**case, **REHEARSAL, "device": arguments.device} for key, case in cases.items()}
    cases = {key: case for key, case in cases.items() if (arguments.only or "") in key}
    if name == "train_step":
        results = measured(cases, seconds, periods, __file__, minutes=arguments.minutes)
        if not arguments.only:
            harness.write(name, results, arguments.out)
    else:
        results = measured(
            cases,
            seconds,
            periods,
            __file__,
            done=harness.earlier(name, arguments.out, harness.RESULTS),
            keep=lambda found: harness.write(name, found, arguments.out, quiet=True),
            minutes=arguments.minutes,
        )
    if any("error" in results.get(key, {}) for key in cases):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
