"""The multiplications that a step cannot do without, from the shapes of the networks' weights.

Not what an implementation happens to execute: a step that computes something twice gains no share of the ceiling by it.
A multiplication with its addition counts as two operations (FLOP). FIR filters, activations and other elementwise work
are left out; they are bound by bandwidth.
"""

from __future__ import annotations

import re

import torch

from gan.networks import Discriminator, Generator

Flops = dict[torch.dtype, float]
"""operations by the dtype they are computed in"""

FORWARD, INPUT_ONLY, TRAINED = 1, 2, 3  # in forward passes: the output; and the input's gradient; and the weights'
# With a penalty on a gradient: forward, inner gradient, then both of those differentiated towards input and weights.
PENALISED = 6


def network_flops(network: Generator | Discriminator, device: torch.device) -> Flops:
    """Operations of a forward pass of one sample."""
    total: Flops = {}
    height, width = network.img_size
    top = max(network.synthesis.block_resolutions if isinstance(network, Generator) else network.block_resolutions)
    for name, weight in network.state_dict().items():
        if not name.endswith("weight"):
            continue
        block, layer = _place(name)
        dtype, pixels = weight.dtype, 1
        if weight.ndim == 4:  # a convolution, done at the lower of its two resolutions
            owner = network.synthesis if isinstance(network, Generator) else network
            halves = layer in (("conv0",) if isinstance(network, Generator) else ("conv1", "skip"))
            level = block // 2 if halves and block > 4 else block
            pixels = (height * level // top) * (width * level // top)
            compute_dtype = getattr(getattr(owner, f"b{block}"), "compute_dtype", None)
            dtype = weight.dtype if compute_dtype is None else compute_dtype(device, False)
        total[dtype] = total.get(dtype, 0.0) + 2.0 * weight.numel() * pixels
    return total


def phase_flops(G: Generator, D: Discriminator, device: torch.device, batch: int, pl_batch: int) -> dict[str, Flops]:
    """{phase: operations of one call on a batch}. Layers that Freeze-D holds count as trained ones."""
    g, d = network_flops(G, device), network_flops(D, device)
    return {
        "Gmain": _sum((g, TRAINED * batch), (d, INPUT_ONLY * batch)),
        "Greg": _sum((g, PENALISED * pl_batch)),
        "Dmain": _sum((g, FORWARD * batch), (d, 2 * TRAINED * batch)),
        "Dreg": _sum((d, PENALISED * batch)),
    }


def seconds_at(flops: Flops, rates: dict[torch.dtype, float]) -> float:
    """How long the operations take at `rates` (FLOP/s), each dtype at its own."""
    return sum(count / rates[dtype] for dtype, count in flops.items())


def _place(name: str) -> tuple[int, str]:
    """The number of the block that a weight belongs to and the layer's name; 0 for the mapping network."""
    found = re.fullmatch(r"(?:synthesis\.)?b(\d+)\.(\w+)\..*weight", name)
    return (int(found[1]), found[2]) if found else (0, "")


def _sum(*parts: tuple[Flops, float]) -> Flops:
    total: Flops = {}
    for flops, factor in parts:
        for dtype, count in flops.items():
            total[dtype] = total.get(dtype, 0.0) + count * factor
    return total
