"""How CUDA kernels come into use, and that whatever goes wrong leaves PyTorch's operations and a reason."""

import itertools
import os
import threading
import time

import fake_cuda
import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from fake_cuda import scaled
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops import cubins, cuda_driver, cuda_kernels, cuda_trial, kernels, nvrtc
from torch_utils.ops.bias_act import bias_act
from torch_utils.ops.cubins import Built
from torch_utils.ops.cuda_kernels import DeviceLost
from torch_utils.ops.kernel_state import KernelError
from torch_utils.ops.noise_bias_act import noise_bias_act

REAL = cuda_kernels.kernels
INSTEAD = "; PyTorch's operations run instead"


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Two devices that are not there, an empty cache, and no kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_kernels, "kernels", {})
    monkeypatch.setattr(kernels, "_asked", ("cpu", "auto"))
    return fake_cuda.install(monkeypatch)


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
        kernel.launch, kernel.prepared, kernel.built = None, False, None
        kernel.reason, kernel.remedy = "kernels.prepare was not called", None


def raising(error):
    """A function that raises an error, whatever it is called with."""

    def function(*args):
        raise error

    return function


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
    assert state == kernels.KernelState("scale", "cuda", True, "", 1.25, False, verified="now", compiler="NVRTC 13.0")
    assert state in kernels.states()


def test_a_kernel_is_compared_once_a_machine_and_version(kernel, compiled, driver, monkeypatch):
    def again():
        next_process()
        kernel.checks.clear()
        assert kernels.prepare("cuda").startswith("CUDA kernels: scale (")
        (state,) = cuda_kernels.states()
        assert state.verified == ("now" if kernel.checks else "before")
        return len(kernel.checks)

    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Another")
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(driver, "cuDriverGetVersion", lambda: (driver.CUresult.CUDA_SUCCESS, 13010))
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert [again(), again()] == [1, 0]
    compiled = nvrtc.compiled
    monkeypatch.setattr(cubins.Built, "digest", "of other code")
    assert [again(), again()] == [1, 0]
    assert nvrtc.compiled is compiled


