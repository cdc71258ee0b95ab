"""Where the time of a step goes, by kind of operation: `python benchmarks/profile_step.py`. One thread, 16 steps."""

from __future__ import annotations

import argparse
from typing import Any

import harness
import torch
from torch.profiler import ProfilerActivity, profile

from gan.config import DataInfo
from gan.data.labels import LabelTable
from gan.networks import set_half_dtype
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.devices import prepare
from gan.training.state import TrainingState
from gan.training.step import TrainStep

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


def shares(res: int, **options: Any) -> dict[str, float]:
    """{kind: its share of the time of 16 steps}"""
    config = resolve(TrainOptions(data="x", batch=16, **options), DataInfo("x", "x", 1000, res, res, 3))
    device, half_dtype = prepare(config)
    state = TrainingState(config, device)
    if state.augment is not None:
        state.augment.p.fill_(0.2)
    for network in (state.G, state.D):
        set_half_dtype(network, half_dtype)
    step = TrainStep(state, config, LabelTable(torch.zeros([1, 0]), torch.zeros([1000], dtype=torch.long)))
    images, indices = torch.randint(0, 256, [16, 3, res, res], dtype=torch.uint8), torch.arange(16)
    step(images, indices)
    state.progress.nimg = 0
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        for _ in range(16):
            step(images, indices)
    times: dict[str, float] = {}
    for event in profiled.key_averages(group_by_input_shape=True):
        times[kind_of(event)] = times.get(kind_of(event), 0.0) + event.self_cpu_time_total
    total = sum(times.values())
    return dict(sorted(((kind, time / total) for kind, time in times.items()), key=lambda item: -item[1]))


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    results = {name: shares(**case) for name, case in CASES.items()}
    kinds = list(next(iter(results.values())))
    print(f"{'share of a step':80s}" + "".join(f"{name:>28s}" for name in results))
    for kind in kinds:
        print(f"{kind:80s}" + "".join(f"{found.get(kind, 0):28.1%}" for found in results.values()))
    harness.write("profile", results)


if __name__ == "__main__":
    main()
