"""What the hardware can do at best: the rate of matrix products and of copies, measured."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import torch

from gan.training.devices import allow_tf32
from gan.training.resources import DTYPE_NAMES

_LARGEST = 8192
_ENOUGH_SECONDS = 0.02  # a product that takes this long is not bound by its launch


@dataclasses.dataclass(frozen=True)
class Ceiling:
    """Rates that large plain operations reach."""

    matmul: dict[str, float]
    """FLOP/s by the name of the precision; tf32 is float32 with TF32 allowed, on NVIDIA GPUs"""
    copy: float
    """bytes/s, read and written"""


def precision_name(dtype: torch.dtype, device: torch.device, tf32: bool) -> str:
    """The name of the precision that products of `dtype` are computed in."""
    return "tf32" if dtype == torch.float32 and tf32 and device.type == "cuda" else DTYPE_NAMES[dtype]


def measure_ceiling(device: torch.device, dtypes: set[torch.dtype], tf32: bool, seconds: float = 0.3) -> Ceiling:
    """The rates of float32, with and without TF32, and of `dtypes`, about `seconds` each; leaves TF32 at `tf32`."""
    rates = {}
    for allowed in (False, True) if device.type == "cuda" else (False,):
        allow_tf32(allowed)
        rates[precision_name(torch.float32, device, allowed)] = matmul_rate(device, torch.float32, seconds)
    allow_tf32(tf32)
    for dtype in sorted(dtypes - {torch.float32}, key=str):
        rates[precision_name(dtype, device, tf32)] = matmul_rate(device, dtype, seconds)
    return Ceiling(rates, copy_rate(device, seconds))


def matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the product of two large square matrices: the best of several, in the layout the hardware likes."""
    size = 256
    while True:
        a, b = (torch.randn([size, size], device=device).to(dtype) for _ in range(2))
        # The second factor transposed, as a linear layer has it.
        best = best_seconds(lambda x=a, y=b: torch.mm(x, y.t()), device, 0)  # type: ignore[misc]
        if size >= _LARGEST or best > min(_ENOUGH_SECONDS, seconds):
            break
        size *= 2
    best = min(best, best_seconds(lambda: torch.mm(a, b.t()), device, seconds))
    return 2 * size**3 / best


def copy_rate(device: torch.device, seconds: float = 0.3) -> float:
    """Bytes per second, read and written, of copying a tensor that no cache holds."""
    size = 2**30 if device.type == "cuda" else 2**28
    source = torch.arange(size // 8, dtype=torch.int64, device=device)  # zeros may be faster
    target = torch.ones_like(source)  # touched: its pages are there
    return 2 * size / best_seconds(lambda: target.copy_(source), device, seconds)


def best_seconds(run: Callable[[], object], device: torch.device, seconds: float) -> float:
    """The shortest of the calls that fit in; one at least, after one that does not count."""
    best, end = float("inf"), 0.0
    for i in range(1000):
        synchronize(device)
        begin = time.perf_counter()
        run()
        synchronize(device)
        now = time.perf_counter()
        if i == 0:
            end = now + seconds
        else:
            best = min(best, now - begin)
            if now > end:
                break
    return best


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
