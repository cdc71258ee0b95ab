"""Where the time of a step goes, by kind of operation: `python benchmarks/profile_step.py`. One thread, 16 steps.

`--device cuda`: by kernel, in milliseconds of the device a step, without CUDA graphs; and how long the device idled.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import harness
import torch
import train_step
from torch.profiler import ProfilerActivity, profile

from gan.bench.ceiling import synchronize
from gan.config import DataInfo
from gan.data.labels import LabelTable
from gan.networks import set_half_dtype
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.devices import prepare
from gan.training.state import TrainingState
from gan.training.step import TrainStep

_KEPT, _SHOWN = 60, 12  # kernels
CASES: dict[str, dict[str, Any]] = {
    "32 px, float32": {"res": 32, "precision": "fp32", "cbase": 4096, "cmax": 128},
    "32 px, bfloat16": {"res": 32, "precision": "bf16", "cbase": 4096, "cmax": 128},
    "64 px, bfloat16": {"res": 64, "precision": "bf16", "cbase": 4096, "cmax": 128},
    "32 px full width, bfloat16": {"res": 32, "precision": "bf16"},
}
KINDS = (  # the first that fits; names are parts of an operation's
    ("bias, activation, gain, clamp", ("bias_act", "leaky_relu", "hardtanh", "clamp")),
    ("matrix products: mapping, styles, demodulation, warp, wide weight gradients", ("mm", "bmm", "addmm", "baddbmm")),
    ("optimiser and guard", ("adam", "nan_to_num", "lerp")),
    ("sampling positions of the warp", ("grid_sampler", "remainder")),
    ("copies, casts, zeros", ("copy_", "fill_", "zero_", "cat", "empty", "to_copy", "clone")),
    ("modulation, noise, other elementwise", ("mul", "add", "sub", "div", "sum", "mean", "rsqrt", "square", "pow")),
)


def kind_of(event: Any) -> str:
    name = event.key.split("::")[-1].lower()
    if "convolution" in name:
        weight = event.input_shapes[2 if "backward" in name else 1]
        return "FIR filters" if len(weight) == 4 and weight[1] == 1 and weight[0] > 1 else "convolutions"
    if "upfirdn" in name:
        return "FIR filters"
    return next((kind for kind, parts in KINDS if any(part in name for part in parts)), "the rest, Python included")


class Run:
    """Steps of random images at p = 0.2, warmed up."""

    def __init__(self, res: int, **options: Any) -> None:
        options = {"data": "x", "batch": 16, **options}
        config = resolve(TrainOptions(**options), DataInfo("x", "x", 1000, res, res, 3))
        device, half_dtype = prepare(config)
        self.state = TrainingState(config, device)
        if self.state.augment is not None:
            self.state.augment.p.fill_(0.2)
        for network in (self.state.G, self.state.D):
            set_half_dtype(network, half_dtype)
        labels = LabelTable(torch.zeros([1, 0], device=device), torch.zeros([1000], dtype=torch.long, device=device))
        self.step = TrainStep(self.state, config, labels)
        shape = [config.batch_size, 3, res, res]
        self.images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
        self.indices = torch.arange(config.batch_size, device=device)
        self.steps(1)

    def steps(self, number: int) -> None:
        """From the beginning of a period."""
        self.state.progress.nimg = 0
        for _ in range(number):
            self.step(self.images, self.indices)


def shares(res: int, **options: Any) -> dict[str, float]:
    """{kind: its share of the time of 16 steps}"""
    run = Run(res, **options)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        run.steps(16)
    times: dict[str, float] = {}
    for event in profiled.key_averages(group_by_input_shape=True):
        times[kind_of(event)] = times.get(kind_of(event), 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return dict(sorted(((kind, time / total) for kind, time in times.items()), key=lambda item: -item[1]))


def on_device(device: str, **options: Any) -> dict[str, Any]:
    """Milliseconds of a step: of the clock, of the device, of each kernel; and how many are launched."""
    run = Run(device=device, cuda_graphs="off", **options)
    run.steps(16)
    synchronize(run.state.device)
    begin = time.perf_counter()
    run.steps(16)
    synchronize(run.state.device)
    wall = (time.perf_counter() - begin) / 16 * 1000
    cuda = device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as profiled:
        run.steps(16)
        synchronize(run.state.device)
    times, launches = {}, 0
    for event in profiled.key_averages():
        spent = event.self_device_time_total if cuda else event.self_cpu_time_total
        if spent > 0:
            times[event.key] = spent / 16 / 1000
            launches += event.count
    ordered = sorted(times.items(), key=lambda item: -item[1])
    return {
        "wall_ms": wall,
        "device_ms": sum(times.values()),
        "launches": launches / 16,
        "kernels_ms": dict(ordered[:_KEPT]),
        "others_ms": sum(spent for _, spent in ordered[_KEPT:]),
    }


def devices(device: str, rehearse: bool, only: str, out: Path) -> None:
    """The cases of train_step with kernels; written after each."""
    results = {}
    for name, shape in train_step.SHAPES.items():
        if only not in name:
            continue
        options = {**shape, **(train_step.REHEARSAL if rehearse else {}), **train_step.PRECISIONS["mixed"]}
        found = results[name] = on_device(device, **options)
        print(f"{name}: {found['wall_ms']:.1f} ms a step, the device works {found['device_ms']:.1f}", end="")
        print(f" in {found['launches']:.0f} kernels", flush=True)
        for kernel, spent in list(found["kernels_ms"].items())[:_SHOWN]:
            print(f"{spent:9.3f} ms {spent / found['device_ms']:6.1%}  {kernel[:100]}")
        harness.write(f"profile_{device}" + "_rehearsal" * rehearse, results, out, quiet=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="what --device cuda does, with a tiny network")
    parser.add_argument("--only", default="", help="cases of CUDA whose name contains this")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" or arguments.rehearse:
        devices(arguments.device, arguments.rehearse, arguments.only, arguments.out)
        return
    torch.set_num_threads(1)
    results = {name: shares(**case) for name, case in CASES.items()}
    kinds = list(next(iter(results.values())))
    print(f"{'share of a step':80s}" + "".join(f"{name:>28s}" for name in results))
    for kind in kinds:
        print(f"{kind:80s}" + "".join(f"{found.get(kind, 0):28.1%}" for found in results.values()))
    harness.write("profile", results, arguments.out)


if __name__ == "__main__":
    main()
