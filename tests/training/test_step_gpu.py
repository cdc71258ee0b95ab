"""Whole steps with the CUDA kernels, on a GPU or compiled for the host, are the steps of PyTorch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_step import IMAGES, NoHostReads, batch_of, tiny_config

from gan.data.labels import LabelTable
from gan.networks import set_half_dtype
from gan.training.state import TrainingState
from gan.training.step import TrainStep
from torch_utils.ops import cuda_kernels, kernels

HALVES = {"cpu": torch.bfloat16, "cuda": torch.float16}


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """cuDNN's fastest algorithms sum in whatever order, and TF32 is less exact than these tests."""
    settings = [(torch.backends.cudnn, "deterministic", True), (torch.backends.cudnn, "benchmark", False)]
    settings += [(torch.backends.cudnn, "allow_tf32", False), (torch.backends.cuda.matmul, "allow_tf32", False)]
    before = [getattr(module, name) for module, name, _ in settings]
    for module, name, value in settings:
        setattr(module, name, value)
    yield
    for (module, name, _), value in zip(settings, before, strict=True):
        setattr(module, name, value)


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
    for _ in range(2):
        one.step(*one.batch)
        other.step(*other.batch)
    assert not torch.equal(one.weights, begin)
    assert torch.equal(one.weights, other.weights)


def test_the_kernels_read_nothing_from_the_device(on_host: object, launched: dict[str, set[str]]) -> None:
    run = Run(torch.device("cpu"), False)
    with NoHostReads():
        run.step(*run.batch)
    assert launched.keys() == cuda_kernels.kernels.keys()


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
