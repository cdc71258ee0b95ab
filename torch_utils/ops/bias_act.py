"""Add a bias, apply an activation, scale and clamp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Activation:
    """A nonlinearity with the slope and the gain that it has unless told otherwise."""

    function: Callable[[torch.Tensor, float], torch.Tensor]
    default_alpha: float = 0.0
    default_gain: float = 1.0


activations = {
    "linear": Activation(lambda x, alpha: x),
    "relu": Activation(lambda x, alpha: F.relu(x), default_gain=2**0.5),
    "lrelu": Activation(lambda x, alpha: F.leaky_relu(x, alpha), default_alpha=0.2, default_gain=2**0.5),
    "tanh": Activation(lambda x, alpha: torch.tanh(x)),
    "sigmoid": Activation(lambda x, alpha: torch.sigmoid(x)),
    "elu": Activation(lambda x, alpha: F.elu(x)),
    "selu": Activation(lambda x, alpha: F.selu(x)),
    "softplus": Activation(lambda x, alpha: F.softplus(x)),
    "swish": Activation(lambda x, alpha: torch.sigmoid(x) * x, default_gain=2**0.5),
}

_NEGATIVE_SLOPE = {"linear": 1.0, "relu": 0.0}  # lrelu: its alpha


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """`clamp(gain * act(x + b), -clamp, clamp)`. Equals `bias_act_ref`.

    Args:
        x: any shape and floating dtype.
        b: bias `[x.shape[dim]]` of x's dtype, or None.
        dim: the dimension of `x` that `b` runs along.
        act: one of `activations`.
        alpha: slope of lrelu below zero.
        gain: scale after the activation; default: sqrt(2) for relu, lrelu and swish, otherwise 1.
        clamp: limit of the absolute output, or None; where it bites, the gradient is 0.

    Returns:
        The shape and dtype of `x`. Differentiable to any order.
    """
    spec, alpha, gain = _check(x, b, dim, act, alpha, gain, clamp)
    slope = alpha if act == "lrelu" else _NEGATIVE_SLOPE.get(act)
    if slope is None or gain <= 0 or (clamp is None and act == "linear"):
        return _compose(x, b, dim, spec, alpha, gain, clamp)
    return _PiecewiseLinear.apply(x, b, dim, slope, gain, clamp)


def bias_act_ref(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """`bias_act`, written as its definition, step by step, in differentiable tensor operations."""
    spec, alpha, gain = _check(x, b, dim, act, alpha, gain, clamp)
    return _compose(x, b, dim, spec, alpha, gain, clamp)


def _compose(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    spec: Activation,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> torch.Tensor:
    if b is not None:
        x = x + _along(b, dim, x.ndim)
    x = spec.function(x, alpha)
    if gain != 1:
        x = x * gain
    if clamp is not None:
        x = x.clamp(-clamp, clamp)
    return x


class _PiecewiseLinear(torch.autograd.Function):
    """linear, relu and lrelu in one buffer: the output alone says which piece each element is on."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, b: torch.Tensor | None, dim: int, slope: float, gain: float, clamp: float | None
    ) -> torch.Tensor:
        y = x.clone() if b is None else x + _along(b, dim, x.ndim)
        if slope != 1:
            F.leaky_relu_(y, slope)
        if gain != 1:
            y.mul_(gain)
        if clamp is not None:
            y.clamp_(-clamp, clamp)
        ctx.save_for_backward(y)
        ctx.call = (dim, slope, gain, clamp)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        dim, slope, gain, clamp = ctx.call
        dx = _Slope.apply(dy, y, slope, gain, clamp)
        db = None
        if ctx.needs_input_grad[1]:
            db = dx.sum([i for i in range(dx.ndim) if i != dim])
        return dx, db, None, None, None, None


class _Slope(torch.autograd.Function):
    """dy times the slope at y: linear in dy, and so its own gradient; constant in y almost everywhere."""

    @staticmethod
    def forward(
        ctx: Any, dy: torch.Tensor, y: torch.Tensor, slope: float, gain: float, clamp: float | None
    ) -> torch.Tensor:
        ctx.save_for_backward(y)
        ctx.call = (slope, gain, clamp)
        dx = dy * gain
        if slope != 1:
            dx = torch.where(y > 0, dx, dx * slope)
        if clamp is not None:
            dx.masked_fill_(y.abs() >= clamp, 0)
        return dx

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        (y,) = ctx.saved_tensors
        return _Slope.apply(ddx, y, *ctx.call), None, None, None, None


def _along(b: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    return b.reshape([-1 if i == dim else 1 for i in range(ndim)])


def _check(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float | None,
    gain: float | None,
    clamp: float | None,
) -> tuple[Activation, float, float]:
    if act not in activations:
        raise ValueError(f"activation {act!r} is not one of {', '.join(activations)}")
    if b is not None and (b.ndim != 1 or b.shape[0] != x.shape[dim]):
        raise ValueError(f"a bias of shape {list(b.shape)} does not fit dimension {dim} of {list(x.shape)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must be at least 0, not {clamp}")
    spec = activations[act]
    return spec, spec.default_alpha if alpha is None else alpha, spec.default_gain if gain is None else gain
