"""Precision and recall of two sets of features, by balls around their rows (arXiv 1904.06991)."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator

import torch

from gan.errors import GanError
from gan.metrics.exact import check_finite, computed_in, without_tf32

# Of a tile of distances, its temporaries and the rows that it is made of. A CPU needs 0.2 s for its 64 MiB.
_BYTES_AT_ONCE = {"cpu": 2**26}
_BYTES_AT_ONCE_ELSEWHERE = 2**28


def precision_recall(
    real: torch.Tensor,
    fake: torch.Tensor,
    k: int = 3,
    device: torch.device | None = None,
    real_radii: torch.Tensor | None = None,
) -> Generator[None, None, tuple[float, float]]:
    """Share of fakes in a ball around a real, and of reals in a ball around a fake; a tile of distances a portion.

    The ball around a row reaches to its k-th nearest neighbour in the same set.

    Args:
        real: `[N, d]`, in whatever precision they are kept; half precision is computed in float32.
        fake: `[M, d]`.
        device: where distances are computed, tile by tile; None: where the rows are.
        real_radii: what `radii` gives of `real`, if it is known; it takes as long as all the rest, or longer.
    """
    if min(len(real), len(fake)) <= k:
        needed = f"precision and recall need more than {k} images of each kind"
        raise GanError(f"{needed}; there are {len(real)} real and {len(fake)} generated")
    check_finite(real, "real")
    check_finite(fake, "generated")
    device = device or real.device
    # Distances do not change, and products of smaller numbers cancel with less error.
    centre = real.mean(0, dtype=computed_in(real)).to(device)
    reals, fakes = _Rows(real, centre, device), _Rows(fake, centre, device)
    if real_radii is None:
        real_radii = yield from _radii(reals, k)
    real_radii = real_radii.to(device)
    fake_radii = yield from _radii(fakes, k)
    real_covered = torch.zeros(len(real), dtype=torch.bool, device=device)
    fake_covered = torch.zeros(len(fake), dtype=torch.bool, device=device)
    for i in reals.tiles():
        x = reals[i]
        for j in fakes.tiles():
            distances = _distances(x, fakes[j])
            real_covered[i] |= (distances <= fake_radii[j]).any(1)
            fake_covered[j] |= (distances <= real_radii[i, None]).any(0)
            yield
    return _share(fake_covered), _share(real_covered)


def radii(rows: torch.Tensor, k: int, device: torch.device | None = None) -> Generator[None, None, torch.Tensor]:
    """Squared distance `[N]` from each row `[N, d]` to its k-th nearest neighbour, on the device it is computed on."""
    device = device or rows.device
    centre = rows.mean(0, dtype=computed_in(rows)).to(device)
    return (yield from _radii(_Rows(rows, centre, device), k))


class _Rows:
    """Rows of a set, a slice at a time on the device, relative to a centre."""

    def __init__(self, rows: torch.Tensor, centre: torch.Tensor, device: torch.device) -> None:
        self._rows, self._centre, self.device = rows, centre, device

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, which: slice) -> torch.Tensor:
        return self._rows[which].to(self.device).to(self._centre.dtype) - self._centre

    def tiles(self) -> Iterator[slice]:
        """Slices so small that a tile between two of them, and what it takes to make it, stays within the limit."""
        dim, size = self._rows.shape[1], self._centre.element_size()
        limit = _BYTES_AT_ONCE.get(self.device.type, _BYTES_AT_ONCE_ELSEWHERE) / (2 * size)
        # side * (side + dim) <= limit
        side = max(int((math.sqrt(dim**2 + 4 * limit) - dim) / 2), 1)
        for begin in range(0, len(self), side):
            yield slice(begin, min(begin + side, len(self)))


def _distances(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances `[N, M]` of rows `[N, d]` and `[M, d]`."""
    with without_tf32():
        products = torch.addmm(y.square().sum(1), x, y.T, alpha=-2)
    return products.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def _radii(rows: _Rows, k: int) -> Generator[None, None, torch.Tensor]:
    """Squared distance `[N]` from each row to its k-th nearest neighbour. Each tile serves its rows and its columns."""
    nearest: torch.Tensor | None = None
    tiles = list(rows.tiles())
    for i, here in enumerate(tiles):
        x = rows[here]
        if nearest is None:
            nearest = x.new_full([len(rows), k], math.inf)
        for there in tiles[i:]:
            distances = _distances(x, x if there == here else rows[there])
            if there == here:
                distances.fill_diagonal_(math.inf)  # a row is no neighbour of itself
            else:
                nearest[there] = _smallest(nearest[there], distances.T, k)
            nearest[here] = _smallest(nearest[here], distances, k)
            yield
    assert nearest is not None
    return nearest[:, -1]


def _share(covered: torch.Tensor) -> float:
    return int(covered.sum()) / len(covered)


def _smallest(before: torch.Tensor, more: torch.Tensor, k: int) -> torch.Tensor:
    """The k smallest of each row, in order."""
    few = more.topk(min(k, more.shape[1]), dim=1, largest=False).values
    return torch.cat([before, few], dim=1).topk(k, dim=1, largest=False).values
