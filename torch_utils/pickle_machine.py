"""Carry out the instructions of a pickle that anyone may have written, within bounds, running nothing that it asks for.

A pickle is a program for a machine with a stack: it names functions, calls them and sets the state of what they gave.
Python's own machine imports what is named and can be made to take all memory or all time. In this one a name leads to
a stand-in that the caller provides, or to an `Opaque` that only remembers what was asked; nothing else can be called,
and nothing but plain containers and stand-ins can be filled. It needs no torch.
"""

from __future__ import annotations

import codecs
import io
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO

from torch_utils.stand_ins import CONTAINERS, Global, StandIn, steps_for_key

MAX_STEPS = 2_000_000  # instructions, and items of what calls are given; a snapshot at 1024 pixels takes some 50,000
_MAX_PROTOCOL = 5
_MAX_INT_BYTES = 64  # of any number; longer ones take for ever to print or multiply
_STEPS_PER_CONTAINER = 4  # an empty set takes as much memory as four numbers
_MAX_LINE = 1000  # characters of a name or number in protocol 0
_MAX_NAME = 100  # characters of a name that are shown or kept; shorter text may be used any number of times
_DECIMAL = re.compile(r"[+-]?[0-9]{1,100}L?")
_MAX_USES = 3  # of each byte of the file: as text, decoded, and as the content of an array
_FREE_USES = 2**20  # bytes; small files may well say the same again and again
_SURELY_THERE = 4096  # bytes that are asked for without looking at the length of the file


class CutShort(ValueError):
    """The file ends too early, or something in it claims to be longer than what is left."""

    def __init__(self) -> None:
        super().__init__("it is cut short or damaged")


def run(
    file: BinaryIO,
    globals: Mapping[tuple[str, str], Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
    *,
    others: bool = True,
    max_steps: int = MAX_STEPS,
) -> Any:
    """The value that a pickle of any protocol describes; the file is left behind its last instruction.

    Bytes are `bytes` (byte arrays too), text of Python 2 is latin-1, OrderedDict is a dict. Keys are text, bytes and
    numbers below 2**64. Results can be nested in themselves and to any depth, so who walks through them must count.

    Args:
        file: seekable.
        globals: (module, name) -> what to call for it; the result is a plain value or a StandIn. Lists, tuples, dicts
            and sets among its arguments cost a step an item, and all bytes and text together are bounded by the file.
        persistent: id -> what is stored under it, for pickles that refer to what is beside them.
        others: other names become Opaque; otherwise they are refused.

    Raises:
        CutShort: the file ends too early.
        ValueError: not a pickle, damaged, or out of bounds.
        OSError: the file cannot be read.
    """
    machine = _Machine(file, globals, persistent, others, max_steps)
    try:
        return machine.run()
    except (MemoryError, OSError):
        raise
    except Exception as error:  # too few values on the stack, or of other types than an instruction needs
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise
        raise ValueError(f"it is damaged (byte {file.tell():,} of {machine.end:,})") from error


def printable(text: str) -> str:
    """Text from a file, cut, that can be shown on one line."""
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[: _MAX_NAME + 1])
    return shown if len(shown) <= _MAX_NAME else shown[: _MAX_NAME - 3] + "..."


