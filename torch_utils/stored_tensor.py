"""Tensors and storages as files describe them, and torch's older way of writing them, read without torch.load."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

from torch_utils import pickle_machine
from torch_utils.pickle_machine import Global, StandIn

LEGACY_START = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # a pickle of the number that such files begin with
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_DIMS = 8
_MAX_SIZE = 2**62
_MAX_KEY = 100  # characters
_MAX_STORAGE_STEPS = 2000  # of the pickle around a single storage, which has about 100
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
    "torch.storage.UntypedStorage": torch.uint8,
}


class StoredStorage(StandIn):
    """The content of a torch storage, read when it is wanted, and once.

    Args:
        read: gives all elements, `[numel]`, on the CPU, aligned. Raises ValueError if they cannot be had.
    """

    def __init__(self, read: Callable[[], torch.Tensor]) -> None:
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
        """What it is a view of, as a number, and how many elements that has. Raises ValueError if it is damaged."""
        return id(self._storage), self._storage.flat().numel()

    @property
    def dtype(self) -> torch.dtype:
        """Raises ValueError if its storage is damaged."""
        return self._storage.flat().dtype

    def tensor(self) -> torch.Tensor:
        """The tensor, on the CPU, a view of its storage. Raises ValueError if it reaches outside its storage."""
        flat, numel = self._storage.flat(), math.prod(self.shape)
        last = self._offset + sum((size - 1) * step for size, step in zip(self.shape, self._stride, strict=True))
        if numel > flat.numel() or (numel > 0 and last >= flat.numel()):
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


def load_legacy(
    file: BinaryIO,
    globals: Mapping[tuple[str, str], Callable[..., Any]],
    max_steps: int = pickle_machine.MAX_STEPS,
) -> Any:
    """What torch.save wrote before it wrote zips: pickles one after the other, then the content of the storages.

    Raises ValueError if it is damaged or of another kind of machine.
    """
    buffers: dict[str, torch.Tensor] = {}
    declared: dict[str, tuple[torch.dtype, int]] = {}
    storages: dict[tuple[str, torch.dtype], StoredStorage] = {}

    def persistent(described: Any) -> StoredStorage:
        key, dtype, size = described_storage(described)
        if declared.setdefault(key, (dtype, size))[1] != size:
            raise ValueError("it is damaged (a storage is described in two ways)")
        if (key, dtype) not in storages:
            storages[key, dtype] = StoredStorage(lambda: flat_tensor(buffers[key], dtype))
        return storages[key, dtype]

    def part(persistent: Callable[[Any], Any] | None = None) -> Any:
        return pickle_machine.run(file, globals, persistent, max_steps=max_steps)

    magic, protocol, system = part(), part(), part()
    if type(magic) is not int or magic != _LEGACY_MAGIC or type(protocol) is not int or protocol != _LEGACY_PROTOCOL:
        raise ValueError("it is not a file that torch.save wrote")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine; save it again on another one")
    value, keys = part(persistent), part()
    sound = type(keys) is list and all(type(key) is str for key in keys) and len(keys) == len(declared)
    if not sound or set(keys) != declared.keys():
        raise ValueError("it is damaged (its storages are not those that it describes)")
    start = file.tell()
    left = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    for key in keys:
        dtype, size = declared[key]
        left -= 8 + size
        if left < 0:
            raise pickle_machine.CutShort
        if int.from_bytes(file.read(8), "little") * dtype.itemsize != size:
            raise ValueError("it is damaged (a storage has another size than described)")
        buffers[key] = filled_buffer(file, size)
    return value


def storage_from_bytes(data: Any) -> StoredStorage:
    """A storage that was pickled by itself, as the bytes that torch.save makes of it."""
    if type(data) is not bytes:
        raise ValueError("a storage is not made of bytes")

    def read() -> torch.Tensor:
        try:
            storage = load_legacy(io.BytesIO(data), {}, _MAX_STORAGE_STEPS)
            if isinstance(storage, StoredStorage):
                return storage.flat()
        except ValueError as error:
            raise ValueError(f"the data of a tensor cannot be read: {error}") from error
        raise ValueError("the data of a tensor is not that of a storage")

    return StoredStorage(read)
