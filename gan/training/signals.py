"""Stopping and saving a run from outside."""

from __future__ import annotations

import math
import signal
import time
from types import FrameType, TracebackType
from typing import Any

_STOP = ("SIGINT", "SIGTERM", "SIGHUP")  # Ctrl-C, a batch system's warning, a closed terminal
_SAVE = ("SIGUSR1",)
_SAME_SECONDS = 2.0  # batch systems and terminals may tell a process and its group


class Signals:
    """While open, Ctrl-C or SIGTERM asks the loop to save and stop after its step; a second one stops at once.

    SIGUSR1 asks it to save and go on.
    """

    def __init__(self) -> None:
        self.stop_requested = False
        self._save_requested_at: float | None = None
        self._previous: dict[int, Any] = {}
        self._stop_requested_at = 0.0

    def __enter__(self) -> Signals:
        for names, handler in ((_STOP, self._stop), (_SAVE, self._save)):
            for number in (getattr(signal, name) for name in names if hasattr(signal, name)):
                # nohup means it. That a shell has a job in the background ignore SIGINT keeps a Ctrl-C from
                # it, but whoever sends it one by `kill -INT` means that.
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) is signal.SIG_IGN:
                    continue
                try:
                    self._previous[number] = signal.signal(number, handler)
                except ValueError:  # not in the main thread: whoever runs us there stops us there
                    return self
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def take_save_request(self, saved_at: float = -math.inf) -> bool:
        """Whether saving was asked for since the last call.

        `saved_at`: when the last request was followed (`time.monotonic`); what was asked before or just after was that.
        """
        requested_at, self._save_requested_at = self._save_requested_at, None
        return requested_at is not None and requested_at > saved_at + _SAME_SECONDS

    def _stop(self, number: int, frame: FrameType | None) -> None:
        again = number == signal.SIGINT or time.monotonic() > self._stop_requested_at + _SAME_SECONDS
        if self.stop_requested and again and number != getattr(signal, "SIGHUP", None):
            raise KeyboardInterrupt
        if not self.stop_requested:
            self._stop_requested_at = time.monotonic()
        self.stop_requested = True

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._save_requested_at = time.monotonic()
