"""What is kept of the images of a pass, by each process of its own, and put together on rank 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Generator
from typing import Protocol

import torch

from gan.metrics.frechet import Gaussian, MomentSums
from gan.metrics.parts import BLOCK
from torch_utils.world import World

_CHUNK = 2**26  # bytes that a process sends at a time


@dataclasses.dataclass(frozen=True)
class Key:
    """What is to be known of a set of images."""

    view: str
    """what the images are looked at with: `features of FILE`, `patches`, ..."""
    form: str
    """rows or moments"""
    number: int
    """images: the first so many of the set"""


class Collector(Protocol):
    """Takes what a view says of the blocks of this process."""

    number: int

    def add(self, block: int, rows: torch.Tensor) -> None:
        """Of the images from BLOCK * block on; those beyond `number` are left out."""

    def together(self, world: World) -> Generator[None, None, torch.Tensor | Gaussian | None]:
        """That of all processes, on rank 0; None elsewhere. Every process comes to it, in the same order."""


class Rows:
    """All rows, in the order of the images, on the CPU.

    Args:
        number: of images.
    """

    def __init__(self, number: int, world: World) -> None:
        self.number, self._world = number, world
        blocks = -(-number // BLOCK)
        self._own = len(range(world.rank, blocks, world.size)) * BLOCK  # rows, of which the last ones may be empty
        self._rows: torch.Tensor | None = None

    def add(self, block: int, rows: torch.Tensor) -> None:
        rows = rows[: self.number - block * BLOCK]
        if self._rows is None:
            self._rows = torch.zeros([self._own, rows.shape[1]], dtype=rows.dtype)
        begin = block // self._world.size * BLOCK
        self._rows[begin : begin + len(rows)] = rows.cpu()

    def together(self, world: World) -> Generator[None, None, torch.Tensor | None]:
        if world.size == 1:
            assert self._rows is not None
            return self._rows[: self.number]
        own = None if self._rows is None else [self._rows.shape[1], str(self._rows.dtype).removeprefix("torch.")]
        dim, kind = next(facts for facts in world.gather(own, "the size of a row") if facts)
        dtype = getattr(torch, kind)
        mine = torch.zeros([0, dim], dtype=dtype) if self._rows is None else self._rows
        blocks = -(-self.number // BLOCK)
        whole = torch.zeros([blocks, BLOCK, dim], dtype=dtype) if world.is_first else None
        rounds = -(-blocks // world.size)
        at_once = max(_CHUNK // (BLOCK * dim * dtype.itemsize), 1)
        for begin in range(0, rounds, at_once):
            some = min(at_once, rounds - begin)
            part = torch.zeros([some, BLOCK, dim], dtype=dtype)
            there = mine[begin * BLOCK : (begin + some) * BLOCK].view(-1, BLOCK, dim)
            part[: len(there)] = there
            parts = world.collect(part.view(torch.uint8), "rows of features")
            if whole is not None and parts is not None:
                for rank, each in enumerate(parts):
                    places = whole[begin * world.size + rank : (begin + some) * world.size : world.size]
                    places.copy_(each.view(dtype)[: len(places)])
            yield
        return None if whole is None else whole.flatten(0, 1)[: self.number]


class Moments:
    """Mean and covariance of all rows, with the root that distances take."""

    def __init__(self, number: int, world: World) -> None:
        self.number = number
        self._sums: MomentSums | None = None

    def add(self, block: int, rows: torch.Tensor) -> None:
        rows = rows[: self.number - block * BLOCK]
        if self._sums is None:
            self._sums = MomentSums(rows.shape[1], rows.device)
        self._sums.add(rows)

    def together(self, world: World) -> Generator[None, None, Gaussian | None]:
        if world.size > 1:
            raw = None if self._sums is None else self._sums.raw().cpu()
            length = max(world.gather(0 if raw is None else len(raw), "the size of sums"))
            parts = world.collect(torch.zeros(length, dtype=torch.float64) if raw is None else raw, "sums of features")
            for part in (parts or [])[1:]:
                assert self._sums is not None  # rank 0 has the first block
                self._sums.merge(part)
        yield
        if not world.is_first:
            return None
        assert self._sums is not None
        return self._sums.gaussian()


FORMS: dict[str, type[Rows] | type[Moments]] = {"rows": Rows, "moments": Moments}
