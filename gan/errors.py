"""Errors that are written for the person at the keyboard."""

from __future__ import annotations

from collections.abc import Sequence


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


class UsageError(GanError):
    """One or more bad settings, all of them at once: each problem names its flag, its value and the remedy."""

    exit_code = 2

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))
