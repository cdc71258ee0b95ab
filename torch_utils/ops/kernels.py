"""Compiled kernels of this machine, for CPUs (cpu_kernels) and NVIDIA GPUs (cuda_kernels): made ready, and reported.

Nothing happens until `prepare` is called, which training, sampling and benchmarks do. What then cannot be built,
loaded or trusted is left to PyTorch's operations; that is no error unless kernels were asked for, and `status` has the
reason.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch

import torch_utils.ops.bias_act
import torch_utils.ops.noise_bias_act
import torch_utils.ops.upfirdn2d
import torch_utils.ops.warp  # noqa: F401  these four announce their kernels
from torch_utils.ops import cpu_kernels, cuda_kernels
from torch_utils.ops.kernel_state import KernelError, KernelState, by_reason

__all__ = ["MODES", "KernelError", "KernelState", "disabled", "missing", "prepare", "states", "status"]

MODES = ("auto", "cuda", "ref")
_lock = threading.Lock()
_asked = ("cpu", "auto")
"""the type of the device and the mode of the last call of `prepare`"""


def prepare(device: torch.device | str = "cpu", mode: str = "auto", timeout: float = cpu_kernels.BUILD_SECONDS) -> str:
    """Build (once on a machine, in seconds), load and check the kernels that `device` can use. Returns `status()`.

    Args:
        device: where the process computes.
        mode: auto: what cannot be had is left to PyTorch's operations. cuda: raises KernelError unless the device is a
            CUDA device and every kernel is in use. ref: no kernels at all.
        timeout: of building for a CPU, in seconds.

    A kernel that was prepared is not prepared again: the first answer holds for the process. Raises KernelError in any
    mode when a kernel broke the device, which only another process can use again.
    """
    global _asked
    kind = torch.device(device).type
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, not {mode}")
    if mode == "cuda" and kind != "cuda":
        raise KernelError(f"the device is {kind}")
    with _lock:
        _asked = (kind, mode)
        if mode == "ref":
            _put_aside()
        elif kind == "cpu":
            cpu_kernels.prepare(timeout)
        elif kind == "cuda":
            cuda_kernels.prepare(torch.device(device))
    if mode == "cuda":
        _insist()
    return status()


def status() -> str:
    """Which kernels are in use, and why not the others, in one line: "CPU kernels: bias_act (built in 4.2 s)"."""
    kind, mode = _asked
    if mode == "ref":
        return "no kernels, PyTorch's operations as asked for"
    if kind not in ("cpu", "cuda"):
        return f"no kernels for {kind}, PyTorch's operations"
    return cuda_kernels.status() if kind == "cuda" else cpu_kernels.status()


def states() -> list[KernelState]:
    """Every kernel, as it stands in this process."""
    return [*cpu_kernels.states(), *cuda_kernels.states()]


def missing() -> list[KernelState]:
    """The kernels that the last call of `prepare` was to make ready, and could not."""
    kind, mode = _asked
    return [state for state in states() if state.kind == kind and not state.in_use and mode != "ref"]


@contextlib.contextmanager
def disabled() -> Iterator[None]:
    """PyTorch's operations within, for comparisons."""
    on_cpu = [(kernel, kernel.ops) for kernel in cpu_kernels.kernels.values()]
    on_cuda = [(kernel, kernel.launch) for kernel in cuda_kernels.kernels.values()]
    for cpu_kernel, _ in on_cpu:
        cpu_kernel.ops = None
    for cuda_kernel, _ in on_cuda:
        cuda_kernel.launch = None
    try:
        yield
    finally:
        for cpu_kernel, ops in on_cpu:
            cpu_kernel.ops = ops
        for cuda_kernel, launch in on_cuda:
            cuda_kernel.launch = launch


def _insist() -> None:
    """Raises KernelError unless all CUDA kernels are in use."""
    absent = missing()
    reasons = by_reason(absent)
    if reasons:
        all_alike = len(reasons) == 1 and len(absent) == len(cuda_kernels.kernels)
        texts = [reason if all_alike else f"{', '.join(names)}: {reason}" for reason, names in reasons.items()]
        remedies = dict.fromkeys(state.remedy for state in absent if state.remedy)
        raise KernelError("; ".join(texts), "; ".join(remedies) or None)


def _put_aside() -> None:
    """What an earlier call prepared is not used; the next one that asks for kernels prepares them anew."""
    for cpu_kernel in cpu_kernels.kernels.values():
        cpu_kernel.ops, cpu_kernel.prepared = None, False
    for cuda_kernel in cuda_kernels.kernels.values():
        cuda_kernel.launch, cuda_kernel.prepared = None, False
