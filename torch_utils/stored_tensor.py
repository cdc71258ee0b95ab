"""Tensors and storages as files describe them, built when they are wanted."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, BinaryIO

import torch

from torch_utils import pickle_machine
from torch_utils.stand_ins import Global, StandIn

_MAX_DIMS = 8
_MAX_SIZE = 2**62
_MAX_EXPANDED = 1_000_000  # elements of a tensor beyond those that are stored
_MAX_KEY = 100  # characters
_DTYPES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
    "torch.ComplexFloatStorage": torch.complex64,
    "torch.ComplexDoubleStorage": torch.complex128,
    "torch.storage.UntypedStorage": torch.uint8,
    # Of quantised tensors, which themselves are not known.
    "torch.QInt8Storage": torch.int8,
    "torch.QUInt8Storage": torch.uint8,
    "torch.QInt32Storage": torch.int32,
}


class StoredStorage(StandIn):
    """The content of a torch storage, read when it is wanted, and once.

    Args:
        read: gives all elements, `[numel]`, on the CPU, aligned. Raises ValueError if they cannot be had.
        source: what holds the content, as a number, if several may be made of it.
    """

    def __init__(self, read: Callable[[], torch.Tensor], source: int | None = None) -> None:
        self.source = id(self) if source is None else source
        self._read: Callable[[], torch.Tensor] | None = read
        self._flat: torch.Tensor | None = None
        self._given_away = False

    def give_away(self) -> bool:
        """Whether its memory may become that of somebody's tensor: only of the first who asks."""
        self._given_away, was_given_away = True, self._given_away
        return not was_given_away

    def flat(self) -> torch.Tensor:
        """All elements, on the CPU, `[numel]`. Raises ValueError if the bytes are not a storage."""
        if self._flat is None:
            assert self._read is not None
            self._flat = self._read()
            self._read = None  # and with it the bytes
        return self._flat


class StoredTensor(StandIn):
    """A tensor that is built when it is wanted."""

    def __init__(self, storage: StoredStorage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        sound = isinstance(storage, StoredStorage) and all(type(sizes) in (tuple, list) for sizes in (shape, stride))
        if not sound or len(shape) != len(stride) or len(shape) > _MAX_DIMS:
            raise ValueError("a tensor is badly described")
        if any(type(number) is not int or not 0 <= number < _MAX_SIZE for number in (offset, *shape, *stride)):
            raise ValueError("a tensor has a shape or stride that is not made of whole numbers")
        self._storage, self._offset, self._stride = storage, offset, tuple(stride)
        self.shape = tuple(shape)

    @property
    def source(self) -> tuple[int, int]:
        """What holds its content, as a number, and how many bytes that has. Raises ValueError if it is damaged."""
        return self._storage.source, self._storage.flat().nbytes

    @property
    def dtype(self) -> torch.dtype:
        """Raises ValueError if its storage is damaged."""
        return self._storage.flat().dtype

    def tensor(self) -> torch.Tensor:
        """The tensor, on the CPU, a view of its storage. Raises ValueError if it reaches outside its storage.

        Expanded tensors name the same elements again and again, up to a million times.
        """
        flat, numel = self._storage.flat(), math.prod(self.shape)
        last = self._offset + sum((size - 1) * step for size, step in zip(self.shape, self._stride, strict=True))
        if numel > flat.numel() + _MAX_EXPANDED or (numel > 0 and last >= flat.numel()):
            raise ValueError(f"a tensor of shape {list(self.shape)} is larger than its data")
        if numel == 0:
            return torch.empty(self.shape, dtype=flat.dtype)
        return flat.as_strided(self.shape, self._stride, self._offset)

    def own(self) -> torch.Tensor:
        """As `tensor`, but contiguous and in memory that nobody else is given: without a copy where that can be."""
        tensor = self.tensor()
        is_all = tensor.is_contiguous() and tensor.numel() == self._storage.flat().numel()
        return tensor if is_all and self._storage.give_away() else tensor.clone(memory_format=torch.contiguous_format)


def flat_tensor(buffer: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A buffer of bytes, uint8, as elements of another type. Raises ValueError if they do not divide."""
    if buffer.numel() % dtype.itemsize:
        raise ValueError("the data of a tensor is damaged")
    return buffer.ne(0) if dtype == torch.bool else buffer.view(dtype)


def filled_buffer(file: BinaryIO, size: int) -> torch.Tensor:
    """The next bytes of a file, uint8, aligned. The caller has seen that so many are left."""
    buffer = torch.empty(size, dtype=torch.uint8)
    view = buffer.numpy().data
    done = 0
    while done < size:
        part: int = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not part:
            raise pickle_machine.CutShort
        done += part
    return buffer


def described_storage(described: Any) -> tuple[str, torch.dtype, int]:
    """Key, type and size in bytes, of the id by which a pickle refers to a storage beside it. Raises ValueError."""
    if type(described) is not tuple or len(described) < 5 or described[0] != "storage":
        raise ValueError("it refers to something outside of it that is no storage")
    _, kind, key, _device, numel, *view = described
    sound = type(key) is str and len(key) <= _MAX_KEY and type(kind) is Global
    if not sound or type(numel) is not int or not 0 <= numel < _MAX_SIZE:
        raise ValueError("a storage is badly described")
    if kind.global_name not in _DTYPES or any(part is not None for part in view):
        raise ValueError(f"a storage of an unsupported kind, {kind.global_name}")
    dtype = _DTYPES[kind.global_name]
    return key, dtype, numel * dtype.itemsize
