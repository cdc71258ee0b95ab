"""Reading a pickle that holds nothing but plain values and arrays of bytes, without running it.

`torch_utils.pickle_machine` carries out its instructions, within bounds. Any name in it but those by which numpy stores
an array makes it refused.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torch_utils import pickle_machine
from torch_utils.pickle_machine import StandIn


class Refused(ValueError):
    """A pickle that is damaged, or more than data."""


class PlainArray(StandIn):
    """An array of bytes, uint8; `filled` is None if the pickle never says what is in it."""

    filled: np.ndarray[Any, Any] | None = None

    def set_state(self, state: Any) -> None:
        if type(state) is not tuple or len(state) < 4:
            raise ValueError("an array is badly described")
        shape, dtype, fortran_order, content = state[-4:]
        if isinstance(content, str):
            content = content.encode("latin-1")
        if type(content) is not bytes or not isinstance(dtype, _Dtype) or fortran_order or len(shape) > 4:
            raise ValueError("an array is badly described")
        if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) != len(content):
            raise ValueError("an array does not fit its shape")
        self.filled = np.frombuffer(content, np.uint8).reshape(shape)


class _Dtype(StandIn):
    """uint8; other arrays are refused."""

    def __init__(self, text: Any, *_flags: Any) -> None:
        if text not in ("u1", "|u1", "uint8"):
            raise ValueError("an array of another kind than bytes")

    def set_state(self, state: Any) -> None:
        """Byte order and such, which single bytes have not."""


def load_plain(data: bytes) -> Any:
    """The value that a pickle of any protocol describes. Arrays are PlainArray, text of Python 2 is latin-1.

    The keys of the dict that it describes, if it is one, are text, whatever wrote it. Raises Refused if it is damaged,
    cut short, or asks for anything else.
    """
    try:
        value = pickle_machine.run(io.BytesIO(data), _GLOBALS, others=False)
    except ValueError as error:
        raise Refused(str(error)) from error
    if type(value) is not dict:
        return value
    return {key.decode("latin-1") if isinstance(key, bytes) else key: item for key, item in value.items()}


def _array_from_buffer(content: Any, dtype: Any, shape: Any, order: Any) -> PlainArray:
    array = PlainArray()
    array.set_state((shape, dtype, order != "C", content))
    return array


def _no_instance(*_: Any) -> Any:
    raise ValueError("an array is badly described")


_GLOBALS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: PlainArray(),
    ("numpy._core.multiarray", "_reconstruct"): lambda *_: PlainArray(),
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy", "ndarray"): _no_instance,
    ("numpy", "dtype"): _Dtype,
}
