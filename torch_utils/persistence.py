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
import struct
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import torch

from torch_utils import pickle_machine, safe_pickle

VERSION = 6  # of the layout
_PROTOCOL = 4  # of pickle: what the oldest supported readers know
_MAX_NAME = 100  # characters of a class's name
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
class PersistentObject(pickle_machine.StandIn):
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
        half: store floating-point tensors as float16, but for single numbers. Whoever reads them makes them float32.

    Raises:
        ValueError: for anything else in `value`, and for modules that did not record their constructor's arguments.
    """
    if isinstance(file, (str, os.PathLike)):
        with open(file, "wb") as opened:
            dump(value, opened, source_of=source_of, transient=transient, half=half)
        return
    _Writer(file, source_of or source_text, transient, half).dump(plain(value))


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


class _Writer:
    """Writes pickle's instructions itself, and tensors straight from their memory into the file.

    Python's pickler wants each tensor as a bytes object, and keeps all of them until it is done.
    """

    def __init__(
        self, file: BinaryIO, source_of: Callable[[type], str], transient: Collection[str], half: bool
    ) -> None:
        self._file, self._source_of, self._transient, self._half = file, source_of, frozenset(transient), half
        self._pending = bytearray()  # instructions, in memory up to the next tensor
        self._memo: dict[str | tuple[str, str], int] = {}  # texts and globals; later ones refer to the first

    def dump(self, value: Any) -> None:
        self._pending += pickle.PROTO + bytes([_PROTOCOL])
        self._save(value)
        self._pending += pickle.STOP
        self._file.write(self._pending)

    def _save(self, value: Any) -> None:
        if value is None or isinstance(value, bool):
            self._pending += {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        elif isinstance(value, int):
            self._save_int(value)
        elif isinstance(value, float):
            self._pending += pickle.BINFLOAT + struct.pack(">d", value)
        elif isinstance(value, str):
            self._save_text(value)
        elif isinstance(value, bytes):
            self._pending += pickle.BINBYTES + struct.pack("<I", len(value)) + value
        elif isinstance(value, dict):
            self._pending += pickle.EMPTY_DICT + pickle.MARK
            for key, item in value.items():
                self._save(key)
                self._save(item)
            self._pending += pickle.SETITEMS
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._save_items(value)
        elif isinstance(value, torch.nn.Module):
            self._save_call("torch_utils.persistence", "_reconstruct_persistent_obj", self._describe(value))
        elif isinstance(value, torch.nn.Parameter):
            self._global("torch._utils", "_rebuild_parameter")
            self._pending += pickle.MARK
            self._save_tensor(value)
            self._save(False)  # no gradient
            self._save_call("collections", "OrderedDict")  # no hooks
            self._pending += pickle.TUPLE + pickle.REDUCE
        elif isinstance(value, torch.Tensor):
            self._save_tensor(value)
        else:
            raise ValueError(f"an object of the type {_type_name(value)} cannot be written")

    def _save_int(self, value: int) -> None:
        if 0 <= value < 256:
            self._pending += pickle.BININT1 + bytes([value])
        elif -(2**31) <= value < 2**31:
            self._pending += pickle.BININT + struct.pack("<i", value)
        else:
            data = pickle.encode_long(value)
            self._pending += pickle.LONG1 + bytes([len(data)]) + data

    def _save_text(self, text: str) -> None:
        if self._recall(text):
            return
        data = text.encode("utf-8", "surrogatepass")
        if len(data) < 256:
            self._pending += pickle.SHORT_BINUNICODE + bytes([len(data)]) + data
        else:
            self._pending += pickle.BINUNICODE + struct.pack("<I", len(data)) + data
        self._remember(text)

    def _save_items(self, items: Collection[Any]) -> None:
        before, behind = {
            list: (pickle.EMPTY_LIST + pickle.MARK, pickle.APPENDS),
            tuple: (pickle.MARK, pickle.TUPLE),
            set: (pickle.EMPTY_SET + pickle.MARK, pickle.ADDITEMS),
            frozenset: (pickle.MARK, pickle.FROZENSET),
        }[type(items)]
        self._pending += before
        for item in items:
            self._save(item)
        self._pending += behind

    def _save_call(self, module: str, name: str, *args: Any) -> None:
        self._global(module, name)
        self._save(args)
        self._pending += pickle.REDUCE

    def _save_tensor(self, tensor: torch.Tensor) -> None:
        """As `torch._utils._rebuild_tensor_v2(storage, offset, size, stride, requires_grad, hooks)`."""
        compact = self._compact(tensor)
        self._global("torch._utils", "_rebuild_tensor_v2")
        self._pending += pickle.MARK
        self._global("torch.storage", "_load_from_bytes")
        self._pending += pickle.MARK
        self._save_storage(compact)
        self._pending += pickle.TUPLE + pickle.REDUCE
        for argument in (0, tuple(compact.shape), compact.stride(), False):
            self._save(argument)
        self._save_call("collections", "OrderedDict")
        self._pending += pickle.TUPLE + pickle.REDUCE

    def _save_storage(self, tensor: torch.Tensor) -> None:
        """The elements of a contiguous tensor as bytes, namely as a file of torch.save's legacy format."""
        header = _storage_header(tensor.dtype, tensor.numel())
        size = len(header) + tensor.numel() * tensor.element_size()
        long = size >= 2**32
        self._pending += (pickle.BINBYTES8 if long else pickle.BINBYTES) + struct.pack("<Q" if long else "<I", size)
        self._pending += header
        self._file.write(self._pending)
        self._pending.clear()
        self._file.write(tensor.reshape(-1).numpy().data)

    def _compact(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the CPU, contiguous, floating point as float32, or float16 if asked for and not a single number."""
        dtype = tensor.dtype
        if tensor.is_floating_point():
            dtype = torch.float16 if self._half and tensor.ndim > 0 else torch.float32
        return tensor.detach().to(device="cpu", dtype=dtype).contiguous()

    def _global(self, module: str, name: str) -> None:
        if not self._recall((module, name)):
            self._save_text(module)
            self._save_text(name)
            self._pending += pickle.STACK_GLOBAL
            self._remember((module, name))

    def _remember(self, key: str | tuple[str, str]) -> None:
        self._pending += pickle.MEMOIZE
        self._memo[key] = len(self._memo)

    def _recall(self, key: str | tuple[str, str]) -> bool:
        """Refer to what was written before, if it was."""
        index = self._memo.get(key)
        if index is not None:
            short = index < 256
            self._pending += pickle.BINGET + bytes([index]) if short else pickle.LONG_BINGET + struct.pack("<I", index)
        return index is not None

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
    """The module's `__dict__` in evaluation mode, without what PyTorch has in every module that was just made."""
    state: dict[str, Any] = {"training": False}
    fresh = torch.nn.Module().__dict__
    for name, value in module.__dict__.items():
        if name in ("_parameters", "_buffers", "_modules"):
            state[name] = dict(value)
        elif name == "_non_persistent_buffers_set" and value:
            state[name] = plain(value)
        elif name not in fresh and name not in transient and name != "_compiled_call_impl":
            try:
                state[name] = plain(value)
            except ValueError as error:
                raise ValueError(f"{type(module).__name__}.{name}: {error}") from error
    return state


@functools.cache
def _storage_header(dtype: torch.dtype, numel: int) -> bytes:
    """What torch.save's legacy format has before the elements of a single storage on the CPU."""
    about = {
        "protocol_version": 1001,
        "little_endian": sys.byteorder == "little",
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    magic, version, system = (pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, about))
    # The persistent id ("storage", torch.FloatStorage, "0", "cpu", numel, None).
    kind = torch.empty([], dtype=dtype).type().replace("torch.", "torch\n").replace("Tensor", "Storage\n").encode()
    text = [pickle.BINUNICODE + struct.pack("<I", len(part)) + part for part in (b"storage", b"0", b"cpu")]
    count = pickle.encode_long(numel)
    identity = [pickle.MARK, text[0], pickle.GLOBAL, kind, *text[1:], pickle.LONG1, bytes([len(count)]), count]
    storage = [pickle.PROTO, bytes([2]), *identity, pickle.NONE, pickle.TUPLE, pickle.BINPERSID, pickle.STOP]
    return b"".join([magic, version, system, *storage, pickle.dumps(["0"], 2), struct.pack("=q", numel)])


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
    cls = _registry.get(checked["class_name"])
    if cls is None:
        raise pickle.UnpicklingError(f"the class {checked['class_name']!r} is not known; import gan.models first")
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
    ("dnnlib.util", "EasyDict"): pickle_machine.plain_dict,
    ("dnnlib", "EasyDict"): pickle_machine.plain_dict,
}
