"""What keeps decoded images, so that each is decoded once: here in memory."""

from __future__ import annotations

import numpy as np


class Store:
    """Images in memory, put in one by one as they are decoded.

    Args:
        array: the images, uint8 `[images, C, H, W]`.
        complete: all of them are in it.
    """

    def __init__(self, array: np.ndarray, complete: bool) -> None:
        self.array, self.complete = array, complete

    def put(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Keep these images. Raises OSError if the disk does not take them."""
        self.array[rows] = images

    def take(self, rows: np.ndarray, out: np.ndarray) -> None:
        """Copy images into `out`, uint8 `[N, C, H, W]`; any thread may call it. Raises OSError if that fails."""
        np.take(self.array, rows, axis=0, out=out, mode="clip")  # the other modes copy twice

    def flush(self) -> None:
        """Have the system write what it holds back, which may take seconds; any thread may call it."""

    def publish(self) -> None:
        """Everything was put and flushed. Raises OSError if that cannot be kept."""
        self.complete = True

    def close(self) -> None:
        """Remove what is not complete."""
