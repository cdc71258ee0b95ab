"""Sliced Wasserstein distance of the patches of two sets of images, level by level (arXiv 1710.10196, section 5).

It compares what is seen at each scale, without any trained network: large structure on the smallest level of a
Laplacian pyramid, texture on the largest.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from gan.metrics.exact import without_tf32

_SMALLEST = 16  # shorter side of the last level
_SIDE = 7  # of a patch
_PATCHES = 64  # of an image and level
_DIRECTIONS = 512
_DIRECTIONS_AT_ONCE = 16
_SCALE = 1000  # as the paper's tables have it
# Levels of 0..255. A channel that hardly varies (an alpha of 255 but for some pixels) would else be scaled up until
# nothing but it counts.
_LEAST_DEVIATION = 1.0


def heights(height: int, width: int) -> list[int]:
    """Heights of the levels for images of this size, the largest first."""
    found = [height]
    while min(height, width) >= 2 * _SMALLEST - 1:
        height, width = (height + 1) // 2, (width + 1) // 2
        found.append(height)
    return found


def descriptors(images: torch.Tensor, index: Sequence[int], seed: int = 0) -> dict[int, torch.Tensor]:
    """Patches at random places of each level, by height of the level: `{height: [N, 64, C, side**2]}`.

    Half precision, on the device of the images: 38 MB for 2048 RGB images a level. Sets are joined along N.

    Args:
        images: uint8 `[N, C, H, W]`.
        index: number of each image in its set. The places depend on it and the seed alone, not on other images.
    """
    levels = heights(*images.shape[2:])
    shares = np.stack([np.random.default_rng((seed, i)).random((len(levels), 2, _PATCHES)) for i in index], axis=2)
    image = torch.arange(len(images), device=images.device)[:, None]
    found = {}
    for height, picture, share in zip(levels, _pyramid(images.float(), len(levels)), shares, strict=True):
        side = min(_SIDE, *picture.shape[2:])
        windows = picture.unfold(2, side, 1).unfold(3, side, 1)  # [N, C, rows, columns, side, side]
        room = np.array(windows.shape[2:4])[:, None, None]
        y, x = torch.from_numpy((share * room).astype(np.int64)).to(images.device)  # [N, patches] each
        patches = windows[image, :, y, x]  # [N, patches, C, side, side]
        found[height] = patches.flatten(3).half()
    return found


def distances(
    reals: Mapping[int, torch.Tensor],
    fakes: Mapping[int, torch.Tensor],
    seed: int = 0,
    device: torch.device | None = None,
) -> Generator[None, None, dict[int, float]]:
    """Distance of each level, by its height, times 1000; some directions a portion.

    Args:
        reals: what `descriptors` gives, of as many images as `fakes`.
        seed: of the directions.
        device: where projections are sorted; None: where the descriptors are.
    """
    found = {}
    for height, real in reals.items():
        fake = fakes[height]
        if real.shape != fake.shape:
            raise ValueError(f"as many images of the same kind are compared; not {[*real.shape]} and {[*fake.shape]}")
        rows = []
        for patches in (real, fake):
            rows.append(_normalised(patches.to(device)))
            yield
        directions = _directions(rows[0].shape[1], (seed, height)).to(rows[0].device)
        total = 0.0
        for some in directions.split(_DIRECTIONS_AT_ONCE):
            a, b = (_sorted(some @ each.T) for each in rows)
            total += float((a - b).abs_().mean(1).sum())
            yield
        found[height] = _SCALE * total / len(directions)
    return found


def _pyramid(images: torch.Tensor, levels: int) -> Iterator[torch.Tensor]:
    """Laplacian pyramid of `[N, C, H, W]`, the largest level first: what a level has that the next cannot show."""
    for _ in range(levels - 1):
        rows, columns = (_lowpass(size).to(images.device) for size in images.shape[2:])
        with without_tf32():
            smaller = rows[::2] @ images @ columns[::2].T
            # Twice the size is the smaller one with zeros between its pixels, low-pass filtered.
            larger = 2 * rows[:, ::2] @ smaller @ (2 * columns[:, ::2].T)
        yield images - larger
        images = smaller
    yield images


@functools.lru_cache(maxsize=32)
def _lowpass(size: int) -> torch.Tensor:
    """The binomial filter 1 4 6 4 1 over `size` pixels, mirrored at the ends, as a matrix float32 `[size, size]`.

    Such products are faster than convolutions of single planes, but for the largest pictures on CPUs.
    """
    padded = F.pad(torch.eye(size)[None], [2, 2], mode="reflect")[0].T  # [size + 4, size]
    return torch.stack([padded[i : i + size] * tap / 16 for i, tap in enumerate((1, 4, 6, 4, 1))]).sum(0)


def _normalised(patches: torch.Tensor) -> torch.Tensor:
    """Rows float32 `[N * 64, C * side**2]`, in which each channel has mean 0 and standard deviation 1, at most."""
    rows = patches.to(torch.float32, copy=True)
    var, mean = torch.var_mean(rows, dim=(0, 1, 3), correction=0, keepdim=True)
    return rows.sub_(mean).div_(var.sqrt().clamp(min=_LEAST_DEVIATION)).flatten(2).flatten(0, 1)


def _directions(dim: int, seed: tuple[int, int]) -> torch.Tensor:
    """Unit vectors float32 `[512, dim]` in random directions."""
    normal = np.random.default_rng(seed).standard_normal((_DIRECTIONS, dim), dtype=np.float32)
    return F.normalize(torch.from_numpy(normal), dim=1)


def _sorted(rows: torch.Tensor) -> torch.Tensor:
    """Each row in order. On CPUs NumPy sorts many times as fast, as it does not ask where a number came from."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return rows.sort(dim=1).values
