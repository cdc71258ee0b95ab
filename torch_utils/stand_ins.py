"""What the names and calls in a pickle become instead of what they name, and what may be a key. It needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

_MAX_KEY = 2**64  # of a number as a key: few below it have the same hash
_STEPS_PER_NUMBER_KEY = 100  # anyone can find numbers for which a dict must look in the same places again and again
_MAX_NUMBER_KEYS = 1000  # in what one call is given; such a call may be repeated


class StandIn:
    """What a name or a call in a pickle may become. A pickle can do to it what it overrides here, and nothing else."""

    def set_state(self, state: Any) -> None:
        """What an object restores itself from."""
        raise ValueError(f"the state of {_kind(self)} cannot be set")

    def extend(self, values: list[Any]) -> None:
        """Items of a list or set."""
        raise ValueError(f"nothing can be appended to {_kind(self)}")

    def set_items(self, items: list[tuple[Any, Any]]) -> None:
        """Keys and values of a dict; a key may be anything, and nothing says that hashing it ends."""
        raise ValueError(f"{_kind(self)} has no items")


class Global(StandIn):
    """A name in a pickle: what it is, and what calling it makes. Without a stand-in, calling it makes an Opaque."""

    def __init__(self, global_name: str, function: Callable[..., Any] | None) -> None:
        self.global_name = global_name
        self._function = function

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Raises ValueError if the stand-in is not made of these arguments."""
        if self._function is None:
            return Opaque(self.global_name, args, kwargs)
        try:
            return self._function(*args, **kwargs)
        except (MemoryError, OSError):
            raise
        except Exception as error:  # arguments of any type; their text may be endless
            if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
                raise
            raise ValueError(f"it is damaged ({self.global_name} is badly described)") from error


class Opaque(StandIn):
    """An object of an unknown class, or the result of an unknown function: what the pickle said of it."""

    def __init__(
        self, global_name: str = "", args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None, state: Any = None
    ) -> None:
        self.global_name = global_name
        self.args = args
        self.kwargs = kwargs or {}
        self.state = state
        self.items: list[Any] = []  # (key, value) pairs of a dict

    def set_state(self, state: Any) -> None:
        self.state = state

    def extend(self, values: list[Any]) -> None:
        self.items += values

    def set_items(self, items: list[tuple[Any, Any]]) -> None:
        self.items += items


def plain_dict(items: Any = ()) -> dict[Any, Any]:
    """What a dict subclass becomes: a dict of its items, a mapping or pairs. Raises ValueError for odd keys."""
    pairs = list(items.items() if type(items) is dict else _several(items))
    if any(type(pair) not in (tuple, list) or len(pair) != 2 for pair in pairs):
        raise TypeError
    _refuse_costly_keys(key for key, _ in pairs)
    return dict(pairs)


def steps_for_key(key: Any) -> int:
    """What it costs to use this as a key of a dict or as an item of a set: nothing for text, whose hash is secret.

    Raises ValueError if that could take for ever: anyone can make tuples that have all the same hash.
    """
    kind = type(key)
    if kind is str or kind is bytes or kind is bool or key is None:
        return 0
    if kind is float or (kind is int and -_MAX_KEY < key < _MAX_KEY):
        return _STEPS_PER_NUMBER_KEY
    raise ValueError("it is damaged (a key is neither text nor a number)")


def _refuse_costly_keys(keys: Iterable[Any]) -> None:
    if sum(steps_for_key(key) for key in keys) > _MAX_NUMBER_KEYS * _STEPS_PER_NUMBER_KEY:
        raise ValueError("it is damaged (too many keys are numbers)")


def _several(items: Any) -> Any:
    """Not text, each of whose characters would become a value."""
    if type(items) not in (list, tuple, set, frozenset):
        raise TypeError
    return items


def _hashable(items: Any) -> Any:
    _refuse_costly_keys(_several(items))
    return items


def _encoded(text: Any = "", encoding: Any = "latin1") -> bytes:
    """How Python 3 writes bytes for Python 2."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes are badly described")
    return text.encode("latin-1")


def _bytes(data: Any = b"", encoding: Any = "latin1") -> bytes:
    return data if type(data) is bytes else _encoded(data, encoding)


def _kind(value: StandIn) -> str:
    return getattr(value, "global_name", None) or f"a {type(value).__name__}"


# Python's own containers, of which there is nothing to fear.
CONTAINERS: Mapping[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): plain_dict,
    ("_codecs", "encode"): _encoded,
    **{
        (module, name): function
        for module in ("builtins", "__builtin__")
        for name, function in (
            ("set", lambda items=(): set(_hashable(items))),
            ("frozenset", lambda items=(): frozenset(_hashable(items))),
            ("bytes", _bytes),
            ("bytearray", _bytes),
        )
    },
}
