"""Where to compute, and in which precision."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Sequence

import torch

from gan.config import TrainConfig
from gan.errors import GanError, UsageError
from torch_utils.distributed import Place
from torch_utils.memory import keep_freed_memory
from torch_utils.ops import kernels

_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
# What PyTorch computes with MKL's vector functions (ATen/cpu/vml.h).
_MKL_FUNCTIONS = ["acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"]
_MKL_FUNCTIONS += ["log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"]
_ONLY = Place()


def prepare(config: TrainConfig, place: Place = _ONLY) -> tuple[torch.device, torch.dtype]:
    """Where a run computes and its half precision; sets up the whole process: GPU, TF32, memory, threads, MKL, kernels.

    Args:
        place: which of the processes of the run this one is.
    """
    device = choose_device(config.device, place)
    half_dtype = choose_half_dtype(config.precision, device)
    if device.index is not None:
        torch.cuda.set_device(device)
    allow_tf32(config.tf32)
    torch.backends.cudnn.benchmark = True  # shapes never change: choose the fastest convolutions once
    if device.type == "cpu":
        share_cores(place)
        keep_freed_memory()
        settle_mkl_functions()
    prepare_kernels(config.ops, device)
    return device, half_dtype


def check(config: TrainConfig, place: Place | None = None) -> None:
    """Raises UsageError for what this machine cannot do.

    Args:
        place: of this process, if the processes of the run have been started; None: all of them are to be, here.
    """
    here = Place(size=config.gpus, local_size=config.gpus) if place is None else place
    device = choose_device(config.device, here)
    choose_half_dtype(config.precision, device)
    choose_graphs(config.cuda_graphs, device)
    if place is None and config.gpus > 1:
        check_count(device, config.gpus)
    elif config.ops == "cuda":  # the only setting that insists: the others never fail
        prepare_kernels(config.ops, device)


def check_count(device: torch.device, processes: int) -> None:
    """Raises UsageError if so many processes cannot each have a device of this kind here."""
    present = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type != "cpu" and processes > present:
        found = f"{present} GPU{'s' * (present > 1)}"
        raise UsageError(
            [
                f"--gpus {processes}: PyTorch finds {found} here, one for each process; use --gpus {present}, or start "
                f"processes on several machines with torchrun (docs/scaling.md)"
            ]
        )


def problems_together(kinds: Sequence[str], identities: Sequence[str | None]) -> list[str]:
    """What keeps these processes from training together: devices of several kinds, or one GPU for two of them.

    Args:
        kinds: of their devices, by rank.
        identities: as `identity` gives them.
    """
    for rank, kind in enumerate(kinds):
        if kind != kinds[0]:
            return [
                f"--device: rank 0 would compute on {kinds[0]}, rank {rank} on {kind}; name one that all have, or see "
                f"what python -m gan doctor says there"
            ]
    first: dict[str, int] = {}
    for rank, identity in enumerate(identities):
        if identity is not None and first.setdefault(identity, rank) != rank:
            return [
                f"rank {first[identity]} and rank {rank} would compute on the same GPU ({identity}); start at most one "
                f"process for each GPU"
            ]
    return []


def identity(device: torch.device) -> str | None:
    """What tells a GPU from all others, wherever it is; None for devices that may be shared."""
    if device.type != "cuda":
        return None
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}"


def choose_device(name: str, place: Place = _ONLY) -> torch.device:
    """`auto` takes cuda, then mps, then cpu; of several processes each takes a GPU of its own.

    Raises UsageError if the named one is not there, or too few are.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present[name]:
        usable = ", ".join(kind for kind, there in present.items() if there)
        raise UsageError([f"--device {name}: PyTorch {torch.__version__} finds no such device here; usable: {usable}"])
    device = torch.device(name)
    if place.size == 1 or name == "cpu":
        return device
    if name == "mps":
        raise UsageError(["--device mps: there is one such GPU, for one process; use --gpus 1, or --device cpu"])
    if torch.cuda.device_count() == 1:  # a batch system may show each process its own; `problems_together` tells
        return torch.device("cuda", 0)
    check_count(device, place.local_size)
    return torch.device("cuda", place.local_rank)


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


def share_cores(place: Place) -> None:
    """Divide the processor's threads among the processes of this machine, unless OMP_NUM_THREADS says how many."""
    if place.local_size > 1 and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(_threads_of_one() // place.local_size, 1))


@functools.cache
def _threads_of_one() -> int:
    """Threads that PyTorch takes if there is one process."""
    return torch.get_num_threads()


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
