"""What tests of several floors share: a tiny dataset, tiny runs, and GPU tests that skip without a GPU."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from host_kernels import HostLaunch, alone
from tiny import write_dataset

from torch_utils.ops import bias_act, cuda_kernels, kernels
from torch_utils.ops import cpu_kernels as compiled

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GAN_CPU_KERNELS", "0")  # tests that want them ask for `cpu_kernels`; nothing is built elsewhere
torch.set_num_threads(1)  # tensors this small gain nothing from threads, and lose much when the cores are busy


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """`-n auto`: a process for every core that we may use, as tests measure time; but each takes up to 1 GB."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, 8)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _exact_gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test marked gpu computes as exactly as it can, whatever `devices.prepare` has set for the process before it."""
    if "gpu" not in request.keywords:
        yield
        return
    settings = [(torch.backends.cuda.matmul, "allow_tf32", False), (torch.backends.cudnn, "allow_tf32", False)]
    # The fastest algorithms sum in whatever order.
    settings += [(torch.backends.cudnn, "benchmark", False), (torch.backends.cudnn, "deterministic", True)]
    before = [getattr(module, name) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    yield
    for (module, name, _), value in zip(settings, before, strict=True):
        setattr(module, name, value)


@pytest.fixture(scope="session")
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all processes of this run of pytest share, for what takes seconds to compile."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "compiled"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "tiny.zip")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path | None:
    """An MLflow database without runs, made once: making one takes seconds. None without mlflow."""
    try:
        from mlflow.tracking import MlflowClient
    except ImportError:
        return None
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def outdir(tmp_path: Path, empty_store: Path | None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for runs with an MLflow database in it, and the working directory beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    folder = tmp_path / "training-runs"
    folder.mkdir()
    if empty_store is not None:
        shutil.copy(empty_store, folder / "mlflow.db")
    return folder


@pytest.fixture
def light_runs() -> Iterator[pytest.MonkeyPatch]:
    """The runs of a test go without MLflow and large sheets, which take most of the time of a tiny run."""
    import runs  # here, as tests of lower floors need nothing of it

    with pytest.MonkeyPatch.context() as patch:
        runs.make_light(patch)
        yield patch


@pytest.fixture
def full_runs(light_runs: pytest.MonkeyPatch) -> None:
    """In a module whose runs are light: those of this test are not."""
    light_runs.undo()


@pytest.fixture(scope="session")
def whole(tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a light run of `runs.RUN` that was never disturbed; to be read, or copied."""
    import runs

    outdir = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        runs.make_light(patch)
        result = runs.run_train("--data", tiny_dataset, *runs.RUN, "--outdir", outdir)
    assert result.exit_code == 0, result.output
    return next(outdir.glob("0*"))


@pytest.fixture(scope="session")
def built_kernel(compiled_once: Path) -> compiled.CpuKernel:
    """The kernel of bias_act, built once into a cache of its own and not switched on; skips where none can be built."""
    kernel = dataclasses.replace(bias_act._kernel, ops=None, prepared=False)
    with pytest.MonkeyPatch.context() as patch, alone(compiled_once / "bias_act.cpp"):
        patch.setenv("XDG_CACHE_HOME", str(compiled_once))
        patch.delenv(compiled.SWITCH)
        compiled._prepare(kernel, timeout=120)
    if kernel.ops is None:
        if "not found" in kernel.reason or "was found" in kernel.reason or "Windows" in kernel.reason:
            pytest.skip(kernel.reason)
        pytest.fail(kernel.reason)
    return kernel


@pytest.fixture
def cpu_kernels(built_kernel: compiled.CpuKernel, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Has the test run with compiled kernels; their operators."""
    monkeypatch.setattr(bias_act._kernel, "ops", built_kernel.ops)
    return built_kernel.ops


@pytest.fixture(scope="session")
def host_launches(compiled_once: Path) -> dict[str, HostLaunch]:
    """The CUDA kernels as they run on the CPU, by name; each is compiled once, when it is first launched."""
    return {name: HostLaunch(kernel.source, compiled_once) for name, kernel in cuda_kernels.kernels.items()}


@pytest.fixture
def on_host(host_launches: dict[str, HostLaunch], monkeypatch: pytest.MonkeyPatch) -> dict[str, HostLaunch]:
    """Has the test run with the CUDA kernels, for tensors of the CPU: see host_kernels."""
    for name, launch in host_launches.items():
        launch.launched.clear()
        monkeypatch.setattr(cuda_kernels.kernels[name], "launch", launch)
        monkeypatch.setattr(cuda_kernels.kernels[name], "device_type", "cpu")
        monkeypatch.setattr(cuda_kernels.kernels[name], "indices", frozenset([None]))
    return host_launches


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def kernel_device(request: pytest.FixtureRequest) -> torch.device:
    """Where the CUDA kernels run in this test: compiled for the host, or on a GPU."""
    if request.param == "host":
        request.getfixturevalue("on_host")
        return torch.device("cpu")
    kernels.prepare("cuda", "cuda")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def golden() -> Callable[[str], dict[str, np.ndarray]]:
    folder = Path(__file__).parent / "golden"
    return lambda name: dict(np.load(folder / name))
