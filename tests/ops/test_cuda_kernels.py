"""How CUDA kernels come into use, and that whatever goes wrong leaves PyTorch's operations and a reason."""

import shutil
import threading

import fake_cuda
import host_kernels
import pytest
import torch
from fake_cuda import SCALE, scaled

from torch_utils.ops import cubins, cuda_driver, cuda_kernels, kernels, nvrtc
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.cuda_kernels import DeviceLost
from torch_utils.ops.kernel_state import KernelError
from torch_utils.ops.noise_bias_act import noise_bias_act

REAL = cuda_kernels.kernels
INSTEAD = "; PyTorch's operations run instead"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("csrc")
    (folder / "scale.cu").write_text(SCALE)
    shutil.copy(cubins.SOURCES / "common.cuh", folder)
    return folder


@pytest.fixture
def driver(monkeypatch, sources, tmp_path):
    """Two devices that are not there, an empty cache, and no kernels."""
    monkeypatch.setattr(host_kernels, "CSRC", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_kernels, "kernels", {})
    monkeypatch.setattr(kernels, "_asked", ("cpu", "auto"))
    return fake_cuda.install(monkeypatch, sources)


@pytest.fixture
def compiled(driver, monkeypatch):
    return fake_cuda.compile_nothing(monkeypatch)


@pytest.fixture
def kernel(driver, compiled):
    """Compares itself with PyTorch on the device, and counts how often."""

    def check(device):
        kernel.checks.append(device)
        x = torch.randn(1000)
        return None if torch.equal(scaled(kernel, x, 3.5, str(device)), x * 3.5) else "y of scale in float32"

    kernel = cuda_kernels.register("scale", "scale.cu", check)
    kernel.checks = []
    return kernel


def next_process():
    """Everything as in the next process, but for what is on disk."""
    for kernel in cuda_kernels.kernels.values():
        kernel.launch, kernel.prepared, kernel.built, kernel.reason = (
            None,
            False,
            None,
            "kernels.prepare was not called",
        )


def test_nothing_happens_before_prepare(kernel, compiled, driver):
    assert not kernel.takes(torch.ones(3))
    with pytest.raises(AssertionError, match=r"scale is not in use: kernels.prepare was not called"):
        scaled(kernel, torch.ones(3), 2)
    kernels.prepare("cpu")
    kernels.prepare("mps")
    assert (compiled, driver.calls, kernel.prepared) == ([], [], False)


def test_prepare_compiles_loads_and_compares(kernel, compiled, driver):
    assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"
    assert compiled == ["scale.cu sm_90"]
    assert kernel.checks == [torch.device("cuda:0")]
    assert torch.equal(scaled(kernel, torch.ones(3), 2), torch.full([3], 2.0))
    kernels.prepare("cuda")
    assert len(compiled) == len(kernel.checks) == 1
    (state,) = cuda_kernels.states()
    assert state == kernels.KernelState("scale", "cuda", True, "", 1.25, cached=False, verified=True)
    assert state in kernels.states()


def test_a_kernel_is_compared_once_a_machine_and_version(kernel, compiled, driver, monkeypatch):
    def again():
        next_process()
        kernel.checks.clear()
        assert kernels.prepare("cuda").startswith("CUDA kernels: scale (")
        return len(kernel.checks)

    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Another")
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (driver.CUresult.CUDA_SUCCESS, 13010))
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert [again(), again()] == [1, 0]
    cubin = nvrtc.cubin
    monkeypatch.setattr(cubins.Built, "digest", "of other code")
    assert [again(), again()] == [1, 0]
    assert nvrtc.cubin is cubin


