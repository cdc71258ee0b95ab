"""What `prepare` settles for the whole process."""

from __future__ import annotations

import torch
from test_step import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from gan.training import devices

# What PyTorch computes with MKL's vector functions (ATen/cpu/vml.h).
MKL = ["acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"]
MKL += ["log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"]


class FirstCalls(TorchDispatchMode):
    """How many elements each of those functions is called with first."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.split(".")[0].rstrip("_")
        if name in MKL and args[0].dtype in (torch.float32, torch.float64):
            self.elements.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))


def test_threads_never_share_the_first_call_of_an_mkl_function() -> None:
    # One thread's part of such a call may be wrong in its last 12 bits, too seldom to be provoked here.
    with FirstCalls() as first:
        devices.prepare(tiny_config(device="cpu"))
    assert first.elements == {(name, dtype): 1 for name in MKL for dtype in (torch.float32, torch.float64)}
