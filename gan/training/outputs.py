"""The files of a run, made beside the training and written in the order in which they fell due.

A picture sheet is computed a batch at a time between the steps; encoding and writing is the work of one thread. What is
asked for first is on disk first: a training state is never there before the sheets and the snapshot that precede it,
but for those that could not be written, so a run that is killed at any moment goes on from a state and makes everything
after it anew.

With several processes all compute their portions of a sheet after the same step, and rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
import time
from collections import deque
from collections.abc import Callable

import torch

from gan.errors import GanError
from torch_utils.distributed import DistributedError


@dataclasses.dataclass(eq=False)
class Output:
    """A file in the making."""

    name: str
    """as people know it"""
    kind: str
    """of which one at a time is kept in memory, where `make_room` is asked for it"""
    write: Callable[[], None] | None
    """makes the file; called on the thread, when all portions are done; None: another process does"""
    portions: deque[Callable[[], None]] = dataclasses.field(default_factory=deque)
    """what training's own thread computes for it, one after a step"""


class Outputs:
    """Takes outputs with `add`; `advance` after every step, `finish` before the end, `close` in any case.

    A file that cannot be written (GanError: the disk is full, a share is gone) is left out, and training goes on; the
    names are in `missing` until they are written after all. Any other error on the thread is raised by the next call,
    and nothing due after it is written.

    Args:
        device: where the outputs' tensors are.
        report: takes a line for people.
        failed: takes an output that could not be written, and why; called on the thread. What it raises is an error.
        any_waits: told whether this process waits for a file of its own; whether any process does. While one waits all
            are asked again, every half second at least.
    """

    def __init__(
        self,
        device: torch.device,
        report: Callable[[str], None],
        failed: Callable[[Output, GanError], None],
        any_waits: Callable[[bool], bool] = bool,
    ) -> None:
        self._cuda, self._report, self._failed = device.type == "cuda", report, failed
        self._any_waits = any_waits
        self.missing: dict[str, GanError] = {}
        self._due: deque[Output] = deque()  # not handed to the thread yet
        self._changed = threading.Condition()  # guards the fields below
        self._handed: deque[tuple[Output, torch.cuda.Event | None]] = deque()
        self._writing = False
        self._unwritten: list[Output] = []
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None

    def add(self, output: Output) -> None:
        """Ask for a file. Nothing happens before the next `advance`."""
        self._check()
        with self._changed:
            self._unwritten.append(output)
        self._due.append(output)

    def advance(self) -> None:
        """One portion of what is first in line, and to the thread with what is ready."""
        self._check()
        self._hand_over_what_is_ready()  # before the portion: it may be due on one process only, the portion is on all
        if self._due:
            try:
                self._due[0].portions[0]()
            except DistributedError:  # started again, the processes make it and all that is due after it
                raise
            except Exception:  # an incomplete sheet is not for people, but what is due after it is worth having
                with self._changed:
                    self._unwritten.remove(self._due.popleft())
                raise
            self._due[0].portions.popleft()
            self._hand_over_what_is_ready()

    def has(self, kind: str) -> bool:
        """Whether an output of this kind is not written yet."""
        with self._changed:
            return any(output.kind == kind for output in self._unwritten)

    def make_room(self, kind: str) -> None:
        """Wait until no output of this kind is left, so that memory holds one of them only; every process calls it."""
        self._progress_until(lambda: not self.has(kind))

    def finish(self) -> None:
        """Complete and write everything; every process calls it."""
        self._progress_until(lambda: not self._unwritten)

    def finish_alone(self) -> None:
        """Write what needs no other process any more; what does, and all that is due after it, is left out."""
        self._hand_over_what_is_ready()
        with self._changed:
            for output in self._due:
                self._unwritten.remove(output)
            self._due.clear()
            while self._unwritten and self._error is None:
                self._changed.wait(timeout=0.5)

    def close(self) -> None:
        """End the thread. What is being written is completed, what is still in line is dropped."""
        with self._changed:
            self._error = self._error or RuntimeError("closed")
        self._due.clear()
        if self._thread is not None:
            self._thread.join()

    def _progress_until(self, done: Callable[[], bool]) -> None:
        """Do nothing else until it is so on every process; a line says so when it takes more than a second.

        All processes advance as often, also those that wait for nothing: each portion is computed by all of them.
        """
        begin, said = time.monotonic(), False
        while self._any_waits(not done()):
            self.advance()
            if not self._due:
                with self._changed:  # not for ever: Ctrl-C is to get through
                    self._changed.wait_for(lambda: self._error is not None or done(), timeout=0.5)
            if not said and time.monotonic() > begin + 1:
                said = True
                with self._changed:
                    names = ", ".join(output.name for output in self._unwritten)
                self._report(f"Finishing {names or 'files'}")
        self._check()

    def _check(self) -> None:
        if self._error is not None:
            raise self._error

    def _hand_over_what_is_ready(self) -> None:
        while self._due and not self._due[0].portions:
            self._hand_over(self._due.popleft())

    def _hand_over(self, output: Output) -> None:
        if output.write is None:
            with self._changed:
                self._unwritten.remove(output)
            return
        ready = torch.cuda.current_stream().record_event() if self._cuda else None
        with self._changed:
            self._handed.append((output, ready))
            if self._writing:
                return
            self._writing = True
        thread = threading.Thread(target=self._write_all, name="outputs", daemon=True)
        try:
            thread.start()
            self._thread = thread
        except RuntimeError:  # the system has no room for another thread
            self._write_all()

    def _write_all(self) -> None:
        """Write what was handed over, and end: a thread that has computed anything keeps OpenMP threads of its own.

        As long as there are more of them than processors, those of the training sleep where they would have waited for
        each other, and steps take half as long again.
        """
        stream: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
        if self._cuda:  # copies to the host pass by the training that goes on
            stream = torch.cuda.stream(torch.cuda.Stream())
        with stream:
            while True:
                with self._changed:
                    if not self._handed:
                        self._writing = False
                        return
                    output, ready = self._handed.popleft()
                self._write(output, ready)
                del output  # or it stays in memory while there is another one

    def _write(self, output: Output, ready: torch.cuda.Event | None) -> None:
        try:
            if self._error is None:
                if ready is not None:
                    ready.synchronize()
                self._write_or_leave_out(output)
        except Exception as error:
            with self._changed:
                self._error = self._error or error
        with self._changed:
            self._unwritten.remove(output)
            self._changed.notify_all()

    def _write_or_leave_out(self, output: Output) -> None:
        assert output.write is not None
        try:
            output.write()
        except GanError as error:
            self.missing[output.name] = error
            self._failed(output, error)
        else:
            self.missing.pop(output.name, None)
