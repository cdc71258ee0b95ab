"""What is kept of the images of a pass, by each process of its own, and put together on rank 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Generator
from typing import Protocol, TypeVar, cast

import torch

from gan.errors import GanError, one_line
from gan.metrics.frechet import Gaussian, MomentSums
from gan.metrics.parts import BLOCK
from torch_utils.distributed import DistributedError
from torch_utils.memory import is_out_of_memory
from torch_utils.world import World

T = TypeVar("T")

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


class LostError(GanError):
    """Something that every process is to do has failed for one of them; raised by all."""


def by_all(world: World, work: Callable[[], T], what: str) -> T:
    """The result of this process' own work. Raises LostError everywhere if any process has failed in its own.

    So nobody is left waiting in what they do together afterwards.
    """
    result, problem = None, None
    try:
        result = work()
    except DistributedError:
        raise
    except Exception as error:
        problem = in_words(error)
    problems = [text for text in world.gather(problem, what) if text is not None]
    if problems:
        raise LostError(problems[0])
    return cast(T, result)


def in_words(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, GanError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory; python -m gan metrics measures it where there is more"
    return f"{type(error).__name__}: {one_line(error)}"


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
        blocks = -(-self.number // BLOCK)
        at_once = min(max(_CHUNK // (BLOCK * dim * dtype.itemsize), 1), -(-blocks // world.size))

        def room() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            mine = torch.zeros([0, dim], dtype=dtype) if self._rows is None else self._rows
            whole = torch.zeros([blocks if world.is_first else 0, BLOCK, dim], dtype=dtype)
            return mine, whole, torch.zeros([at_once, BLOCK, dim], dtype=dtype)

        mine, whole, part = by_all(world, room, "the room for rows")
        for begin in range(0, -(-blocks // world.size), at_once):
            there = mine[begin * BLOCK : (begin + at_once) * BLOCK].view(-1, BLOCK, dim)
            part[: len(there)] = there
            parts = world.collect(part.view(torch.uint8), "rows of features")
            for rank, each in enumerate(parts or ()):
                places = whole[begin * world.size + rank : (begin + at_once) * world.size : world.size]
                places.copy_(each.view(dtype)[: len(places)])
            yield
        return whole.flatten(0, 1)[: self.number] if world.is_first else None


class Moments:
    """Mean and covariance of all rows."""

    def __init__(self, number: int, world: World) -> None:
        self.number = number
        self._sums: MomentSums | None = None

    def add(self, block: int, rows: torch.Tensor) -> None:
        rows = rows[: self.number - block * BLOCK]
        if self._sums is None:
            self._sums = MomentSums(rows.shape[1], rows.device)
        self._sums.add(rows)

    def together(self, world: World) -> Generator[None, None, Gaussian | None]:
        sums = self._sums
        if world.size == 1:
            yield
            assert sums is not None
            return sums.gaussian()
        raw = by_all(world, lambda: None if sums is None else sums.raw().cpu(), "the sums")
        length = max(world.gather(0 if raw is None else len(raw), "the size of sums"))
        room = by_all(world, lambda: torch.zeros(length, dtype=torch.float64) if raw is None else raw, "room for sums")
        parts = world.collect(room, "sums of features")
        yield

        def gaussian() -> Gaussian | None:
            if parts is None:
                return None
            assert sums is not None  # rank 0 has the first block
            for part in parts[1:]:
                sums.merge(part)
            return sums.gaussian()

        return by_all(world, gaussian, "the mean and the covariance")


FORMS: dict[str, type[Rows] | type[Moments]] = {"rows": Rows, "moments": Moments}
