"""Words of errors about files: what they hold may be of any length and nesting, and no terminal's business."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence

_NAMED = 12  # misfits that an error spells out

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = 60
_repr.maxlevel, _repr.maxlist, _repr.maxtuple, _repr.maxdict = 2, 8, 8, 8


def brief(value: object) -> str:
    """`repr` of what a file holds, in bounded time and length, however deeply it is nested."""
    try:
        return cut(_repr.repr(value), 120)
    except ValueError:  # whole numbers of thousands of digits are not written out
        return f"a {type(value).__name__}"


def cut(text: str, length: int) -> str:
    """One printable line of text out of a file, of at most `length` characters and an ellipsis."""
    line = "".join(char if char.isprintable() else " " for char in text[: length + 1])
    return line if len(line) <= length else line[:length] + "..."


def listed(problems: Sequence[str]) -> str:
    """The first of them, and how many more there are."""
    rest = len(problems) - _NAMED
    return "; ".join(problems[:_NAMED]) + (f"; and {rest} more" if rest > 0 else "")
