"""The snapshot pickle layout: modules as class name, source text and state. Written plainly, read without executing.

Each module, and each of its submodules, is a call of the global `torch_utils.persistence._reconstruct_persistent_obj`
with one dict {type, version, module_src, class_name, state}. Programs that execute `module_src` can open such a file
without having the classes; this one never does. Everything else in the file is a plain value or a tensor.
"""

from __future__ import annotations

import functools
import inspect
import os
import pickle
import sys
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

from torch_utils import safe_pickle

VERSION = 6  # of the layout
_PROTOCOL = 4  # of pickle: what the oldest supported readers know
_MAX_DEPTH, _MAX_VALUES = 32, 100_000  # of plain values, against cycles and lists of lists of one list

# Everything that a file of ours may name.
WRITTEN_GLOBALS = frozenset(
    {
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch._utils", "_rebuild_parameter"),
        ("torch.storage", "_load_from_bytes"),
        ("collections", "OrderedDict"),
    }
)

_registry: dict[str, type[torch.nn.Module]] = {}


@dataclass(frozen=True, eq=False)
class PersistentObject(safe_pickle.Inert):
    """A module as it was found in a file, not brought to life. `state` was the object's `__dict__`."""

    class_name: str
    module_src: str = field(repr=False)
    state: dict[str, Any] = field(repr=False)


def register_classes(classes: Mapping[str, type[torch.nn.Module]]) -> None:
    """Make classes known, by the name that files use, to a plain `pickle.load`."""
    _registry.update(classes)


def dump(
    value: Mapping[str, Any],
    file: str | os.PathLike[str] | BinaryIO,
    *,
    source_of: Callable[[type], str] | None = None,
    transient: Collection[str] = (),
) -> None:
    """Pickle a dict in which modules occur.

    Modules are written as they would be used: in evaluation mode, without gradients or hooks, floating-point tensors
    as contiguous float32. The live modules are not altered; their parameters may be views of larger tensors.

    Args:
        value: of modules, tensors and plain values (see `plain`).
        source_of: class -> source text of its module; the default asks `inspect`. The modules that a text imports
            must exist wherever the file is to be opened.
        transient: names of module attributes to leave out.

    Raises:
        ValueError: for anything else in `value`, and for modules that did not record their constructor's arguments.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "wb") as opened:
            dump(value, opened, source_of=source_of, transient=transient)
        return
    _Writer(file, source_of or source_text, transient).dump(plain(value))


def load(file: str | os.PathLike[str] | BinaryIO) -> Any:
    """Read a file of this layout, whoever wrote it, without executing anything in it.

    Returns:
        The pickled value, a dict in this layout. Modules are PersistentObject, tensors and arrays are
        safe_pickle.StoredTensor and StoredArray, and objects of unknown classes are safe_pickle.Opaque.

    Raises:
        ValueError: not a pickle, cut short or damaged; the text continues a sentence about the file.
        OSError: the file cannot be read.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "rb") as opened:
            return load(opened)
    return safe_pickle.load(file, _READ_GLOBALS)


def plain(value: Any) -> Any:
    """A copy of `value` in the plain types of Python; dict subclasses become dicts, numpy scalars Python's.

    Modules and tensors, alive or as read, stay as they are. Raises ValueError for other objects, naming their type.
    """
    return _plain(value, 0, [_MAX_VALUES])


@functools.cache
def source_text(cls: type) -> str:
    """The source text of the module that defines `cls`: the same object at each call, even if the file has changed."""
    return _module_source(cls.__module__)


def _plain(value: Any, depth: int, budget: list[int]) -> Any:
    budget[0] -= 1
    if depth > _MAX_DEPTH or budget[0] < 0:
        raise ValueError("values are nested too deeply or too many")
    if value is None or isinstance(value, (bool, torch.Tensor, torch.nn.Module, PersistentObject)):
        return value
    if isinstance(value, (safe_pickle.StoredTensor, safe_pickle.StoredArray)):
        return value
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if isinstance(value, np.generic):
        return _plain(value.item(), depth + 1, budget)
    if type(value) in (int, float, str, bytes):
        return value
    if isinstance(value, str):
        return str.__str__(value)  # not str(value), which for an enum is its name
    for number in (int, float):
        if isinstance(value, number):
            return number(value)
    if isinstance(value, Mapping):
        return {_plain(k, depth + 1, budget): _plain(v, depth + 1, budget) for k, v in value.items()}
    for container in (list, tuple, set, frozenset):
        if isinstance(value, container):
            return container(_plain(item, depth + 1, budget) for item in value)
    raise ValueError(f"an object of the type {_type_name(value)} is not a plain value")


