"""The operations that are counted from shapes are those that PyTorch counts when a step runs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from gan.bench.flops import PENALISED, TRAINED, network_flops, phase_flops, seconds_at
from gan.config import DataInfo
from gan.data.labels import LabelTable
from gan.networks import set_half_dtype
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.state import TrainingState
from gan.training.step import TrainStep

CPU = torch.device("cpu")


class Counter(TorchDispatchMode):
    """FlopCounterMode fails at gradients of gradients towards leaves; this one has its formulas, without modules."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        is_fir = func is torch.ops.aten.convolution.default and args[8] > 1
        if func._overloadpacket in flop_registry and not is_fir:
            self.total += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def test_a_convolution_with_a_penalty_on_its_gradient_costs_six_forward_passes() -> None:
    n, c, o, size = 2, 8, 16, 12
    x, w = torch.randn(n, c, size, size, requires_grad=True), torch.randn(o, c, 3, 3, requires_grad=True)
    forward = 2 * n * o * c * 9 * size * size
    with FlopCounterMode(display=False) as counter:
        y = F.conv2d(x, w, padding=1)
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        F.conv2d(x, w, padding=1).sum().backward()
    assert counter.get_total_flops() == TRAINED * forward
    with FlopCounterMode(display=False) as counter:
        # A nonlinearity: otherwise the gradient does not depend on x and nothing flows back through the output.
        y = F.conv2d(x, w, padding=1).square()
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        gradient.square().sum().backward()
    assert counter.get_total_flops() == PENALISED * forward


@pytest.mark.parametrize(("cfg", "shape"), [("auto", (32, 32, 3)), ("cifar", (32, 32, 3)), ("auto", (24, 40, 4))])
def test_a_step_executes_what_is_counted(cfg: str, shape: tuple[int, int, int]) -> None:
    height, width, channels = shape
    options = TrainOptions(data="x", cfg=cfg, batch=8, batch_gpu=4, mbstd_group=4, cbase=2048, cmax=64, aug="noaug")
    config = resolve(options, DataInfo("x", "x", 8, height, width, channels))
    state = TrainingState(config, CPU)
    for network in (state.G, state.D):
        set_half_dtype(network, torch.float32)
    step = TrainStep(state, config, LabelTable(torch.zeros([1, 0]), torch.zeros([8], dtype=torch.long)))
    images = torch.zeros([8, channels, height, width], dtype=torch.uint8)
    counted = {}
    for phase in step.phases:
        with Counter() as counter:
            step._run(phase, images.to(torch.float32), torch.zeros([8, 0]))
        counted[phase.name] = counter.total
    expected = phase_flops(state.G, state.D, CPU, batch=8, pl_batch=4)
    for name, total in counted.items():
        assert total / sum(expected[name].values()) == pytest.approx(1, abs=0.1), name


def test_each_dtype_is_counted_by_itself_and_takes_its_own_time() -> None:
    config = resolve(TrainOptions(data="x", cbase=512, cmax=32, batch=4), DataInfo("x", "x", 8, 32, 32, 3))
    state = TrainingState(config, CPU)
    set_half_dtype(state.G, torch.bfloat16)
    flops = network_flops(state.G, CPU)
    assert set(flops) == {torch.float32, torch.bfloat16}
    set_half_dtype(state.G, torch.float32)
    assert network_flops(state.G, CPU) == {torch.float32: pytest.approx(sum(flops.values()))}
    assert seconds_at({torch.float32: 6.0, torch.bfloat16: 8.0}, {torch.float32: 2.0, torch.bfloat16: 8.0}) == 4