def test_a_cache_that_cannot_be_written_costs_a_comparison(kernel, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    for _ in range(2):
        next_process()
        assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"
    assert len(kernel.checks) == 2


def test_what_was_built_and_could_not_be_kept_is_said(kernel, monkeypatch):
    built = Built(b"scale.cu", "NVRTC", (13, 0), 1.25, 32, 0, not_kept="/a cannot be written (Read-only file system)")
    monkeypatch.setattr(nvrtc, "compiled", lambda source, arch: built)
    expected = "CUDA kernels: scale (built in 1.2 s, not kept: /a cannot be written (Read-only file system))"
    assert kernels.prepare("cuda") == expected


def test_the_sources_of_python_may_be_missing(kernel, monkeypatch, tmp_path):
    """As in an installation of compiled files alone; the code of the kernel is what then tells versions apart."""
    monkeypatch.setattr(cuda_trial, "__file__", str(tmp_path / "cuda_trial.pyc"))
    kernels.prepare("cuda")
    next_process()
    kernels.prepare("cuda")
    assert len(kernel.checks) == 1
    monkeypatch.setattr(cubins.Built, "digest", "of other code")
    next_process()
    kernels.prepare("cuda")
    assert len(kernel.checks) == 2


def test_what_the_driver_compiles_is_compared_every_time(kernel, monkeypatch):
    monkeypatch.setattr(nvrtc, "arch_of", lambda capability: "compute_90")
    for _ in range(2):
        next_process()
        kernels.prepare("cuda", "cuda")
    assert len(kernel.checks) == 2
    assert not list(cubins.folder().glob("*.verified"))


@pytest.mark.parametrize(
    ("arch", "compiler", "fits"),
    [
        ("sm_90", (12, 9), True),
        ("sm_90", (13, 5), True),  # CUDA's minor versions load each other's code
        ("compute_90", (13, 0), True),
        ("compute_90", (13, 1), False),
        ("sm_90", (14, 0), False),
    ],
)
def test_code_of_a_newer_cuda_than_the_drivers_is_not_loaded(arch, compiler, fits, kernel, driver, monkeypatch):
    monkeypatch.setattr(nvrtc, "arch_of", lambda capability: arch)
    monkeypatch.setattr(nvrtc, "compiled", lambda source, arch: Built(b"scale.cu", "NVRTC", compiler, 1.25, 32, 0))
    kernels.prepare("cuda")
    (state,) = cuda_kernels.states()
    assert state.in_use == fits == ("cuLibraryLoadData" in driver.calls)
    if not fits:
        version = ".".join(map(str, compiler))
        assert state.reason == f"the NVIDIA driver is for CUDA 13.0 and loads no code of NVRTC {version}"
        assert state.remedy.startswith("update the NVIDIA driver, or: python -m pip install --force-reinstall ")


def test_the_callers_modes_do_not_matter_to_the_check(kernel):
    def check(device):
        x = torch.ones(3, requires_grad=True)
        (x * 2).sum().backward()
        return None if x.grad.device.type == "cpu" and not x.is_inference() else "the modes"

    kernel.check = check
    with torch.inference_mode(), torch.device("meta"):
        assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"
    next_process()
    (note,) = cubins.folder().glob("*.verified")
    note.unlink()
    with torch.no_grad():
        assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"


def test_a_comparison_changes_no_random_number(kernel):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    kernels.prepare("cuda")
    assert torch.equal(torch.rand(3), expected)


def test_wrong_results_are_found(kernel):
    kernel.check = lambda device: "dx of scale in float16"
    reason = "results are wrong here (dx of scale in float16)"
    assert kernels.prepare("cuda") == f"CUDA kernels: none, because {reason}{INSTEAD}"
    assert kernel.launch is None
    next_process()
    assert reason in kernels.prepare("cuda")  # and nothing was noted


def test_one_that_fails_leaves_the_others(kernel, monkeypatch):
    other = cuda_kernels.register("other", "other.cu", lambda device: None)
    compiled = nvrtc.compiled

    def fails(source, arch):
        if source == "other.cu":
            raise KernelError("other.cu does not compile: it is wrong")
        return compiled(source, arch)

    monkeypatch.setattr(nvrtc, "compiled", fails)
    reason = "not other, because other.cu does not compile: it is wrong"
    assert kernels.prepare("cuda") == f"CUDA kernels: scale (built in 1.2 s); {reason}{INSTEAD}"
    assert (kernel.launch is None, other.launch is None) == (False, True)
    with pytest.raises(KernelError, match=r"^other: other.cu does not compile: it is wrong$"):
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


FAULT = RuntimeError(
    "CUDA error: an illegal memory access was encountered\n"
    "Search for `cudaErrorIllegalAddress' in https://docs.nvidia.com for more information.\n"
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might lie.\n"
)
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")


def test_a_check_that_fails_costs_its_kernel(kernel):
    kernel.check = raising(FULL)
    reason = "the check does not run (CUDA out of memory. Tried to allocate 1 GiB)"
    assert kernels.prepare("cuda") == f"CUDA kernels: none, because {reason}{INSTEAD}"
    assert kernel.launch is None
    assert not list(cubins.folder().glob("*.failed"))


def test_a_kernel_that_breaks_the_device_is_left_out_by_the_next_process(kernel, monkeypatch):
    earlier, later = (cuda_kernels.register(name, "scale.cu", lambda device: None) for name in ("earlier", "later"))
    cuda_kernels.kernels = {"earlier": earlier, "scale": kernel, "later": later}
    check, kernel.check = kernel.check, raising(FAULT)
    with monkeypatch.context() as patch:
        # It works until the kernel has run.
        patch.setattr(torch.cuda, "synchronize", lambda place: kernel.launch and earlier.launch and raising(FAULT)())
        again = r"type the same command again: it does without scale$"
        message = rf"^scale: the device fails in its check \(CUDA error: an illegal .* encountered\); {again}"
        with pytest.raises(DeviceLost, match=message):
            kernels.prepare("cuda")
    assert {name: k.launch for name, k in cuda_kernels.kernels.items()} == dict.fromkeys(cuda_kernels.kernels)
    assert earlier.reason == later.reason == "scale broke the device before"
    next_process()
    kernel.check = check
    reason = "the device fails in its check (CUDA error: an illegal memory access was encountered) (tried before)"
    expected = f"CUDA kernels: earlier, later (built in 1.2 s); not scale, because {reason}{INSTEAD}"
    assert kernels.prepare("cuda") == expected
    assert kernel.checks == []
    assert "update the NVIDIA driver" in next(state.remedy for state in cuda_kernels.states() if state.remedy)
    next_process()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: None)  # the same home on another machine
    assert kernels.prepare("cuda") == "CUDA kernels: earlier, scale, later (built in 1.2 s)"


