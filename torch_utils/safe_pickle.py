"""Read pickles that anyone may have written, without running anything that they ask for.

A pickle is a program: it names functions and calls them. Here the names lead to a short list of harmless stand-ins,
and every other name to an `Opaque` that only remembers what was asked. Whatever a stand-in makes refuses or merely
records what a pickle may do to an object (set its state, append, set items), so that none can alter code or each other.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np
import torch

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248]|c8|c16)")
_MAX_DIMS = 8
_FOREIGN = {  # first bytes of what is mistaken for a pickle
    b"PK\x03\x04": "it is a zip file",
    b"\x1f\x8b": "it is a gzip file; unpack it first",
    b"<": "it is a web page; the download went wrong",
    b"version https://git-lfs": "it is a Git LFS pointer; fetch the file itself",
}


class Opaque:
    """What an unknown global of a pickle stands for: it records its arguments and state, and does nothing."""

    global_name = ""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    state: Any
    items: list[Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Opaque:
        made = super().__new__(cls)
        made.args, made.kwargs, made.state, made.items = args, kwargs, None, []
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    def extend(self, values: Iterable[Any]) -> None:
        self.items.extend(values)

    def add(self, value: Any) -> None:
        self.items.append(value)


class Inert:
    """Base of stand-ins whose state a pickle must not set."""

    def __setstate__(self, state: Any) -> None:
        raise ValueError(f"the state of a {type(self).__name__} cannot be set")


class Call(Inert):
    """A function that a pickle may call; unlike a bare function, it has no attributes that a pickle could alter."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class PlainDict(dict[Any, Any]):
    """Stands for dict subclasses; what they hold beside their items is dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class StoredStorage(Inert):
    """The bytes of a torch storage, read when they are wanted, and once."""

    def __init__(self, data: bytes) -> None:
        if type(data) is not bytes:
            raise ValueError("a storage is not made of bytes")
        self._data: bytes | None = data
        self._flat: torch.Tensor | None = None

    def flat(self) -> torch.Tensor:
        """All elements, on the CPU, `[numel]`. Raises ValueError if the bytes are not a storage."""
        if self._flat is None:
            assert self._data is not None
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # what a damaged file makes torch suspect helps nobody
                    storage = torch.load(io.BytesIO(self._data), map_location="cpu", weights_only=True)
                self._flat = torch.empty(0, dtype=storage.dtype).set_(storage)
            except Exception as error:  # torch raises nearly anything here
                raise ValueError("the data of a tensor is damaged") from error
            self._data = None
        return self._flat


class StoredTensor(Inert):
    """A tensor that is built when it is wanted."""

    def __init__(self, storage: StoredStorage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...]) -> None:
        if not isinstance(storage, StoredStorage) or len(shape) != len(stride) or len(shape) > _MAX_DIMS:
            raise ValueError("a tensor is badly described")
        if any(type(number) is not int or number < 0 for number in (offset, *shape, *stride)):
            raise ValueError("a tensor has a shape or stride that is not a whole number")
        self._storage, self._offset, self._stride = storage, offset, tuple(stride)
        self.shape = tuple(shape)

    def tensor(self) -> torch.Tensor:
        """The tensor, on the CPU, a view of its storage. Raises ValueError if it reaches outside its storage."""
        flat, numel = self._storage.flat(), math.prod(self.shape)
        last = self._offset + sum((size - 1) * step for size, step in zip(self.shape, self._stride, strict=True))
        if numel > flat.numel() or (numel > 0 and last >= flat.numel()):
            raise ValueError(f"a tensor of shape {list(self.shape)} is larger than its data")
        return flat.as_strided(self.shape, self._stride, self._offset if numel else 0)


class StoredDtype(Inert):
    """A numpy dtype, of those that hold nothing but numbers."""

    def __init__(self, text: str, *_flags: Any) -> None:
        if not isinstance(text, str) or not _DTYPE.fullmatch(text):
            raise ValueError("an array has an unsupported dtype")
        self.dtype = np.dtype(text)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray(Inert):
    """A numpy array: `np.asarray(stored)` gives it."""

    def __init__(self) -> None:
        self._array: np.ndarray[Any, Any] | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        shape, dtype, fortran_order, data = state[-4:]
        self.fill(data, dtype, shape, "F" if fortran_order else "C")

    def fill(self, data: bytes, dtype: StoredDtype, shape: tuple[int, ...], order: str) -> None:
        """Take the content. Raises ValueError if it does not fit the shape."""
        if not isinstance(dtype, StoredDtype) or not isinstance(data, (bytes, bytearray)):
            raise ValueError("an array is badly described")
        if any(type(size) is not int or size < 0 for size in shape) or len(shape) > _MAX_DIMS:
            raise ValueError("an array has a shape that is not made of whole numbers")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {list(shape)} does not fit its data")
        array = np.frombuffer(data, dtype.dtype).reshape(shape, order="F" if order == "F" else "C")
        self._array = array.astype(dtype.dtype.newbyteorder("="))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if self._array is None:
            raise ValueError("an array has no content")
        return self._array if dtype is None else self._array.astype(dtype)


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_grad_and_hooks: Any) -> StoredTensor:
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(data: Any, *_grad_and_hooks: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise ValueError("a parameter is not a tensor")
    return data


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any) -> StoredArray:
    array = StoredArray()
    array.fill(data, dtype, shape, order)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    return np.asarray(_array_from_buffer(data, dtype, (), "C")).item()


SAFE_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Call(lambda items=(): dict(items)),
    ("builtins", "set"): Call(lambda items=(): set(items)),
    ("builtins", "frozenset"): Call(lambda items=(): frozenset(items)),
    ("torch._utils", "_rebuild_tensor"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_tensor_v2"): Call(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): Call(_rebuild_parameter),
    ("torch._utils", "_rebuild_parameter_with_state"): Call(_rebuild_parameter),
    ("torch.storage", "_load_from_bytes"): Call(StoredStorage),
    ("numpy", "dtype"): Call(StoredDtype),
    **{  # numpy 2 renamed the package
        (f"numpy.{core}.{module}", name): Call(function)
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", lambda *_: StoredArray()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _array_from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: BinaryIO, known: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(file)
        self._known = dict(known)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            self._known[module, name] = type("Opaque", (Opaque,), {"global_name": f"{module}.{name}"})
        return self._known[module, name]


def load(file: BinaryIO, extra_globals: Mapping[tuple[str, str], Any] | None = None) -> Any:
    """Read one pickle (protocol 2 or newer) from a seekable binary file; execute nothing.

    Args:
        extra_globals: (module, name) -> what it stands for, beside SAFE_GLOBALS: a `Call`, or a class that defines
            `__setstate__` (without it a pickle could set attributes of the class).

    Returns:
        Plain values, StoredTensor, StoredArray, what extra_globals made, and Opaque for everything else.

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
        return _Unpickler(file, {**SAFE_GLOBALS, **(extra_globals or {})}).load()
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way there is
        if isinstance(error, EOFError) or "truncated" in str(error):
            raise ValueError("it is cut short; copy or download it again") from error
        raise ValueError(f"it is damaged ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(char if char.isprintable() else "?" for char in text)[:120]
