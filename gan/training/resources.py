"""What a run uses, and on what it runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys

import torch

from gan.networks import Generator
from torch_utils.ops import kernels

DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def can_measure_memory() -> bool:
    """Whether `cpu_memory_gb` knows."""
    return importlib.util.find_spec("psutil") is not None


def cpu_memory_gb() -> float:
    """Resident memory of this process; 0 if psutil is not there to say."""
    if not can_measure_memory():
        return 0.0
    import psutil

    return psutil.Process().memory_info().rss / 2**30


def peak_gpu_memory_gb(device: torch.device) -> float:
    """The most GPU memory that was taken since the last call; 0 without CUDA."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' * (threads > 1)}"


def computing(device: torch.device, G: Generator, half_dtype: torch.dtype) -> str:
    """What computes and in which precision, in a few words."""
    half = [int(name[1:]) for name, block in G.synthesis.named_children() if block.use_fp16]
    precision = "float32"
    if half and half_dtype != torch.float32:
        height, width = (side * min(half) // max(half) for side in G.img_size)
        precision = f"{DTYPE_NAMES[half_dtype]} from {width}x{height} on, float32 below"
    return f"{device_name(device)}, {precision}"


def kernels_in_use() -> str:
    """Which of our kernels are in use, and why not the others, in one line."""
    status = kernels.status()
    known = any(state.kind == "cuda" or state.remedy for state in kernels.missing())  # to the doctor
    return f"{status}; see python -m gan doctor" if known else status


def versions(device: torch.device) -> dict[str, str]:
    """Versions and hardware, for whoever reads the run later."""
    try:
        own = importlib.metadata.version("stylegan2-ada-trainer")
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        own = "checkout"
    return {
        "version.program": own,
        "version.python": platform.python_version(),
        "version.torch": torch.__version__,
        "device": device_name(device),
        "host": platform.node(),
        "command": " ".join([os.path.basename(sys.argv[0]), *sys.argv[1:]]),
    }