@pytest.mark.parametrize("words", ["out of memory", "CUDA-capable device(s) is/are busy or unavailable"])
def test_a_device_that_others_fill_is_no_fault_of_a_kernel(words, kernel, monkeypatch):
    error = RuntimeError(f"CUDA error: {words}\nCUDA kernel errors might be asynchronously reported")
    kernel.check = raising(error)
    calls = itertools.count()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: next(calls) and raising(error)())
    reason = f"the check does not run (CUDA error: {words})"
    assert kernels.prepare("cuda") == f"CUDA kernels: none, because {reason}{INSTEAD}"
    assert not list(cubins.folder().glob("*.failed"))


@pytest.mark.parametrize("error", [FULL, FAULT])
def test_a_device_that_cannot_be_used_is_no_fault_of_a_kernel(error, kernel, compiled, monkeypatch):
    cuda_kernels.register("other", "scale.cu", kernel.check)
    monkeypatch.setattr(cuda_trial, "_compute", raising(error))
    status = kernels.prepare("cuda")
    assert status.startswith("CUDA kernels: none, because the device cannot be used (CUDA ")
    assert compiled == kernel.checks == []
    assert not cubins.folder().exists()
    (state, _) = cuda_kernels.states()
    assert (state.remedy is not None) == (error is FULL)


@pytest.mark.parametrize("cache", [True, False])
def test_a_check_that_does_not_end_ends_the_process(cache, kernel, monkeypatch, capsys, tmp_path):
    ended = threading.Event()
    codes = []
    monkeypatch.setattr(cuda_trial, "_SECONDS", 0.05)
    monkeypatch.setattr(cuda_trial.os, "_exit", lambda code: (codes.append(code), ended.set()))
    if not cache:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    check, kernel.check = kernel.check, lambda device: None if ended.wait(30) else "nothing ended it"
    kernels.prepare("cuda")
    assert codes == [1]
    said = "error: scale: its check did not end in 0.05 s; "
    advice = "type the same command again: it does without scale"
    if not cache:
        advice = f"{cubins.folder()} cannot be written, so ask for no kernels"
    assert capsys.readouterr().err == f"{said}{advice}\n"
    next_process()
    kernel.check = check
    status = kernels.prepare("cuda")
    assert ("because its check did not end in 0.05 s (tried before)" in status) == cache
    if cache:  # it may have been stopped by somebody: not a judgement for ever
        (note,) = cubins.folder().glob("*.slow")
        assert f"delete {note}" in next(state.remedy for state in cuda_kernels.states() if state.remedy)
        yesterday = time.time() - 1.01 * cuda_trial._RETRY_SECONDS
        os.utime(note, (yesterday, yesterday))
        next_process()
        assert kernels.prepare("cuda").startswith("CUDA kernels: scale ")


@pytest.mark.parametrize("words", ["uncorrectable ECC error encountered", "uncorrectable NVLINK error", "device lost"])
def test_a_card_that_fails_is_no_fault_of_a_kernel(words, kernel, monkeypatch):
    error = RuntimeError(f"CUDA error: {words}\nCUDA kernel errors might be asynchronously reported")
    kernel.check = raising(error)
    calls = itertools.count()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: next(calls) and raising(error)())
    with pytest.raises(DeviceLost, match="type the same command again") as raised:
        kernels.prepare("cuda")
    assert bool(list(cubins.folder().glob("*.failed"))) == (words == "device lost")
    assert ("without scale" in str(raised.value)) == (words == "device lost")


def test_a_check_that_is_interrupted_is_made_by_the_next_call(kernel):
    check, kernel.check = kernel.check, raising(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        kernels.prepare("cuda")
    assert (kernel.launch, kernel.prepared) == (None, False)
    kernel.check = check
    assert kernels.prepare("cuda") == "CUDA kernels: scale (built in 1.2 s)"


def test_the_check_ends_with_what_it_launched(kernel, monkeypatch):
    """A fault inside of a kernel shows when the device is waited for."""
    launched = []
    check = kernel.check
    kernel.check = lambda device: launched.append(device) or check(device)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: launched and raising(FAULT)())
    with pytest.raises(DeviceLost, match="an illegal memory access"):
        kernels.prepare("cuda")
    assert kernel.checks


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
    assert (kernel.launch, kernel.prepared) == (None, False)
    assert kernels.prepare("cuda", "cuda") == "CUDA kernels: scale (built in 1.2 s)"
    kernels.prepare("cuda", "ref")
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


