"""Where to compute, and in which precision."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import torch

from gan.config import TrainConfig
from gan.errors import GanError, UsageError
from torch_utils.ops import kernels

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What PyTorch computes with MKL's vector functions (ATen/cpu/vml.h).
_MKL_FUNCTIONS = ["acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"]
_MKL_FUNCTIONS += ["log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"]


def prepare(config: TrainConfig) -> tuple[torch.device, torch.dtype]:
    """Where a run computes and its half precision; sets up the whole process: TF32, memory, MKL, kernels."""
    device = choose_device(config.device)
    half_dtype = choose_half_dtype(config.precision, device)
    allow_tf32(config.tf32)
    torch.backends.cudnn.benchmark = True  # shapes never change: choose the fastest convolutions once
    if device.type == "cpu":
        keep_freed_memory()
        settle_mkl_functions()
    prepare_kernels(config.ops, device)
    return device, half_dtype


def check(config: TrainConfig) -> None:
    """Raises UsageError for what this machine cannot do."""
    device = choose_device(config.device)
    choose_half_dtype(config.precision, device)
    choose_graphs(config.cuda_graphs, device)
    if config.ops == "cuda":  # the only setting that insists: the others never fail
        prepare_kernels(config.ops, device)


def choose_device(name: str) -> torch.device:
    """`auto` takes cuda, then mps, then cpu. Raises UsageError if the named one is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        usable = ", ".join(kind for kind, there in present.items() if there)
        raise UsageError([f"--device {name}: PyTorch {torch.__version__} finds no such device here; usable: {usable}"])
    return torch.device(name)


def choose_half_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the high resolutions compute in: `auto` is fp16 on CUDA, bf16 on CPUs with hardware for it, else fp32."""
    if precision != "auto":
        if precision == "fp16" and device.type == "cpu":
            raise UsageError(["--precision fp16: CPUs have no fast float16; use --precision bf16 or fp32"])
        return _DTYPES[precision]
    if device.type == "cuda":
        return torch.float16
    return torch.bfloat16 if device.type == "cpu" and _cpu_has_bf16() else torch.float32


def choose_graphs(setting: str, device: torch.device) -> bool:
    """Whether to record the phases of a step as CUDA graphs: `auto` does on CUDA. Raises UsageError if it cannot be."""
    if setting == "on" and device.type != "cuda":
        raise UsageError([f"--cuda-graphs on: {device.type} has none; leave it out"])
    return setting != "off" and device.type == "cuda"


def prepare_kernels(ops: str, device: torch.device) -> None:
    """Make ready what --ops asks for on this device.

    Raises UsageError if `cuda` cannot be had, and GanError if a kernel broke the device, which is then left out by the
    next process.
    """
    if ops == "cuda" and device.type != "cuda":
        problem = f"--ops cuda: is for NVIDIA GPUs, and the device is {device.type}"
        raise UsageError([f"{problem}; leave it out, or see python -m gan doctor"])
    try:
        kernels.prepare(device, ops)
    except kernels.KernelError as error:
        if ops != "cuda":
            raise GanError(str(error)) from error
        raise UsageError(
            [f"--ops cuda: {error}; use --ops auto to go on without, and see python -m gan doctor"]
        ) from error


def allow_tf32(allowed: bool) -> None:
    """Switch TF32 in float32 matrix products and convolutions of NVIDIA GPUs."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


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


def settle_mkl_functions() -> None:
    """Have MKL choose its instructions for each of these functions while no other thread asks for it.

    It chooses in a function's first call. When several threads make that call, one of them may compute its part with
    others, which are wrong in the last 12 bits: https://github.com/pytorch/pytorch/issues/188792 (MKL before 2025). In
    training it was the square root of minibatch-stddev, in 7 of 102 runs. This takes milliseconds.
    """
    for dtype in (torch.float32, torch.float64):
        half = torch.full([1], 0.5, dtype=dtype)  # one element is never divided among threads
        for name in _MKL_FUNCTIONS:
            getattr(torch, name)(half)


def return_freed_memory() -> None:
    """Have glibc return what is free, and what is freed from now on: memory is short."""
    if not sys.platform.startswith("linux"):
        return
    with contextlib.suppress(OSError, AttributeError):
        glibc = ctypes.CDLL(None)
        glibc.mallopt(_M_MMAP_THRESHOLD, 1 << 20)
        glibc.mallopt(_M_TRIM_THRESHOLD, 1 << 20)
        glibc.malloc_trim(0)


def _cpu_has_bf16() -> bool:
    """bfloat16 matrix instructions (AMX or AVX512-BF16); emulated ones are slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        found = capabilities()
        return bool(found.get("amx_bf16") or found.get("avx512_bf16"))
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
        flags = file.read()
        return "amx_bf16" in flags or "avx512_bf16" in flags
    return False
