"""Several processes: what they say to each other costs, and what it makes of a step: `python benchmarks/processes.py`.

* collectives: `World.average` and `World.agree` against bytes, over the loopback (gloo).
* steps: real runs of `train.py` at equal images per process, one thread each: one process alone, two runs that know
  nothing of each other (they share caches and memory, and are what two processes could reach at best), two processes.
  On Linux, with cores 0 and 1 and nothing beside it.
* model: what published figures of networks make of the predicted steps of a GPU. Nothing in it is measured.

Results are in benchmarks/results/processes.json; `--only` renews a part. `python benchmarks/report.py` prints them, and
docs/scaling.md says what they mean. What else a step's cost grows with is `scaling.py`'s.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch

from gan.bench.images import random_dataset
from gan.config import DataInfo, TrainConfig
from gan.resolve import resolve
from gan.tracking import jsonl
from gan.train_options import TrainOptions
from gan.training.disk import network_shapes
from gan.training.run_folder import read_options
from torch_utils import distributed
from torch_utils.world import World, join

ROOT = Path(__file__).parents[1]
NAME = "processes"
SIZES = tuple(4**i for i in range(1, 14))  # bytes, to 64 MB
# A step has one reduction a phase: G main and D main, G path length every 4th, D R1 every 16th.
G_REDUCTIONS, D_REDUCTIONS = 1 + 1 / 4, 1 + 1 / 16


@dataclasses.dataclass(frozen=True)
class Case:
    """A run whose steps are timed."""

    res: int
    images: int
    """a process"""
    width: tuple[str, ...] = ()
    """options"""


CASES = {
    "64 px, cbase 4096, cmax 128, 16 images": Case(64, 16, ("--cbase", "4096", "--cmax", "128")),
    "32 px, full width, 8 images": Case(32, 8),
}


# ---- collectives


def collectives(processes: int) -> dict[str, Any]:
    """Of so many processes on this machine."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc-per-node={processes}",
        "--master-addr=127.0.0.1",
    ]
    command += [f"--master-port={free_port()}", __file__, "--member"]
    output = subprocess.run(command, env=one_thread(), stdout=subprocess.PIPE, text=True, check=True).stdout
    (line,) = [line for line in output.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(line)
    latency = min(found["average_us"].values())
    largest = max(map(int, found["average_us"]))
    seconds = (found["average_us"][str(largest)] - latency) / 1e6
    return {**found, "latency_us": latency, "bus_gb_per_second": on_wire(largest, processes) / seconds / 1e9}


def member() -> None:
    """One of the processes that are timed."""
    torch.set_num_threads(1)
    place = distributed.place()
    assert place is not None
    world = join(place, 60)
    average_us = {}
    for size in SIZES:
        flat = torch.ones(size // 4)
        average_us[size] = microseconds(lambda flat=flat: world.average(flat, "a test"), world)
    agree_us = microseconds(lambda: world.agree(0, "a step"), world)
    if world.is_first:
        print(json.dumps({"average_us": average_us, "agree_us": agree_us}), flush=True)
    world.close()


def microseconds(call: Callable[[], object], world: World, seconds: float = 1.0) -> float:
    """Median of calls that all ranks make, as many as rank 0 has time for."""
    times: list[float] = []
    begin = time.perf_counter()
    while world.share(len(times) < 5 or time.perf_counter() - begin < seconds, "whether to go on"):
        for _ in range(4):
            here = time.perf_counter()
            call()
            times.append((time.perf_counter() - here) * 1e6)
    return statistics.median(times[4:])


# ---- steps


def steps(case: Case, ticks: int, measured: dict[str, float] | None) -> dict[str, Any]:
    """Milliseconds a step: alone, beside a stranger, and of two processes; `measured`: the collectives of two."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        random_dataset(folder / "data.zip", (case.res, case.res))

        def start(outdir: str, processes: int, core: int | None = None) -> subprocess.Popen[str]:
            batch = case.images * processes
            command: list[object] = [sys.executable, ROOT / "train.py", "--data", folder / "data.zip", *case.width]
            command += [
                "--metrics",
                "none",
                "--batch",
                batch,
                "--batch-gpu",
                case.images,
                "--outdir",
                folder / outdir,
                "--device",
                "cpu",
                "--snap",
                1000,
                "--gpus",
                processes,
            ]
            tick = 16 * batch / 1000  # 16 steps: all phases in their proportions
            command += ["--tick", tick, "--kimg", 1000, "--workers", 0]
            pin = [] if core is None else ["taskset", "-c", core]
            return subprocess.Popen(
                [str(word) for word in (*pin, *command)], env=one_thread(), stdout=subprocess.DEVNULL, text=True
            )

        def measure(**started: subprocess.Popen[str]) -> None:
            """Let the runs go until each has the ticks that are wanted."""
            try:
                while any(len(records(folder / name)) < 2 + ticks for name in started):
                    assert all(process.poll() is None for process in started.values()), "a run has ended by itself"
                    time.sleep(0.2)
            finally:
                for process in started.values():
                    process.terminate()
                codes = [process.wait() for process in started.values()]
            assert codes == [130] * len(codes), codes

        measure(alone=start("alone", 1, core=0))
        measure(stranger=start("stranger", 1, core=0), other=start("other", 1, core=1))
        measure(pair=start("pair", 2))
        found = {name: timing(folder / name, ticks) for name in ("alone", "stranger", "pair")}
        if measured is not None:
            sizes = gradient_bytes(read_options(next((folder / "pair").glob("0*"))))
            found["pair"]["modelled_reduce_ms"] = reductions_ms(
                *sizes, 2, measured["bus_gb_per_second"], measured["latency_us"]
            )
    alone, stranger, pair = (found[name]["step_ms"]["median"] for name in found)
    return {
        **found,
        "images_per_process": case.images,
        "efficiency": alone / pair,
        "efficiency_against_strangers": stranger / pair,
        "share_of_reductions": found["pair"]["reduce_ms"] / pair,
    }


def timing(outdir: Path, ticks: int) -> dict[str, Any]:
    """Of a run: milliseconds a step and in reductions a step, median and spread of whole ticks of 16 steps."""
    lines = records(outdir)[2 : 2 + ticks]  # the first tick is one step, and MLflow is loaded in the second
    ms = [line["Timing/sec_per_tick"]["mean"] * 1000 / 16 for line in lines]
    reduce_ms = [line.get("Timing/reduce", {"mean": 0.0})["mean"] for line in lines]  # a call
    spread = {"median": statistics.median(ms), "min": min(ms), "max": max(ms), "runs": len(ms)}
    return {"step_ms": spread, "reduce_ms": statistics.median(reduce_ms) * (G_REDUCTIONS + D_REDUCTIONS)}


def records(outdir: Path) -> list[dict[str, Any]]:
    """The ticks of the run in a folder until now."""
    return [record for path in outdir.glob("0*/stats.jsonl") for record in jsonl.read_records(path)]


# ---- model


@dataclasses.dataclass(frozen=True)
class Fabric:
    """What connects GPUs. Published figures; where they come from."""

    name: str
    ranks: int
    bus_gb: float
    """GB per second of one rank's bus, as nccl-tests defines it, for messages of 100 MB"""
    latency_us: float
    """of a small all-reduce"""
    agree_us: float
    """of the message over the CPU at each step's start"""
    source: str


FABRICS = (
    Fabric(
        "8 GPUs, NVLink 4", 8, 250, 15, 300, "nccl-tests#212, #272: 370 to 475 for longer messages; DeepEP#303: 10 us"
    ),
    Fabric("8 GPUs, PCIe 5 alone", 8, 35, 45, 300, "8 x H100 PCIe 35 to 45; latency nccl#1530 (8 x RTX 4090)"),
    Fabric(
        "8 nodes of 8 GPUs, 8 x 400 Gb/s InfiniBand each",
        64,
        200,
        80,
        600,
        "nccl-tests#290: 46 to 48 a card; the rest assumed",
    ),
    Fabric("8 nodes of 1 GPU, 400 Gb/s InfiniBand", 8, 41, 60, 500, "nccl-tests#232: 41 at 32 MB; latency assumed"),
    Fabric("8 nodes of 1 GPU, 100 Gb/s Ethernet, TCP", 8, 6, 200, 500, "nccl#398: 6 sustained; latency assumed"),
)
# Seconds per thousand images of one H200, predicted (docs/performance.md), and the images a step that this was for.
PREDICTED = {"auto 256": (1.8, 16), "auto 512": (6.5, 8), "paper1024": (12.5, 4)}
GPUS = 8  # whose images each of any number of GPUs has
LAUNCHES_MS = 5.0  # some 2,000 launches of 2.5 us, whatever the number of images
BACKWARD = 0.5  # of a step, behind which reductions could be hidden
MEMORY_GB = 3900  # GB/s of an H200, for random numbers that are written


def model(preset: str, fabric: Fabric) -> dict[str, float]:
    """A step of each GPU: computing, and after it what is said; or, if that were hidden, beside it."""
    sec_per_kimg, images = PREDICTED[preset]
    G_bytes, D_bytes, draws = numbers(preset)
    own = images_per_gpu(preset)
    alone = step_ms(sec_per_kimg, images, own)
    reductions = reductions_ms(G_bytes, D_bytes, fabric.ranks, fabric.bus_gb, fabric.latency_us)
    # Noise is drawn for the whole batch by every rank, in both main phases and for half of it in path length.
    more_draws = 4 * draws * own * (fabric.ranks - 1) * (2 + 1 / 8) / MEMORY_GB / 1e6
    besides = fabric.agree_us / 1000 + more_draws
    hidden = min(reductions, alone * BACKWARD)
    return {
        "images_per_gpu": own,
        "alone_ms": alone,
        "reductions_ms": reductions,
        "agree_ms": fabric.agree_us / 1000,
        "more_draws_ms": more_draws,
        "efficiency": alone / (alone + reductions + besides),
        "efficiency_if_hidden": alone / (alone + reductions - hidden + besides),
        "sec_per_kimg": (alone + reductions + besides) / (own * fabric.ranks),
    }


def modelled() -> dict[str, Any]:
    """All presets on all fabrics, with what went into it."""
    names = ("G_bytes", "D_bytes", "noise_values")
    return {
        "sizes": {preset: dict(zip(names, numbers(preset), strict=True)) for preset in PREDICTED},
        "fabrics": {fabric.name: dataclasses.asdict(fabric) for fabric in FABRICS},
        "cases": {preset: {fabric.name: model(preset, fabric) for fabric in FABRICS} for preset in PREDICTED},
    }


def step_ms(sec_per_kimg: float, images: int, own: int) -> float:
    """Of one GPU with its `own` number of images: launches take their time, the rest grows with the images."""
    predicted = sec_per_kimg * images
    return LAUNCHES_MS + (predicted - LAUNCHES_MS) * own / images


def images_per_gpu(preset: str) -> int:
    """What the preset gives each of `GPUS`."""
    return config_of(preset).batch_size // GPUS


def reductions_ms(G_bytes: int, D_bytes: int, ranks: int, bus_gb: float, latency_us: float) -> float:
    """Of a step."""
    wire = on_wire(G_bytes, ranks) * G_REDUCTIONS + on_wire(D_bytes, ranks) * D_REDUCTIONS
    return wire / bus_gb / 1e6 + (G_REDUCTIONS + D_REDUCTIONS) * latency_us / 1000


def numbers(preset: str) -> tuple[int, int, int]:
    """Bytes of the gradients of G and of D, and noise values of one image."""
    config = config_of(preset)
    G, _ = network_shapes(config)
    noise = sum(buffer.numel() for name, buffer in G.named_buffers() if name.endswith("noise_const"))
    return (*gradient_bytes(config), noise)


def gradient_bytes(config: TrainConfig) -> tuple[int, int]:
    """Of G and of D."""
    G, D = (4 * sum(p.numel() for p in network.parameters()) for network in network_shapes(config))
    return G, D


def config_of(preset: str) -> TrainConfig:
    """The configuration of a preset and a size, such as "auto 256", on `GPUS`."""
    size = int(preset.removeprefix("auto ").removeprefix("paper"))
    cfg = preset.split()[0]
    data = DataInfo("data.zip", "data", 10000, size, size, 3, 0, None)
    return resolve(TrainOptions(data="data.zip", cfg=cfg, gpus=GPUS), data)


# ---- all of it


def on_wire(size: int, ranks: int) -> float:
    """Bytes that each rank sends in a ring that reduces `size` bytes."""
    return 2 * (ranks - 1) / ranks * size


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def free_port() -> int:
    with contextlib.closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def parts(ticks: int, only: list[str], results: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part and what it found; `results`: what is known."""
    if "collectives" in only:
        yield "collectives", {f"{n} processes": collectives(n) for n in (2, 4)}
    if "model" in only:
        yield "model", modelled()
    if "steps" in only:
        of_two = results.get("collectives", {}).get("2 processes")
        yield "steps", {name: steps(case, ticks, of_two) for name, case in CASES.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    names = ("collectives", "model", "steps")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--ticks", type=int, default=2, help="of 16 steps, for each run of `steps`")
    parser.add_argument("--member", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.member:
        member()
        return
    results = harness.earlier(NAME, harness.RESULTS)
    for name, found in parts(arguments.ticks, arguments.only, results):
        results[name] = {"load_before": os.getloadavg()[0], **found}
        harness.write(NAME, results)
        print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
