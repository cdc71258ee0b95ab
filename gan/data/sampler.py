"""Which images come next: a pure function of the seed and the image counter."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def epoch_order(num_images: int, seed: int, epoch: int) -> np.ndarray:
    """A permutation of all images, int64 `[num_images]`: every image once per epoch."""
    return np.random.default_rng([seed, epoch]).permutation(num_images)


def batches(
    num_images: int, batch: int, seed: int, start: int = 0, rank: int = 0, size: int = 1
) -> Iterator[np.ndarray]:
    """Endless batches of image indices, int64 `[batch / size]`, beginning at the `start`-th image of the stream.

    A run that continues at image n gets what the run that never stopped got from there on. Of `size` processes, each
    gets every `size`-th image of each batch: together they get what one would, however many they are.
    """
    epoch, order = -1, np.empty(0, dtype=np.int64)
    position = start
    while True:
        indices = np.empty(batch, dtype=np.int64)
        for i in range(batch):
            if position // num_images != epoch:
                epoch = position // num_images
                order = epoch_order(num_images, seed, epoch)
            indices[i] = order[position % num_images]
            position += 1
        yield indices[rank::size]
