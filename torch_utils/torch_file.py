"""Read what torch.save wrote, by anyone, without torch.load: a zip of a pickle and the content of its storages.

The zip is read here, not by zipfile, to know beforehand how much is in it: entries are stored as they are, none lies
over another, and each storage is read once. The older layout is in `torch_legacy`.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from torch_utils import pickle_machine, torch_legacy
from torch_utils.pickle_machine import CutShort, printable
from torch_utils.safe_pickle import SAFE_GLOBALS
from torch_utils.stored_tensor import (
    StoredStorage,
    described_storage,
    filled_buffer,
    flat_tensor,
)

_MAX_ENTRIES = 100_000  # of a zip; networks with their optimisers have some thousands
_PICKLE = "data.pkl"

_ENTRY_START = b"PK\x03\x04"
_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END_64_PLACE = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_MAX_COMMENT = 2**16
_UNKNOWN_32, _UNKNOWN_16 = 2**32 - 1, 2**16 - 1  # the number is in a wider field elsewhere
_ENCRYPTED = 1


def load(file: BinaryIO) -> Any:
    """Read a file that torch.save wrote, of either layout; execute nothing. The file must be seekable.

    All storages are in memory then, once; the tensors are views of them.

    Returns:
        Plain values, StoredTensor, StoredStorage, StoredArray, and Opaque for everything else, argparse.Namespace for
        one (its `state` is a dict). They can be nested in themselves and to any depth.

    Raises:
        ValueError: another kind of file, cut short, or damaged; the text continues a sentence about the file.
    """
    start = file.read(torch_legacy.START_LENGTH)
    file.seek(-len(start), io.SEEK_CUR)
    try:
        if torch_legacy.looks_like_one(start):
            return torch_legacy.load_legacy(file, SAFE_GLOBALS)
        if start.startswith(_ENTRY_START):
            return _load_zip(file)
    except CutShort as error:
        raise ValueError(f"{error}; copy or download it again") from error
    raise ValueError("it is not a file that torch.save wrote")


def names_in_zip(file: BinaryIO) -> list[str]:
    """The names of all files in a zip, in the order in which they lie there. Raises ValueError if it is damaged."""
    return list(_entries(file))


@dataclass(frozen=True)
class _Entry:
    start: int  # of its header
    end: int  # where the next one begins
    size: int
    stored: bool  # as it is, neither compressed nor encrypted


def _load_zip(file: BinaryIO) -> Any:
    entries = _entries(file)
    folder = _folder(entries)
    if f"{folder}byteorder" in entries and _content(file, entries, f"{folder}byteorder") != b"little":
        raise ValueError("it was written on a big-endian machine; save it again on another one")
    storages: dict[str, tuple[torch.dtype, StoredStorage]] = {}

    def persistent(described: Any) -> StoredStorage:
        key, dtype, size = described_storage(described)
        name = f"{folder}data/{key}"
        if name not in entries or entries[name].size != size:
            raise ValueError(f"it is damaged (no entry {printable(name)} of {size:,} bytes)")
        if key not in storages:
            _seek(file, entries, name)
            flat = flat_tensor(filled_buffer(file, size), dtype)
            storages[key] = dtype, StoredStorage(lambda: flat)
        known, storage = storages[key]
        if known != dtype:
            raise ValueError(f"it is damaged (its entry {printable(name)} is described in two ways)")
        return storage

    return pickle_machine.run(io.BytesIO(_content(file, entries, folder + _PICKLE)), SAFE_GLOBALS, persistent)


def _folder(entries: Mapping[str, _Entry]) -> str:
    """The one folder that everything is in, with its slash; its name is free."""
    folders = [name.removesuffix(_PICKLE) for name in entries if name.endswith(f"/{_PICKLE}") and name.count("/") == 1]
    if len(folders) != 1:
        raise ValueError("it is a zip file, but none that torch.save wrote")
    folder = folders[0]
    if any(name == f"{folder}constants.pkl" or name.startswith(f"{folder}code/") for name in entries):
        raise ValueError("it is a TorchScript program, not weights; save the state_dict of the module instead")
    return folder


def _seek(file: BinaryIO, entries: Mapping[str, _Entry], name: str) -> None:
    """Go to the content of an entry. Raises ValueError if it does not lie where it should."""
    entry = entries[name]
    if not entry.stored:
        raise ValueError(f"its entry {printable(name)} is compressed or encrypted, which torch.save does not do")
    file.seek(entry.start)
    header = file.read(_LOCAL.size)
    if len(header) < _LOCAL.size:
        raise CutShort
    magic, *_, name_length, extra_length = _LOCAL.unpack(header)
    start = entry.start + _LOCAL.size + name_length + extra_length
    if magic != _ENTRY_START or start + entry.size > entry.end:
        raise ValueError(f"it is damaged (its entry {printable(name)} lies over another)")
    file.seek(start)


def _content(file: BinaryIO, entries: Mapping[str, _Entry], name: str) -> bytes:
    _seek(file, entries, name)
    return file.read(entries[name].size)


def _entries(file: BinaryIO) -> dict[str, _Entry]:
    """What the zip's directory lists, by name. Raises ValueError if it is damaged or entries share bytes."""
    directory, place, count = _directory(file)
    found: list[tuple[int, int, str, bool]] = []
    at = 0
    for _ in range(count):
        fields = directory[at : at + _CENTRAL.size]
        if len(fields) < _CENTRAL.size:
            raise CutShort
        magic, _, _, flags, method, _, _, _, packed, size, *lengths, _, _, _, start = _CENTRAL.unpack(fields)
        at += _CENTRAL.size
        name_end, extra_end = at + lengths[0], at + lengths[0] + lengths[1]
        if magic != b"PK\x01\x02" or extra_end > len(directory):
            raise ValueError("it is damaged (the directory of the zip)")
        name = directory[at:name_end].decode("utf-8", "replace")
        size, packed, start = _wide(directory[name_end:extra_end], [size, packed, start])
        found.append((start, size, name, method == 0 and not flags & _ENCRYPTED and packed == size))
        at = extra_end + lengths[2]
    found.sort()
    entries: dict[str, _Entry] = {}
    for (start, size, name, stored), end in zip(found, [*(start for start, *_ in found[1:]), place], strict=True):
        if name in entries:
            raise ValueError(f"it is damaged (two entries have the name {printable(name)})")
        if stored and start + _LOCAL.size + size > end:
            raise ValueError(f"it is damaged (its entry {printable(name)} lies over another)")
        entries[name] = _Entry(start, end, size, stored)
    return entries


