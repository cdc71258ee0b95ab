"""Arrays as numpy's pickles describe them, read without numpy's constructors. It needs no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from torch_utils.stand_ins import Opaque, StandIn

_DTYPE = re.compile(r"[<>=|]?(b1|[iu][1248]|f[248])")
_MAX_DIMS = 8


class StoredDtype(StandIn):
    """A numpy dtype, of those that hold nothing but real numbers."""

    def __init__(self, text: str) -> None:
        self.dtype = np.dtype(text)

    def set_state(self, state: Any) -> None:
        if state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


class StoredArray(StandIn):
    """A numpy array: `np.asarray(stored)` gives it, the same one at each call.

    That raises ValueError for one of an unknown dtype: such an array is inert.
    """

    def __init__(self) -> None:
        self._array: np.ndarray[Any, Any] | None = None
        self._data: bytes | None = None
        self._dtype: np.dtype[Any] = np.dtype("u1")
        self._order: Literal["C", "F"] = "C"
        self._stored_shape: tuple[int, ...] = ()
        self._axes: tuple[int, ...] = ()
        self.shape: tuple[int, ...] = ()
        self.source = (id(self), 0)  # what holds its content, as a number, and how many bytes that has

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 4:
            raise ValueError("an array is badly described")
        shape, dtype, fortran_order, data = state[-4:]
        self.fill(data, dtype, shape, "F" if fortran_order else "C")

    def fill(self, data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> None:
        """Take the content. Raises ValueError if it does not fit the shape.

        Args:
            axes: how to transpose what has this shape.
        """
        if type(dtype) is Opaque:
            return
        if isinstance(data, str):  # as Python 2 wrote bytes
            data = data.encode("latin-1")
        if not isinstance(dtype, StoredDtype) or type(data) is not bytes or type(shape) not in (tuple, list):
            raise ValueError("an array is badly described")
        if len(shape) > _MAX_DIMS or any(type(size) is not int or not 0 <= size < 2**62 for size in shape):
            raise ValueError("an array has a shape that is not made of whole numbers")
        if math.prod(shape) * dtype.dtype.itemsize != len(data):
            raise ValueError(f"an array of shape {list(shape)} does not fit its data")
        axes = tuple(range(len(shape))) if axes is None else axes
        if type(axes) is not tuple or not _are_axes(axes, len(shape)):
            raise ValueError("an array is badly described")
        self._data, self._dtype, self._order = data, dtype.dtype, "F" if order == "F" else "C"
        self._stored_shape, self._axes = tuple(shape), axes
        self.shape = tuple(shape[axis] for axis in axes)
        self.source = (id(data), len(data))  # several arrays may be of the same bytes

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        if self._array is None:
            if self._data is None:
                raise ValueError("an array has no content, or holds something else than real numbers")
            flat: np.ndarray[Any, Any] = np.frombuffer(self._data, self._dtype)
            array = flat.reshape(self._stored_shape, order=self._order).transpose(self._axes)
            self._array = array.astype(self._dtype.newbyteorder("="))
            self._data = None
        return self._array.astype(self._array.dtype if dtype is None else dtype, copy=bool(copy))


def _are_axes(axes: tuple[Any, ...], count: int) -> bool:
    return all(type(axis) is int for axis in axes) and sorted(axes) == list(range(count))


def _dtype(text: Any = None, *flags: Any) -> StoredDtype | Opaque:
    if isinstance(text, str) and _DTYPE.fullmatch(text):
        return StoredDtype(text)
    return Opaque("numpy.dtype", (text, *flags))


def _array_from_buffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> StoredArray:
    array = StoredArray()
    array.fill(data, dtype, shape, order, axes if order == "K" else None)
    return array


def _scalar(dtype: Any, data: Any) -> Any:
    if type(dtype) is Opaque:
        return Opaque("numpy.core.multiarray.scalar", (dtype, data))
    return np.asarray(_array_from_buffer(data, dtype, (), "C")).item()


ARRAY_GLOBALS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy", "dtype"): _dtype,
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
