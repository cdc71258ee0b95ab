"""NVIDIA's cards as the system sees them, and why PyTorch does not use one. No torch in here."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

from gan.doctor.facts import Fact, unset
from gan.packages import install

TOPIC = "GPU"
_SECONDS = 5
_DRIVER_NOTE = Path("/proc/driver/nvidia/version")
_DRIVER_CARDS = Path("/proc/driver/nvidia/gpus")
_DEVICE_NODE = Path("/dev/nvidiactl")
_PCI = Path("/sys/bus/pci/devices")
_CONTAINERS = (Path("/.dockerenv"), Path("/run/.containerenv"))
_DRIVERS = "https://www.nvidia.com/drivers"
_SLURM = "ask Slurm for a GPU: srun --gres=gpu:1"


@dataclasses.dataclass(frozen=True)
class _Build:
    """One of PyTorch's builds for CUDA."""

    name: str
    cuda: int
    oldest_driver: int
    """that runs programs built for this CUDA: CUDA's release notes"""
    capabilities: tuple[tuple[int, int], tuple[int, int]]
    """of the oldest and the newest GPUs that it is for: PyTorch's RELEASE.md"""


# All here that grows old, as of November 2026 and PyTorch 2.13; the newest comes first.
_WHEELS = "https://download.pytorch.org/whl"
_BUILDS = (_Build("cu130", 13, 580, ((7, 5), (99, 0))), _Build("cu126", 12, 525, ((5, 0), (9, 0))))
_NEWEST, _OLDER = _BUILDS


@dataclasses.dataclass(frozen=True)
class Nvidia:
    """What is there, whatever PyTorch sees."""

    cards: tuple[str, ...] = ()
    """their names, or what takes their place"""
    driver: str | None = None
    """its version"""
    capability: tuple[int, int] | None = None
    """of the first card"""
    complaint: str | None = None
    """what nvidia-smi says instead of an answer"""
    has_nodes: bool = True
    """the driver can be reached from here; not so in a container that was given no GPU"""
    in_container: bool = False

    @property
    def named(self) -> str:
        """`NVIDIA H200, driver 580.65.06`."""
        first = self.cards[0] if self.cards else "an NVIDIA GPU"
        more = f" and {len(self.cards) - 1} more" if len(self.cards) > 1 else ""
        driver = f", driver {self.driver}" if self.driver else "" if self.complaint else ", no driver"
        return f"{first}{more}{driver}"


def find() -> Nvidia | None:
    """The cards of this machine; None if there is no trace of any."""
    answer, complaint = _ask_nvidia_smi()
    in_container = any(mark.exists() for mark in _CONTAINERS)
    if answer:
        rows = [[field.strip() for field in line.split(",")] for line in answer]
        return Nvidia(tuple(row[0] for row in rows), rows[0][1], _capability(rows[0][2]), in_container=in_container)
    driver = _driver_of(_read(_DRIVER_NOTE))
    cards = [_model(_read(path / "information")) for path in _listed(_DRIVER_CARDS)]
    cards = cards or ["an NVIDIA GPU" for path in _listed(_PCI) if _is_nvidia_display(path)]
    if not cards and driver is None and complaint is None:
        return None
    has_nodes = platform.system() != "Linux" or _DEVICE_NODE.exists()
    return Nvidia(tuple(cards), driver, None, complaint, has_nodes, in_container)


def unused(nvidia: Nvidia | None, built_for: str | None, said: str, visible: str | None) -> Fact:
    """Why PyTorch finds no CUDA device, and what to do.

    Args:
        built_for: CUDA's version of the PyTorch build; None: it is built without.
        said: PyTorch's own warning.
        visible: CUDA_VISIBLE_DEVICES.
    """
    if nvidia is None:
        is_login_node = shutil.which("srun") is not None and "SLURM_JOB_ID" not in os.environ
        text = "no NVIDIA GPU or driver was found on this machine"
        return Fact(TOPIC, text, f"{_SLURM} python -m gan doctor" if is_login_node else None)
    text, complaint = f"{nvidia.named}, is not used:", nvidia.complaint or ""
    then = "" if built_for else f", then: {torch_for(_NEWEST)}"
    if not nvidia.has_nodes and nvidia.in_container:
        remedy = "start the container with a GPU: docker run --gpus all, or apptainer exec --nv"
        return Fact(TOPIC, f"{text} this container was given no GPU", remedy + then)
    if "version mismatch" in complaint:
        return Fact(TOPIC, f"{text} the driver was updated while it was in use ({complaint})", "reboot")
    if "communicate with the NVIDIA driver" in complaint or not (nvidia.driver or complaint):
        return Fact(TOPIC, f"{text} its driver is not loaded", f"{_driver()} and reboot{then}")
    if nvidia.driver is None:
        return Fact(TOPIC, f"{text} {complaint}", _reboot() + then)
    if built_for is None:
        return Fact(TOPIC, f"{text} the installed PyTorch is built for CPUs only", _remedy(nvidia, built_for))
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        remedy = _SLURM if "SLURM_JOB_ID" in os.environ else unset("CUDA_VISIBLE_DEVICES")
        return Fact(TOPIC, f"{text} CUDA_VISIBLE_DEVICES={visible!r} hides it", remedy)
    oldest = next((build.oldest_driver for build in _BUILDS if build.cuda == _major(built_for)), 0)
    if _major(nvidia.driver) < oldest or "too old" in said:
        needed = f", which needs {oldest} or newer" if oldest else ""
        return Fact(
            TOPIC,
            f"{text} the driver is too old for PyTorch's CUDA {built_for}{needed}",
            _remedy(nvidia, built_for),
        )
    reason = said or complaint or "PyTorch finds no CUDA device and does not say why"
    return Fact(TOPIC, f"{text} {reason}", _reboot())