def _type_name(value: Any) -> str:
    if isinstance(value, type):
        return getattr(value, "global_name", "type")
    return getattr(value, "global_name", f"{type(value).__module__}.{type(value).__qualname__}")


class _Writer(pickle.Pickler):
    def __init__(self, file: BinaryIO, source_of: Callable[[type], str], transient: Collection[str]) -> None:
        super().__init__(file, protocol=_PROTOCOL)
        self._source_of, self._transient = source_of, frozenset(transient)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, torch.nn.Module):
            return _reconstruct_persistent_obj, (self._describe(value),)
        if isinstance(value, torch.nn.Parameter):
            return torch.nn.Parameter(_compact(value), requires_grad=False).__reduce_ex__(_PROTOCOL)
        if isinstance(value, torch.Tensor):
            return _compact(value).__reduce_ex__(_PROTOCOL)
        if isinstance(value, (torch.TypedStorage, OrderedDict)):
            return NotImplemented
        if (getattr(value, "__module__", None), getattr(value, "__qualname__", None)) in WRITTEN_GLOBALS:
            return NotImplemented
        raise ValueError(f"an object of the type {_type_name(value)} cannot be written")

    def _describe(self, module: torch.nn.Module) -> dict[str, Any]:
        cls = type(module)
        if "_init_kwargs" not in module.__dict__:
            raise ValueError(f"{cls.__name__} does not record its constructor's arguments, so it cannot be written")
        return {
            "type": "class",
            "version": VERSION,
            "module_src": self._source_of(cls),
            "class_name": cls.__name__,
            "state": _state_of(module, self._transient),
        }


def _state_of(module: torch.nn.Module, transient: Collection[str]) -> dict[str, Any]:
    """The module's `__dict__` with empty hooks (their containers must exist), in evaluation mode."""
    state: dict[str, Any] = {}
    fresh = torch.nn.Module().eval().__dict__
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            state[name] = dict(value)
        elif name in fresh and name != "_non_persistent_buffers_set":
            state[name] = fresh[name]
        elif name not in transient and name != "_compiled_call_impl":
            try:
                state[name] = plain(value)
            except ValueError as error:
                raise ValueError(f"{type(module).__name__}.{name}: {error}") from error
    return state


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """On the CPU, contiguous, floating point as float32, and with a storage that holds nothing else."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    compact = tensor.detach().to(device="cpu", dtype=dtype).contiguous()
    if compact.untyped_storage().nbytes() != compact.numel() * compact.element_size():
        compact = compact.clone(memory_format=torch.contiguous_format)
    return compact


@functools.cache
def _module_source(name: str) -> str:
    return inspect.getsource(sys.modules[name])


def _checked(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("a module is badly described")
    if meta.get("version") != VERSION:
        raise ValueError(f"it has version {meta.get('version')!r} of the layout, and only {VERSION} is known")
    kinds = {"class_name": str, "module_src": str, "state": dict}
    if any(not isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        raise ValueError("a module is badly described")
    return meta


def _read_persistent_obj(meta: Any) -> PersistentObject:
    checked = _checked(meta)
    return PersistentObject(checked["class_name"], checked["module_src"], checked["state"])


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> torch.nn.Module:
    """What plain `pickle.load` calls: a registered class with the stored attributes. The stored source is not used.

    Plain `pickle.load` executes whatever else a file asks for: use it on files of your own only.
    """
    try:
        checked = _checked(meta)
    except ValueError as error:
        raise pickle.UnpicklingError(str(error)) from error
    cls = _registry.get(checked["class_name"])
    if cls is None:
        raise pickle.UnpicklingError(f"the class {checked['class_name']!r} is not known; import gan.models first")
    module = cls.__new__(cls)
    module.__setstate__(checked["state"])
    return module


_READ_GLOBALS: Mapping[tuple[str, str], Any] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): safe_pickle.Call(_read_persistent_obj),
    ("dnnlib.util", "EasyDict"): safe_pickle.PlainDict,
    ("dnnlib", "EasyDict"): safe_pickle.PlainDict,
}
