"""The CUDA kernels of csrc/*.cu: which there are, which are in use, and how one is called.

A kernel is in use once `kernels.prepare` has compiled it, loaded it and compared it with its reference on the device at
hand; until then, and for whatever it does not do, PyTorch's operations compute. That it was compared is noted on disk,
so each version of a kernel is compared once on a kind of device.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from torch_utils.ops import cubins, cuda_driver, nvrtc
from torch_utils.ops.cubins import Built
from torch_utils.ops.kernel_state import KernelError, KernelState, brief

NAMESPACE = "gan"  # of the operators, torch.ops.gan
SUFFIXES = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
"""of the names of entry points"""
Size = cuda_driver.Size
_library = torch.library.Library(NAMESPACE, "DEF")


class Launch(Protocol):
    """Runs an entry point of a compiled source on a device, after what was launched on its current stream."""

    def __call__(self, entry: str, grid: Size, block: Size, params: bytes, device: torch.device) -> None: ...


@dataclasses.dataclass
class CudaKernel:
    """One source, and whether it is in use."""

    name: str
    source: str
    """file in csrc/"""
    check: Callable[[torch.device], str | None]
    """compares it, while `launch` is set, with its reference; what is wrong, or None"""
    launch: Launch | None = None
    """while it is in use, otherwise None"""
    device_type: str = "cuda"
    """of the tensors that it takes"""
    reason: str = "kernels.prepare was not called"
    """why `launch` is None"""
    prepared: bool = False
    built: Built | None = None
    """as it was compiled, once it has been"""

    def takes(self, *tensors: torch.Tensor | None) -> bool:
        """Whether it is in use and computes with tensors such as these; None stands for one that is left out."""
        if self.launch is None:
            return False
        present = [t for t in tensors if t is not None]
        device = present[0].device
        return device.type == self.device_type and all(
            t.device == device and t.dtype in SUFFIXES and 0 < t.numel() < 2**31 for t in present
        )

    def run(self, entry: str, grid: Size, block: Size, layout: str, *params: Any, device: torch.device) -> None:
        """Launch an entry point whose parameters are a struct of this `layout` (see `struct`)."""
        assert self.launch is not None, f"{self.name} is not in use: {self.reason}"
        self.launch(entry, grid, block, struct.pack(f"@{layout}0P", *params), device)


kernels: dict[str, CudaKernel] = {}


def register(name: str, source: str, check: Callable[[torch.device], str | None]) -> CudaKernel:
    """Announce a kernel to `kernels.prepare`; done by the module of the operation that may use it."""
    kernels[name] = CudaKernel(name, source, check)
    return kernels[name]


class DeviceLost(KernelError):
    """A kernel broke the device for the whole process."""


def prepare(device: torch.device) -> None:
    """Compile, load and check the kernels. The first answer holds for the process, as does the device's architecture.

    What goes wrong is the `reason` of a kernel. Raises DeviceLost if the process has to be started again.
    """
    waiting = [kernel for kernel in kernels.values() if not kernel.prepared]
    if not waiting:
        return
    for kernel in waiting:
        kernel.prepared = True
    try:
        found = cuda_driver.find(device)
        arch = nvrtc.arch_of(found.capability)
    except Exception as error:  # whatever it is, PyTorch can do without, and the reason is printed
        for kernel in waiting:
            kernel.reason = _reason(error)
        return
    with concurrent.futures.ThreadPoolExecutor(len(waiting)) as pool:  # NVRTC lets Python go on
        futures = [pool.submit(nvrtc.cubin, kernel.source, arch) for kernel in waiting]
    for kernel, future in zip(waiting, futures, strict=True):
        try:
            kernel.built = future.result()
            _load(kernel, kernel.built, found)
        except Exception as error:
            kernel.launch, kernel.reason = None, _reason(error)
            if isinstance(error, DeviceLost):
                raise


def status() -> str:
    """Which kernels are in use, and why not the others: "CUDA kernels: bias_act, upfirdn2d (built in 1.9 s)"."""
    used = [kernel for kernel in kernels.values() if kernel.launch is not None]
    fresh = [kernel.built.seconds for kernel in used if kernel.built is not None and not kernel.built.cached]
    when = f"built in {max(fresh):.1f} s" if fresh else "built before"
    parts = [f"{', '.join(kernel.name for kernel in used)} ({when})"] if used else []
    reasons: dict[str, list[str]] = {}
    for kernel in kernels.values():
        if kernel.launch is None:
            reasons.setdefault(kernel.reason, []).append(kernel.name)
    for reason, names in reasons.items():
        missing = f"not {', '.join(names)}" if len(names) < len(kernels) else "none"
        parts.append(f"{missing}, because {reason}")
    run_instead = "; PyTorch's operations run instead" if reasons else ""
    return f"CUDA kernels: {'; '.join(parts) or 'none, because no operation has one'}{run_instead}"


def states() -> list[KernelState]:
    """Every kernel, as it stands in this process."""
    return [_state(kernel) for kernel in kernels.values()]


def _state(kernel: CudaKernel) -> KernelState:
    in_use, built = kernel.launch is not None, kernel.built
    seconds, cached = (built.seconds, built.cached) if built else (0.0, False)
    return KernelState(kernel.name, "cuda", in_use, "" if in_use else kernel.reason, seconds, cached, verified=in_use)


def _load(kernel: CudaKernel, built: Built, device: cuda_driver.Device) -> None:
    """Put a compiled kernel to use, if it computes what its reference computes."""
    key = _verified_key(built, device)
    passed, lost = f"{kernel.name}-{key}.verified", f"{kernel.name}-{key}.failed"
    failure = cubins.noted(lost)
    if failure is not None:
        raise KernelError(f"{failure} (tried before; delete {cubins.folder() / lost} to try again)")
    kernel.launch = cuda_driver.Library(built.code)
    if cubins.noted(passed) is None:
        wrong = _compare(kernel, device, lost)
        if wrong:
            raise KernelError(f"{kernel.name} computes wrong results here ({wrong})")
        cubins.note(passed, f"{device.name}, driver for CUDA {device.driver}, PyTorch {torch.__version__}\n")


def _compare(kernel: CudaKernel, device: cuda_driver.Device, lost: str) -> str | None:
    """What the kernel's check says. Random numbers are as they were: a run does not depend on whether it came first."""
    place = torch.device("cuda", device.index)
    try:
        with torch.random.fork_rng(devices=[device.index]):
            wrong = kernel.check(place)
            torch.cuda.synchronize(place)
        return wrong
    except Exception as error:
        if _works(place):
            raise KernelError(f"{kernel.name} cannot be checked ({brief(str(error))})") from error
        # A fault inside of a kernel ends every later call of the process. The next one does without the kernel.
        reason = f"{kernel.name} fails on this device ({brief(str(error), 100)})"
        cubins.note(lost, reason)
        raise DeviceLost(f"{reason}; start again, and it is left out") from error


