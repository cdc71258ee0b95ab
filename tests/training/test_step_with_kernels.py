"""A step computed by compiled kernels is the step that PyTorch's operations compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_step import NoHostReads, batch_of, make_step, tiny_config

from gan.networks import set_half_dtype
from torch_utils.ops import bias_act, kernels

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def weights_after(steps: int, precision: str) -> torch.Tensor:
    """All weights after the first steps, in which every phase runs.

    With a large epsilon: otherwise Adam's step is as large for a gradient of rounding errors as for any other.
    """
    step = make_step(tiny_config(precision=precision))
    for network in (step.state.G, step.state.D):
        set_half_dtype(network, DTYPES[precision])
    for optimizer in (step.state.G_opt, step.state.D_opt):
        for group in optimizer.param_groups:
            group["eps"] = 1.0
            group["lr"] = 0.1
    for _ in range(steps):
        step(*batch_of(step.config))
    return torch.cat([p.detach().flatten() for net in (step.state.G, step.state.D) for p in net.parameters()])


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 0.1)])
def test_steps_with_kernels_equal_steps_without(precision: str, tolerance: float, cpu_kernels: Any) -> None:
    start, ours = weights_after(0, precision), weights_after(3, precision)
    with kernels.disabled():
        native = weights_after(3, precision)
    assert (ours - native).norm() <= tolerance * (native - start).norm()
    assert torch.equal(ours, weights_after(3, precision))


def test_the_step_reads_nothing_from_the_device(cpu_kernels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = bias_act._Call.gradient
    monkeypatch.setattr(
        bias_act._Call, "gradient", lambda self, *args, **kw: calls.append(1) or real(self, *args, **kw)
    )
    step = make_step(tiny_config())
    with NoHostReads():
        step(*batch_of(step.config))
    assert len(calls) > 10
