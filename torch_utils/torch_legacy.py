"""torch's older way of writing, read without torch.load: pickles one after the other, then the content of storages.

Single storages are still written like that, into the pickles of tensors.
"""

from __future__ import annotations

import functools
import io
import pickle
import struct
import sys
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import torch

from torch_utils import pickle_machine
from torch_utils.stored_tensor import StoredStorage, described_storage, filled_buffer, flat_tensor

START_LENGTH = 32  # bytes that tell, whatever the protocol of the pickle
_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
_MAX_STORAGE_STEPS = 2000  # of the pickle around a single storage, which has about 100


def looks_like_one(start: bytes) -> bool:
    """Whether a file that begins like this, in 32 bytes or more, is of this layout: with a pickle of its number."""
    return start.startswith(b"\x80") and _MAGIC.to_bytes(10, "little") in start[:START_LENGTH]


def load_legacy(
    file: BinaryIO,
    globals: Mapping[tuple[str, str], Callable[..., Any]],
    max_steps: int = pickle_machine.MAX_STEPS,
) -> Any:
    """What torch.save wrote before it wrote zips: pickles one after the other, then the content of the storages.

    Raises ValueError if it is damaged or of another kind of machine.
    """
    buffers: dict[str, torch.Tensor] = {}
    declared: dict[str, tuple[torch.dtype, int]] = {}
    storages: dict[str, StoredStorage] = {}

    def persistent(described: Any) -> Any:
        if type(described) is tuple and len(described) == 4 and described[0] == "module":
            _, cls, *_source_text = described  # which torch.save wrote beside the class of a whole module
            return cls
        key, dtype, size = described_storage(described)
        if declared.setdefault(key, (dtype, size)) != (dtype, size):
            raise ValueError("it is damaged (a storage is described in two ways)")
        if key not in storages:
            storages[key] = StoredStorage(lambda: flat_tensor(buffers[key], dtype))
        return storages[key]

    def part(persistent: Callable[[Any], Any] | None = None) -> Any:
        return pickle_machine.run(file, globals, persistent, max_steps=max_steps)

    magic, protocol, system = part(), part(), part()
    if type(magic) is not int or magic != _MAGIC or type(protocol) is not int or protocol != _PROTOCOL:
        raise ValueError("it is not a file that torch.save wrote")
    if type(system) is not dict or system.get("little_endian") is not True:
        raise ValueError("it was written on a big-endian machine; save it again on another one")
    value, keys = part(persistent), part()
    sound = type(keys) is list and all(type(key) is str for key in keys) and len(keys) == len(declared)
    if not sound or set(keys) != declared.keys():
        raise ValueError("it is damaged (its storages are not those that it describes)")
    start = file.tell()
    left = file.seek(0, io.SEEK_END) - start
    file.seek(start)
    for key in keys:
        dtype, size = declared[key]
        left -= 8 + size
        if left < 0:
            raise pickle_machine.CutShort
        if int.from_bytes(file.read(8), "little") * dtype.itemsize != size:
            raise ValueError("it is damaged (a storage has another size than described)")
        buffers[key] = filled_buffer(file, size)
    return value


def storage_from_bytes(data: Any) -> StoredStorage:
    """A storage that was pickled by itself, as the bytes that torch.save makes of it."""
    if type(data) is not bytes:
        raise ValueError("a storage is not made of bytes")

    def read() -> torch.Tensor:
        try:
            storage = load_legacy(io.BytesIO(data), {}, _MAX_STORAGE_STEPS)
            if isinstance(storage, StoredStorage):
                return storage.flat()
        except ValueError as error:
            raise ValueError(f"the data of a tensor cannot be read: {error}") from error
        raise ValueError("the data of a tensor is not that of a storage")

    return StoredStorage(read, id(data))


@functools.cache
def storage_header(dtype: torch.dtype, numel: int) -> bytes:
    """What torch.save's legacy format has before the elements of a single storage on the CPU."""
    about = {
        "protocol_version": _PROTOCOL,
        "little_endian": sys.byteorder == "little",
        "type_sizes": {"short": 2, "int": 4, "long": 4},
    }
    magic, version, system = (pickle.dumps(part, 2) for part in (_MAGIC, _PROTOCOL, about))
    # The persistent id ("storage", torch.FloatStorage, "0", "cpu", numel, None).
    kind = torch.empty([], dtype=dtype).type().replace("torch.", "torch\n").replace("Tensor", "Storage\n").encode()
    text = [pickle.BINUNICODE + struct.pack("<I", len(part)) + part for part in (b"storage", b"0", b"cpu")]
    count = pickle.encode_long(numel)
    identity = [pickle.MARK, text[0], pickle.GLOBAL, kind, *text[1:], pickle.LONG1, bytes([len(count)]), count]
    storage = [pickle.PROTO, bytes([2]), *identity, pickle.NONE, pickle.TUPLE, pickle.BINPERSID, pickle.STOP]
    return b"".join([magic, version, system, *storage, pickle.dumps(["0"], 2), struct.pack("=q", numel)])
