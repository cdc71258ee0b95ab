"""What a run uses, and on what it runs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch


def cpu_memory_gb() -> float:
    """Resident memory of this process; 0 if psutil is not there to say."""
    try:
        import psutil
    except ImportError:
        return 0.0
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
    return f"CPU with {torch.get_num_threads()} threads"


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