def test_a_cache_that_cannot_be_written_costs_a_comparison(kernel, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        next_process()
        assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"
    assert len(kernel.checks) == 2


def test_a_comparison_changes_no_random_number(kernel):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    kernels.prepare("cuda")
    assert torch.equal(torch.rand(3), expected)


def test_wrong_results_are_found(kernel):
    kernel.check = lambda device: "dx of scale in float16"
    reason = "scale computes wrong results here (dx of scale in float16)"
    assert kernels.prepare("cuda") == f"CUDA kernels: none, because {reason}{INSTEAD}"
    assert kernel.launch is None
    next_process()
    assert reason in kernels.prepare("cuda")  # and nothing was noted


def test_one_that_fails_leaves_the_others(kernel, monkeypatch):
    other = cuda_kernels.register("other", "other.cu", lambda device: None)
    cubin = nvrtc.cubin

    def fails(source, arch):
        if source == "other.cu":
            raise KernelError("other.cu does not compile: it is wrong")
        return cubin(source, arch)

    monkeypatch.setattr(nvrtc, "cubin", fails)
    reason = "not other, because other.cu does not compile: it is wrong"
    assert kernels.prepare("cuda") == f"CUDA kernels: scale (built in 1.2 s); {reason}{INSTEAD}"
    assert (kernel.launch is None, other.launch is None) == (False, True)
    with pytest.raises(KernelError, match=r"^other.cu does not compile: it is wrong$"):
        kernels.prepare("cuda", "cuda")


@pytest.mark.parametrize(
    ("function", "error", "reason"),
    [
        (
            "cuLibraryLoadData",
            "CUDA_ERROR_INVALID_VALUE",
            "RuntimeError: CUDA error: invalid value (cuLibraryLoadData)",
        ),
        ("cuDriverGetVersion", "CUDA_ERROR_NOT_FOUND", "the CUDA driver cannot be used (CUDA error: not found"),
    ],
)
def test_what_the_driver_refuses_is_the_reason(function, error, reason, kernel, driver):
    driver.fails[function] = driver.CUresult[error]
    assert kernels.prepare("cuda").startswith(f"CUDA kernels: none, because {reason}")
    assert kernel.launch is None


def test_a_check_that_fails_costs_its_kernel(kernel):
    def check(device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    kernel.check = check
    reason = "scale cannot be checked (CUDA out of memory. Tried to allocate 1 GiB)"
    assert kernels.prepare("cuda") == f"CUDA kernels: none, because {reason}{INSTEAD}"
    assert kernel.launch is None


def test_a_kernel_that_breaks_the_device_is_left_out_by_the_next_process(kernel, monkeypatch):
    def broken(*args):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    check, kernel.check = kernel.check, broken
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "synchronize", broken)
        message = r"^scale fails on this device \(CUDA error: an illegal .*\); start again, and it is left out$"
        with pytest.raises(DeviceLost, match=message):
            kernels.prepare("cuda")
    assert kernel.launch is None
    next_process()
    kernel.check = check
    assert "because scale fails on this device (CUDA error: an illegal" in kernels.prepare("cuda")
    assert kernel.checks == []
    (note,) = cubins.folder().glob("*.failed")
    assert f"(tried before; delete {note} to try again)" in kernels.status()
    note.unlink()
    next_process()
    assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"


def test_without_a_gpu_the_reason_is_one_line(kernel, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    expected = f"CUDA kernels: none, because PyTorch finds no CUDA device{INSTEAD}"
    assert kernels.prepare("cuda") == kernels.status() == expected
    with pytest.raises(KernelError, match=r"^PyTorch finds no CUDA device$"):
        kernels.prepare("cuda", "cuda")


def test_modes(kernel, compiled):
    with pytest.raises(KernelError, match=r"^the device is cpu$"):
        kernels.prepare("cpu", "cuda")
    with pytest.raises(ValueError, match="mode must be one of auto, cuda, ref, not fast"):
        kernels.prepare("cuda", "fast")
    assert kernels.prepare("cuda", "ref") == "no kernels, PyTorch's operations as asked for"
    assert compiled == []
    assert kernels.prepare("cuda", "cuda") == "CUDA kernels: scale (built in 1.2 s)"
    with kernels.disabled():
        assert kernel.launch is None
    assert kernel.launch is not None
    kernels.prepare("cuda", "ref")
    assert kernel.launch is None
    assert kernels.prepare("mps") == "no kernels for mps, PyTorch's operations"


def test_what_a_kernel_takes():
    kernel = cuda_kernels.CudaKernel("any", "any.cu", lambda device: None, launch=print, device_type="cpu")
    x = torch.ones(3)
    for good in ([x], [x, None, x.half()], [None, x.bfloat16()]):
        assert kernel.takes(*good)
    on_meta = torch.ones(3, device="meta")
    for bad in (x.double(), x.long(), x[:0], on_meta, torch.empty(2**31, device="meta")):
        assert not kernel.takes(x, bad)
    assert not kernel.takes(on_meta)
    kernel.device_type = "meta"
    assert kernel.takes(on_meta)
    assert not kernel.takes(torch.empty(2**31, device="meta"))
    assert not kernel.takes(on_meta, x)  # PyTorch says what is wrong with that


def test_a_real_kernel_is_prepared_and_used(driver, compiled, host_launches, monkeypatch):
    """All of it, but for the compiler and the driver themselves."""
    real = REAL["noise_bias_act"]
    driver.compiled = {real.source: host_launches[real.name]}
    check = real.check
    changes = {"check": lambda device: check(torch.device("cpu")), "device_type": "cpu"}
    for name, value in {**changes, "launch": None, "prepared": False, "built": None, "reason": ""}.items():
        monkeypatch.setattr(real, name, value)
    cuda_kernels.kernels[real.name] = real
    assert kernels.prepare("cuda", "cuda") == "CUDA kernels: noise_bias_act (built in 1.2 s)"
    assert driver.launches  # to check it
    driver.launches.clear()
    x, b = torch.randn(2, 3, 4, 5, requires_grad=True), torch.randn(3, requires_grad=True)
    scale = torch.rand(2, 3)
    y = noise_bias_act(x, scale, b=b, act="lrelu")
    dx, db = torch.autograd.grad(y.square().sum(), [x, b], create_graph=True)
    (dx.square().sum() + db.sum()).backward()
    assert len(driver.launches) >= 3
    with kernels.disabled():
        expected = torch.autograd.grad(noise_bias_act(x, scale, b=b, act="lrelu").square().sum(), [x, b])
    torch.testing.assert_close((dx.detach(), db.detach()), expected)


def test_every_operation_announces_its_kernel():
    sources = {kernel.source for kernel in cuda_kernels.kernels.values()}
    assert sources == {path.name for path in cubins.SOURCES.glob("*.cu")}


def test_parameters_are_packed_as_a_compiler_would():
    seen = []
    kernel = cuda_kernels.CudaKernel("any", "any.cu", lambda device: None)
    kernel.launch = lambda entry, grid, block, params, device: seen.append(params)
    kernel.run("any", (1, 1, 1), (1, 1, 1), "PiPf", 1, 2, 3, 0.0, device=torch.device("cpu"))
    ints = torch.frombuffer(bytearray(seen[0]), dtype=torch.int64)
    assert ints.tolist() == [1, 2, 3, 0]  # padded before a pointer and at the end


@pytest.mark.gpu
def test_every_kernel_is_in_use_on_a_gpu():
    kernels.prepare("cuda", "cuda")
    assert all(state.in_use and state.verified for state in kernels.states() if state.kind == "cuda")


@pytest.mark.gpu
def test_a_kernel_launches_from_a_new_thread():
    kernels.prepare("cuda", "cuda")
    x, results = torch.randn(4, 5, 6, 7, device="cuda"), []
    expected = bias_act(x, act="lrelu")
    thread = threading.Thread(target=lambda: results.append(bias_act(x, act="lrelu")))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.gpu
def test_a_kernel_may_be_loaded_while_a_graph_is_recorded(monkeypatch):
    kernels.prepare("cuda", "cuda")
    x = torch.randn(4, 5, 6, 7, device="cuda")
    expected = bias_act(x, act="lrelu")
    kernel = REAL["bias_act"]
    monkeypatch.setattr(kernel, "launch", cuda_driver.Library(kernel.built.code))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = bias_act(x, act="lrelu")
    graph.replay()
    assert torch.equal(y, expected)


@pytest.mark.gpu
def test_a_kernel_runs_on_the_current_stream():
    kernels.prepare("cuda", "cuda")
    x = torch.zeros(1 << 24, 1, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(100):  # long enough for a kernel on another stream to come before the end of it
            x += 1
        y = bias_act(x, act="lrelu", gain=1)
    stream.synchronize()
    assert (y == 100).all()
