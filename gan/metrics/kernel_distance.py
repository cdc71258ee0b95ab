"""Kernel distance of two sets of features: unbiased squared MMD with a cubic kernel (KID, arXiv 1801.01401)."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np
import torch

from gan.errors import GanError
from gan.metrics.exact import check_finite, computed_in, without_tf32


def kernel_distance(
    real: torch.Tensor,
    fake: torch.Tensor,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
    device: torch.device | None = None,
) -> Generator[None, None, float]:
    """Mean over `subsets` random choices of `size` rows of each set; a portion each.

    Args:
        real: `[N, d]`, in whatever precision they are kept; half precision is computed in float32.
        fake: `[M, d]`.
        size: of a choice, or all rows of the smaller set if it has fewer.
        seed: of the choices, which depend on nothing else but N and M.
        device: where products are computed; None: where the rows are.
    """
    size = min(size, len(real), len(fake))
    if size < 2:
        raise GanError(f"a kernel distance needs at least 2 images of each kind; there are {len(real)} and {len(fake)}")
    check_finite(real, "real")
    check_finite(fake, "generated")
    total = 0.0
    for subset in range(subsets):
        random = np.random.default_rng((seed, subset))
        x, y = (_some(rows, size, random).to(device).to(computed_in(rows)) for rows in (real, fake))
        total += _unbiased(x, y)
        yield
    return total / subsets


def _some(rows: torch.Tensor, size: int, random: np.random.Generator) -> torch.Tensor:
    return rows[torch.from_numpy(random.choice(len(rows), size, replace=False)).to(rows.device)]


def _unbiased(x: torch.Tensor, y: torch.Tensor) -> float:
    """mean k(x, x') + mean k(y, y') - 2 mean k(x, y), both `[n, d]`; in the first two no row meets itself."""
    n = len(x)

    def mean(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        product = torch.addmm(a.new_ones(1), a, b.T, alpha=1 / a.shape[1])
        kernel = (product * product).mul_(product)
        total = kernel.sum(1).cpu().double().sum()  # as precise as sums of float64 alone, and half as long
        if a is not b:
            return total / n**2
        return (total - kernel.diagonal().cpu().double().sum()) / (n * (n - 1))

    with without_tf32():
        return float(mean(x, x) + mean(y, y) - 2 * mean(x, y))