def _directory(file: BinaryIO) -> tuple[bytes, int, int]:
    """The zip's directory, where it begins, and how many entries it has."""
    end = file.seek(0, io.SEEK_END)
    file.seek(max(0, end - _END.size - _MAX_COMMENT))
    tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) - at < _END.size:
        raise CutShort
    *_, count, size, place, _ = _END.unpack_from(tail, at)
    if at >= _END_64_PLACE.size and tail[at - _END_64_PLACE.size :].startswith(b"PK\x06\x07"):
        _, _, place_64, _ = _END_64_PLACE.unpack_from(tail, at - _END_64_PLACE.size)
        file.seek(min(place_64, end))
        record = file.read(_END_64.size)
        if not record.startswith(b"PK\x06\x06") or len(record) < _END_64.size:
            raise ValueError("it is damaged (the directory of the zip)")
        *_, count, size, place = _END_64.unpack(record)
    if count > _MAX_ENTRIES:
        raise ValueError(f"it is a zip of {count:,} files, which no network has")
    if place + size > end:
        raise CutShort
    file.seek(place)
    return file.read(size), place, count


def _wide(extra: bytes, numbers: list[int]) -> list[int]:
    """Size, packed size and place of an entry; those that do not fit 32 bits are in a field of their own."""
    unknown = [index for index, number in enumerate(numbers) if number == _UNKNOWN_32]
    at = 0
    while unknown and at + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, at)
        if kind == 1 and length >= 8 * len(unknown) and at + 4 + length <= len(extra):
            for index, number in zip(unknown, struct.unpack_from(f"<{len(unknown)}Q", extra, at + 4), strict=True):
                numbers[index] = number
            break
        at += 4 + length
    return numbers
