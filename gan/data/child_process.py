"""A process that works for this one: how it is started, how it is ended for certain, and in words how it ended."""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from gan.errors import GanError

SILENCE = 300  # seconds after which a process that does not answer is given up

_PATIENCE = 5  # seconds for a process that was killed: it may wait for a disk that is gone


class Child(ABC):
    """A process that was started when this was made; any thread may end it."""

    @abstractmethod
    def kill(self) -> None:
        """Have it end at once, if it has not ended."""

    @abstractmethod
    def wait(self, seconds: float) -> int | None:
        """The exit code, negative for a signal; None if it does not end in this time, or its end was seen elsewhere."""

    def end(self) -> int | None:
        """Kill it if need be, and wait for its end. The exit code; None: it cannot be killed."""
        self.kill()
        return self.wait(_PATIENCE)


class Forked(Child):
    """Does `life` in a copy of this process, and nothing else.

    It ends with this process only if its life notices, as by a pipe that is closed then. So it first has to close the
    ends of pipes that belong to its parent, its siblings' as well as its own.
    """

    def __init__(self, life: Callable[[], None]) -> None:
        self._lock = threading.Lock()  # once its end was seen its number may be another one's
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                gc.freeze()  # what is garbage there is not freed here: it may be on a GPU
                life()
            finally:
                os._exit(0)  # whatever it is: nothing of the parent runs here

    def kill(self) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._code is None:
                os.kill(self.pid, signal.SIGKILL)  # changes nothing for one that is ending

    def wait(self, seconds: float) -> int | None:
        deadline = time.monotonic() + seconds
        try:
            while self._ending() is None and time.monotonic() < deadline:
                time.sleep(0.001)
        except ChildProcessError:
            return None
        return self._code

    def _ending(self) -> int | None:
        with self._lock:
            if self._code is None:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                self._code = os.waitstatus_to_exitcode(status) if pid else None
            return self._code


class Spawned(Child):
    """Calls a function in a fresh interpreter, which everything is sent to."""

    def __init__(self, target: Callable[..., None], args: tuple[Any, ...]) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=target, args=args, daemon=True)
        self._process.start()

    def kill(self) -> None:
        self._process.kill()

    def wait(self, seconds: float) -> int | None:
        self._process.join(seconds)
        return self._process.exitcode


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """What is started now never sees Ctrl-C and the like, which go to all processes; only the parent decides."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    asking = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, asking)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def killed_by(code: int) -> str:
    """For people, what a negative exit code means: `was killed by SIGKILL (often: out of memory)`."""
    name = {int(known): known.name for known in signal.Signals}.get(-code, f"signal {-code}")
    return f"was killed by {name}{' (often: out of memory)' if name == 'SIGKILL' else ''}"


def too_few(started: int, wanted: int, problem: object, without: str) -> str:
    """For people, that processes could not be started; `without` is what happens if there is none at all."""
    rest = "" if started else f"; {without}"
    return f"only {started} of {wanted} worker processes could be started ({problem}){rest}"


def failure(error: Exception) -> str:
    """What a child's work raised, in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, GanError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