class _Machine:
    def __init__(
        self,
        file: BinaryIO,
        globals: Mapping[tuple[str, str], Callable[..., Any]],
        persistent: Callable[[Any], Any] | None,
        others: bool,
        max_steps: int,
    ) -> None:
        self._file = file
        self._known: dict[tuple[str, str], Callable[..., Any]] = {**CONTAINERS, **globals}
        self._persistent = persistent
        self._others = others
        self._globals: dict[tuple[str, str], Global] = {}
        self._steps = max_steps
        start = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(start)
        self._bytes_left = _MAX_USES * (self.end - start) + _FREE_USES  # that calls and states may be given
        self.stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks under the marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        read, instructions = self._file.read, _INSTRUCTIONS
        while True:
            code = read(1)
            if code == b".":
                return self.stack.pop()
            instruction = instructions.get(code)
            if instruction is None:
                raise CutShort if not code else ValueError(f"it is damaged (there is no instruction {code!r})")
            self._steps -= 1
            if self._steps < 0:
                raise ValueError("it asks for more steps than any network needs")
            instruction(self)

    # What instructions are made of

    def take(self, length: int) -> bytes:
        """The next bytes; nothing is reserved for what the file does not have."""
        if length < 0 or (length > _SURELY_THERE and length > self.end - self._file.tell()):
            raise CutShort
        data = self._file.read(length)
        if len(data) != length:
            raise CutShort
        return data

    def number(self, layout: struct.Struct) -> int:
        found: int = layout.unpack(self.take(layout.size))[0]
        return found

    def line(self, limit: int | None = _MAX_LINE) -> bytes:
        """The rest of the line, without its end."""
        found = self._file.readline(self.end if limit is None else limit)
        if not found.endswith(b"\n"):
            raise CutShort if limit is None or len(found) < limit else ValueError("it is damaged (a line is too long)")
        return found[:-1]

    def word(self) -> str:
        return self.line().decode("utf-8")

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def push_container(self, value: Any) -> None:
        self.spend(_STEPS_PER_CONTAINER)
        self.stack.append(value)

    def spend(self, steps: int) -> None:
        self._steps -= steps
        if self._steps < 0:
            raise ValueError("it asks for more steps than any network needs")

    def mark(self) -> None:
        self.spend(_STEPS_PER_CONTAINER)
        self._below.append(self.stack)
        self.stack = []

    def items(self) -> list[Any]:
        """Everything above the last mark, taken off the stack with it."""
        found, self.stack = self.stack, self._below.pop()
        return found

    def pop_any(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.items()

    def pop_mark(self) -> None:
        self.items()

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        first = len(self.stack) - count
        self.stack[first:] = [tuple(self.stack[first:])]

    def put(self, index: int) -> None:
        if not 0 <= index < 2**32:
            raise IndexError
        self._memo[index] = self.stack[-1]

    def get(self, index: int) -> None:
        self.stack.append(self._memo[index])

    def memoize(self) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    # Numbers and text

    def integer(self, data: bytes) -> None:
        self.stack.append(int.from_bytes(data, "little", signed=True))

    def long(self, length: int) -> None:
        if length > _MAX_INT_BYTES:
            raise ValueError(f"it is damaged (a number of {length:,} bytes)")
        self.integer(self.take(length))

    def decimal(self) -> None:
        text = self.word()
        if not _DECIMAL.fullmatch(text):
            raise ValueError("it is damaged (a number that is none)")
        self.stack.append(text == "01" if text in ("00", "01") else int(text.removesuffix("L")))

    def index(self) -> int:
        text = self.word()
        if not text.isdecimal() or len(text) > 10:
            raise IndexError
        return int(text)

    def float_in_words(self) -> None:
        try:
            self.stack.append(float(self.word()))
        except ValueError as error:
            raise TypeError from error

    def text(self, length: int) -> None:
        self.stack.append(self.take(length).decode("utf-8", "surrogatepass"))

    def old_text(self, length: int) -> None:
        self.stack.append(self.take(length).decode("latin-1"))

    def quoted(self) -> None:
        line = self.line(None)
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise ValueError("it is damaged (text without quotes)")
        data: bytes = codecs.escape_decode(line[1:-1])[0]
        self.stack.append(data.decode("latin-1"))

    # Containers

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) is list:
            target += values
        elif isinstance(target, StandIn):
            target.extend(values)
        else:
            raise TypeError

    def add(self) -> None:
        values, target = self.items(), self.stack[-1]
        if type(target) is set:
            self.spend_on_keys(values)
            target.update(values)
        elif isinstance(target, StandIn):
            target.extend(values)
        else:
            raise TypeError

    def frozenset(self) -> None:
        values = self.items()
        self.spend_on_keys(values)
        self.push_container(frozenset(values))

    def set_items(self, target: Any, flat: list[Any]) -> None:
        """Keys and values alternate in `flat`."""
        if len(flat) % 2:
            raise TypeError
        if type(target) is dict:
            keys = flat[::2]
            self.spend_on_keys(keys)
            target.update(zip(keys, flat[1::2], strict=True))
        elif isinstance(target, StandIn):
            target.set_items(list(zip(flat[::2], flat[1::2], strict=True)))
        else:
            raise TypeError

    def set_one(self) -> None:
        flat = self.stack[-2:]
        del self.stack[-2:]
        self.set_items(self.stack[-1], flat)

    def set_many(self) -> None:
        flat = self.items()
        self.set_items(self.stack[-1], flat)

    def dict_of_items(self) -> None:
        made: dict[Any, Any] = {}
        self.set_items(made, self.items())
        self.push_container(made)

    def spend_on_keys(self, keys: Iterable[Any]) -> None:
        for key in keys:
            if type(key) is not str:
                self.spend(steps_for_key(key))

    # Names, calls and state

    def find(self, module: str, name: str) -> None:
        if len(module) + len(name) > _MAX_LINE:
            raise ValueError("it is damaged (a name is too long)")
        found = self._globals.get((module, name))
        if found is None:
            shown = printable(f"{module}.{name}")
            function = self._known.get((module, name))
            if function is None and not self._others:
                raise ValueError(f"it asks for {shown}, which no data needs")
            found = self._globals[module, name] = Global(shown, function)
        self.stack.append(found)

    def find_on_stack(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if type(name) is not str or type(module) is not str:
            raise TypeError
        self.find(module, name)

    def call(self, function: Any, args: Any, kwargs: Any) -> None:
        if type(function) is not Global or type(args) is not tuple or type(kwargs) is not dict:
            raise TypeError
        self.spend(_STEPS_PER_CONTAINER)
        self._charge(args)
        self._charge(tuple(kwargs.values()))
        if function.global_name in _INSTANCES:  # how objects are made is written as a call too
            function, args = _INSTANCES[function.global_name](*args)
            if type(function) is not Global or function.global_name in _INSTANCES:
                raise TypeError
        if not all(type(name) is str for name in kwargs):
            raise TypeError
        self.stack.append(function.call(args, kwargs))

    def _charge(self, values: tuple[Any, ...]) -> None:
        """Bound what stand-ins can be made to look at or copy: the memo gives the same value any number of times."""
        self.spend(len(values))
        for value in values:
            kind = type(value)
            if kind in (list, tuple, dict, set, frozenset):
                self.spend(len(value))
            elif kind in (bytes, str) and len(value) > _MAX_NAME:
                self._bytes_left -= len(value)
                if self._bytes_left < 0:
                    raise ValueError("it is damaged (it uses the same data again and again)")

    def reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        self.call(function, args, {})

    def new_with_names(self) -> None:
        kwargs, args, function = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.call(function, args, kwargs)

    def old_instance(self) -> None:
        module, name = self.word(), self.word()
        args = tuple(self.items())
        self.find(module, name)
        self.call(self.stack.pop(), args, {})

    def old_object(self) -> None:
        items = self.items()
        self.call(items[0], tuple(items[1:]), {})

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, StandIn):
            if type(state) is tuple:
                self._charge(state)
            target.set_state(state)
        elif type(target) is not dict:  # what dict subclasses hold beside their items is dropped
            raise TypeError

    def load_persistent(self, key: Any) -> None:
        if self._persistent is None:
            raise ValueError("it is damaged (it refers to something outside of it)")
        self._charge(key if type(key) is tuple else (key,))
        self.stack.append(self._persistent(key))

    def protocol(self) -> None:
        if self.take(1)[0] > _MAX_PROTOCOL:
            raise ValueError("it is damaged, or a pickle of a newer protocol than 5")

    def frame(self) -> None:
        if self.number(_U64) > self.end - self._file.tell():
            raise CutShort


