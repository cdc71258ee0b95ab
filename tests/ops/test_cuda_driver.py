"""Kernels are launched in the right context, on the right stream, whatever thread asks and even during a recording."""

import os
import platform
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import fake_cuda
import pytest
import torch
from fake_cuda import FakeDriver, scaled

from torch_utils.ops import cuda_driver, cuda_kernels
from torch_utils.ops.kernel_state import KernelError


@pytest.fixture
def driver(monkeypatch):
    return fake_cuda.install(monkeypatch)


@pytest.fixture
def kernel(driver):
    kernel = cuda_kernels.CudaKernel("scale", "scale.cu", lambda device: None)
    kernel.launch = cuda_driver.Library(b"scale.cu")
    return kernel


def in_a_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_a_kernel_computes_what_its_source_says(driver, kernel):
    x = torch.arange(1000.0)
    assert torch.equal(scaled(kernel, x, 2.5), x * 2.5)
    assert torch.equal(scaled(kernel, x[:1], -1), -x[:1])
    assert driver.launches == [("scale_f32", 0, 0)] * 2


def test_an_entry_point_is_looked_up_once_a_device(driver, kernel):
    for device in ("cuda:0", "cuda:1", "cuda:0", "cuda:1"):
        scaled(kernel, torch.ones(3), 2, device)
    assert driver.calls.count("cuKernelGetFunction") == 2
    assert driver.calls.count("cuDevicePrimaryCtxRetain") == 2
    driver.calls.clear()
    driver.context = 100
    scaled(kernel, torch.ones(3), 2)
    assert driver.calls == ["cuCtxGetCurrent", "cuLaunchKernel"]


@pytest.mark.parametrize("current", [0, 100, 101])
@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_its_device_and_leaves_the_thread_as_it_was(current, index, driver, kernel):
    def launch():
        driver.context = current
        y = scaled(kernel, torch.ones(3), 2, f"cuda:{index}")
        return y.tolist(), driver.context

    assert in_a_thread(launch) == ([2, 2, 2], current)
    assert driver.launches == [("scale_f32", index, 10 * index)]


def test_a_device_without_a_number_is_the_current_one(driver, kernel):
    driver.context = 101
    scaled(kernel, torch.ones(3), 2, "cuda")
    assert driver.launches == [("scale_f32", 1, 10)]


def test_a_kernel_may_be_launched_first_while_a_graph_is_recorded(driver, kernel):
    driver.recording = True
    scaled(kernel, torch.ones(3), 2)
    mode = driver.cuThreadExchangeStreamCaptureMode(driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL)[1]
    assert mode == driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_GLOBAL  # the thread's is as it was


