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
_LARGEST_HALF = torch.finfo(torch.float16).max


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
            raise GanError(f"{self.source}: holds a discriminator only, and no generator to sample from")
        return self.generator


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
        half: store float16, half the size. Whoever opens the file has float32, rounded to 3 digits.

    Raises GanError if the file cannot be written or a number is too large for float16, ValueError if
    training_set_kwargs holds more than plain values.
    """
    content = {
        "G": G,
        "D": D,
        "G_ema": G_ema,
        "augment_pipe": augment_pipe,
        "training_set_kwargs": dict(training_set_kwargs),
    }
    if half:
        _check_range(os.fspath(path), {"G": G, "D": D, "G_ema": G_ema})
    with atomic_path(os.fspath(path)) as temporary:
        persistence.dump(content, temporary, source_of=_source_of, transient=_TRANSIENT, half=half)


def _source_of(cls: type) -> str:
    """The text that other programs execute to have this class."""
    return persistence.source_text(getattr(embedded_networks, cls.__name__))


def _check_range(path: str, nets: Mapping[str, torch.nn.Module | None]) -> None:
    for network, module in nets.items():
        for name, tensor in module.state_dict().items() if module is not None else ():
            beyond = tensor[(tensor.abs() > _LARGEST_HALF) & tensor.isfinite()]
            if tensor.ndim > 0 and beyond.numel() > 0:  # single numbers stay float32
                raise GanError(
                    f"{path}: cannot be stored as float16: {network}.{name} holds {beyond.abs().max():g}, and "
                    f"{_LARGEST_HALF:g} is the largest number; store it as float32"
                )
