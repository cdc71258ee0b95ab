"""The sheets of reals and fakes that show how a run is doing."""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from gan.data.dataset import ImageDataset
from gan.data.dataset_labels import VECTORS
from gan.files import write_png
from gan.latent.sampling import quantize, tile
from gan.networks import Generator, prepare_weights
from gan.training.micro_batch import is_out_of_memory, release_memory
from torch_utils.world import ALONE, World


@dataclasses.dataclass(frozen=True)
class SampleGrid:
    """Which images the sheets show; a function of the dataset and the seed alone, and so the same after a restart."""

    columns: int
    rows: int
    indices: np.ndarray
    """dataset images of reals.png, int64 `[rows * columns]`; their labels are those of the fakes"""
    z: torch.Tensor
    """latents of the fakes, float32 `[rows * columns, z_dim]`"""

    @staticmethod
    def choose(dataset: ImageDataset, z_dim: int, seed: int) -> SampleGrid:
        """Images for a sheet of `sheet_shape`."""
        columns, rows = sheet_shape(dataset.width, dataset.height)
        rng = np.random.RandomState(seed)
        indices = _rows_by_label(dataset, rows, columns, rng)
        return SampleGrid(columns, rows, indices, torch.from_numpy(rng.randn(rows * columns, z_dim)).to(torch.float32))

    def save_reals(self, dataset: ImageDataset, path: Path) -> None:
        """Write the sheet of real images."""
        write_png(path, tile(dataset.images(self.indices), self.columns))

    def fakes(self, G: Generator, labels: torch.Tensor, batch: int, world: World = ALONE) -> FakesSheet:
        """The sheet of generated images, to be computed. `labels`: `[rows * columns, c_dim]` on G's device.

        `batch`: images that fit into the device's memory in training; without gradients four times as many do.
        """
        return FakesSheet(G, self.z.to(labels.device), labels, self.columns, 4 * batch, world)


class FakesSheet:
    """A sheet of generated images in the making, `batch` at a time. G must keep its weights until it is complete.

    Several processes compute `batch` images each at a time. What one portion computes the next one collects, when it
    has arrived from the GPU.
    """

    def __init__(
        self, G: Generator, z: torch.Tensor, labels: torch.Tensor, columns: int, batch: int, world: World = ALONE
    ) -> None:
        self._G: Generator | None = G
        prepare_weights(G)
        self._columns, self._world = columns, world
        self._shape = [G.img_channels, *G.img_size]
        self._images = torch.empty(0)
        if world.is_first:
            self._images = torch.empty([len(z), *self._shape], dtype=torch.uint8, pin_memory=z.is_cuda)
        self.portions: deque[Callable[[], None]] = deque()
        """calls that compute it; copies from a GPU are on their way when they return"""
        if world.size == 1:
            parts = zip(z.split(batch), labels.split(batch), self._images.split(batch), strict=True)
            self.portions.extend(functools.partial(self._compute, *part) for part in parts)
        else:
            self.portions.extend(self._shared_portions(z, labels, batch))

    def write(self, path: Path) -> None:
        """Write it, when the device is through with the portions."""
        self._G = None
        write_png(path, tile(self._images.numpy(), self._columns))

    def _shared_portions(self, z: torch.Tensor, labels: torch.Tensor, batch: int) -> Iterator[Callable[[], None]]:
        """Compute the own part of the first images; compute that of the next and collect the first; and so on."""
        world, arriving = self._world, deque[_Arriving]()

        def portion(first: int) -> None:
            if first < len(z):
                number = min(batch, -(-(len(z) - first) // world.size))  # of each rank; the last one has what is left
                own = torch.arange(number) + first + world.rank * number
                own = own.clamp(max=len(z) - 1).to(z.device)
                target = torch.empty([number, *self._shape], dtype=torch.uint8, pin_memory=z.is_cuda)
                self._compute(z[own], labels[own], target)
                event = torch.cuda.current_stream().record_event() if z.is_cuda else None
                arriving.append(_Arriving(first, target, event))
            if first > 0:
                self._collect(arriving.popleft())

        for first in (*range(0, len(z), batch * world.size), len(z)):
            yield functools.partial(portion, first)

    def _collect(self, own: _Arriving) -> None:
        """The pictures of all ranks to their places, on rank 0."""
        if own.event is not None:
            own.event.synchronize()
        parts = self._world.collect(own.images, "a sheet of fakes")
        for rank, part in enumerate(parts or ()):
            target = self._images[own.first + rank * len(part) :][: len(part)]
            target.copy_(part[: len(target)])

    @torch.no_grad()
    def _compute(self, z: torch.Tensor, labels: torch.Tensor, target: torch.Tensor) -> None:
        assert self._G is not None
        images = None
        try:
            images = quantize(self._G.synthesis(self._G.mapping(z, labels), noise_mode="const"))
        except Exception as error:
            if len(z) == 1 or not is_out_of_memory(error):
                raise
        if images is not None:
            target.copy_(images, non_blocking=True)
            return
        release_memory(z.device)
        half = -(-len(z) // 2)
        for part in zip(z.split(half), labels.split(half), target.split(half), strict=True):
            self._compute(*part)


@dataclasses.dataclass(frozen=True)
class _Arriving:
    """What a rank has computed of a portion, from the `first` image on."""

    first: int
    images: torch.Tensor
    event: torch.cuda.Event | None
    """when they are there"""


def sheet_shape(width: int, height: int) -> tuple[int, int]:
    """(columns, rows): as many images as make a sheet of about 8K, at least 7x4, at most 32x32."""
    return min(max(7680 // width, 7), 32), min(max(4320 // height, 4), 32)


def _rows_by_label(dataset: ImageDataset, rows: int, columns: int, rng: np.random.RandomState) -> np.ndarray:
    """Random images; in a labelled set each row shows one label, the labels taking turns.

    Vectors, of which nearly each image has one of its own, are as good as none.
    """
    _, label_of = dataset.label_table()
    if dataset.label_kind == VECTORS:
        label_of = np.zeros_like(label_of)
    groups = [rng.permutation(np.flatnonzero(label_of == label)) for label in np.unique(label_of)]
    if len(groups) == 1:
        return np.resize(groups[0], rows * columns)
    chosen = []
    for row in range(rows):
        group = groups[row % len(groups)]
        chosen.append(np.resize(np.roll(group, -(row // len(groups)) * columns), columns))
    return np.concatenate(chosen)
