"""The CUDA kernels of csrc/*.cu: which there are, which are in use, and how one is called.

A kernel is in use once `kernels.prepare` has compiled it, loaded it and compared it with its reference on the device at
hand (`cuda_trial`); until then, and for whatever it does not do, PyTorch's operations compute.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import struct
import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch.autograd import forward_ad

from torch_utils.ops import cuda_driver, cuda_trial, nvrtc
from torch_utils.ops.cubins import Built
from torch_utils.ops.cuda_trial import Check, DeviceLost
from torch_utils.ops.kernel_state import KernelError, KernelState, brief, by_reason, installing, said

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
    check: Check
    """compares it, while `launch` is set, with its reference; what is wrong, or None"""
    launch: Launch | None = None
    """while it is in use, otherwise None"""
    device_type: str = "cuda"
    """of the tensors that it takes"""
    indices: frozenset[int | None] = frozenset([None])
    """of the devices of that type that it is compiled for"""
    reason: str = "kernels.prepare was not called"
    """why `launch` is None"""
    remedy: str | None = None
    """what to type, or to do about the reason, if something is known to help"""
    prepared: bool = False
    built: Built | None = None
    """as it was compiled, once it has been"""
    verified: str = ""
    """when it was compared with its reference: now or before"""

    def takes(self, *tensors: torch.Tensor | None) -> bool:
        """Whether it is in use and computes with tensors such as these; None stands for one that is left out."""
        if self.launch is None or _transforms() or _forward._current_level >= 0:  # of which only PyTorch's know
            return False
        present = [t for t in tensors if t is not None]
        device = present[0].device
        if device.type != self.device_type or device.index not in self.indices:
            return False
        return all(t.device == device and t.dtype in SUFFIXES and 0 < t.numel() < 2**31 for t in present)

    def run(self, entry: str, grid: Size, block: Size, layout: str, *params: Any, device: torch.device) -> None:
        """Launch an entry point whose parameters are a struct of this `layout` (see `struct`)."""
        assert self.launch is not None, f"{self.name} is not in use: {self.reason}"
        assert device.type == self.device_type, f"{self.name} computes on {self.device_type}, not on {device.type}"
        self.launch(entry, grid, block, struct.pack(f"@{layout}0P", *params), device)

    def leave_out(self, error: Exception) -> None:
        """For that reason it is not used by this process."""
        self.launch, self.prepared = None, True
        if isinstance(error, KernelError):
            self.reason, self.remedy = error.reason, error.remedy
        else:
            self.reason, self.remedy = f"{type(error).__name__}: {said(error)}", None


# Whether PyTorch is asked for more than values and gradients. Nothing public tells of modes, and asking each tensor
# (torch.func.debug_unwrap, forward_ad.unpack_dual) takes 2 us a call, all of these 0.1 us. For a PyTorch without them
# nothing of the kind is active.
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", int)
"""how many modes watch or replace operators"""
_transforms: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", bool)
"""whether torch.func transforms what is called"""
_forward: Any = forward_ad if hasattr(forward_ad, "_current_level") else types.SimpleNamespace(_current_level=-1)
"""whose level is 0 and up where forward-mode derivatives are computed"""


kernels: dict[str, CudaKernel] = {}


def register(name: str, source: str, check: Check) -> CudaKernel:
    """Announce a kernel to `kernels.prepare`; done by the module of the operation that may use it."""
    kernels[name] = CudaKernel(name, source, check)
    return kernels[name]


def prepare(device: torch.device) -> None:
    """Compile, load and check the kernels. The first answer holds for the process, as does the device's architecture.

    What goes wrong is the `reason` of a kernel. Raises DeviceLost if the process has to be started again.
    """
    waiting = [kernel for kernel in kernels.values() if not kernel.prepared]
    if not waiting:
        return
    try:
        found = cuda_driver.find(device)
        cuda_trial.try_out(found)
        arch = nvrtc.arch_of(found.capability)
    except Exception as error:  # whatever it is, PyTorch can do without, and the reason is printed
        for kernel in waiting:
            kernel.leave_out(error)
        return
    with concurrent.futures.ThreadPoolExecutor(len(waiting)) as pool:  # NVRTC lets Python go on
        futures = [pool.submit(nvrtc.compiled, kernel.source, arch) for kernel in waiting]
    for kernel, future in zip(waiting, futures, strict=True):
        try:
            kernel.built = future.result()
            _load(kernel, kernel.built, found, arch)
        except DeviceLost as error:
            lost = KernelError(f"{kernel.name} broke the device before")
            for other in kernels.values():
                if other.launch is not None or not other.prepared:
                    other.leave_out(lost)
            kernel.leave_out(error)
            raise
        except Exception as error:
            kernel.leave_out(error)


def status() -> str:
    """Which kernels are in use, and why not the others: "CUDA kernels: bias_act, upfirdn2d (built in 1.9 s)"."""
    used = [kernel for kernel in kernels.values() if kernel.launch is not None]
    parts = [f"{', '.join(kernel.name for kernel in used)} ({_when(used)})"] if used else []
    reasons = by_reason(states())
    for reason, names in reasons.items():
        missing = f"not {', '.join(names)}" if len(names) < len(kernels) else "none"
        parts.append(f"{missing}, because {brief(reason, 100)}")
    run_instead = "; PyTorch's operations run instead" if reasons else ""
    return f"CUDA kernels: {'; '.join(parts) or 'none, because no operation has one'}{run_instead}"


def _when(used: list[CudaKernel]) -> str:
    fresh = [kernel.built for kernel in used if kernel.built is not None and not kernel.built.cached]
    if not fresh:
        return "built before"
    not_kept = next((f", not kept: {built.not_kept}" for built in fresh if built.not_kept), "")
    return f"built in {max(built.seconds for built in fresh):.1f} s{not_kept}"


def states() -> list[KernelState]:
    """Every kernel, as it stands in this process."""
    return [_state(kernel) for kernel in kernels.values()]


def _state(kernel: CudaKernel) -> KernelState:
    built = kernel.built
    seconds, cached, compiler = (built.seconds, built.cached, built.by) if built else (0.0, False, "")
    if kernel.launch is None:
        return KernelState(kernel.name, "cuda", False, kernel.reason, seconds, cached, "", kernel.remedy, compiler)
    return KernelState(kernel.name, "cuda", True, "", seconds, cached, kernel.verified, compiler=compiler)


def _load(kernel: CudaKernel, built: Built, device: cuda_driver.Device, arch: str) -> None:
    """Put a compiled kernel to use, if it computes what its reference computes."""
    _check_driver(built, device, arch)
    cuda_trial.refuse_what_failed(kernel.name, built, device)
    kernel.launch, kernel.indices = cuda_driver.Library(built.code), cuda_driver.alike(device)
    try:
        kernel.verified = cuda_trial.verify(kernel.name, kernel.check, built, device, arch)
        kernel.prepared = True
    except BaseException:  # Ctrl-C too: nobody knows yet what it computes
        kernel.launch = None
        raise


def _check_driver(built: Built, device: cuda_driver.Device, arch: str) -> None:
    """Raises KernelError for code that the driver is too old for: it loads none of the next CUDA, and knows no PTX of
    a newer one."""
    exact = 2 if arch.startswith("compute_") else 1
    if built.version[:exact] > device.driver[:exact]:
        reason = f"the NVIDIA driver is for CUDA {device.driver_text} and loads no code of {built.by}"
        raise KernelError(reason, f"update the NVIDIA driver, or: {installing(again=True)}")


class Operator:
    """`torch.ops.gan.NAME`, called as directly as it can be.

    PyTorch's dispatcher and its autograd for registered operators take up to 20 us a call, three times what an
    autograd.Function takes, and most calls of a step are short. So whoever only computes calls the implementation, and
    whoever traces the operator (torch.compile, fake tensors, modes that watch or replace operators) has the registered
    one; their derivatives are the same.
    """

    def __init__(
        self, op: Any, implementation: Callable[..., Any], function: type[torch.autograd.Function] | None
    ) -> None:
        self.op = op
        """as it is registered"""
        self._implementation, self._function = implementation, function

    def __call__(self, *args: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        if torch.compiler.is_compiling() or _modes() or any(type(t) not in _PLAIN for t in tensors):
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


# What launches have in common: see common.cuh.

THREADS = 256
"""of a block, at most: BLOCK_THREADS"""
_TOTALS = "2P3Ii"  # Total
_TYPES = list(SUFFIXES)  # by the number that they have there


def layout(x: torch.Tensor) -> torch.memory_format:
    """The one that a tensor is computed in: channels_last if it has only that one, otherwise contiguous."""
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def dense(x: torch.Tensor) -> torch.Tensor:
    """x itself if it is contiguous or channels_last, otherwise a contiguous copy."""
    return x.contiguous(memory_format=layout(x))


def division(divisor: int) -> tuple[int, int, int]:
    """`Divisor`, "3I": `n // divisor == (n * multiplier // 2**32 + n) >> shift` for every n below 2**31."""
    shift = (divisor - 1).bit_length()
    return divisor, (2**32 * (2**shift - divisor)) // divisor + 1, shift


def totals(
    name: str, parts: Sequence[torch.Tensor | None], dtype: torch.dtype = torch.float32
) -> list[torch.Tensor | None]:
    """Add up what blocks have summed, in the kernel's entry point `NAME_totals`.

    Args:
        parts: up to three, float32 `[outer, count, columns]`; None for what is not wanted.

    Returns:
        Of each the sum over dimension 1, of that dtype; in one launch, or none where there is nothing to add.
    """
    sums: list[torch.Tensor | None] = []
    params: list[int] = []
    columns = outer = 0
    for part in parts:
        if part is None:
            sums.append(None)
            continue
        n, count, width = part.shape
        if count == 1 and dtype == torch.float32:
            sums.append(part[:, 0])
            continue
        total = part.new_empty([n, width], dtype=dtype)
        sums.append(total)
        params += pointer(part), pointer(total), n, count, width, _TYPES.index(dtype)
        columns, outer, device = max(columns, width), outer + n, part.device
    if params:
        params += [0] * (18 - len(params))
        grid = -(-columns // 8), outer, 1
        kernels[name].run(f"{name}_totals", grid, (THREADS, 1, 1), _TOTALS * 3, *params, device=device)
    return sums
