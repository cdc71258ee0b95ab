"""Random numbers of a batch that is computed in parts, by several processes or in several rounds.

Each part draws for the whole batch and keeps its own samples, so that what a sample gets does not depend on how the
batch is divided. A whole batch draws what `torch.randn` and `torch.rand` give.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch

_part = (0, 1)


@contextlib.contextmanager
def part(index: int, parts: int) -> Iterator[None]:
    """Inside, draws are those of samples index, index + parts, ... of a batch `parts` times as large."""
    global _part
    before, _part = _part, (index, parts)
    try:
        yield
    finally:
        _part = before


def randn(size: Sequence[int], device: torch.device, dtype: torch.dtype | None = None, dim: int = 0) -> torch.Tensor:
    """Standard normal numbers, `size` of them; samples lie along `dim`."""
    return _own(torch.randn(_whole(size, dim), device=device, dtype=dtype), dim)


def rand(size: Sequence[int], device: torch.device, dim: int = 0) -> torch.Tensor:
    """Numbers uniform in [0, 1), `size` of them; samples lie along `dim`."""
    return _own(torch.rand(_whole(size, dim), device=device), dim)


def _whole(size: Sequence[int], dim: int) -> list[int]:
    whole = list(size)
    whole[dim] *= _part[1]
    return whole


def _own(whole: torch.Tensor, dim: int) -> torch.Tensor:
    index, parts = _part
    if parts == 1:
        return whole
    own = torch.arange(index, whole.shape[dim], parts, device=whole.device)
    return whole.index_select(dim, own)
