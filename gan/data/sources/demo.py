"""The built-in collection."""

from __future__ import annotations

from PIL import Image

from gan.data import demo
from gan.data.sources.base import Header, Source


class DemoSource(Source):
    """The built-in landscapes of `gan.data.demo`, drawn when they are read."""

    def __init__(self, name: str = "demo", count: int = demo.DEMO_COUNT, size: int = 64) -> None:
        super().__init__(name, [f"{name}/{index:05d}.png" for index in range(count)])
        self._size = size

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(demo.draw(index, self._size))

    def header(self, index: int) -> Header:
        return Header("RGB", self._size, self._size)
