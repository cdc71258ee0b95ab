"""Arithmetic that measurements can rely on: float64 where there is any, float32 products with all their bits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from gan.errors import GanError


def float64_device(device: torch.device) -> torch.device:
    """`device`, or the CPU where that one has no float64 (Apple's GPUs)."""
    return torch.device("cpu") if device.type == "mps" else device


def computed_in(rows: torch.Tensor) -> torch.dtype:
    """float64 stays what it is, all else is computed in float32; half precision is a way of storing."""
    return torch.float64 if rows.dtype == torch.float64 else torch.float32


def check_finite(rows: torch.Tensor, which: str) -> None:
    """Raises GanError if what a detector found in `which` images holds anything but finite numbers."""
    if not rows.sum(dtype=computed_in(rows)).isfinite():  # one pass that needs no memory
        raise GanError(f"the features of the {which} images are not finite numbers")


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Inside, float32 products and convolutions on NVIDIA GPUs keep 24 bits, though training may have allowed 11.

    Not to be left open over a `yield` of a measurement: training goes on there.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
