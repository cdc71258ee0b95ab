"""The snapshot pickle layout: modules as class name, source text and state. Written plainly, read without executing.

Each module, and each of its submodules, is a call of the global `torch_utils.persistence._reconstruct_persistent_obj`
with one dict {type, version, module_src, class_name, state}. Programs that execute `module_src` can open such a file
without having the classes; this one never does. Everything else in the file is a plain value or a tensor.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import os
import pickle
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

from torch_utils import safe_pickle
from torch_utils.pickle_writer import Writer
from torch_utils.stand_ins import StandIn, plain_dict

VERSION = 6  # of the layout
_MAX_NAME = 100  # characters of a class's name
_MAX_DEPTH, _MAX_VALUES = 32, 100_000  # of plain values, against cycles and lists of lists of one list

_registry: dict[str, type[torch.nn.Module]] = {}
# Registers its classes when it is imported. A plain `pickle.load` imports this module alone, which knows no networks.
_REGISTERS = "gan.models"


@dataclass(frozen=True, eq=False)
class PersistentObject(StandIn):
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
    half: bool = False,
) -> None:
    """Pickle a dict in which modules occur.

    Modules are written as they would be used: in evaluation mode, without gradients or hooks, floating-point tensors
    as contiguous float32. The live modules are not altered; their parameters may be views of larger tensors. Memory is
    needed for one tensor at a time, and none for those that are on the CPU and as they are written.

    Args:
        value: of modules, tensors and plain values (see `plain`).
        source_of: class -> source text of its module; the default asks `inspect`. The modules that a text imports
            must exist wherever the file is to be opened.
        transient: names of module attributes to leave out.
        half: store floating-point tensors as `halved` ones. Whoever reads them makes them float32.

    Raises:
        ValueError: for anything else in `value`, and for modules that did not record their constructor's arguments.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "wb") as opened:
            dump(value, opened, source_of=source_of, transient=transient, half=half)
        return
    Writer(file, lambda module: _describe(module, source_of or source_text, transient), half).dump(plain(value))


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


def plain_entries(values: Mapping[Any, Any]) -> dict[str, Any]:
    """What is plain of a dict, under its names: all together is not more than `plain` takes, and the rest left out."""
    budget, found = [_MAX_VALUES], {}
    for name, value in values.items():
        with contextlib.suppress(ValueError):
            if isinstance(name, str):
                found[name] = _plain(value, 0, budget)
    return found


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
        return {_plain_key(k, depth + 1, budget): _plain(v, depth + 1, budget) for k, v in value.items()}
    for several in (list, tuple):
        if isinstance(value, several):
            return several(_plain(item, depth + 1, budget) for item in value)
    for unordered in (set, frozenset):
        if isinstance(value, unordered):
            return unordered(_plain_key(item, depth + 1, budget) for item in value)
    raise ValueError(f"an object of the type {_type_name(value)} is not a plain value")


def _plain_key(value: Any, depth: int, budget: list[int]) -> Any:
    """Anyone can make tuples that have all the same hash, so they are no keys."""
    key = _plain(value, depth, budget)
    if key is not None and not isinstance(key, (bool, int, float, str, bytes)):
        raise ValueError(f"a key of the type {_type_name(key)} is not a plain value")
    return key


def _type_name(value: Any) -> str:
    if isinstance(value, type):
        return getattr(value, "global_name", "type")
    return getattr(value, "global_name", f"{type(value).__module__}.{type(value).__qualname__}")


def _describe(module: torch.nn.Module, source_of: Callable[[type], str], transient: Collection[str]) -> dict[str, Any]:
    cls = type(module)
    if "_init_kwargs" not in module.__dict__:
        raise ValueError(f"{cls.__name__} does not record its constructor's arguments, so it cannot be written")
    return {
        "type": "class",
        "version": VERSION,
        "module_src": source_of(cls),
        "class_name": cls.__name__,
        "state": _state_of(module, transient),
    }


def _state_of(module: torch.nn.Module, transient: Collection[str]) -> dict[str, Any]:
    """The module's `__dict__` in evaluation mode, without what PyTorch has in every module that was just made."""
    state: dict[str, Any] = {"training": False}
    fresh = torch.nn.Module().__dict__
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            state[name] = dict(value)
        elif name not in fresh and name not in transient:
            try:
                state[name] = plain(value)
            except ValueError as error:
                raise ValueError(f"{type(module).__name__}.{name}: {error}") from error
    return state


@functools.cache
def _module_source(name: str) -> str:
    return inspect.getsource(sys.modules[name])


def _checked(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict) or meta.get("type") != "class":
        raise ValueError("a module is badly described")
    version = meta.get("version")
    if type(version) is not int:  # anything else may be nested in itself, and endless to show
        raise ValueError("a module is badly described")
    if version != VERSION:
        raise ValueError(f"it has version {version} of the layout, and only {VERSION} is known")
    kinds = {"class_name": str, "module_src": str, "state": dict}
    if any(not isinstance(meta.get(key), kind) for key, kind in kinds.items()):
        raise ValueError("a module is badly described")
    if len(meta["class_name"]) > _MAX_NAME or not meta["class_name"].isidentifier():
        raise ValueError("a module is of a class that has no name")
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
    if checked["class_name"] not in _registry:
        with contextlib.suppress(ImportError):
            importlib.import_module(_REGISTERS)
    cls = _registry.get(checked["class_name"])
    if cls is None:
        raise pickle.UnpicklingError(f"the class {checked['class_name']!r} is not known")
    module = cls.__new__(cls)
    torch.nn.Module.__init__(module)  # what PyTorch wants of every module is not in the file
    state = dict(checked["state"])
    for kind in ("_parameters", "_buffers"):
        state[kind] = {name: _as_float32(tensor) for name, tensor in state.get(kind, {}).items()}
    module.__setstate__(state)
    return module


def _as_float32(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """float16 in a file is a way of storing."""
    if tensor is None or tensor.dtype != torch.float16:
        return tensor
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(tensor.detach().float(), requires_grad=tensor.requires_grad)
    return tensor.float()


_READ_GLOBALS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _read_persistent_obj,
    ("dnnlib.util", "EasyDict"): plain_dict,
    ("dnnlib", "EasyDict"): plain_dict,
}
