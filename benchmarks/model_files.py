"""Saving and opening a snapshot of G, D and G_ema at 256 px: `python benchmarks/model_files.py`.

Against Python's own pickle: `pickle.dump` of the live networks and, which executes what the file asks for,
`pickle.load` of our snapshot. Each measurement is a process of its own, so that its peak of memory is its own; they
take turns. A stall is the longest time for which another thread, as training beside it, gets no turn.
"""

from __future__ import annotations

import argparse
import gc
import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import torch

from gan import models
from gan.networks import Discriminator, Generator

_WIDTH = {"channel_base": 16384, "channel_max": 512}
WAYS = ("save, ours", "save, plain", "open, ours", "open, plain")


def networks() -> dict[str, torch.nn.Module]:
    """Those of the preset `auto` at 256 px."""
    torch.manual_seed(0)
    G, G_ema = (Generator(512, 0, 512, 256, 3, {"num_layers": 2}, _WIDTH).requires_grad_(False) for _ in range(2))
    return {"G": G, "D": Discriminator(0, 256, 3, **_WIDTH).requires_grad_(False), "G_ema": G_ema}


def save_plain(path: Path, live: dict[str, torch.nn.Module]) -> None:
    """What one would write first."""
    with open(path, "wb") as file:
        pickle.dump(live, file, protocol=4)


def open_plain(path: Path) -> Any:
    """The same, the other way round."""
    with open(path, "rb") as file:
        return pickle.load(file)


def measure(way: str, snapshot: Path, scratch: Path) -> dict[str, float]:
    """Seconds, and MB of memory on top of what was there before."""
    live = networks() if way.startswith("save") else {}
    run: Callable[[], Any] = {
        "save, ours": lambda: models.save(scratch, **live, training_set_kwargs={}),
        "save, plain": lambda: save_plain(scratch, live),
        "open, ours": lambda: models.load(snapshot),
        "open, plain": lambda: open_plain(snapshot),
    }[way]
    gc.freeze()  # as training does
    before, cpu, wall = peak_mb(), time.process_time(), time.perf_counter()
    kept = run()
    result = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "peak_mb": peak_mb() - before}
    del kept
    result["bytes"] = scratch.stat().st_size if scratch.exists() else snapshot.stat().st_size
    return {**result, "stall_ms": longest_stall_ms(run)}


def peak_mb() -> float:
    """The most memory that this process has had (Linux; getrusage would count that of the process that started it)."""
    status = Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))) / 1000


def longest_stall_ms(run: Callable[[], Any]) -> float:
    """How long this thread is kept from running while another one does it."""
    thread = threading.Thread(target=run)
    thread.start()
    longest, last = 0.0, time.perf_counter()
    while thread.is_alive():
        time.sleep(0.0005)
        now = time.perf_counter()
        longest, last = max(longest, now - last), now
    return 1000 * longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--one", nargs=3, metavar=("WAY", "SNAPSHOT", "SCRATCH"), help="measure once, print JSON")
    arguments = parser.parse_args()
    if arguments.one:
        torch.set_num_threads(1)
        way, snapshot, scratch = arguments.one
        print(json.dumps(measure(way, Path(snapshot), Path(scratch))))
        return
    with tempfile.TemporaryDirectory() as folder:
        snapshot, scratch = Path(folder) / "snapshot.pkl", Path(folder) / "scratch.pkl"
        live = networks()
        models.save(snapshot, **live, training_set_kwargs={})
        tensors = [tensor for network in live.values() for tensor in network.state_dict().values()]
        rounds: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(arguments.rounds):
            for way in WAYS:
                scratch.unlink(missing_ok=True)
                command = [sys.executable, __file__, "--one", way, str(snapshot), str(scratch)]
                rounds[way].append(json.loads(subprocess.run(command, check=True, capture_output=True).stdout))
    results: dict[str, Any] = {"tensor_bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors)}
    for way, found in rounds.items():
        plain = rounds[way.replace("ours", "plain")]
        results[way] = {
            **{key: spread([turn[key] for turn in found]) for key in found[0]},
            "wall_to_plain": statistics.median(b["wall"] / a["wall"] for a, b in zip(found, plain, strict=True)),
        }
        shown = {key: value["median"] for key, value in results[way].items() if isinstance(value, dict)}
        besides = f"{shown['cpu']:.2f} s of processor, +{shown['peak_mb']:.0f} MB, stall {shown['stall_ms']:.1f} ms"
        print(f"{way:12s} {shown['wall']:.2f} s, {results[way]['wall_to_plain']:.2f} x plain's speed; {besides}")
    harness.write("model_files", results)


def spread(values: list[float]) -> dict[str, float]:
    """Median and extremes."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


if __name__ == "__main__":
    main()
