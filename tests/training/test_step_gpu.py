"""Whole steps with the CUDA kernels, on a GPU or compiled for the host, are the steps of PyTorch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from host_kernels import HostLaunch
from test_step import IMAGES, NoHostReads, batch_of, tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from gan.data.labels import LabelTable
from gan.networks import set_half_dtype
from gan.training.state import TrainingState
from gan.training.step import TrainStep
from torch_utils.ops import cuda_kernels, kernels

HALVES = {"cpu": torch.bfloat16, "cuda": torch.float16}


class SumsInOrder(TorchDispatchMode):
    """Fails on what adds up in any order on a GPU, of all that `torch.use_deterministic_algorithms` refuses there."""

    ADDITIONS = ("scatter_add", "scatter_reduce", "index_add", "index_put", "index_reduce", "put", "bincount", "histc")
    ADDITIONS += ("cumsum", "grid_sampler_2d_backward", "embedding_dense_backward")
    PADS = ("reflection_pad", "replication_pad", "upsample", "adaptive_avg_pool", "max_pool")  # and their backward

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.split(".")[0].strip("_")
        ordered = name not in self.ADDITIONS and not (name.startswith(self.PADS) and name.endswith("backward"))
        assert ordered, f"the step adds in any order: {func}"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launched(kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> dict[str, set[str]]:
    """{kernel: entry points that were launched in this test}"""
    entries: dict[str, set[str]] = {}
    real = cuda_kernels.CudaKernel.run

    def run(self: cuda_kernels.CudaKernel, entry: str, *args: Any, **options: Any) -> None:
        entries.setdefault(self.name, set()).add(entry)
        real(self, entry, *args, **options)

    monkeypatch.setattr(cuda_kernels.CudaKernel, "run", run)
    return entries


class Run:
    """A tiny run with everything that augments, at p = 0.5, that is given the same batch again and again."""

    def __init__(self, device: torch.device, half: bool, graphs: str = "off") -> None:
        config = tiny_config(
            batch=4, precision="bf16" if half else "fp32", cuda_graphs=graphs, aug="fixed", p=0.5, augpipe="bgcfnc"
        )
        state = TrainingState(config, device)
        for network in (state.G, state.D):
            set_half_dtype(network, HALVES[device.type])
        labels = LabelTable(torch.zeros([1, 0], device=device), torch.zeros([IMAGES], dtype=torch.long, device=device))
        self.step = TrainStep(state, config, labels)
        images, indices = batch_of(config)
        self.batch = images.to(device), indices.to(device)

    def curve(self, steps: int) -> Iterator[dict[str, float]]:
        """The statistics of each step."""
        for _ in range(steps):
            self.step(*self.batch)
            yield {name: moments["mean"] for name, moments in self.step.state.stats.flush().items()}

    @property
    def weights(self) -> torch.Tensor:
        networks = (self.step.state.G, self.step.state.D)
        return torch.cat([p.detach().flatten() for net in networks for p in net.parameters()])


@pytest.mark.parametrize(("half", "tolerance"), [(False, 1e-3), (True, 0.1)], ids=["fp32", "half"])
def test_twenty_steps_go_as_they_go_without_kernels(
    kernel_device: torch.device, half: bool, tolerance: float, launched: dict[str, set[str]]
) -> None:
    """Losses in every step, and the weights after them by the way that they have come."""
    ours, native = Run(kernel_device, half), Run(kernel_device, half)
    begin = native.weights
    assert torch.equal(ours.weights, begin)
    steps = 6 if half and kernel_device.type == "cpu" else 20  # half precision is slow on a CPU
    with_kernels = list(ours.curve(steps))
    assert launched.keys() == cuda_kernels.kernels.keys()
    launched.clear()
    with kernels.disabled():
        without = list(native.curve(steps))
    assert not launched
    for one, other in zip(with_kernels, without, strict=True):
        for name in one.keys() | other.keys():
            if "/signs/" not in name:  # of a score near 0
                assert one[name] == pytest.approx(other[name], rel=tolerance, abs=tolerance), name
    way = (native.weights - begin).norm()

    # In half precision Adam moves some weights by rounding errors; what is wrong would move all.
    assert 0 < (ours.weights - native.weights).norm() < (0.4 if half else tolerance) * way


def test_equal_steps_are_equal_to_the_last_bit(kernel_device: torch.device) -> None:
    one, other = Run(kernel_device, True), Run(kernel_device, True)
    begin = one.weights
    for _ in range(1 if kernel_device.type == "cpu" else 4):
        one.step(*one.batch)
        other.step(*other.batch)
    assert not torch.equal(one.weights, begin)
    assert torch.equal(one.weights, other.weights)


def test_the_kernels_read_nothing_from_the_device_and_all_sums_are_in_order(
    on_host: dict[str, HostLaunch],
) -> None:
    run = Run(torch.device("cpu"), False)
    with NoHostReads(), SumsInOrder():
        run.step(*run.batch)
    assert all(launch.launched for launch in on_host.values())


def test_the_guard_of_that_test_works() -> None:
    x, index = torch.randn(2, 3, requires_grad=True), torch.tensor([0, 0])
    for sums in (lambda: x.index_select(1, index), lambda: x[:, index], lambda: F.pad(x[None], [2, 2], "reflect")):
        with pytest.raises(AssertionError, match="the step adds in any order"), SumsInOrder():
            sums().sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "half"])
def test_recorded_phases_are_those_that_run_unrecorded(half: bool) -> None:
    device = torch.device("cuda")
    kernels.prepare(device)
    after = []
    for graphs in ("off", "on"):
        run = Run(device, half, graphs)
        begin = run.weights
        for _ in range(20):  # of D's R1 the first is run and the second recorded
            run.step(*run.batch)
        if run.step.graphs is not None:
            assert set(run.step.graphs._graphs) == {"Gmain", "Greg", "Dmain", "Dreg"}
        after.append(run.weights)
    assert (after[1] - after[0]).norm() < (0.1 if half else 1e-3) * (after[0] - begin).norm()