def _reconstructor(cls: Any, base: Any, state: Any) -> tuple[Any, tuple[Any, ...]]:
    """`copyreg._reconstructor`: an object of a class, made of one of its base class."""
    return cls, () if state is None else (state,)


def _new_object(cls: Any, *args: Any) -> tuple[Any, tuple[Any, ...]]:
    """`copyreg.__newobj__`: what the instruction NEWOBJ does, for older protocols."""
    return cls, args


_INSTANCES: Mapping[str, Callable[..., tuple[Any, tuple[Any, ...]]]] = {
    f"{module}.{name}": function
    for module in ("copyreg", "copy_reg")
    for name, function in (("_reconstructor", _reconstructor), ("__newobj__", _new_object))
}
_U16, _U32, _U64, _I32, _DOUBLE = (struct.Struct(layout) for layout in ("<H", "<I", "<Q", "<i", ">d"))
_INSTRUCTIONS: Mapping[bytes, Callable[[_Machine], None]] = {
    b"\x80": _Machine.protocol,
    b"\x95": _Machine.frame,
    # the stack
    b"(": _Machine.mark,
    b"0": _Machine.pop_any,
    b"1": _Machine.pop_mark,
    b"2": lambda m: m.push(m.stack[-1]),
    b"p": lambda m: m.put(m.index()),
    b"q": lambda m: m.put(m.take(1)[0]),
    b"r": lambda m: m.put(m.number(_U32)),
    b"\x94": _Machine.memoize,
    b"g": lambda m: m.get(m.index()),
    b"h": lambda m: m.get(m.take(1)[0]),
    b"j": lambda m: m.get(m.number(_U32)),
    # values
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"I": _Machine.decimal,
    b"L": _Machine.decimal,
    b"J": lambda m: m.push(m.number(_I32)),
    b"K": lambda m: m.push(m.take(1)[0]),
    b"M": lambda m: m.push(m.number(_U16)),
    b"\x8a": lambda m: m.long(m.take(1)[0]),
    b"\x8b": lambda m: m.long(m.number(_I32)),
    b"F": _Machine.float_in_words,
    b"G": lambda m: m.push(_DOUBLE.unpack(m.take(8))[0]),
    b"S": _Machine.quoted,
    b"T": lambda m: m.old_text(m.number(_I32)),
    b"U": lambda m: m.old_text(m.take(1)[0]),
    b"V": lambda m: m.push(m.line(None).decode("raw-unicode-escape")),
    b"X": lambda m: m.text(m.number(_U32)),
    b"\x8c": lambda m: m.text(m.take(1)[0]),
    b"\x8d": lambda m: m.text(m.number(_U64)),
    b"B": lambda m: m.push(m.take(m.number(_U32))),
    b"C": lambda m: m.push(m.take(m.take(1)[0])),
    b"\x8e": lambda m: m.push(m.take(m.number(_U64))),
    b"\x96": lambda m: m.push(m.take(m.number(_U64))),
    # containers
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.items())),
    b"\x85": lambda m: m.tuple_of(1),
    b"\x86": lambda m: m.tuple_of(2),
    b"\x87": lambda m: m.tuple_of(3),
    b"]": lambda m: m.push_container([]),
    b"l": lambda m: m.push_container(m.items()),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.items()),
    b"}": lambda m: m.push_container({}),
    b"d": _Machine.dict_of_items,
    b"s": _Machine.set_one,
    b"u": _Machine.set_many,
    b"\x8f": lambda m: m.push_container(set()),
    b"\x90": _Machine.add,
    b"\x91": _Machine.frozenset,
    # names, calls and state
    b"c": lambda m: m.find(m.word(), m.word()),
    b"\x93": _Machine.find_on_stack,
    b"R": _Machine.reduce,
    b"\x81": _Machine.reduce,
    b"\x92": _Machine.new_with_names,
    b"i": _Machine.old_instance,
    b"o": _Machine.old_object,
    b"b": _Machine.build,
    b"P": lambda m: m.load_persistent(m.word()),
    b"Q": lambda m: m.load_persistent(m.stack.pop()),
}
