"""What a file says of its networks, whatever its format, before any of them is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from torch_utils.safe_pickle import StoredTensor

MAX_TENSORS = 4096  # of a network


@dataclass(frozen=True)
class Description:
    """A network: which class of ours, the arguments of its constructor, its tensors under our names."""

    cls: type[torch.nn.Module]  # Generator or Discriminator of gan.networks
    kwargs: dict[str, Any]
    tensors: Mapping[str, StoredTensor | torch.Tensor]


@dataclass(frozen=True)
class Contents:
    """A whole file."""

    kind: str  # of which format it is, to be told: "snapshot of the PyTorch generation"
    networks: dict[str, Description]  # of "G", "D" and "G_ema" those that it holds
    augment_p: float | None = None
    training_set_kwargs: dict[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()  # what had to be assumed or left out, for the user to know
