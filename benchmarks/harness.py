"""Timing that can be trusted on a noisy machine: candidates in turn, median and spread, the hardware in the file."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # run from a checkout, installed or not

RESULTS = Path(__file__).parent / "results"


def alternate(candidates: dict[str, Callable[[], object]], rounds: int, warmup: int = 1) -> dict[str, dict[str, float]]:
    """Run the candidates A, B, A, B, ...; milliseconds per call: median, smallest, largest."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for i in range(rounds + warmup):
        for name, run in candidates.items():
            _synchronize()
            begin = time.perf_counter()
            run()
            _synchronize()
            if i >= warmup:
                times[name].append((time.perf_counter() - begin) * 1000)
    return {
        name: {"median_ms": statistics.median(t), "min_ms": min(t), "max_ms": max(t), "runs": len(t)}
        for name, t in times.items()
    }


def hardware() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": gpu, "torch": torch.__version__}


def write(name: str, results: object) -> None:
    """Write benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "results": results}
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {path}")


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
