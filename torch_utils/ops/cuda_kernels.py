"""The CUDA kernels of csrc/*.cu: which there are, which are in use, and how one is called.

A kernel is in use once `kernels.prepare` has compiled it, loaded it and compared it with its reference on the device at
hand; until then, and for whatever it does not do, PyTorch's operations compute.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable
from typing import Any, Protocol

import torch

NAMESPACE = "gan"  # of the operators, torch.ops.gan
SUFFIXES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""of the names of entry points"""
Size = tuple[int, int, int]
_library = torch.library.Library(NAMESPACE, "DEF")


class Launch(Protocol):
    """Runs an entry point of a compiled source on a device, after what was launched on its current stream."""

    def __call__(self, entry: str, grid: Size, block: Size, params: bytes, device: torch.device) -> None: ...


@dataclasses.dataclass
class CudaKernel:
    """One source, and whether it is in use."""

    name: str
    source: str
    """file in csrc/"""
    check: Callable[[torch.device], str | None]
    """compares it, while `launch` is set, with its reference; what is wrong, or None"""
    launch: Launch | None = None
    """while it is in use, otherwise None"""
    device_type: str = "cuda"
    """of the tensors that it takes"""
    reason: str = "kernels.prepare was not called"
    """why `launch` is None"""

    def takes(self, *tensors: torch.Tensor | None) -> bool:
        """Whether it is in use and computes with tensors such as these; None stands for one that is left out."""
        if self.launch is None:
            return False
        return all(
            t is None or (t.device.type == self.device_type and t.dtype in SUFFIXES and 0 < t.numel() < 2**31)
            for t in tensors
        )

    def run(self, entry: str, grid: Size, block: Size, layout: str, *params: Any, device: torch.device) -> None:
        """Launch an entry point whose parameters are a struct of this `layout` (see `struct`)."""
        assert self.launch is not None, f"{self.name} is not in use: {self.reason}"
        self.launch(entry, grid, block, struct.pack(f"@{layout}0P", *params), device)


kernels: dict[str, CudaKernel] = {}


def register(name: str, source: str, check: Callable[[torch.device], str | None]) -> CudaKernel:
    """Announce a kernel to `kernels.prepare`; done by the module of the operation that may use it."""
    kernels[name] = CudaKernel(name, source, check)
    return kernels[name]


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Any:
    """Define the operator `torch.ops.gan.NAME`, which launches kernels, and return it.

    Args:
        schema: of the operator without its namespace: "name(Tensor x, float gain) -> Tensor".
        fake: makes outputs of the right shape, dtype and layout without computing them.
        setup, backward: as `torch.library.register_autograd` takes them; None: the operator has no derivative.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
