"""Read pickles that anyone may have written, without running anything that they ask for.

`pickle_machine` carries out the instructions; here are the stand-ins for the names that files of networks need:
tensors and storages, beside those for arrays. Every other name becomes an `Opaque`, which only remembers the request.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from torch_utils import pickle_machine
from torch_utils.stand_ins import Global, Opaque
from torch_utils.stored_array import ARRAY_GLOBALS, StoredArray
from torch_utils.stored_tensor import StoredStorage, StoredTensor
from torch_utils.torch_legacy import storage_from_bytes

__all__ = [
    "SAFE_GLOBALS",
    "Opaque",
    "StoredArray",
    "StoredStorage",
    "StoredTensor",
    "check_sizes",
    "load",
]

_MAX_SHARED = 4_000_000  # bytes of tensors that a file may use for more than one
_TENSOR_FUNCTIONS = {f"torch._utils.{name}" for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")}
_TENSOR_CLASSES = {"torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"}


def check_sizes(stored: Iterable[StoredTensor | StoredArray]) -> None:
    """Raise ValueError if these together, as float32, would take far more memory than what is stored of them.

    Otherwise a small file could describe a network of any size, all of whose tensors are the same one. Twice as much is
    right for float16, and for two networks that are one.
    """
    sources: dict[int, int] = {}
    wanted = 0
    for one in stored:
        sources.update([one.source])
        wanted += 4 * math.prod(one.shape)
    if wanted > 2 * sum(sources.values()) + _MAX_SHARED:
        raise ValueError("its tensors are larger than what is stored of them")


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _grad: Any = None, _hooks: Any = None, metadata: Any = None
) -> StoredTensor | Opaque:
    if metadata:  # that its numbers have the other sign, for one
        return Opaque("torch._utils._rebuild_tensor_v2", (storage, offset, shape, stride, metadata))
    return StoredTensor(storage, offset, shape, stride)


def _rebuild_parameter(data: Any, *_grad_and_hooks: Any) -> Any:
    if not isinstance(data, (StoredTensor, Opaque)):
        raise ValueError("a parameter is not a tensor")
    return data


def _rebuild_with_attributes(function: Any, kind: Any, args: Any, state: Any) -> Any:
    """A tensor with attributes of Python's, which are left out; `torch.nn.Buffer` has some."""
    known = type(function) is type(kind) is Global and function.global_name in _TENSOR_FUNCTIONS
    if not known or kind.global_name not in _TENSOR_CLASSES or type(args) is not tuple:
        return Opaque("torch._tensor._rebuild_from_type_v2", (function, kind, args, state))
    return function.call(args, {})


def _size(sizes: Any = ()) -> tuple[Any, ...]:
    if type(sizes) not in (list, tuple):
        raise ValueError("a size is badly described")
    return tuple(sizes)


SAFE_GLOBALS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _rebuild_parameter,
    ("torch.storage", "_load_from_bytes"): storage_from_bytes,
    ("torch", "Size"): _size,
    ("torch._tensor", "_rebuild_from_type_v2"): _rebuild_with_attributes,
    **ARRAY_GLOBALS,
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
    start = file.read(1)
    file.seek(-len(start), io.SEEK_CUR)
    if not start:
        raise ValueError("it is empty")
    if start != b"\x80":
        raise ValueError("it is not a pickle")
    try:
        return pickle_machine.run(file, {**SAFE_GLOBALS, **(extra_globals or {})})
    except pickle_machine.CutShort as error:
        raise ValueError(f"{error}; copy or download it again") from error
