"""The memory that this process may still take."""

from __future__ import annotations

import os
from pathlib import Path


def available_bytes() -> int:
    """What is free on the machine, or less where this process is limited (containers, batch systems, ulimit)."""
    return min([_free_on_machine(), *_left_in_cgroups(), *_left_of_addresses()])


def _free_on_machine() -> int:
    """0: nobody knows."""
    try:
        import psutil
    except ImportError:
        if not hasattr(os, "sysconf"):  # Windows
            return 0
        try:
            fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
            return int(fields["MemAvailable"].split()[0]) * 1024
        except (OSError, KeyError):  # macOS: all there is
            return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return psutil.virtual_memory().available


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