def _works(device: torch.device) -> bool:
    try:
        torch.cuda.synchronize(device)
        return True
    except Exception:
        return False


def _verified_key(built: Built, device: cuda_driver.Device) -> str:
    """Of all that a comparison depends on: what is launched, by which code, and where."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in sources]
    parts = [built.digest, device.name, device.driver, torch.__version__, *texts]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, KernelError) else f"{type(error).__name__}: {brief(str(error))}"


class Operator:
    """`torch.ops.gan.NAME`, called as directly as it can be.

    PyTorch's dispatcher and its autograd for registered operators take up to 20 us a call, three times what an
    autograd.Function takes, and most calls of a step are short. So whoever only computes calls the implementation, and
    whoever traces the operator (torch.compile, fake tensors) sees the registered one; their derivatives are the same.
    """

    def __init__(
        self, op: Any, implementation: Callable[..., Any], function: type[torch.autograd.Function] | None
    ) -> None:
        self.op = op
        """as it is registered"""
        self._implementation, self._function = implementation, function

    def __call__(self, *args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if torch.compiler.is_compiling() or any(type(t) not in _PLAIN for t in tensors):
            return self.op(*args)
        if self._function is not None and torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            return self._function.apply(*args)
        return self._implementation(*args)


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def _function(
    name: str, implementation: Callable[..., Any], setup: Callable[..., None], backward: Callable[..., Any]
) -> type[torch.autograd.Function]:
    """The operator as autograd knows it."""

    def forward(ctx: Any, *args: Any) -> Any:
        # In one method: for a setup_context of its own PyTorch looks at the signature in each call, for 40 us.
        output = implementation(*args)
        setup(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"gan_{name}", (torch.autograd.Function,), members)


def define(
    schema: str,
    implementation: Callable[..., Any],
    fake: Callable[..., Any],
    setup: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Operator:
    """Define the operator `torch.ops.gan.NAME`, which launches kernels.

    Args:
        schema: of the operator without its namespace: "name(Tensor x, float gain) -> Tensor".
        fake: makes outputs of the right shape, dtype and layout without computing them.
        setup, backward: as `torch.library.register_autograd` takes them; None: the operator has no derivative.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    _library.define(schema)
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=_library)
    function = None
    if setup is not None and backward is not None:
        torch.library.register_autograd(qualified, backward, setup_context=setup, lib=_library)
        function = _function(name, implementation, setup, backward)
    return Operator(getattr(getattr(torch.ops, NAMESPACE), name).default, implementation, function)


def pointer(tensor: torch.Tensor | None) -> int:
    """The address of a tensor's first element; 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()
