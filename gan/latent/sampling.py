"""Latents to pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from gan.networks import Generator


def seed_latent(seed: int, z_dim: int) -> np.ndarray:
    """The latent of a seed, float64 `[1, z_dim]`: the same everywhere, so that known seeds give known pictures."""
    return np.random.RandomState(seed).randn(1, z_dim)


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images about [-1, 1] as uint8, `[N, C, H, W]`; truncated, not rounded, as the reference does."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu().numpy()


@torch.no_grad()
def synthesize(
    G: Generator, ws: torch.Tensor, batch: int, noise_mode: str = "const", force_fp32: bool = False
) -> Iterator[np.ndarray]:
    """Pictures of ws `[N, num_ws, w_dim]`, uint8 `[C, H, W]` each, computed `batch` at a time."""
    for part in ws.split(batch):
        yield from to_uint8(G.synthesis(part, noise_mode=noise_mode, force_fp32=force_fp32))


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """A sheet of images, row by row: uint8 `[N, C, H, W]` -> `[C, rows * H, columns * W]`; missing ones are black."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    sheet = np.zeros([rows * columns, c, h, w], dtype=np.uint8)
    sheet[:n] = images
    return sheet.reshape(rows, columns, c, h, w).transpose(2, 0, 3, 1, 4).reshape(c, rows * h, columns * w)
