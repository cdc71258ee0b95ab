"""Reading a pickle that holds nothing but plain values and arrays of bytes, without running it.

A pickle is a program for a machine with a stack. These are the instructions that data needs, carried out here; any
other one, and any function but those by which numpy stores an array, makes the pickle refused. (torch_utils.safe_pickle
does this for snapshots; it knows tensors and needs torch.)
"""

from __future__ import annotations

import math
import pickletools
from typing import Any

import numpy as np

_VALUES = {"NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "BINFLOAT", "FLOAT"}
_VALUES |= {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE"}
_VALUES |= {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BINUNICODE8", "BYTEARRAY8"}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_ARRAY, _BUFFER, _DTYPE, _ENCODE = "_reconstruct", "_frombuffer", "dtype", "encode"
_FUNCTIONS = {
    "numpy.core.multiarray _reconstruct": _ARRAY,
    "numpy._core.multiarray _reconstruct": _ARRAY,
    "numpy.core.numeric _frombuffer": _BUFFER,
    "numpy._core.numeric _frombuffer": _BUFFER,
    "numpy ndarray": "ndarray",
    "numpy dtype": _DTYPE,
    "_codecs encode": _ENCODE,  # how Python 3 writes bytes for Python 2
}


class Refused(ValueError):
    """A pickle that is damaged, or more than data."""


class _Mark:
    """Where the items of a list, tuple or dict begin on the stack."""


class _Function:
    def __init__(self, name: str) -> None:
        self.name = name


class PlainArray:
    """An array of bytes, uint8; `filled` is None if the pickle never says what is in it."""

    filled: np.ndarray[Any, Any] | None = None


class _Dtype:
    """uint8; other arrays are refused."""


def load_plain(data: bytes) -> Any:
    """The value that a pickle of any protocol describes. Arrays are PlainArray, text of Python 2 is latin-1.

    Raises Refused if it is damaged, cut short, or asks for anything else.
    """
    try:
        return _run(data)
    except (MemoryError, Refused):
        raise
    except Exception as error:  # too few values on the stack, values of other types than an instruction needs, no end
        raise Refused("it is damaged") from error


def _run(data: bytes) -> Any:
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = _Mark()

    def items() -> list[Any]:
        """Everything above the mark, taken off the stack with it."""
        start = len(stack) - 1
        while stack[start] is not mark:
            start -= 1
        found = stack[start + 1 :]
        del stack[start:]
        return found

    argument: Any
    for opcode, argument, _ in pickletools.genops(data):
        name = opcode.name
        if name in _VALUES:
            stack.append(_CONSTANTS.get(name, argument))
        elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
            memo[int(argument)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name == "MARK":
            stack.append(mark)
        elif name in ("EMPTY_LIST", "EMPTY_DICT"):
            stack.append([] if name == "EMPTY_LIST" else {})
        elif name in _TUPLES:
            count = len(stack) - _TUPLES[name]
            stack[count:] = [tuple(stack[count:])]
        elif name == "TUPLE":
            stack.append(tuple(items()))
        elif name == "LIST":
            stack.append(items())
        elif name == "DICT":
            stack.append(_filled({}, items()))
        elif name in ("APPEND", "APPENDS"):
            new = [stack.pop()] if name == "APPEND" else items()
            _list(stack[-1]).extend(new)
        elif name in ("SETITEM", "SETITEMS"):
            new = [stack.pop(-2), stack.pop()] if name == "SETITEM" else items()
            _filled(stack[-1], new)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            if name == "STACK_GLOBAL":
                parts = stack.pop(-2), stack.pop()
                argument = " ".join(parts)  # fails where they are no text
            if argument not in _FUNCTIONS:
                raise Refused(f"it asks for {argument[:80].replace(' ', '.')}, which no data needs")
            stack.append(_Function(_FUNCTIONS[argument]))
        elif name == "REDUCE":
            arguments = stack.pop()
            stack.append(_called(stack.pop(), arguments))
        elif name == "BUILD":
            _set_state(stack[-2], stack.pop())
        elif name == "STOP":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise Refused(f"it holds the instruction {name}, which no data needs")
    raise Refused("it is damaged")


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise Refused("it is damaged")
    return value


def _filled(target: Any, keys_and_values: list[Any]) -> dict[str, Any]:
    """The dict with the items. Keys are text: comparing anything else could take for ever."""
    if type(target) is not dict or len(keys_and_values) % 2:
        raise Refused("it is damaged")
    for key, value in zip(keys_and_values[::2], keys_and_values[1::2], strict=True):
        if not isinstance(key, (str, bytes)):
            raise Refused("a key is not text")
        target[key.decode("latin-1") if isinstance(key, bytes) else key] = value
    return target


def _called(function: Any, arguments: Any) -> Any:
    if not isinstance(function, _Function):
        raise Refused("it is damaged")
    if function.name == _ARRAY:
        return PlainArray()
    if function.name == _BUFFER:
        content, dtype, shape, order = arguments
        array = PlainArray()
        _set_state(array, (shape, dtype, order != "C", content))
        return array
    if function.name == _DTYPE and arguments[0] in ("u1", "|u1", b"u1", "uint8"):
        return _Dtype()
    if function.name == _ENCODE and arguments[1] in ("latin1", "latin-1") and isinstance(arguments[0], str):
        return arguments[0].encode("latin-1")
    raise Refused("an array of another kind than bytes")  # showing what is nested in itself could take for ever


def _set_state(target: Any, state: Any) -> None:
    if isinstance(target, _Dtype):
        return  # byte order and such, which single bytes have not
    if not isinstance(target, PlainArray):
        raise Refused("it is damaged")
    shape, dtype, fortran_order, content = state[-4:]
    if isinstance(content, str):
        content = content.encode("latin-1")
    if not isinstance(dtype, _Dtype) or not isinstance(content, (bytes, bytearray)) or fortran_order or len(shape) > 4:
        raise Refused("an array is badly described")
    if any(type(size) is not int or size < 0 for size in shape) or math.prod(shape) != len(content):
        raise Refused("an array does not fit its shape")
    target.filled = np.frombuffer(content, np.uint8).reshape(shape)
