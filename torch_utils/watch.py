"""A watch over what is under way on a GPU and needs other processes."""

from __future__ import annotations

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Protocol


class Event(Protocol):
    """As of CUDA."""

    def query(self) -> bool:
        """Whether the device has come to it."""


@dataclasses.dataclass
class Pending:
    """Something that all ranks do together on their GPUs; `event` is behind it, once it is in the queue."""

    what: str
    sequence: int
    begun: float
    event: Event | None = None


class Watch:
    """A thread that tells of what has not come to its end in time.

    The host runs ahead of a GPU and then waits for it without heed to anything; NCCL's own watchdog ends the process
    without a word, whichever rank it was that hung.

    Args:
        on_hang: called in the thread, with what hangs and for how many seconds; it does not return.
        prepare: called in the thread before anything else: to make it one of the right device, as asking an event would
            otherwise open a context on the first GPU, half a GB of it for each process.
    """

    def __init__(
        self,
        timeout_s: float,
        on_hang: Callable[[Pending, float], None],
        prepare: Callable[[], None] | None = None,
        every_s: float = 1.0,
    ) -> None:
        self._timeout_s = timeout_s
        self._on_hang = on_hang
        self._prepare = prepare
        self._every_s = every_s
        self._pending: collections.deque[Pending] = collections.deque()  # in the order of the device
        self._closed = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    def begin(self, what: str, sequence: int) -> Pending:
        """To be called before something is put into the queue, which may wait itself; the result's `event` after."""
        pending = Pending(what, sequence, time.monotonic())
        self._pending.append(pending)
        return pending

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()

    def _run(self) -> None:
        if self._prepare is not None:
            self._prepare()
        while not self._closed.wait(self._every_s):
            try:
                while self._pending and (event := self._pending[0].event) is not None and event.query():
                    self._pending.popleft()
            except RuntimeError:  # the device is broken, which whoever uses it learns soon enough
                return
            if self._pending:
                seconds = time.monotonic() - self._pending[0].begun
                if seconds > self._timeout_s:
                    self._on_hang(self._pending[0], seconds)
                    return
