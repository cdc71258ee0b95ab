"""The labels of a dataset where training needs them."""

from __future__ import annotations

import dataclasses

import torch

from gan.data.dataset import ImageDataset


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The labels of a dataset on the training device: distinct rows `[K, c_dim]`, and each image's row `[images]`."""

    rows: torch.Tensor
    index: torch.Tensor

    @staticmethod
    def of(dataset: ImageDataset, device: torch.device) -> LabelTable:
        """The table of `dataset`."""
        rows, index = dataset.label_table()
        return LabelTable(torch.from_numpy(rows).to(device), torch.from_numpy(index).to(device))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Labels `[N, c_dim]` of images `[N]`."""
        return self.rows[self.index[indices]]

    def draw(self, n: int) -> torch.Tensor:
        """Labels `[n, c_dim]` of images taken at random."""
        return self.take(torch.randint(len(self.index), [n], device=self.index.device))
