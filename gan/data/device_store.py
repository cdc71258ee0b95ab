"""Decoded images, kept on the training device."""

from __future__ import annotations

import numpy as np
import torch

from gan.data.cache import Choice, found_store


class DeviceStore:
    """The whole set on the device; filled and read on one stream."""

    def __init__(self, choice: Choice, device: torch.device) -> None:
        self.complete = choice.found
        self._images = torch.empty(choice.content.shape, dtype=torch.uint8, device=device)
        if choice.found:
            source = found_store(choice)
            for rows in np.array_split(np.arange(len(self._images)), -(-self._images.nbytes // 2**28)):
                part = np.empty((len(rows), *self._images.shape[1:]), dtype=np.uint8)
                source.take(rows, part)
                self._images[rows[0] : rows[-1] + 1] = torch.from_numpy(part).to(device)

    def put(self, rows: torch.Tensor, images: torch.Tensor) -> None:
        """Keep these images, uint8 `[N, C, H, W]`, of the host."""
        images = images.to(self._images.device, non_blocking=True)
        self._images.index_copy_(0, rows.to(self._images.device), images)

    def take(self, rows: torch.Tensor) -> torch.Tensor:
        """Images, uint8 `[N, C, H, W]`; rows: on the device."""
        return self._images.index_select(0, rows)

    def flush(self) -> None:
        """Nothing is held back."""

    def publish(self) -> None:
        """Nothing is to be published."""

    def close(self) -> None:
        """Nothing is left behind."""
