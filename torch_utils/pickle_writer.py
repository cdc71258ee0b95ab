"""Pickles of networks and plain values, written instruction by instruction."""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable, Collection
from typing import Any, BinaryIO

import torch

from torch_utils.torch_legacy import storage_header

_PROTOCOL = 4  # of pickle: what the oldest supported readers know


def halved(tensor: torch.Tensor) -> torch.Tensor:
    """A floating-point tensor as files of half the size store it: as float16 if it has two dimensions or more and all
    of its numbers fit, otherwise as float32.
    """
    if tensor.ndim > 1:
        half = tensor.half()
        if half.isfinite().all():
            return half
    return tensor.float()


class Writer:
    """Writes pickle's instructions itself, and tensors straight from their memory into the file.

    Python's pickler wants each tensor as a bytes object, and keeps all of them until it is done.

    Args:
        describe: what is written of a module, in place of itself.
        half: write floating-point tensors as `halved` ones.
    """

    def __init__(
        self, file: BinaryIO, describe: Callable[[torch.nn.Module], dict[str, Any]], half: bool = False
    ) -> None:
        self._file, self._describe, self._half = file, describe, half
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
            raise ValueError(f"an object of the type {type(value).__name__} cannot be written")

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
        header = storage_header(tensor.dtype, tensor.numel())
        size = len(header) + tensor.numel() * tensor.element_size()
        long = size >= 2**32
        self._pending += (pickle.BINBYTES8 if long else pickle.BINBYTES) + struct.pack("<Q" if long else "<I", size)
        self._pending += header
        self._file.write(self._pending)
        self._pending.clear()
        self._file.write(tensor.reshape(-1).numpy().data)

    def _compact(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the CPU, contiguous, floating point as float32, or float16 where that is asked for."""
        tensor = tensor.detach()
        if tensor.is_floating_point():
            tensor = halved(tensor) if self._half else tensor.float()
        return tensor.cpu().contiguous()

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
