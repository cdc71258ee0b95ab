"""Compiled code to kernels that can be launched, through the CUDA driver and its binding `cuda.bindings`.

Kernels run in the device's primary context, which is PyTorch's, on its current stream.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import platform
from pathlib import Path
from typing import Any

import torch

from torch_utils.ops.kernel_state import KernelError, installing, said

Size = tuple[int, int, int]
# Contexts of devices by index, as the driver's object and as a number: retained once, for the life of the process.
_contexts: dict[int, tuple[Any, int]] = {}


@dataclasses.dataclass(frozen=True)
class Device:
    """A CUDA device, as far as kernels care."""

    index: int
    name: str
    capability: tuple[int, int]
    driver: tuple[int, int]
    """the newest CUDA version that the driver knows"""
    identity: str
    """this very device and build of its driver, as far as they can be told from others"""

    @property
    def driver_text(self) -> str:
        """13.0"""
        return ".".join(map(str, self.driver))


def find(device: torch.device) -> Device:
    """The device. Raises KernelError if kernels cannot use it."""
    if torch.version.cuda is None:
        raise KernelError(f"this PyTorch ({torch.__version__}) is not built for CUDA")
    if not torch.cuda.is_available():
        raise KernelError("PyTorch finds no CUDA device")
    driver = _bindings()
    index = torch.cuda.current_device() if device.index is None else device.index
    try:
        version = _call(driver, "cuDriverGetVersion")
    except RuntimeError as error:  # the binding loads the driver when it is first called
        raise KernelError(f"the CUDA driver cannot be used ({said(error, 100)})") from error
    name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
    return Device(index, name, capability, (version // 1000, version % 1000 // 10), _identity(index))


def alike(device: Device) -> frozenset[int]:
    """The indices of all devices that run the same code."""
    found = range(torch.cuda.device_count())
    return frozenset(index for index in found if torch.cuda.get_device_capability(index) == device.capability)


def _identity(index: int) -> str:
    build = ""
    with contextlib.suppress(OSError):  # Linux has it
        build = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8", errors="replace")
    return f"{getattr(torch.cuda.get_device_properties(index), 'uuid', None) or platform.node()} {build}"


class Library:
    """The entry points of a compiled source, on every device of the architecture that it was compiled for.

    Raises RuntimeError for what the driver says, KernelError without a binding.
    """

    def __init__(self, code: bytes) -> None:
        self._driver = _bindings()
        self._library = _call(self._driver, "cuLibraryLoadData", code, None, None, 0, None, None, 0)
        self._functions: dict[tuple[str, int], Any] = {}

    def __call__(self, entry: str, grid: Size, block: Size, params: bytes, device: torch.device) -> None:
        """Launch an entry point, which takes one struct, after what was launched on the device's current stream."""
        driver = self._driver
        index = torch.cuda.current_device() if device.index is None else device.index
        context, number = _contexts.get(index) or _context(driver, index)
        # A thread that PyTorch started, such as autograd's, may have no context yet, and one that works on several
        # devices another one. The default stream of PyTorch is that of the current context.
        current = _call(driver, "cuCtxGetCurrent")
        if int(current) == number:
            self._launch(entry, grid, block, params, index)
            return
        _call(driver, "cuCtxSetCurrent", context)
        try:
            self._launch(entry, grid, block, params, index)
        finally:
            _call(driver, "cuCtxSetCurrent", current)

    def _launch(self, entry: str, grid: Size, block: Size, params: bytes, index: int) -> None:
        function = self._functions.get((entry, index)) or self._load(entry, index)
        stream = torch.cuda.current_stream(index).cuda_stream
        struct = ctypes.c_char_p(params)  # its own memory is the array of one pointer that the driver asks for
        address = ctypes.addressof(struct)
        (error,) = self._driver.cuLaunchKernel(function, *grid, *block, 0, stream, address, 0)
        if error.value != 0:  # by now the driver has copied the struct
            raise _error(self._driver, error, f"{entry} with {grid} blocks of {block} threads")

    def _load(self, entry: str, index: int) -> Any:
        """An entry point as it is in the current context, which is that of the device.

        The driver would load it at its first launch. That may be while a CUDA graph is recorded, which forbids such
        things to a thread unless it says that they are no part of the graph.
        """
        driver = self._driver
        relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
        before = _call(driver, "cuThreadExchangeStreamCaptureMode", relaxed)
        try:
            kernel = _call(driver, "cuLibraryGetKernel", self._library, entry.encode())
            function = _call(driver, "cuKernelGetFunction", kernel)
            _load_now(driver, function)
            self._functions[entry, index] = function
        finally:
            _call(driver, "cuThreadExchangeStreamCaptureMode", before)
        return function


def _load_now(driver: Any, function: Any) -> None:
    """Have the driver load a function's code, which may otherwise wait for the first launch."""
    try:
        (error,) = driver.cuFuncLoad(function)
    except (AttributeError, RuntimeError):  # new in CUDA 12.4: neither every binding nor every driver has it
        return
    if error.value != 0:
        raise _error(driver, error, "cuFuncLoad")


def _context(driver: Any, index: int) -> tuple[Any, int]:
    context = _call(driver, "cuDevicePrimaryCtxRetain", _call(driver, "cuDeviceGet", index))
    _contexts[index] = (context, int(context))
    return _contexts[index]


def _call(driver: Any, name: str, *args: Any) -> Any:
    """What a function of the driver returns behind its error code."""
    error, *values = getattr(driver, name)(*args)
    if error.value != 0:
        raise _error(driver, error, name)
    return values[0] if values else None


def _error(driver: Any, error: Any, what: str) -> RuntimeError:
    """In PyTorch's words for its own launches: "CUDA error: out of memory"."""
    _, text = driver.cuGetErrorString(error)
    return RuntimeError(f"CUDA error: {text.decode() if text else error.name} ({what})")


def _bindings() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise KernelError("cuda-bindings is not installed", installing()) from error
    return driver
