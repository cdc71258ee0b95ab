"""Batches for training, read and decoded ahead of the step by worker processes."""

from __future__ import annotations

import dataclasses
import signal
from collections.abc import Iterator

import numpy as np
import torch
import torch.utils.data

from gan.data.dataset import ImageDataset
from gan.data.sampler import batches
from gan.errors import GanError


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


class _Batches(torch.utils.data.Dataset):
    """Maps an array of image indices to the images, so that one worker assembles a whole batch."""

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset

    def __getitem__(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor] | GanError:
        try:
            return torch.from_numpy(self.dataset.images(indices)), torch.from_numpy(indices)
        except GanError as error:  # raised here, it would reach the user wrapped in the worker's traceback
            return error


def batch_stream(
    dataset: ImageDataset, batch: int, seed: int, start: int, workers: int, pin_memory: bool = False
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Endless (images uint8 `[batch, C, H, W]`, indices int64 `[batch]`), from the `start`-th image of the stream on.

    Args:
        workers: processes that read ahead; 0 reads in this one.
        pin_memory: page-locked results, for asynchronous copies to a GPU.
    """
    loader = torch.utils.data.DataLoader(
        _Batches(dataset),
        sampler=batches(len(dataset), batch, seed, start),  # endless: it has no length
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers > 0 else None,
        worker_init_fn=_ignore_interrupts,
    )
    for batch_or_error in loader:
        if isinstance(batch_or_error, GanError):
            raise batch_or_error
        yield batch_or_error


def _ignore_interrupts(worker: int) -> None:
    """Ctrl-C reaches every process of a terminal; only the main one decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
