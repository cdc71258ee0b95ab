"""Latents to pictures."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from gan.networks import Generator


def seed_latent(seed: int, z_dim: int) -> np.ndarray:
    """The latent of a seed, float64 `[1, z_dim]`: the same everywhere, so that known seeds give known pictures."""
    return np.random.RandomState(seed).randn(1, z_dim)


def quantize(images: torch.Tensor) -> torch.Tensor:
    """Images about [-1, 1] as uint8, `[N, C, H, W]`; truncated, not rounded, as the reference does."""
    return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def synthesize(
    G: Generator, ws: torch.Tensor, batch: int, noise_mode: str = "const", force_fp32: bool = False
) -> Iterator[np.ndarray]:
    """Pictures of ws `[N, num_ws, w_dim]`, uint8 `[C, H, W]` each, computed `batch` at a time."""
    for part in ws.split(batch):
        yield from quantize(G.synthesis(part, noise_mode=noise_mode, force_fp32=force_fp32)).cpu().numpy()


class Sheet:
    """Pictures side by side, row by row, in memory once; missing ones are black, or transparent.

    `image` is the sheet, uint8 `[C, rows * H, columns * W]`, stored with its channels last as a PNG holds them.
    """

    def __init__(self, number: int, columns: int, shape: tuple[int, int, int]) -> None:
        c, h, w = shape
        self._columns = columns
        self._pixels = np.zeros([-(-number // columns), h, columns, w, c], dtype=np.uint8)
        self.image = self._pixels.reshape(-1, columns * w, c).transpose(2, 0, 1)

    def put(self, index: int, picture: np.ndarray) -> None:
        """The picture `[C, H, W]` in its place."""
        row, column = divmod(index, self._columns)
        self._pixels[row, :, column] = picture.transpose(1, 2, 0)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """A sheet of images: uint8 `[N, C, H, W]` -> `[C, rows * H, columns * W]`."""
    sheet = Sheet(len(images), columns, images.shape[1:])
    for i, image in enumerate(images):
        sheet.put(i, image)
    return sheet.image
