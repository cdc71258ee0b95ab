"""Processes that decode ahead. They are a help that a run can lose: what they leave undone is done without them."""

from __future__ import annotations

import contextlib
import mmap
import os
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, Pipe

import numpy as np

from gan.data.child_process import SILENCE, Forked, failure, killed_by, signals_blocked, too_few

Request = tuple[np.ndarray, np.ndarray]
"""int64 indices of a batch's images `[batch]`, and rows of those that are to be decoded `[rows]`"""
Decoded = tuple[np.ndarray, np.ndarray, np.ndarray]
"""a request and its images, uint8 `[rows, C, H, W]`, which are overwritten after the next one was asked for"""

_BY_ITSELF = "images are now decoded by the training process itself"
AHEAD = 2  # batches that a process has to decode, or has decoded


class Workers:
    """What requests ask for, decoded in processes, if any, and delivered in order; `close` it in the end.

    Pixels come in memory that all share: nothing is copied, and the size of /dev/shm does not matter. A process that
    dies, fails or hangs is ended and reported, and what it was asked for is decoded here. So an image that cannot be
    decoded raises the same error as without processes.

    DataLoader is not used, because once it was, the death of a process raises an error in the main thread wherever
    that is, such as in the middle of a step.

    Args:
        count: processes, forked here: no other thread should run yet. 0: everything is decoded here.
        decode: gives the image of a row, uint8 `[C, H, W]`.
        requests: endless.
        shape: of the images of a batch, `[batch, C, H, W]`.
        report: takes a line for people, in the thread that asks for batches.
    """

    def __init__(
        self,
        count: int,
        decode: Callable[[int], np.ndarray],
        requests: Iterator[Request],
        shape: tuple[int, ...],
        report: Callable[[str], None],
    ) -> None:
        self._decode, self._requests, self._shape, self._report = decode, requests, shape, report
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _end, self._workers, os.getpid())  # also when the interpreter exits
        self._asked: deque[tuple[_Worker, int, Request]] = deque()
        self._closed = False
        if count:
            self._start(count)
        self._free = deque((w, i * count + j) for i in range(AHEAD) for j, w in enumerate(self._workers))

    def __iter__(self) -> Workers:
        return self

    def __next__(self) -> Decoded:
        while self._free:
            worker, slot = self._free.popleft()
            if worker in self._workers:
                request = next(self._requests)
                worker.ask(slot, request[1])
                self._asked.append((worker, slot, request))
        if not self._asked:
            return self._decode_here(next(self._requests))
        worker, slot, request = self._asked.popleft()
        problem = worker.answer()
        if problem is None:
            self._free.append((worker, slot))
            return (*request, self._slots[slot, : len(request[1])])
        if self._closed:
            raise StopIteration
        return self._replace(worker, problem, request)

    def close(self) -> None:
        """End the processes, from any thread; a call of next that waits for one, or decodes, comes back."""
        self._closed = True
        self._finalizer()

    @property
    def pids(self) -> list[int]:
        """The processes there are."""
        return [worker.pid for worker in self._workers]

    def _start(self, count: int) -> None:
        try:
            if not hasattr(os, "fork"):
                raise OSError("this system has no fork")
            pixels = mmap.mmap(-1, count * AHEAD * int(np.prod(self._shape)))
            self._slots = np.frombuffer(pixels, dtype=np.uint8).reshape(count * AHEAD, *self._shape)
            for _ in range(count):
                _Worker(self._decode, self._slots, self._workers)
        except OSError as error:
            self._report(too_few(len(self._workers), count, error, _BY_ITSELF))

    def _replace(self, worker: _Worker, problem: str, request: Request) -> Decoded:
        worker.end()
        decoded = self._decode_here(request)  # raises what is wrong with an image, which then is all there is to say
        if worker in self._workers:
            self._workers.remove(worker)
            left = len(self._workers)
            rest = f"the other {left} now do{'es' * (left == 1)} all the decoding" if left else _BY_ITSELF
            self._report(f"worker process {worker.pid} {problem}; {rest}")
        return decoded

    def _decode_here(self, request: Request) -> Decoded:
        images = np.empty((len(request[1]), *self._shape[1:]), dtype=np.uint8)
        for image, row in zip(images, request[1].tolist(), strict=True):
            if self._closed:
                raise StopIteration
            image[:] = self._decode(row)
        return (*request, images)


class _Worker:
    """A process forked off this one. It ends when this one does, however that ends: its pipe is closed then.

    It joins its group.
    """

    def __init__(self, decode: Callable[[int], np.ndarray], slots: np.ndarray, group: list[_Worker]) -> None:
        self._connection, theirs = Pipe()

        def life() -> None:
            for worker in (self, *group):
                worker._connection.close()  # else it would not notice that nobody is at the other end
            _serve(decode, slots, theirs)

        with signals_blocked(), theirs:
            self._process = Forked(life)
            self.pid = self._process.pid
            group.append(self)  # here, as a Ctrl-C that was waiting comes now

    def ask(self, slot: int, rows: np.ndarray) -> None:
        """Have rows decoded into a slot."""
        with contextlib.suppress(OSError):  # it is gone, which the answer will tell
            self._connection.send((slot, rows))

    def answer(self) -> str | None:
        """Wait until the first thing that was asked for is done. What went wrong, or None."""
        try:
            for _ in range(SILENCE):  # seconds that this process runs, too: both may have been stopped by Ctrl-Z
                if self._connection.poll(1):
                    return self._connection.recv()
        except (OSError, EOFError):
            return self._ending()
        return f"did not answer for {SILENCE} s"

    def end(self) -> int | None:
        """Kill the process if there is still one, and wait for its end. Its exit code; None: it cannot be killed."""
        return self._process.end()

    def _ending(self) -> str:
        code = self.end()
        return killed_by(code) if code is not None and code < 0 else "has ended"


def _serve(decode: Callable[[int], np.ndarray], slots: np.ndarray, connection: Connection) -> None:
    """The life of a worker process."""
    while True:
        try:
            slot, rows = connection.recv()
        except (EOFError, OSError):
            return
        problem = None
        try:
            for image, row in zip(slots[slot, : len(rows)], rows.tolist(), strict=True):
                image[:] = decode(row)
        except Exception as error:
            problem = f"failed ({failure(error)})"
        try:
            connection.send(problem)
        except OSError:
            return


def _end(workers: list[_Worker], owner: int) -> None:
    """A process forked off must not end those of its parent."""
    if os.getpid() == owner:
        for worker in list(workers):
            worker.end()
