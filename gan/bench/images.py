"""Random images that stand in for a dataset: what is in a picture does not change how long a step takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gan.data.dataset import ImageDataset
from gan.data.packing import pack
from gan.data.sources import Header, Source

_BYTES = 24_000_000


class RandomImages(Source):
    """Noise, a picture a pure function of its number."""

    def __init__(self, resolution: int) -> None:
        super().__init__("random images", [f"{i:05d}.png" for i in range(count_at(resolution))])
        self._resolution = resolution

    def read(self, index: int) -> Image.Image:
        shape = (self._resolution, self._resolution, 3)
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8))

    def header(self, index: int) -> Header:
        return Header("RGB", self._resolution, self._resolution)


def count_at(resolution: int) -> int:
    """How many there are."""
    return min(max(_BYTES // (3 * resolution**2), 8), 320)


def random_dataset(path: Path, resolution: int, mirror: bool = False) -> ImageDataset:
    """Pack random images into `path`, as dataset_tool.py would, and open it."""
    pack(RandomImages(resolution), path, workers=0)  # torch has threads here: no forking
    return ImageDataset(path, mirror=mirror)
