"""Errors that are written for the person at the keyboard."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch_utils.distributed import LOST_EXIT_CODE


class GanError(Exception):
    """Something the user can mend. The text is one line: what is wrong, in which file or flag, what to do.

    The command line prints the text without a traceback and exits with `exit_code`.
    """

    exit_code = 1


class DiskFullError(GanError):
    """A file could not be written for want of room; what was there before it is as it was."""


class FailedRunError(GanError):
    """Training itself has failed: starting it again as it is changes nothing."""

    exit_code = 3


class LostProcessError(GanError):
    """The processes that train together have lost each other: worth starting again."""

    exit_code = LOST_EXIT_CODE


class UsageError(GanError):
    """One or more bad settings, all of them at once: each problem names its flag, its value and the remedy."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def printable(text: str) -> str:
    """Text that any terminal can show on one line, whatever bytes a file name is made of."""
    shown = text.encode("utf-8", "replace").decode("utf-8")
    return "".join(letter if letter.isprintable() else "?" for letter in shown)


def without_password(text: str) -> str:
    """Text as it may be shown: without what stands before the @ of the addresses in it."""
    return re.sub(r"://[^/?#\s]*@", "://", text)


def one_line(error: BaseException) -> str:
    """What another library's error says, short enough for a line; its kind if it says nothing."""
    return printable(" ".join(str(error).split()))[:120] or type(error).__name__