def test_what_the_driver_says_is_raised(driver, kernel):
    with pytest.raises(RuntimeError, match=r"^CUDA error: not found \(cuLibraryGetKernel\)$"):
        kernel.run("scale_f16", (1, 1, 1), (1, 1, 1), "2Pif", 0, 0, 0, 1.0, device=torch.device("cuda:0"))
    driver.fails["cuLaunchKernel"] = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory \(scale_f32 with \(1, 1, 1\) blocks of \("):
        scaled(kernel, torch.ones(3), 2)
    assert driver.context == 0  # and the thread is as it was
    driver.fails["cuLibraryLoadData"] = driver.CUresult.CUDA_ERROR_INVALID_VALUE
    with pytest.raises(RuntimeError, match=r"^CUDA error: invalid value \(cuLibraryLoadData\)$"):
        cuda_driver.Library(b"scale.cu")


def test_an_entry_point_is_loaded_before_its_first_launch(driver, kernel, monkeypatch):
    scaled(kernel, torch.ones(3), 2)
    names = [name for name in driver.calls if name in ("cuFuncLoad", "cuThreadExchangeStreamCaptureMode")]
    assert names == ["cuThreadExchangeStreamCaptureMode", "cuFuncLoad", "cuThreadExchangeStreamCaptureMode"]
    driver.fails["cuFuncLoad"] = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match=r"^CUDA error: out of memory \(cuFuncLoad\)$"):
        scaled(kernel, torch.ones(3), 2, "cuda:1")
    assert kernel.launch._functions.keys() == {("scale_f32", 0)}


@pytest.mark.parametrize("what", ["binding", "driver"])
def test_one_that_cannot_load_entry_points_beforehand(what, driver, kernel, monkeypatch):
    def missing(driver, function):
        raise RuntimeError('Function "cuFuncLoad" not found')

    if what == "binding":
        monkeypatch.delattr(FakeDriver, "cuFuncLoad")
    else:
        monkeypatch.setattr(FakeDriver, "cuFuncLoad", missing)
    assert torch.equal(scaled(kernel, torch.ones(3), 2), torch.full([3], 2.0))


def test_devices_that_run_the_same_code(driver, monkeypatch):
    capabilities = [(9, 0), (8, 0), (9, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    assert cuda_driver.alike(cuda_driver.find(torch.device("cuda:2"))) == {0, 2}


def test_a_device_that_cannot_be_told_from_others_is_that_of_the_machine(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: None)
    assert cuda_driver.find(torch.device("cuda:0")).identity.startswith(platform.node())


def test_a_device_is_found(driver):
    driver.context = 101
    found = cuda_driver.find(torch.device("cuda"))
    assert (found.index, found.name, found.capability, found.driver) == (1, "Fake 1", (9, 0), (13, 0))
    assert found.identity.startswith("GPU-1 ")
    assert cuda_driver.find(torch.device("cuda:0")).name == "Fake 0"


def test_why_there_is_no_device(driver, monkeypatch):
    def no_driver():
        raise RuntimeError("Failed to dlopen libcuda.so.1")

    monkeypatch.setattr(driver, "cuDriverGetVersion", no_driver)
    with pytest.raises(KernelError, match=r"^the CUDA driver cannot be used \(Failed to dlopen libcuda.so.1\)$"):
        cuda_driver.find(torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(KernelError, match=r"^PyTorch finds no CUDA device$"):
        cuda_driver.find(torch.device("cuda"))
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(KernelError, match=r"^this PyTorch \(.*\) is not built for CUDA$"):
        cuda_driver.find(torch.device("cuda"))


@pytest.mark.parametrize(
    ("cuda", "remedy"),
    [
        ("13.2", '"cuda-bindings~=13.0" "nvidia-cuda-nvrtc==13.2.*"'),
        ("12.8", '"cuda-bindings~=12.0" "nvidia-cuda-nvrtc-cu12==12.8.*"'),
        (None, '"cuda-bindings~=13.0" "nvidia-cuda-nvrtc==13.0.*"'),
    ],
)
def test_without_a_binding_there_is_a_remedy(cuda, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(KernelError, match=r"^cuda-bindings is not installed$") as raised:
        cuda_driver.Library(b"")
    assert raised.value.remedy == f"python -m pip install {remedy}"


def test_the_real_binding_takes_the_same_arguments():
    real = pytest.importorskip("cuda.bindings.driver")
    names = [name for name in vars(FakeDriver) if name.startswith("cu")]
    assert len(names) > 8
    for name in names:
        signature = re.match(rf"{name}\((.*?)\)\n", getattr(real, name).__doc__ + "\n", re.DOTALL)
        fake = getattr(FakeDriver, name).__code__
        expected = list(fake.co_varnames[1 : fake.co_argcount])
        parameters = re.sub(r"\[[^][]*\]", "", re.sub(r"\[[^][]*\]", "", signature[1]))
        found = [part.split(":")[0].split()[-1].strip("*") for part in parameters.split(",") if part.strip()]
        assert found == expected, name
    assert real.CUresult.CUDA_SUCCESS.value == 0
    assert real.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED.value == 2


def test_the_real_binding_makes_handles_of_numbers():
    real = pytest.importorskip("cuda.bindings.driver")
    for kind in (real.CUcontext, real.CUkernel, real.CUfunction, real.CUlibrary, real.CUstream):
        assert int(kind(12345)) == 12345


STUB = r"""
#include <cstdio>
#include <cstring>
#include <dlfcn.h>

static thread_local void* context = nullptr;
static thread_local int mode = 0;

extern "C" {
int cuInit(unsigned) { return 0; }
int cuDriverGetVersion(int* version) { *version = 13000; return 0; }
int cuGetErrorString(int, const char** text) { *text = "it is a stub"; return 0; }
int cuDeviceGet(int* device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void** out, int device) { *out = (void*)(0x1000l + device); return 0; }
int cuCtxGetCurrent(void** out) { *out = context; return 0; }
int cuCtxSetCurrent(void* to) { context = to; printf("context %p\n", to); return 0; }
int cuThreadExchangeStreamCaptureMode(int* to) {
  const int before = mode;
  printf("mode %d\n", mode = *to);
  *to = before;
  return 0;
}
int cuLibraryLoadData(void** out, const void* code, void*, void*, unsigned, void*, void*, unsigned) {
  printf("load %s\n", (const char*)code);
  *out = (void*)0x2000;
  return 0;
}
int cuLibraryGetKernel(void** out, void* library, const char* name) {
  printf("kernel %s of %p\n", name, library);
  *out = (void*)0x3000;
  return 0;
}
int cuKernelGetFunction(void** out, void* kernel) {
  printf("function of %p\n", kernel);
  *out = (void*)0x4000;
  return 0;
}
#ifdef LOADS
int cuFuncLoad(void* function) { printf("load %p\n", function); return 0; }
#endif
int cuLaunchKernel(void* function, unsigned a, unsigned b, unsigned c, unsigned d, unsigned e, unsigned f,
                   unsigned shared, void* stream, void** params, void** extra) {
  long pointer;
  float number;
  memcpy(&pointer, params[0], 8);
  memcpy(&number, (char*)params[0] + 8, 4);
  printf("launch %p in %p: %u %u %u, %u %u %u, %u, %p, %d: %lx %g\n", function, context, a, b, c, d, e, f, shared,
         stream, extra != nullptr, pointer, number);
  return a == 99 ? 700 : 0;
}
int cuGetProcAddress_v2(const char* name, void** out, int, unsigned long long, int* found) {
  *out = dlsym(dlopen("libcuda.so.1", RTLD_NOLOAD | RTLD_NOW), name);
  if (found) *found = *out ? 0 : 1;
  return *out ? 0 : 500;
}
int cuGetProcAddress(const char* name, void** out, int version, unsigned long long flags) {
  return cuGetProcAddress_v2(name, out, version, flags, nullptr);
}
}
"""
# Without PyTorch, whose import would take longer than all of it.
WITH_STUB = """
import struct, sys, types

cuda = types.SimpleNamespace(current_stream=lambda index: types.SimpleNamespace(cuda_stream=0x500 + index))
sys.modules["torch"] = types.SimpleNamespace(cuda=cuda, version=types.SimpleNamespace(cuda="13.0"))
from torch_utils.ops import cuda_driver

library = cuda_driver.Library(b"code")
params, device = struct.pack("@Pf0P", 0x123456789ABC, 2.5), types.SimpleNamespace(index=1)
library("any_f32", (3, 2, 1), (256, 1, 1), params, device)
try:
    library("any_f32", (99, 2, 1), (256, 1, 1), params, device)
except RuntimeError as error:
    print(error, flush=True)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a stub is made for Linux")
@pytest.mark.parametrize("loads", [True, False], ids=["new driver", "old driver"])
def test_the_real_binding_launches_what_we_say(loads, tmp_path):
    """Of a driver that prints its calls."""
    pytest.importorskip("cuda.bindings.driver")
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile a driver")
    (tmp_path / "stub.cpp").write_text(STUB)
    flags = ["-shared", "-fPIC", "-w", *["-DLOADS"] * loads]
    subprocess.run([compiler, *flags, "stub.cpp", "-o", "libcuda.so.1"], cwd=tmp_path, check=True)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", WITH_STUB]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert result.stderr == ""
    launch = "launch 0x4000 in 0x1001: {} 2 1, 256 1 1, 0, 0x501, 0: 123456789abc 2.5"
    lines = ["load code", "context 0x1001", "mode 2", "kernel any_f32 of 0x2000", "function of 0x3000"]
    lines += ["load 0x4000"] * loads + ["mode 0", launch.format(3), "context (nil)"]
    lines += ["context 0x1001", launch.format(99), "context (nil)"]
    lines += ["CUDA error: it is a stub (any_f32 with (99, 2, 1) blocks of (256, 1, 1) threads)"]
    assert sorted(result.stdout.splitlines()) == sorted(lines)  # C and Python have buffers of their own
    assert [line for line in result.stdout.splitlines() if not line.startswith("CUDA")] == lines[:-1]
