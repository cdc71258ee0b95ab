"""Add a bias, apply an activation, scale and clamp."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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

# act(gain * x) = gain * act(x) for gain > 0: the gain can join the addition of the bias.
_HOMOGENEOUS = ("linear", "relu", "lrelu")


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
    _, alpha, gain = _check(x, b, dim, act, alpha, gain, clamp)
    if act in _HOMOGENEOUS and gain > 0:
        # As few passes over memory as native operations allow; each has native derivatives of any order.
        if b is not None:
            x = torch.add(_along(b * gain if gain != 1 else b, dim, x.ndim), x, alpha=gain)
        elif gain != 1:
            x = x * gain
        if act == "lrelu":
            x = F.leaky_relu(x, alpha)
        elif act == "relu":
            x = F.relu(x)
        return x if clamp is None else F.hardtanh(x, -clamp, clamp)
    return bias_act_ref(x, b, dim, act, alpha, gain, clamp)


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
    if b is not None:
        x = x + _along(b, dim, x.ndim)
    x = spec.function(x, alpha) * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def _along(b: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    return b.reshape([-1 if i == dim % ndim else 1 for i in range(ndim)])


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
