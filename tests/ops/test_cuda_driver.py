"""Kernels are launched in the right context, on the right stream, whatever thread asks and even during a recording."""

import re
import shutil
import sys
import threading

import fake_cuda
import host_kernels
import pytest
import torch
from fake_cuda import SCALE, FakeDriver, scaled

from torch_utils.ops import cubins, cuda_driver, cuda_kernels
from torch_utils.ops.kernel_state import KernelError


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "scale.cu").write_text(SCALE)
    shutil.copy(cubins.SOURCES / "common.cuh", folder)
    return folder


@pytest.fixture
def driver(monkeypatch, sources):
    monkeypatch.setattr(host_kernels, "CSRC", sources)
    return fake_cuda.install(monkeypatch, sources)


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


def test_a_device_is_found(driver):
    driver.context = 101
    assert cuda_driver.find(torch.device("cuda")) == cuda_driver.Device(1, "Fake 1", (9, 0), "13.0")
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
        ("13.0", "pip install cuda-bindings~=13.0 nvidia-cuda-nvrtc~=13.0"),
        ("12.8", "pip install cuda-bindings~=12.0 nvidia-cuda-nvrtc-cu12~=12.0"),
    ],
)
def test_without_a_binding_there_is_a_remedy(cuda, remedy, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(KernelError, match=f"^cuda-bindings is not installed; {remedy}$"):
        cuda_driver.Library(b"")


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
