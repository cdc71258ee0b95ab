"""Memory that ran out, and giving back what can be: of the GPU, and what the allocator of a CPU keeps for later."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
# What libraries say that have no error of their own for it.
_SAYINGS = (
    "out of memory",  # CUDA's launches, MPS
    "can't allocate memory",  # PyTorch on a CPU, compiled kernels included
    "not enough memory",  # the same on Windows
    "std::bad_alloc",
    "ALLOC_FAILED",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether this is how PyTorch, or a library under it, says that memory ran out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(saying in str(error) for saying in _SAYINGS)


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to; never inside an `except`, whose error refers to all that it came through."""
    gc.unfreeze()  # what was alive when MLflow was imported counts too
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    else:
        _return_freed_memory()


def keep_freed_memory() -> None:
    """Have glibc keep large freed blocks instead of returning them to the system.

    A step on a CPU frees and takes again hundreds of large tensors; giving each back means faulting every page of it
    in again: 12 % of the demo's step (benchmarks/train_step.py). Without glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)


def _return_freed_memory() -> None:
    """Have glibc return what is free, and what is freed from now on: memory is short."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        glibc.mallopt(_M_TRIM_THRESHOLD, 1 << 20)
        glibc.malloc_trim(0)
