"""Reading a pickle that holds nothing but plain values and arrays, without running it.

`torch_utils.pickle_machine` carries out its instructions, within bounds. Any name in it but those by which numpy stores
an array makes it refused.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from typing import Any

from torch_utils import pickle_machine
from torch_utils.stored_array import ARRAY_GLOBALS


class Refused(ValueError):
    """A pickle that is damaged, or more than data."""


def load_plain(data: bytes) -> Any:
    """The value that a pickle of any protocol describes. Arrays are StoredArray, text of Python 2 is latin-1.

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


def _no_instance(*_: Any) -> Any:
    raise ValueError("an array is badly described")


_GLOBALS: Mapping[tuple[str, str], Callable[..., Any]] = {("numpy", "ndarray"): _no_instance, **ARRAY_GLOBALS}