def when_it_fails(problem: str, capability: tuple[int, int] | None, built_for: str | None) -> str:
    """What to do about a GPU that PyTorch sees and cannot compute on."""
    if "no kernel image" in problem or "not compatible" in problem:
        is_old = capability is not None and capability < _NEWEST.capabilities[0]
        return torch_for(_OLDER if is_old and _major(built_for) >= _NEWEST.cuda else _NEWEST)
    if "out of memory" in problem or "busy" in problem:
        return "nvidia-smi names the programs that hold it: end them"
    return f"reboot; if that does not help: {torch_for(_OLDER if _major(built_for) == _OLDER.cuda else _NEWEST)}"


def when_code_is_refused() -> str:
    """What to do about a driver that does not load what a newer CUDA has compiled."""
    return f"{_driver(_NEWEST.oldest_driver)}, or go back: {torch_for(_OLDER)}"


def _remedy(nvidia: Nvidia, built_for: str | None) -> str:
    """A PyTorch that goes with this card and driver, or else a newer driver."""
    for build in _BUILDS:
        oldest, newest = build.capabilities
        if _major(nvidia.driver) >= build.oldest_driver and oldest <= (nvidia.capability or oldest) <= newest:
            return torch_for(build)
    return f"{_driver(_NEWEST.oldest_driver)}{'' if built_for else f', then: {torch_for(_NEWEST)}'}"


def torch_for(build: _Build) -> str:
    """The command that installs a build of PyTorch in place of what is there."""
    # --force-reinstall: what is there has the same version, and would stay.
    return f"{install('--force-reinstall', 'torch')} --index-url {_WHEELS}/{build.name}"


def _driver(oldest: int | None = None) -> str:
    """How to get one."""
    wanted = "the newest driver" if oldest is None else f"a driver from {oldest} on"
    return f"install {wanted} ({_DRIVERS}; on a cluster ask its administrators)"


def _reboot() -> str:
    return f"reboot; if that does not help, {_driver()}"


def _ask_nvidia_smi() -> tuple[list[str], str | None]:
    """A line a card, `name, driver, capability`, or what it says instead."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return [], None
    command = [program, "--query-gpu=name,driver_version,compute_cap", "--format=csv,noheader"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError):
        return [], "nvidia-smi does not answer"
    lines = [line for line in result.stdout.splitlines() if line.strip()]
    if result.returncode == 0 and lines and all(line.count(",") == 2 for line in lines):
        return lines, None
    said = " ".join((lines or result.stderr.splitlines() or ["it says nothing"])[0].split())
    return [], f"nvidia-smi: {said[:160]}"


def _is_nvidia_display(path: Path) -> bool:
    """PCI's numbers of a graphics or compute card of NVIDIA."""
    return _read(path / "vendor").strip() == "0x10de" and _read(path / "class").startswith("0x03")


def _listed(folder: Path) -> list[Path]:
    with contextlib.suppress(OSError):
        return sorted(folder.iterdir())
    return []


def _read(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace")
    return ""


def _driver_of(note: str) -> str | None:
    match = re.search(r"\b(\d{3,4}(?:\.\d+)+)\b", note)
    return match[1] if match else None


def _model(information: str) -> str:
    match = re.search(r"^Model:\s*(.+)$", information, flags=re.MULTILINE)
    return match[1].strip() if match else "an NVIDIA GPU"


def _capability(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else None


def _major(version: str | None) -> int:
    match = re.match(r"\d+", version or "")
    return int(match[0]) if match else 0
