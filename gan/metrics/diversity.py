"""How much pictures of a set differ from each other: a cheap sign of a generator that makes few different ones."""

from __future__ import annotations

from collections.abc import Generator

import torch
import torch.nn.functional as F

from gan.errors import GanError
from gan.metrics.exact import float64_device

_SIDE = 16
_ROWS_AT_ONCE = 1024


def reduced(images: torch.Tensor) -> torch.Tensor:
    """Pictures uint8 `[N, C, H, W]` as rows float32 `[N, C * 16 * 16]` of the mean levels of their areas, 0..255."""
    return F.adaptive_avg_pool2d(images.float(), _SIDE).flatten(1)


def mean_distance(rows: torch.Tensor) -> Generator[None, None, float]:
    """Mean over all pairs of rows `[N, d]` of their root mean square difference; some rows a portion."""
    number, dim = rows.shape
    if number < 2:
        raise GanError(f"a distance between images needs at least 2 of them; there are {number}")
    exact = rows.to(float64_device(rows.device)).double()
    exact = exact - exact.mean(0)  # equal rows become zeros, and so do their distances
    squares, total = exact.square().sum(1), 0.0
    for begin in range(0, number, _ROWS_AT_ONCE):
        these = slice(begin, begin + _ROWS_AT_ONCE)
        distances = torch.addmm(squares, exact[these], exact.T, alpha=-2).add_(squares[these, None]).clamp_(min=0)
        distances.diagonal(begin).zero_()
        total += float(distances.div_(dim).sqrt_().sum())
        yield
    return total / (number * (number - 1))
