"""What a model file holds, and how ours are written: networks to share, sample and transfer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from gan.errors import GanError
from gan.files import atomic_path
from gan.models import embedded_networks
from gan.networks import Discriminator, Generator
from torch_utils import persistence

Where = str | os.PathLike[str]
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

    def require_generator(self) -> Generator:
        """`generator`; raises GanError, naming the file, if there is none."""
        if self.generator is None:
            raise GanError(f"{self.source}: holds no generator, only a discriminator; give a file with G_ema or G")
        return self.generator

    @property
    def networks(self) -> dict[str, Generator | Discriminator]:
        """Those that are there, by name: G, D, G_ema."""
        there = {"G": self.G, "D": self.D, "G_ema": self.G_ema}
        return {name: network for name, network in there.items() if network is not None}

    @property
    def class_names(self) -> list[str] | None:
        """What the columns of the labels stand for, in their order; None where the file does not tell."""
        names = self.training_set_kwargs.get("class_names")
        size = next((network.c_dim for network in self.networks.values()), 0)
        sound = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        return list(names) if sound and names and len(names) == size else None


def save(
    path: str | os.PathLike[str],
    *,
    G: torch.nn.Module | None,
    D: torch.nn.Module | None,
    G_ema: torch.nn.Module | None,
    augment_pipe: torch.nn.Module | None = None,
    training_set_kwargs: Mapping[str, Any],
    half: bool = False,
) -> None:
    """Atomically write a snapshot. The networks, on any device and in any mode, are not altered.

    Args:
        half: store float16, half the size, but for vectors and for tensors with a number that is too large for it.
            Whoever opens the file has float32, rounded to 3 digits.

    Raises GanError if the file cannot be written, ValueError if training_set_kwargs holds more than plain values or a
    network is of another class.
    """
    for name, network, cls in (("G", G, Generator), ("D", D, Discriminator), ("G_ema", G_ema, Generator)):
        if network is not None and not isinstance(network, cls):
            raise ValueError(f"{name} must be a {cls.__name__} of gan.networks or None, not a {type(network).__name__}")
    content = {
        "G": G,
        "D": D,
        "G_ema": G_ema,
        "augment_pipe": augment_pipe,
        "training_set_kwargs": dict(training_set_kwargs),
    }
    with atomic_path(os.fspath(path)) as temporary:
        persistence.dump(content, temporary, source_of=_source_of, transient=_TRANSIENT, half=half)


def _source_of(cls: type) -> str:
    """The text that other programs execute to have this class."""
    return persistence.source_text(getattr(embedded_networks, cls.__name__))
