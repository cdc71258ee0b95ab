"""Frechet distance of two sets of features, as Gaussians (FID, arXiv 1706.08500)."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator

import torch

from gan.errors import GanError
from gan.metrics.exact import check_finite, float64_device

_ROWS_AT_ONCE = 1024  # few rows a product are bound by reading and writing the d x d sums


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """What the Frechet distance knows of a set. All float64."""

    number: int
    """rows of the set"""
    mean: torch.Tensor
    """`[d]`"""
    cov: torch.Tensor
    """`[d, d]`, normalised by `number`"""
    half: torch.Tensor | None = None
    """`[d, d]`, the symmetric root of `cov`; takes as long as all the rest, so it is worth keeping"""

    def with_half(self) -> Generator[None, None, Gaussian]:
        """The same with `half`, for that of the real images."""
        if self.half is not None:
            return self
        check_finite(self.cov, "real")
        values, vectors = torch.linalg.eigh(self.cov)
        yield
        return dataclasses.replace(self, half=(vectors * values.clamp(min=0).sqrt()) @ vectors.T)

    def on(self, device: torch.device) -> Gaussian:
        """The same there; the CPU stands in where there is no float64."""
        device = float64_device(device)
        half = None if self.half is None else self.half.to(device)
        return Gaussian(self.number, self.mean.to(device), self.cov.to(device), half)


class MomentSums:
    """Sums of rows and of their products, in float64 on the device that they come from.

    If memory runs out in any of this, no row is lost or counted twice: free some, maybe `move`, and `count`.

    Args:
        dim: numbers in a row.
        device: where sums are kept; the CPU stands in where there is no float64.
    """

    def __init__(self, dim: int, device: torch.device) -> None:
        self.device = float64_device(device)
        self._dim = dim
        self._raw = torch.zeros(dim * dim + dim + 1, dtype=torch.float64, device=self.device)
        self._waiting: list[torch.Tensor] = []

    def add(self, rows: torch.Tensor) -> None:
        """Count in `rows` `[N, dim]`. They may be kept for a while: not to be changed afterwards."""
        self._waiting.append(rows)
        if sum(map(len, self._waiting)) >= _ROWS_AT_ONCE:
            self.count()

    def raw(self) -> torch.Tensor:
        """All sums in one tensor float64 `[dim * dim + dim + 1]`, which may be added to those of other processes."""
        self.count()
        return self._raw

    def merge(self, raw: torch.Tensor) -> None:
        """Count in what another one has: its `raw()`."""
        self._raw += raw.to(self.device)

    @property
    def number(self) -> int:
        """Rows so far."""
        return int(self._raw[-1]) + sum(map(len, self._waiting))

    def gaussian(self) -> Gaussian:
        """Mean and covariance of all rows."""
        self.count()
        if not self.number:
            raise GanError("there are no images to take a mean of")
        products, sums, number = self._parts()
        mean = sums / number
        return Gaussian(self.number, mean, products / number - mean.outer(mean))

    def count(self) -> None:
        """Count in the rows that wait."""
        if not self._waiting:
            return
        products, sums, number = self._parts()
        waiting = self._waiting[0] if len(self._waiting) == 1 else torch.cat(self._waiting)
        self._waiting = list(waiting.split(_ROWS_AT_ONCE))
        while self._waiting:
            exact = self._waiting[0].to(self.device).double()
            total = exact.sum(0)
            products.addmm_(exact.T, exact)  # from here on nothing takes memory
            sums += total
            number += len(exact)
            del self._waiting[0]

    def move(self, device: torch.device) -> None:
        """Go on there."""
        self.device = float64_device(device)
        self._raw = self._raw.to(self.device)
        self._waiting = [rows.to(self.device) for rows in self._waiting]

    def _parts(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of all sums: of products `[d, d]`, of rows `[d]`, their number `[1]`."""
        products, sums, number = self._raw.split([self._dim**2, self._dim, 1])
        return products.unflatten(0, (self._dim, self._dim)), sums, number


def frechet_distance(
    real: Gaussian, fake: Gaussian, device: torch.device | None = None
) -> Generator[None, None, float]:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); each of its matrix operations is a portion.

    S1 S2 has the eigenvalues of the symmetric R S2 R, where R is the root of S1. So the trace of its root takes one
    symmetric eigenvalue problem, is real, and exists for singular covariances too. `real.half` saves the other one.

    Args:
        device: where it is computed, or the CPU where there is no float64; None: where `real` is.
    """
    check_finite(real.cov, "real")
    check_finite(fake.cov, "generated")
    device = device or real.cov.device
    real, fake = real.on(device), fake.on(device)
    half = (yield from real.with_half()).half
    assert half is not None
    yield
    between = half @ fake.cov @ half
    yield
    roots = torch.linalg.eigvalsh((between + between.T) / 2).clamp(min=0).sqrt()
    offset = (real.mean - fake.mean).square().sum()
    distance = offset + real.cov.trace() + fake.cov.trace() - 2 * roots.sum()
    return float(distance.clamp(min=0))  # rounding alone makes it negative
