"""The machine that is measured: its name, its memory, and what else keeps it busy."""

from __future__ import annotations

import os
import platform
import sys
import time
from pathlib import Path

import torch

from gan.bench.result import Machine, Memory
from gan.training import resources
from gan.training.state import TrainingState

_GB = 2**30


def describe_machine(device: torch.device, load: OtherLoad) -> Machine:
    """The machine, and how busy others kept it since `load` was made."""
    cores = len(usable_cores())
    return Machine(
        name=cpu_name() if device.type == "cpu" else resources.device_name(device),
        device=device.type,
        threads=torch.get_num_threads(),
        cores=cores,
        threads_limited="OMP_NUM_THREADS" in os.environ and torch.get_num_threads() < cores,
        busy_cores=load.cores(),
    )


def usable_cores() -> list[int]:
    """The numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def memory_of(state: TrainingState, before: float) -> Memory:
    """Memory after a step that had every phase; `before` is what `memory_now` said before the networks were made."""
    device = state.device
    networks = [tensor for net in (state.G, state.D, state.G_ema) for tensor in net.state_dict().values()]
    moments = [
        value
        for optimizer in (state.G_opt, state.D_opt)
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, torch.Tensor)
    ]
    return Memory(
        peak=peak_memory(device),
        before=before,
        weights=_size(networks),
        gradients=_size([state.G_grads.flat, state.D_grads.flat]),
        optimizer=_size(moments),
        total=_total(device),
    )


def memory_now(device: torch.device) -> float:
    """GB that are taken on the device, or by the process; on a GPU, peaks are counted anew from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device) / _GB
    return resources.cpu_memory_gb()


def peak_memory(device: torch.device) -> float:
    """The most GB that were taken: on a GPU since `memory_now`, else by this process in its life."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / _GB
    try:
        import resource
    except ImportError:  # Windows
        return resources.cpu_memory_gb()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / _GB


class OtherLoad:
    """How busy other programs keep the cores that we may use, from when it is made."""

    def __init__(self) -> None:
        self._begin = self._counters()

    def cores(self) -> float | None:
        """Mean number of cores that others kept busy; None without psutil."""
        end = self._counters()
        if self._begin is None or end is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self._begin, end, strict=True))
        return max(busy - own, 0.0) / max(wall, 1e-9)

    @staticmethod
    def _counters() -> tuple[float, float, float] | None:
        """Seconds: of the clock, of all cores' work, of our own, the processes that read images included."""
        if not resources.can_measure_memory():
            return None
        import psutil

        every = psutil.cpu_times(percpu=True)
        ours = [every[i] for i in usable_cores() if i < len(every)]
        own = psutil.Process()
        used = sum(own.cpu_times()[:4])
        for child in own.children(recursive=True):
            try:
                used += sum(child.cpu_times()[:2])
            except psutil.Error:
                continue
        busy = sum(core.user + core.system + getattr(core, "nice", 0.0) for core in ours)
        return time.monotonic(), busy, used


def _size(tensors: list[torch.Tensor]) -> float:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / _GB


def _total(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1] / _GB
    if not resources.can_measure_memory():
        return 0.0
    import psutil

    return psutil.virtual_memory().available / _GB + resources.cpu_memory_gb()
