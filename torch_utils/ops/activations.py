"""The activations of `bias_act`, each with the slope and the gain that it has unless told otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F


@dataclasses.dataclass(frozen=True)
class Activation:
    """A function of the input and the slope below zero, which only lrelu has."""

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

# act(gain * x) = gain * act(x) for gain > 0; without a negative slope the output has the sign of the input.
HOMOGENEOUS = ("linear", "relu", "lrelu")
