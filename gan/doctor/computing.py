"""PyTorch, the device, and the kernels: what computes here, how fast our kernels are, and why one is not in use."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from gan.doctor import nvidia
from gan.doctor.facts import AGAIN, Fact, unset
from gan.errors import GanError, UsageError, one_line
from gan.packages import install

if TYPE_CHECKING:
    import torch

    from torch_utils.ops.kernel_state import KernelState

_OURS = "stylegan2-ada-trainer"
_LITTLE_GPU_MEMORY = 4e9
_SLOW = 0.9  # of the speed of PyTorch's operations


class Computing:
    """The examinations that need PyTorch; each yields facts, and leaves what the next ones need.

    Args:
        wanted: `--device`.
    """

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted
        self.device: torch.device | None = None
        """that training would take; None: not known, or there is none"""
        self.gpu_free: int | None = None
        """bytes, of a GPU that computes"""
        self._is_silent = False  # the GPU, as far as is known

    def pytorch(self) -> Iterator[Fact]:
        """Whether there is one, and for what it is built."""
        try:
            import torch
        except ModuleNotFoundError:
            yield Fact("PyTorch", "is not installed", install("torch"), fatal=True)
            return
        except Exception as error:  # a library of it that is missing or another's
            text = f"is installed, but cannot be imported ({one_line(error)})"
            yield Fact("PyTorch", text, install("--force-reinstall", "torch"), fatal=True)
            return
        kind = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPUs"
        if torch.version.hip:
            kind = f"AMD's ROCm {torch.version.hip}"
        oldest = _oldest_torch()
        text = f"{torch.__version__}, built for {kind}"
        if oldest is not None and _numbers(torch.__version__) < _numbers(oldest):
            yield Fact("PyTorch", f"{text}; this program is made for {oldest} and newer", install("--upgrade", "torch"))
        else:
            yield Fact("PyTorch", text)

    def gpu(self) -> Iterator[Fact]:
        """What PyTorch sees of the graphics cards, and why not what is there."""
        import torch

        self._is_silent = True
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            found = torch.cuda.is_available()
        self._is_silent = found
        if found:
            yield from self._card(torch.device("cuda"))
        elif torch.backends.mps.is_available():
            yield Fact(nvidia.TOPIC, "Apple's, through MPS")
        elif torch.version.hip:
            text = "PyTorch's ROCm finds no AMD GPU that it can use"
            yield Fact(nvidia.TOPIC, text, "see https://pytorch.org/get-started/locally for what it needs")
        else:
            visible = os.environ.get("CUDA_VISIBLE_DEVICES")
            warning = " ".join(str(warning.message) for warning in said)
            warning = warning.removeprefix("CUDA initialization: ").split(" (Triggered")[0]
            yield nvidia.unused(nvidia.find(), torch.version.cuda, warning, visible)

    def _card(self, device: torch.device) -> Iterator[Fact]:
        """A card that PyTorch sees: what it is, and whether it computes."""
        import torch

        seen = None if torch.version.hip else nvidia.find()
        problem = _cannot_compute(device)
        self._is_silent = False
        if problem is not None:
            named = "the GPU" if seen is None else seen.named
            capability = None if seen is None else seen.capability
            remedy = nvidia.when_it_fails(problem, capability, torch.version.cuda)
            text = f"{named}: PyTorch sees it, but cannot compute there ({problem})"
            yield Fact(nvidia.TOPIC, text, remedy, fatal=self.wanted in ("auto", "cuda"))
            return
        major, minor = torch.cuda.get_device_capability(device)
        driver = f", driver {seen.driver}" if seen is not None and seen.driver else ""
        present = torch.cuda.device_count()
        over = "" if torch.distributed.is_nccl_available() else ", slowly: this PyTorch has no NCCL"
        more = f"; {present - 1} more, which training uses with --gpus {present}{over}" if present > 1 else ""
        yield Fact(
            nvidia.TOPIC, f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}{driver}{more}"
        )
        self.gpu_free, total = torch.cuda.mem_get_info(device)
        text = f"{self.gpu_free / 2**30:.1f} GB free of {total / 2**30:.1f}"
        if self.gpu_free < min(_LITTLE_GPU_MEMORY, total / 2):
            remedy = "nvidia-smi names the programs that hold the rest: end them, or train with --batch-gpu auto"
            yield Fact(nvidia.TOPIC, f"{text}, which is little", remedy)
        else:
            yield Fact(nvidia.TOPIC, text)

    def choose(self) -> Iterator[Fact]:
        """Where training would compute, and in which precision."""
        from gan.training import devices
        from gan.training.resources import DTYPE_NAMES, device_name

        if self._is_silent:
            text = "not known: the GPU has not answered, and training would wait for it too"
            yield Fact("Device", text, "run it once more; if it stays so, reboot", fatal=True)
            return
        try:
            device = devices.choose_device(self.wanted)
        except UsageError as error:
            yield Fact("Device", str(error), "leave --device out, or see GPU above", fatal=True)
            return
        if device.type == "cuda" and self.gpu_free is None:
            text = "cuda, which cannot compute; training on the CPU would take --device cpu"
            yield Fact("Device", text, "see GPU above", fatal=True)
            return
        self.device = device
        half = devices.choose_half_dtype("auto", device)
        precision = DTYPE_NAMES[half]
        precision += " throughout" if precision == "float32" else " in the high resolutions"
        chosen = " (--device auto)" if self.wanted == "auto" else ""
        yield Fact("Device", f"{device.type}{chosen}: {device_name(device)}, {precision}")
        if device.type == "cpu":
            yield from _processor()

    def kernels(self) -> Iterator[Fact]:
        """Which of our kernels are in use, whether they were verified, and how fast they are."""
        if self.device is None:
            return
        from gan.training import devices
        from torch_utils.ops import cpu_kernels, kernels
        from torch_utils.ops.kernel_state import by_reason

        unbuilt = cpu_kernels.unbuilt() if self.device.type == "cpu" else []
        if unbuilt:  # the one thing here that would take long
            yield Fact("Kernels", f"{', '.join(unbuilt)}: not built yet; the first run builds it, in seconds")
            return
        try:
            devices.prepare_kernels("auto", self.device)
        except GanError as error:  # one broke the device
            yield Fact("Kernels", str(error), AGAIN)
            return
        mine = [state for state in kernels.states() if state.kind == self.device.type]
        compilers = dict.fromkeys(state.compiler for state in mine if state.in_use and state.compiler)
        if compilers:
            yield Fact("Kernels", f"compiled by {', '.join(compilers)}")
        if not mine:
            yield Fact("Kernels", f"none for {self.device.type}: PyTorch's operations run instead")
        for state in mine:
            if state.in_use:
                yield _in_use(state, self.device)
        normal = self.device.type == "cpu" and sys.platform == "win32"  # where there are none
        for reason, names in by_reason(mine).items():
            text = f"{', '.join(names)}: PyTorch's operations run instead, because {reason}"
            remedy = next((_remedy(state) for state in mine if state.reason == reason), None)
            yield Fact("Kernels", text, remedy, good=normal)


def _in_use(state: KernelState, device: torch.device) -> Fact:
    from gan.doctor.speed import times_as_fast

    built = f"built earlier ({state.seconds:.1f} s)" if state.cached else f"built in {state.seconds:.1f} s"
    text = f"{state.name}: in use, verified {state.verified}, {built}"
    times = times_as_fast(state.name, device)
    if times is None:
        return Fact("Kernels", text)
    if times >= _SLOW:
        return Fact("Kernels", f"{text}, {times:.1f} times as fast as PyTorch's operations")
    text += f", but only {times:.2f} times as fast as PyTorch's operations in a layer taken alone"
    return Fact("Kernels", text, "compare whole steps: python -m gan bench --ops auto, and the same with --ops ref")


def _remedy(state: KernelState) -> str | None:
    """What to do about a kernel that is not in use; None: nothing is known to help."""
    refused = "image is invalid" in state.reason or "unsupported toolchain" in state.reason
    return nvidia.when_code_is_refused() if refused and state.remedy is None else state.remedy


def _cannot_compute(device: torch.device) -> str | None:
    """What goes wrong in a product and a convolution with their gradients, if something does."""
    import torch
    import torch.nn.functional as F

    try:
        x = torch.ones([2, 8, 8, 8], device=device, requires_grad=True)
        y = F.conv2d(x, torch.ones([4, 8, 1, 1], device=device)).flatten(1)
        (y @ y.t()).sum().backward()
        right = x.grad is not None and bool((x.grad == 128).all())
    except Exception as error:  # a library that cannot be loaded, no code for this card, no memory
        return one_line(error)
    return None if right else "a product has a wrong result"


def _processor() -> Iterator[Fact]:
    """What a CPU is held back by."""
    import torch

    from gan.bench.machine import cpu_name, usable_cores

    cores, threads = len(usable_cores()), torch.get_num_threads()
    text = f"{cpu_name()}, {cores} core{'s' * (cores > 1)} to use"
    if "OMP_NUM_THREADS" in os.environ and threads < min(max(cores // 2, 2), cores):
        text += f", but OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} allows {threads}"
        yield Fact("Device", text, unset("OMP_NUM_THREADS"))
    else:
        yield Fact("Device", text)


def _oldest_torch() -> str | None:
    """The version that our installed package asks for; None in a checkout that was not installed."""
    try:
        needs = importlib.metadata.requires(_OURS) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"torch\s*>=\s*([\d.]+)", need) for need in needs)
    return next((match[1] for match in found if match), None)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])