def test_a_kernel_takes_tensors_of_the_devices_that_it_is_compiled_for(kernel, monkeypatch):
    class OnDevice:
        dtype = torch.float32

        def __init__(self, index):
            self.device = torch.device("cuda", index)

        def numel(self):
            return 3

    monkeypatch.setattr(torch.cuda, "get_device_capability", [(9, 0), (8, 0)].__getitem__)
    kernels.prepare("cuda:0", "cuda")
    assert kernel.takes(OnDevice(0))
    assert not kernel.takes(OnDevice(1))
    assert not kernel.takes(torch.ones(3))
    with pytest.raises(AssertionError, match=r"^scale computes on cuda, not on cpu$"):
        scaled(kernel, torch.ones(3), 2, "cpu")


def test_transforms_have_pytorchs_operations():
    kernel = cuda_kernels.CudaKernel("any", "any.cu", lambda device: None, launch=print, device_type="cpu")
    taken = []

    def function(x):
        taken.append(kernel.takes(x))
        return 2 * x

    x = torch.ones(3)
    function(x)
    torch.vmap(function)(x)
    with forward_ad.dual_level():
        function(x)
    function(x)
    assert taken == [True, False, False, True]


@pytest.fixture(scope="module")
def twice():
    """An operator, the devices of whose inputs are in `seen`."""

    def implementation(x):
        seen.append(x.device.type)
        return 2 * x

    def fake(x):
        seen.append("fake")
        return torch.empty_like(x)

    seen = []
    schema = "test_twice(Tensor x) -> Tensor"
    setup, backward = lambda ctx, inputs, output: None, lambda ctx, dy: 2 * dy
    operator = cuda_kernels.define(schema, implementation, fake, setup, backward)
    operator.seen = seen
    return operator


@pytest.fixture
def dispatched(twice, monkeypatch):
    """The calls that go by PyTorch's dispatcher."""
    calls, op = [], twice.op
    monkeypatch.setattr(twice, "op", lambda *args: calls.append(args) or op(*args))
    twice.seen.clear()
    return calls


def test_an_operator_is_called_directly(twice, dispatched):
    x = torch.ones(3, requires_grad=True)
    assert torch.autograd.grad(twice(x).sum(), x)[0].tolist() == [2, 2, 2]
    with torch.no_grad():
        assert not twice(x).requires_grad
    assert (dispatched, twice.seen) == ([], ["cpu", "cpu"])


def test_whoever_traces_sees_the_registered_operator(twice, dispatched):
    x = torch.ones(3, requires_grad=True)
    with FakeTensorMode() as mode:
        assert twice(mode.from_tensor(x)).shape == (3,)
    assert len(dispatched) == 1
    assert twice(mode.from_tensor(x)).shape == (3,)  # a fake tensor, without its mode
    assert len(dispatched) == 2
    assert set(twice.seen) == {"fake"}

    class Watch(TorchDispatchMode):
        seen = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        y = twice(x)
    assert Watch.seen == [torch.ops.gan.test_twice.default]
    assert torch.autograd.grad(y.sum(), x)[0].tolist() == [2, 2, 2]
    assert twice(x).tolist() == [2, 2, 2]
    assert len(dispatched) == 3


def test_a_real_kernel_is_prepared_and_used(driver, compiled, host_launches, monkeypatch):
    """All of it, but for the compiler and the driver themselves."""
    real = REAL["noise_bias_act"]
    driver.compiled = {real.source: host_launches[real.name]}
    check = real.check
    changes = {"check": lambda device: check(torch.device("cpu")), "device_type": "cpu"}
    for name, value in {**changes, "launch": None, "prepared": False, "built": None, "reason": ""}.items():
        monkeypatch.setattr(real, name, value)
    monkeypatch.setattr(real, "indices", real.indices)
    monkeypatch.setattr(cuda_driver, "alike", lambda device: frozenset([None]))
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
    kernel.run("any", (1, 1, 1), (1, 1, 1), "PiPf", 1, 2, 3, 0.0, device=torch.device("cuda"))
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
