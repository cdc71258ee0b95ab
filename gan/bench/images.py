"""Random images that stand in for a dataset: what is in a picture does not change how long a step takes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from gan.data.dataset import ImageDataset
from gan.data.packing import pack
from gan.data.sources import Header, Source
from gan.image_size import Size

_BYTES = 24_000_000


class RandomImages(Source):
    """Noise, a picture a pure function of its number."""

    def __init__(self, size: Size) -> None:
        super().__init__("random images", [f"{i:05d}.png" for i in range(count_at(size))])
        self._width, self._height = size

    def read(self, index: int) -> Image.Image:
        shape = (self._height, self._width, 3)
        return Image.fromarray(np.random.default_rng(index).integers(0, 256, shape, dtype=np.uint8))

    def header(self, index: int) -> Header:
        return Header("RGB", self._width, self._height)


def count_at(size: Size) -> int:
    """How many there are."""
    return min(max(_BYTES // (3 * size[0] * size[1]), 8), 320)


def random_dataset(path: Path, size: Size, mirror: bool = False) -> ImageDataset:
    """Pack random images into `path`, as dataset_tool.py would, and open it."""
    pack(RandomImages(size), path, workers=0)  # torch has threads here: no forking
    return ImageDataset(path, mirror=mirror)
