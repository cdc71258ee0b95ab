"""A function of many items computed in processes, in order. What happens to a process costs one item at most."""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any, Generic, TypeVar

from gan.data.child_process import SILENCE, Child, Forked, Spawned, failure, killed_by, signals_blocked, too_few

BUDGET = 2**30  # bytes

_FORK = sys.platform == "linux"  # macOS has fork, but its own libraries do not survive it
_AHEAD = 4  # items in flight for each process: what comes after a slow one is done and waits for it
_PIPE_BYTES = 2**20  # a result up to this size leaves its process without waiting for anybody
_MOST = 60 if sys.platform == "win32" else 10_000  # Windows waits for no more than 63 things at a time

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Failed:
    """Why an item has no result, in one line."""

    reason: str


def default_workers() -> int:
    """One for each processor that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_processes(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int | None = None,
    weight: Callable[[Item], int] | None = None,
    budget: int = BUDGET,
    *,
    silence: float = SILENCE,
    report: Callable[[str], None] | None = None,
) -> Generator[tuple[Item, Result | Failed], None, None]:
    """Yield (item, function(item)) in the order of the items; what the function raises becomes Failed.

    A process that is killed, crashes or hangs is replaced, and the item that it was working on becomes Failed; no
    other one does. The processes end when the iterator is exhausted or closed, or when this process ends, however
    that happens. Close it (`contextlib.closing`) where it may be left early.

    Args:
        function: is forked with its items on Linux, otherwise both are pickled once for each process, as its results
            always are. It prints nothing, and changes nothing that others see.
        workers: processes; None: one for each core that may be used. 0: everything is computed here.
        weight: the bytes of memory that an item takes, computed here.
        budget: no more bytes than these are in flight (begun, and not yet yielded). A heavier item goes alone.
        silence: seconds after which a process that does not answer is given up.
        report: takes a line for people, if fewer processes than that can be started. Without any, all goes on here.
    """
    workers = default_workers() if workers is None else workers
    pool = _Pool(function, items, min(workers, _MOST), weight, budget, silence, report)
    try:
        yield from pool.results()
    finally:
        pool.close()


class _Pool(Generic[Item, Result]):
    def __init__(
        self,
        function: Callable[[Item], Result],
        items: Sequence[Item],
        wanted: int,
        weight: Callable[[Item], int] | None,
        budget: int,
        silence: float,
        report: Callable[[str], None] | None,
    ) -> None:
        self._function, self._items, self._weight, self._budget = function, items, weight, budget
        self._silence, self._report = silence, report
        self._wanted = wanted  # processes
        self._processes: list[_Process] = []
        self._next = 0  # the first item that was never asked for
        self._next_weight: int | None = None
        self._again: deque[int] = deque()  # asked for, but their process is gone
        self._in_flight: dict[int, int] = {}  # weights
        self._done: dict[int, Result | Failed] = {}
        self._owner = os.getpid()
        atexit.register(self.close)

    def results(self) -> Iterator[tuple[Item, Result | Failed]]:
        self._ask()
        for index in range(len(self._items)):
            while index not in self._done:
                if self._processes:
                    self._receive()
                else:
                    self._done[index] = _answer(self._function, self._items, index)
            self._in_flight.pop(index, None)
            self._ask()
            yield self._items[index], self._done.pop(index)

    def close(self) -> None:
        """End the processes."""
        atexit.unregister(self.close)
        if os.getpid() != self._owner:  # a process forked off must not end those of its parent
            return
        for process in self._processes:
            process.handle.kill()
        for process in self._processes:
            process.end()
        self._processes.clear()

    def _ask(self) -> None:
        """Have the processes do whatever may be begun."""
        while self._has_room() and (index := self._upcoming()) is not None:
            process = self._least_busy()
            if process is None or not process.ask(index):
                self._again.appendleft(index)
                if process is None:
                    return

    def _has_room(self) -> bool:
        return len(self._processes) < self._wanted or any(process.has_room for process in self._processes)

    def _upcoming(self) -> int | None:
        if self._again:
            return self._again.popleft()
        index = self._next
        if index == len(self._items) or len(self._in_flight) >= _AHEAD * self._wanted:
            return None
        if self._next_weight is None:
            self._next_weight = self._weight(self._items[index]) if self._weight is not None else 0
        if self._in_flight and sum(self._in_flight.values()) + self._next_weight > self._budget:
            return None
        self._in_flight[index] = self._next_weight
        self._next, self._next_weight = index + 1, None
        return index

    def _least_busy(self) -> _Process | None:
        """A process that has room, started if need be; None if there is none, and none can be started."""
        if len(self._processes) < self._wanted and all(process.asked for process in self._processes):
            try:
                return _Process(self._function, self._items, self._processes)
            except OSError as error:
                self._fewer(f"{error.strerror or error}")
        with_room = (process for process in self._processes if process.has_room)
        return min(with_room, key=lambda process: len(process.asked), default=None)

    def _fewer(self, problem: str) -> None:
        """Go on with the processes that there are."""
        before, self._wanted = self._wanted, len(self._processes)
        if self._report is not None:
            without = "the work is now done by this one process, slowly"
            self._report(too_few(self._wanted, before, problem, without))

    def _receive(self) -> None:
        """Wait a second at most for what the processes have, and see to those that are gone."""
        began = time.monotonic()
        ready = wait([process.answers for process in self._processes], 1)
        # Seconds that this process waits, too: both may have been stopped by Ctrl-Z.
        waited = min(time.monotonic() - began, 1)
        for process in list(self._processes):
            if process.answers in ready:
                self._take(process)
            elif process.asked:
                process.silent += waited
                if process.silent >= self._silence:
                    self._lose(process, f"its process did not answer for {self._silence:g} s")
                elif not ready and process.handle.wait(0) is not None and not process.answers.poll():
                    self._lose(process, process.ending())  # somebody else holds the other end of its pipe
        self._ask()

    def _take(self, process: _Process) -> None:
        try:
            answer = process.answers.recv_bytes()
        except (OSError, EOFError):
            self._lose(process, process.ending())
            return
        process.silent = 0
        if not answer:
            process.started = True
            return
        index = process.asked.popleft()
        try:
            self._done[index] = pickle.loads(answer)
        except Exception as error:  # there is no memory for it, or it is of a strange kind
            self._done[index] = Failed(f"its result cannot be taken ({failure(error)})")

    def _lose(self, process: _Process, problem: str) -> None:
        self._processes.remove(process)
        process.end()
        if not process.started:  # no item's fault, and another one would fare no better
            self._fewer(problem)
        elif process.asked:
            self._done[process.asked.popleft()] = Failed(problem)
        self._again = deque(sorted([*self._again, *process.asked]))


class _Process:
    """A process that computes. It ends when this one does, however that ends: its pipe is closed then.

    `asked` are the items that it has not answered, the first of them in work. An empty answer says that it has started.
    It joins its group.
    """

    def __init__(self, function: Callable[[Any], Any], items: Sequence[Any], group: list[_Process]) -> None:
        self.asked: deque[int] = deque()
        self.started, self.gone, self.silent = False, False, 0.0
        requests, self._requests = Pipe(duplex=False)
        self.answers, answers = Pipe(duplex=False)
        _enlarge(answers)

        def life() -> None:
            for process in (self, *group):
                process.close()  # else it would not notice that nobody is at the other end
            _serve(function, items, requests, answers)

        with signals_blocked(), requests, answers:
            self.handle: Child = Forked(life) if _FORK else Spawned(_serve, (function, items, requests, answers))
            group.append(self)  # here, as a Ctrl-C that was waiting comes now

    @property
    def has_room(self) -> bool:
        """For one item in work and one behind it, so that it never waits for its parent."""
        return len(self.asked) < 2 and not self.gone

    def ask(self, index: int) -> bool:
        """False: the process is gone. What it has answered is still to be taken."""
        try:
            self._requests.send(index)  # a few bytes, for which a pipe always has room
        except OSError:
            self.gone = True
            return False
        self.asked.append(index)
        return True

    def ending(self) -> str:
        """How the process ended that has closed its pipe."""
        code = self.handle.wait(1)
        if code is None:
            return "its process has ended"
        if code >= 0:
            return f"its process ended with exit code {code}"
        hint = " (a decoder crashed)" if code == -signal.SIGSEGV else ""
        return f"its process {killed_by(code)}{hint}"

    def end(self) -> None:
        self.handle.end()
        self.close()

    def close(self) -> None:
        self._requests.close()
        self.answers.close()


def _enlarge(connection: Connection) -> None:
    """Have a pipe hold more, where the system knows how."""
    if sys.platform == "linux":
        import fcntl

        with contextlib.suppress(OSError):  # this user has too many of them
            fcntl.fcntl(connection.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)


def _serve(function: Callable[[Any], Any], items: Sequence[Any], requests: Connection, answers: Connection) -> None:
    """The life of a worker process."""
    if not hasattr(signal, "pthread_sigmask"):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):  # the parent has ended
        answers.send_bytes(b"")
        while True:
            answers.send_bytes(_pickled(function, items, requests.recv()))


def _pickled(function: Callable[[Any], Any], items: Sequence[Any], index: int) -> bytes:
    try:
        return pickle.dumps(_answer(function, items, index), pickle.HIGHEST_PROTOCOL)
    except Exception as error:
        return pickle.dumps(Failed(f"its result cannot be sent ({failure(error)})"))


def _answer(function: Callable[[Item], Result], items: Sequence[Item], index: int) -> Result | Failed:
    try:
        return function(items[index])
    except Exception as error:
        return Failed(failure(error))
