"""Whether a CUDA kernel computes what its reference does, on the device at hand: found out once, and noted on disk.

A kernel may break the device for the whole process, or never end, and nothing inside of the process mends that. It is
noted too, for this machine alone, so that the next process does without the kernel.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from torch_utils.ops import cubins
from torch_utils.ops.cubins import Built
from torch_utils.ops.cuda_driver import Device
from torch_utils.ops.kernel_state import KernelError, said

Check = Callable[[torch.device], "str | None"]
_SECONDS = 60.0  # a check takes milliseconds, and a while where PyTorch loads its own kernels for the first time
# What another program does to a device, or too little memory: no fault of a kernel.
_NO_FAULT = ("out of memory", "busy or unavailable", "not initialized", "initialization error")
# What a card does by itself: the process is lost, but the next one may use the kernel.
_OF_THE_CARD = ("ecc error", "nvlink error", "no longer available")
# A process that somebody stopped for a while looks like one whose check does not end.
_RETRY_SECONDS = 24 * 3600
_REPORT = "update the NVIDIA driver, and report this with all lines of the doctor; training does without it"


class DeviceLost(KernelError):
    """A kernel broke the device for the whole process."""


def try_out(device: Device) -> None:
    """Raises KernelError if the device cannot be used at all, which is then no fault of a kernel."""
    place = torch.device("cuda", device.index)
    try:
        _compute(place)
        torch.cuda.synchronize(place)
    except Exception as error:
        remedy = "end what else uses the GPU; nvidia-smi names it" if _says(error, _NO_FAULT) else None
        raise KernelError(f"the device cannot be used ({said(error, 100)})", remedy) from error


def refuse_what_failed(name: str, built: Built, device: Device) -> None:
    """Raises KernelError if this code broke this device before, or lately did not end."""
    reason = cubins.noted(_failed(name, built, device))
    if reason is not None:
        raise KernelError(f"{reason} (tried before)", _REPORT)
    slow = _slow(name, built, device)
    reason = cubins.noted(slow, within=_RETRY_SECONDS)
    if reason is not None:
        raise KernelError(
            f"{reason} (tried before)", f"it is tried again after a day, or: delete {cubins.folder() / slow}"
        )


def verify(name: str, check: Check, built: Built, device: Device, arch: str) -> str:
    """Have the kernel's check compare it with its reference. Returns when that was: now, or before.

    Raises KernelError if the kernel is not to be used, DeviceLost if it broke the device.
    """
    # What the driver makes of PTX each of its builds makes anew, and no version tells them apart.
    passed = None if arch.startswith("compute_") else f"{name}-{_key(built, device)}.verified"
    if passed is not None and cubins.noted(passed) is not None:
        return "before"
    with _ended(name, _slow(name, built, device), _SECONDS if passed else 5 * _SECONDS):
        wrong = _compare(name, check, device, _failed(name, built, device))
    if wrong:
        raise KernelError(f"results are wrong here ({wrong})")
    if passed is not None:
        cubins.note(passed, f"{device.name}, driver for CUDA {device.driver_text}, PyTorch {torch.__version__}\n")
    return "now"


def _compare(name: str, check: Check, device: Device, failed: str) -> str | None:
    """What the check says, whatever the caller's modes; random numbers are as they were. `failed` names the note."""
    place = torch.device("cuda", device.index)
    try:
        with torch.random.fork_rng(devices=[device.index]), _plain_modes():
            wrong = check(place)
            torch.cuda.synchronize(place)
        return wrong
    except Exception as error:
        if not _broken(place):
            raise KernelError(f"the check does not run ({said(error)})") from error
        reason = f"the device fails in its check ({said(error, 100)})"
        if _says(error, _OF_THE_CARD):
            raise DeviceLost(f"{name}: {reason}; type the same command again") from error
        raise DeviceLost(f"{name}: {reason}; {_next(name, cubins.note(failed, reason))}") from error


@contextlib.contextmanager
def _plain_modes() -> Iterator[None]:
    """Gradients are recorded, and tensors are made where the check says."""
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        yield


@contextlib.contextmanager
def _ended(name: str, slow: str, seconds: float) -> Iterator[None]:
    """Ends the process if the body does not end: a kernel that hangs can be stopped in no other way. `slow` names the
    note."""

    def give_up() -> None:
        reason = f"its check did not end in {seconds:g} s"
        text = f"error: {name}: {reason}; {_next(name, cubins.note(slow, reason))}"
        print(text, file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _next(name: str, note: Path | None) -> str:
    """What to do when it has failed."""
    if note is None:
        return f"{cubins.folder()} cannot be written, so ask for no kernels"
    return f"type the same command again: it does without {name}"


def _broken(place: torch.device) -> bool:
    """Whether a fault inside of a kernel ends every later call of the process on this device."""
    try:
        torch.cuda.synchronize(place)
    except Exception as error:
        return not _says(error, _NO_FAULT)
    return False


def _says(error: Exception, texts: Sequence[str]) -> bool:
    return any(text in str(error).lower() for text in texts)


def _compute(place: torch.device) -> None:
    torch.ones(1, device=place)


def _failed(name: str, built: Built, device: Device) -> str:
    """The name of the note that a kernel failed on this very device; a home may be shared by many machines."""
    return f"{name}-{_key(built, device, device.identity)}.failed"


def _slow(name: str, built: Built, device: Device) -> str:
    """The same of a check that did not end."""
    return f"{name}-{_key(built, device, device.identity)}.slow"


def _key(built: Built, device: Device, *more: str) -> str:
    """Of all that a comparison depends on: what is launched, by which code, and where."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in sources]
    parts = [built.digest, device.name, device.driver_text, torch.__version__, *more, *texts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
