"""NVIDIA's cards as the system sees them, and why PyTorch does not use one. No torch in here."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import re
import shutil
import subprocess
from pathlib import Path

from gan.doctor.facts import Fact, install, unset

TOPIC = "GPU"
_SECONDS = 5
_DRIVER_NOTE = Path("/proc/driver/nvidia/version")
_DRIVER_CARDS = Path("/proc/driver/nvidia/gpus")
_DEVICE_NODE = Path("/dev/nvidiactl")
_PCI = Path("/sys/bus/pci/devices")
_CONTAINERS = (Path("/.dockerenv"), Path("/run/.containerenv"))
_DRIVERS = "https://www.nvidia.com/drivers"
_REBOOT = f"reboot; if that does not help, install the newest driver: {_DRIVERS}"
_WHEELS = "https://download.pytorch.org/whl"
# CUDA's release notes: the oldest driver that runs programs built for these, and PyTorch's RELEASE.md: for which GPUs
# its builds are, by compute capability.
_OLDEST_DRIVER = {12: 525, 13: 580}
_OLDEST_FOR_CUDA_13, _NEWEST_FOR_CUDA_12 = (7, 5), (9, 0)


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
        return Fact(TOPIC, "no NVIDIA GPU or driver was found on this machine")
    text, complaint = f"{nvidia.named}, is not used:", nvidia.complaint or ""
    then = "" if built_for else f", then: {torch_for('cu130')}"
    if not nvidia.has_nodes and nvidia.in_container:
        remedy = "start the container with docker run --gpus all (the host needs the NVIDIA Container Toolkit)"
        return Fact(TOPIC, f"{text} this container was given no GPU", remedy + then)
    if "version mismatch" in complaint:
        return Fact(TOPIC, f"{text} the driver was updated while it was in use ({complaint})", "reboot")
    if "communicate with the NVIDIA driver" in complaint or not (nvidia.driver or complaint):
        return Fact(TOPIC, f"{text} its driver is not loaded", f"install the driver ({_DRIVERS}) and reboot{then}")
    if nvidia.driver is None:
        return Fact(TOPIC, f"{text} {complaint}", _REBOOT + then)
    if built_for is None:
        return Fact(TOPIC, f"{text} the installed PyTorch is built for CPUs only", _remedy(nvidia, built_for))
    if visible is not None and (not visible.strip() or visible.strip().startswith("-")):
        return Fact(TOPIC, f"{text} CUDA_VISIBLE_DEVICES={visible!r} hides it", unset("CUDA_VISIBLE_DEVICES"))
    oldest = _OLDEST_DRIVER.get(_major(built_for), 0)
    if _major(nvidia.driver) < oldest or "too old" in said:
        needed = f", which needs {oldest} or newer" if oldest else ""
        return Fact(
            TOPIC,
            f"{text} the driver is too old for PyTorch's CUDA {built_for}{needed}",
            _remedy(nvidia, built_for),
        )
    reason = said or complaint or "PyTorch finds no CUDA device and does not say why"
    return Fact(TOPIC, f"{text} {reason}", _REBOOT)


def when_it_fails(problem: str, capability: tuple[int, int] | None, built_for: str | None) -> str:
    """What to do about a GPU that PyTorch sees and cannot compute on."""
    if "no kernel image" in problem or "not compatible" in problem:
        is_old = capability is not None and capability < _OLDEST_FOR_CUDA_13 and _major(built_for) >= 13
        return torch_for("cu126" if is_old else "cu130")
    if "out of memory" in problem or "busy" in problem:
        return "nvidia-smi names the programs that hold it: end them"
    return f"reboot; if that does not help: {torch_for('cu126' if _major(built_for) == 12 else 'cu130')}"


def _remedy(nvidia: Nvidia, built_for: str | None) -> str:
    """A PyTorch that goes with this card and driver, or else a newer driver."""
    driver, capability = _major(nvidia.driver), nvidia.capability
    if driver >= _OLDEST_DRIVER[13] and (capability is None or capability >= _OLDEST_FOR_CUDA_13):
        return torch_for("cu130")
    if driver >= _OLDEST_DRIVER[12] and (capability is None or capability <= _NEWEST_FOR_CUDA_12):
        return torch_for("cu126")
    then = "" if built_for else f", then: {torch_for('cu130')}"
    return f"install a driver from {_OLDEST_DRIVER[13]} on: {_DRIVERS}{then}"


def torch_for(build: str) -> str:
    """The command that installs PyTorch for `cu126`, say, in place of what is there."""
    # --force-reinstall: what is there has the same version, and would stay.
    return f"{install('--force-reinstall', 'torch')} --index-url {_WHEELS}/{build}"


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
