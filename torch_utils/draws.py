"""Random numbers of a batch that is computed in parts, by several processes or in several rounds.

Each part draws for the whole batch and keeps its own samples, so that what a sample gets does not depend on how the
batch is divided. A whole batch draws what `torch.randn` and `torch.rand` give.

So each part takes the time of the whole batch's numbers, but not their memory: more than 2**24 of them are drawn in
blocks, of as many samples as that holds however the batch is divided. On CPUs blocks change no number as long as a
sample is a multiple of 16 of them; on GPUs those beyond the limit are not what one call would give.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch

_BLOCK = 2**24  # numbers drawn at a time: 64 MiB of float32

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
    return _draw(torch.randn, size, device, dtype, dim)


def rand(size: Sequence[int], device: torch.device, dim: int = 0) -> torch.Tensor:
    """Numbers uniform in [0, 1), `size` of them; samples lie along `dim`."""
    return _draw(torch.rand, size, device, None, dim)


def _draw(
    kind: Callable[..., torch.Tensor], size: Sequence[int], device: torch.device, dtype: torch.dtype | None, dim: int
) -> torch.Tensor:
    """What `kind` gives for the whole batch, of which the part's own samples are kept."""
    index, parts = _part
    before, after = size[:dim], size[dim + 1 :]
    at_once = max(_BLOCK // (math.prod(before) * math.prod(after)), 1)
    samples = size[dim] * parts
    if parts == 1 and samples <= at_once:
        return kind(size, device=device, dtype=dtype)
    own = torch.empty(size, device=device, dtype=dtype)
    places = own.movedim(dim, 0)
    for begin in range(0, samples, at_once):
        block = kind([*before, min(at_once, samples - begin), *after], device=device, dtype=dtype)
        kept = block.movedim(dim, 0)[(index - begin) % parts :: parts]
        places[: len(kept)].copy_(kept)
        places = places[len(kept) :]
    return own
