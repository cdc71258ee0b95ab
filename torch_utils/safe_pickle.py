"""Read pickles that anyone may have written, without running anything that they ask for.

`pickle_machine` carries out the instructions; here are the stand-ins for the names that files of networks need:
tensors, storages and numpy's arrays. Every other name becomes an `Opaque`, which only remembers what was asked.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, Literal

import numpy as np

from torch_utils import pickle_machine
from torch_utils.pickle_machine import Opaque, StandIn
from torch_utils.stored_tensor import StoredStorage, StoredTensor, storage_from_bytes

__all__ = [
    "SAFE_GLOBALS",
    "Opaque",
    "StoredArray",
    "StoredDtype",
    "StoredStorage",
    "StoredTensor",
    "check_sizes",
    "load",
]

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
_MAX_DIMS = 8
_MAX_SHARED = 1_000_000  # elements of tensors that a file may use for more than one
_FOREIGN = {  # first bytes of what is mistaken for a pickle
    b"PK\x03\x04": "it is a zip file",
    b"\x1f\x8b": "it is a gzip file; unpack it first",
    b"<": "it is a web page; the download went wrong",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file itself",
}


class StoredDtype(StandIn):
    """A numpy dtype, of those that hold nothing but numbers."""

    def __init__(self, text: str, *_flags: Any) -> None:
        if not isinstance(text, str) or not _DTYPE.fullmatch(text):
            raise ValueError("an array has an unsupported dtype")
        self.dtype = np.dtype(text)

    def set_state(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray(StandIn):
    """A numpy array: `np.asarray(stored)` gives it, the same one at each call."""

    def __init__(self) -> None:
        self._array: np.ndarray[Any, Any] | None = None
        self._data: bytes | None = None
        self._dtype: np.dtype[Any] = np.dtype("u1")
        self._order: Literal["C", "F"] = "C"
        self.shape: tuple[int, ...] = ()

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 4:
            raise ValueError("an array is badly described")
        shape, dtype, fortran_order, data = state[-4:]
        self.fill(data, dtype, shape, "F" if fortran_order else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: str) -> None:
        """Take the content. Raises ValueError if it does not fit the shape."""
        if isinstance(data, str):  # as Python 2 wrote bytes
            data = data.encode("latin-1")
        if not isinstance(dtype, StoredDtype) or type(data) is not bytes or type(shape) not in (tuple, list):
            raise ValueError("an array is badly described")
        if len(shape) > _MAX_DIMS or any(type(size) is not int or not 0 <= size < 2**62 for size in shape):
            raise ValueError("an array has a shape that is not made of whole numbers")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {list(shape)} does not fit its data")
        self._data, self._dtype, self._order = data, dtype.dtype, "F" if order == "F" else "C"
        self.shape = tuple(shape)

    @property
    def source(self) -> tuple[int, int]:
        """What holds its content, as a number, and how many elements that has."""
        return id(self), math.prod(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if self._array is None:
            if self._data is None:
                raise ValueError("an array has no content")
            flat: np.ndarray[Any, Any] = np.frombuffer(self._data, self._dtype)
            self._array = flat.reshape(self.shape, order=self._order).astype(self._dtype.newbyteorder("="))
            self._data = None
        return self._array.astype(self._array.dtype if dtype is None else dtype, copy=bool(copy))


def check_sizes(stored: Iterable[StoredTensor | StoredArray]) -> None:
    """Raise ValueError if copies of these together would be larger than what is stored of them.

    Otherwise a small file could describe a network of any size, all of whose tensors are the same one.
    """
    sources: dict[int, int] = {}
    wanted = 0
    for one in stored:
        sources.update([one.source])
        wanted += math.prod(one.shape)
    if wanted > sum(sources.values()) + _MAX_SHARED:
        raise ValueError("its tensors are larger than what is stored of them")


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_grad_and_hooks: Any) -> StoredTensor:
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(data: Any, *_grad_and_hooks: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("a parameter is not a tensor")
    return data


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if type(sizes) not in (list, tuple):
        raise ValueError("a size is badly described")
    return tuple(sizes)


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
    array = StoredArray()
    array.fill(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return np.asarray(_array_from_buffer(data, dtype, (), "C")).item()


SAFE_GLOBALS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): storage_from_bytes,
    ("torch", "Size"): _size,
    ("numpy", "dtype"): StoredDtype,
    **{  # numpy 2 renamed the package
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda *_: StoredArray()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_from_buffer),
        )
    },
}


def load(file: BinaryIO, extra_globals: Mapping[tuple[str, str], Callable[..., Any]] | None = None) -> Any:
    """Read one pickle (protocol 2 or newer) from a seekable binary file; execute nothing.

    Args:
        extra_globals: (module, name) -> what makes the stand-in, beside SAFE_GLOBALS; see `pickle_machine.run`.

    Returns:
        Plain values, StoredTensor, StoredArray, what extra_globals made, and Opaque for everything else. They can be
        nested in themselves and to any depth.

    Raises:
        ValueError: not a pickle, cut short, or damaged.
    """
    start = file.read(32)
    file.seek(-len(start), io.SEEK_CUR)
    if not start:
        raise ValueError("it is empty")
    if start[:1] != b"\x80":
        kind = next((text for magic, text in _FOREIGN.items() if start.startswith(magic)), "it is not a pickle")
        raise ValueError(kind)
    try:
        return pickle_machine.run(file, {**SAFE_GLOBALS, **(extra_globals or {})})
    except pickle_machine.CutShort as error:
        raise ValueError(f"{error}; copy or download it again") from error
