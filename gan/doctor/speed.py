"""How fast a kernel is beside PyTorch's operations: a call and its gradient, in a fraction of a second."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from gan.bench.ceiling import synchronize
from torch_utils.ops import kernels
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.noise_bias_act import noise_bias_act
from torch_utils.ops.upfirdn2d import setup_filter, upsample2d
from torch_utils.ops.warp import warp

_TIMINGS = 5
_LAYER = {"cuda": [32, 128, 64, 64], "cpu": [8, 64, 64, 64]}  # [N, C, H, W] by device: in the middle of a network
_PICTURES = [32, 3, 128, 128]
Operation = Callable[[torch.Tensor], torch.Tensor]


def times_as_fast(name: str, device: torch.device) -> float | None:
    """The time of the operation `name` without our kernels by that with them: medians of a few, taken in turn.

    None if there is no sample of it, or no memory for that.
    """
    try:
        return _ratio(name, device)
    except torch.OutOfMemoryError:
        return None


def _ratio(name: str, device: torch.device) -> float | None:
    sample = _sample(name, device)
    if sample is None:
        return None
    operation, x = sample
    x.requires_grad_()
    dy = torch.randn_like(operation(x))
    ours: list[float] = []
    plain: list[float] = []
    for _ in range(_TIMINGS):
        ours.append(_seconds(operation, x, dy))
        with kernels.disabled():
            if not plain:
                _seconds(operation, x, dy)  # what the first call prepares does not count; `dy` was ours
            plain.append(_seconds(operation, x, dy))
    return statistics.median(plain) / statistics.median(ours)


def _seconds(operation: Operation, x: torch.Tensor, dy: torch.Tensor) -> float:
    """Of the operation and the gradient of its input, as training has them."""
    synchronize(x.device)
    begin = time.perf_counter()
    for _ in range(10 if x.is_cuda else 1):  # waiting for a GPU takes about as long as so little work
        torch.autograd.grad(operation(x), x, dy)
    synchronize(x.device)
    return time.perf_counter() - begin


def _sample(name: str, device: torch.device) -> tuple[Operation, torch.Tensor] | None:
    """What a kernel computes, of x alone, and x as layers have it."""
    shape, dtype = _LAYER[device.type], torch.float16 if device.type == "cuda" else torch.float32
    x = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
    b = torch.zeros(shape[1], device=device)
    if name == "bias_act":
        b = b.to(dtype)
        return lambda x: bias_act(x, b, act="lrelu", clamp=256), x
    if name == "noise_bias_act":
        scale, noise = torch.ones(shape[:2], device=device), torch.randn(shape[2:], device=device)
        strength = torch.ones([], device=device)
        return lambda x: noise_bias_act(x, scale, noise, strength, b, act="lrelu", clamp=256), x
    if name == "upfirdn2d":
        f = setup_filter([1, 3, 3, 1], device)
        return lambda x: upsample2d(x, f), x
    if name == "warp":
        turned = torch.tensor([[0.9, 0.4, 1.5], [-0.4, 0.9, 2.5], [0, 0, 1]], device=device)
        inverse, lowpass = turned.expand(_PICTURES[0], 3, 3).contiguous(), torch.full([12], 1 / 12, device=device)
        return lambda x: warp(x, inverse, lowpass), torch.randn(_PICTURES, device=device)
    return None
