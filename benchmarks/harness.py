"""Timing that can be trusted on a noisy machine: candidates in turn, median and spread, the hardware in the file."""

from __future__ import annotations

import json
import os
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
    found: dict[str, Any] = {"cpu": cpu, "threads": torch.get_num_threads(), "gpu": None, "torch": torch.__version__}
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        found |= {"gpu": about.name, "gpu_memory_gb": about.total_memory / 2**30, "cuda": torch.version.cuda}
        found |= {"multiprocessors": about.multi_processor_count, "cudnn": torch.backends.cudnn.version()}
    return found


def write(name: str, results: object, folder: Path = RESULTS, quiet: bool = False) -> None:
    """Write NAME.json, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    content = {"hardware": hardware(), "date": time.strftime("%Y-%m-%d"), "results": results}
    path.with_suffix(".part").write_text(json.dumps(content, indent=1) + "\n")
    os.replace(path.with_suffix(".part"), path)
    if not quiet:
        print(f"wrote {path}")


def earlier(name: str, *folders: Path) -> dict[str, Any]:
    """The results that NAME.json has, in the first of these folders that has one, and was measured on this hardware."""
    for folder in folders:
        path = folder / f"{name}.json"
        if path.exists():
            content = json.loads(path.read_text())
            if content["hardware"] == hardware():
                results: dict[str, Any] = content["results"]
                return results
    return {}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
