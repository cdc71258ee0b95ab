"""What a run uses, and on what it runs."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import sys
from pathlib import Path

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


def available_memory_gb() -> float:
    """Memory that this process may still take: what is free on the machine, or less where it is limited."""
    return min([_free_on_machine(), *_left_in_cgroups(), *_left_of_addresses()]) / 2**30


def peak_gpu_memory_gb(device: torch.device) -> float:
    """The most GPU memory that was taken since the last call; 0 without CUDA."""
    if device.type != "cuda":
        return 0.0
    peak = torch.cuda.max_memory_allocated(device) / 2**30
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def _free_on_machine() -> int:
    if can_measure_memory():
        import psutil

        return psutil.virtual_memory().available
    pages = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"  # macOS: all there is
    return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE")


def _left_in_cgroups(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left in each control group around this process that has a limit (Linux: containers, batch systems)."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            top, names = mounted, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = mounted / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        folder = top / path.lstrip("/")
        for group in (folder, *(parent for parent in folder.parents if parent.is_relative_to(top))):
            left += _left_in_group(group, *names)
    return left


def _left_in_group(group: Path, limit: str, usage: str, cached: str) -> list[int]:
    """Files that were read count as used, but are dropped for who needs memory."""
    try:
        numbers = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / usage).read_text()) - int(numbers.get(cached, 0))
        return [max(int((group / limit).read_text()) - used, 0)]
    except (OSError, ValueError):  # not there (a container sees its own as the top), or without a limit ("max")
        return []


def _left_of_addresses() -> list[int]:
    """Bytes left of `ulimit -v`, if there is one."""
    try:
        import resource
    except ImportError:  # Windows
        return []
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
    except OSError:
        return []
    return [] if limit == resource.RLIM_INFINITY else [max(limit - pages * resource.getpagesize(), 0)]


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return "Apple GPU"
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' * (threads > 1)}"


def computing(device: torch.device, G: Generator, half_dtype: torch.dtype) -> str:
    """What computes and in which precision, in one line."""
    half_from = [block.resolution for block in G.synthesis.children() if block.use_fp16]
    precision = "float32"
    if half_from and half_dtype != torch.float32:
        precision = f"{DTYPE_NAMES[half_dtype]} from {half_from[0]}x{half_from[0]} on, float32 below"
    compiled = kernels.status() if device.type == "cpu" else "PyTorch operations, no CUDA kernels yet"
    return f"{device_name(device)}, {precision}; {compiled}"


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
