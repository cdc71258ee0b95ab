"""What a model file holds, and how ours are written: networks to share, sample and transfer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gan.files import atomic_path
from gan.networks import Discriminator, Generator
from torch_utils import persistence

_TRANSIENT = ("half_dtype", "prepared")  # what a network computes in here and now, not a property of it


@dataclass(frozen=True)
class Snapshot:
    """Networks out of a file, on the CPU, in evaluation mode, without gradients. None: the file has none."""

    G: Generator | None
    D: Discriminator | None
    G_ema: Generator | None
    augment_p: float | None  # overall augmentation probability, None if there was no augmentation
    training_set_kwargs: dict[str, Any] = field(default_factory=dict)
    source: str = ""  # the file or address it came from
    kind: str = ""  # its format: "snapshot of the PyTorch generation"
    notes: Sequence[str] = ()  # what had to be assumed or left out, for the user to know

    @property
    def generator(self) -> Generator | None:
        """The one to sample from: the moving average if there is one."""
        return self.G_ema or self.G


def save(
    path: str | os.PathLike[str],
    *,
    G: torch.nn.Module | None,
    D: torch.nn.Module | None,
    G_ema: torch.nn.Module | None,
    augment_pipe: torch.nn.Module | None = None,
    training_set_kwargs: Mapping[str, Any],
) -> None:
    """Atomically write a snapshot. The networks, on any device and in any mode, are not altered.

    Raises GanError if the file cannot be written, ValueError if training_set_kwargs holds more than plain values.
    """
    content = {
        "G": G,
        "D": D,
        "G_ema": G_ema,
        "augment_pipe": augment_pipe,
        "training_set_kwargs": dict(training_set_kwargs),
    }
    with atomic_path(os.fspath(path)) as temporary:
        persistence.dump(content, temporary, transient=_TRANSIENT)
