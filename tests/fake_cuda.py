"""A CUDA driver without a GPU: the functions of `cuda.bindings.driver` that we call, as strict as the real ones.

Kernels are those of host_kernels; the code of one is the name of its source.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import shutil
import tempfile
import threading
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import host_kernels
import pytest
import torch
from host_kernels import HostLaunch

from torch_utils.ops import cubins, cuda_driver, cuda_kernels, cuda_trial, nvrtc
from torch_utils.ops.cubins import Built

DEVICES = 2


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900


class CUstreamCaptureMode(enum.IntEnum):
    CU_STREAM_CAPTURE_MODE_GLOBAL = 0
    CU_STREAM_CAPTURE_MODE_RELAXED = 2


class Handle:
    """A pointer of the driver's."""

    def __init__(self, value: int, **facts: Any) -> None:
        self.value = value
        self.__dict__.update(facts)

    def __int__(self) -> int:
        return self.value


class FakeDriver:
    """Stands for the module. `calls` are the names of what was called; `recording`: a CUDA graph is recorded."""

    CUresult = CUresult
    CUstreamCaptureMode = CUstreamCaptureMode

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.launches: list[tuple[str, int, int]] = []  # entry, device and stream
        self.recording = False
        self.compiled: dict[str, HostLaunch] = {}  # by source
        self.fails: dict[str, CUresult] = {}
        self._thread = threading.local()

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("cu"):
            return super().__getattribute__(name)
        self.calls.append(name)
        if name in self.fails:
            return lambda *args: (self.fails[name],)
        return super().__getattribute__(name)

    @property
    def context(self) -> int:
        """The number of this thread's current context; 0 for none."""
        return getattr(self._thread, "context", 0)

    @context.setter
    def context(self, number: int) -> None:
        self._thread.context = number

    def cuDriverGetVersion(self) -> tuple[CUresult, int]:
        return CUresult.CUDA_SUCCESS, 13000

    def cuGetErrorString(self, error: CUresult) -> tuple[CUresult, bytes]:
        return CUresult.CUDA_SUCCESS, error.name.removeprefix("CUDA_ERROR_").replace("_", " ").lower().encode()

    def cuDeviceGet(self, ordinal: int) -> tuple[CUresult, int]:
        assert ordinal in range(DEVICES)
        return CUresult.CUDA_SUCCESS, ordinal

    def cuDevicePrimaryCtxRetain(self, dev: int) -> tuple[CUresult, Handle]:
        return CUresult.CUDA_SUCCESS, Handle(100 + dev)

    def cuCtxGetCurrent(self) -> tuple[CUresult, Handle]:
        return CUresult.CUDA_SUCCESS, Handle(self.context)

    def cuCtxSetCurrent(self, ctx: Handle) -> tuple[CUresult]:
        self.context = int(ctx)
        return (CUresult.CUDA_SUCCESS,)

    def cuThreadExchangeStreamCaptureMode(self, mode: CUstreamCaptureMode) -> tuple[CUresult, CUstreamCaptureMode]:
        before = getattr(self._thread, "mode", CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        self._thread.mode = mode
        return CUresult.CUDA_SUCCESS, before

    def cuLibraryLoadData(
        self, code: bytes, jitOptions: None, jitOptionsValues: None, numJitOptions: int, libraryOptions: None,
        libraryOptionValues: None, numLibraryOptions: int,
    ) -> tuple[CUresult, Any]:  # fmt: skip
        source = code.decode()
        return CUresult.CUDA_SUCCESS, self.compiled.get(source) or _compiled(source)

    def cuLibraryGetKernel(self, library: HostLaunch, name: bytes) -> tuple[CUresult, Any]:
        if not hasattr(library._loaded(), name.decode()):
            return CUresult.CUDA_ERROR_NOT_FOUND, None
        return CUresult.CUDA_SUCCESS, Handle(1, library=library, entry=name.decode())

    def cuKernelGetFunction(self, kernel: Any) -> tuple[CUresult, Any]:
        mode = getattr(self._thread, "mode", CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        if self.recording and mode != CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED:
            return CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED, None
        if not self.context:
            return CUresult.CUDA_ERROR_INVALID_CONTEXT, None
        return CUresult.CUDA_SUCCESS, Handle(2, library=kernel.library, entry=kernel.entry, context=self.context)

    def cuFuncLoad(self, function: Any) -> tuple[CUresult]:
        mode = getattr(self._thread, "mode", CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)
        if self.recording and mode != CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED:
            return (CUresult.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED,)
        return (CUresult.CUDA_SUCCESS,)

    def cuLaunchKernel(
        self, f: Any, gridDimX: int, gridDimY: int, gridDimZ: int, blockDimX: int, blockDimY: int, blockDimZ: int,
        sharedMemBytes: int, hStream: int, kernelParams: int, extra: int,
    ) -> tuple[CUresult]:  # fmt: skip
        if f.context != self.context:
            return (CUresult.CUDA_ERROR_INVALID_CONTEXT,)
        assert (sharedMemBytes, extra) == (0, 0)
        size = ctypes.c_uint.in_dll(f.library._loaded(), f"{f.entry}_size").value
        struct = ctypes.c_void_p.from_address(kernelParams).value
        assert struct
        grid, block = (gridDimX, gridDimY, gridDimZ), (blockDimX, blockDimY, blockDimZ)
        f.library(f.entry, grid, block, ctypes.string_at(struct, size), torch.device("cpu"))
        self.launches.append((f.entry, self.context - 100, hStream))
        return (CUresult.CUDA_SUCCESS,)


@functools.cache
def _sources() -> tempfile.TemporaryDirectory[str]:
    """The folder of SCALE, and of what it is compiled to, for the life of the process."""
    folder = tempfile.TemporaryDirectory(prefix="fake-cuda-")
    write_source(Path(folder.name))
    return folder


@functools.cache
def _compiled(source: str) -> HostLaunch:
    return HostLaunch(source, Path(_sources().name))


def install(patch: pytest.MonkeyPatch) -> FakeDriver:
    """Put the driver, and two devices of capability 9.0, in the place of what is not here; SCALE is their source."""
    driver = FakeDriver()
    patch.setattr(host_kernels, "CSRC", Path(_sources().name))
    patch.setattr(cuda_trial, "_compute", lambda place: None)
    patch.setattr(cuda_driver, "_bindings", lambda: driver)
    patch.setattr(cuda_driver, "_contexts", {})
    patch.setattr(torch.version, "cuda", "13.0")
    cuda = types.SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: DEVICES,
        current_device=lambda: max(driver.context - 100, 0),
        current_stream=lambda index: types.SimpleNamespace(cuda_stream=10 * index),
        get_device_name=lambda index: f"Fake {index}",
        get_device_capability=lambda index: (9, 0),
        get_device_properties=lambda index: types.SimpleNamespace(uuid=f"GPU-{index}"),
        synchronize=lambda device: None,
    )
    for name, value in vars(cuda).items():
        patch.setattr(torch.cuda, name, value)
    fork_rng = torch.random.fork_rng

    @contextlib.contextmanager
    def fork_cpu_rng(devices: list[int]) -> Iterator[None]:
        with fork_rng(devices=[]):
            yield

    patch.setattr(torch.random, "fork_rng", fork_cpu_rng)
    return driver


def compile_nothing(patch: pytest.MonkeyPatch) -> list[str]:
    """Have NVRTC make code for the driver above. Returns the list of what it was asked for: "scale.cu sm_90"."""
    asked: list[str] = []

    def compiled(source: str, arch: str) -> Built:
        asked.append(f"{source} {arch}")
        return Built(source.encode(), "NVRTC", (13, 0), 1.25, 32, 0)

    patch.setattr(nvrtc, "compiled", compiled)
    patch.setattr(nvrtc, "arch_of", lambda capability: "sm_{}{}".format(*capability))
    return asked


SCALE = """\
#include "common.cuh"

struct Params {
  const float* x;
  float* y;
  int n;
  float factor;
};

__device__ void scale(const Params& p) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < p.n) p.y[i] = p.x[i] * p.factor;
}

ENTRY(scale_f32, Params, scale)
"""


def write_source(folder: Path) -> None:
    """Put SCALE, and what it includes, into a folder."""
    (folder / "scale.cu").write_text(SCALE)
    shutil.copy(cubins.SOURCES / "common.cuh", folder)


def scaled(kernel: cuda_kernels.CudaKernel, x: torch.Tensor, factor: float, device: str = "cuda:0") -> torch.Tensor:
    """x * factor by the kernel of SCALE."""
    y = torch.empty_like(x)
    pointers = cuda_kernels.pointer(x), cuda_kernels.pointer(y)
    blocks = -(-x.numel() // 256)
    kernel.run(
        "scale_f32", (blocks, 1, 1), (256, 1, 1), "2Pif", *pointers, x.numel(), factor, device=torch.device(device)
    )
    return y
