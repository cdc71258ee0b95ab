"""What processes that train together leave for one another, and what it tells when one of them fails."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from torch_utils import distributed
from torch_utils.distributed import DistributedError, Place
from torch_utils.meeting import in_words, named, within

T = TypeVar("T")

_STORE_SECONDS = 5.0  # for asking the store what became of the others: it may be gone itself


class Notes:
    """Notes of all ranks in the store where they have met: what each does, and why it has left.

    Args:
        hosts: names of machines, by rank.
        timeout_s: that after which a rank that does not come is given up.
    """

    def __init__(self, store: dist.Store, place: Place, hosts: list[str], timeout_s: float) -> None:
        self._store = store
        self._place = place
        self._hosts = hosts
        self._timeout_s = timeout_s

    def write(self, sequence: int, together: bool, what: str) -> None:
        """Note what this rank does; `sequence`: how many things it has come to that all do together."""
        try:
            self._store.set(f"note/{self._place.rank}", json.dumps([sequence, together, what, os.getpid()]))
        except RuntimeError as error:
            raise DistributedError(f"{self._store_gone()} ({what})") from error

    def leave(self, text: str) -> None:
        """Note why this rank ends, for those that will miss it."""
        self._ask(lambda: self._store.set(f"left/{self._place.rank}", text), None)

    def first(self, key: str) -> bool:
        """Whether no other rank has asked this before."""
        # A store that is gone is no reason for nobody to speak.
        return self._ask(lambda: self._store.add(f"first/{key}", 1) == 1, True)

    def failed(self, what: str, error: RuntimeError) -> str:
        """The text for what has failed in this rank itself."""
        if isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error):
            text = f"{what} failed on rank {self._place.rank}: out of memory; try a smaller --batch-gpu"
        else:
            text = f"{what} failed on rank {self._place.rank}: {in_words(error)}"
        self.leave(text)
        return text

    def missed(self, what: str, sequence: int, seconds: float, words: str = "") -> str:
        """The text for what has not come to its end because of others, as far as their notes tell.

        Args:
            what: all ranks do together, and its number.
            seconds: after which it has failed.
            words: of the library.
        """
        return self._ask(
            lambda: self._what_happened(what, sequence, seconds, f" ({words})" if words else ""),
            f"{self._store_gone()} ({what})",
        )

    def _store_gone(self) -> str:
        return (
            f"{self._place.address}:{self._place.port}, where the processes meet, does not answer: what started them, "
            "or rank 0, has ended or hangs, or its machine cannot be reached"
        )

    def _what_happened(self, what: str, sequence: int, seconds: float, words: str) -> str:
        others = [rank for rank in range(self._place.size) if rank != self._place.rank]
        # Whoever has found out before us is gone now, but not the cause.
        left = [rank for rank in others if self._store.check([f"left/{rank}"])]
        late: list[int] = []
        if left:
            text = self._store.get(f"left/{left[0]}").decode()
        else:
            notes = {rank: self._read(rank) for rank in others}
            behind = [rank for rank in others if notes[rank][0] < sequence]
            if seconds < 0.9 * self._timeout_s:
                text = self._lost(behind or others, bool(behind) or len(others) == 1, what, words)
            elif behind:
                late = behind
                text = self._late(behind, notes[behind[0]], what)
            else:
                text = (
                    f"{what} did not end within {self._timeout_s:g} s (--dist-timeout), though all ranks came to it: "
                    f"the network between them stands still, or a rank was stopped within it{words}"
                )
        self._store.set(f"left/{self._place.rank}", text)
        for rank in late:
            self._give_up(rank, notes[rank][3])
        return text

    def _read(self, rank: int) -> tuple[int, bool, str, int]:
        if not self._store.check([f"note/{rank}"]):
            return 0, False, "starting", 0
        sequence, together, what, pid = json.loads(self._store.get(f"note/{rank}"))
        return sequence, together, what, pid

    def _late(self, ranks: list[int], note: tuple[int, bool, str, int], what: str) -> str:
        _, together, last, _ = note
        it, stopped = ("it", "it is stopped, hangs, or is") if len(ranks) == 1 else ("the first of them", "they are")
        doing = f"the last that {it} came to was {last}" if together else f"{it} was last {last}"
        return (
            f"{self._named(ranks)} did not come to {what} within {self._timeout_s:g} s (--dist-timeout); {doing}: "
            f"{stopped} {'very slow' if len(ranks) == 1 else 'stopped, hang, or are very slow'}"
        )

    def _lost(self, ranks: list[int], certain: bool, what: str, words: str) -> str:
        who = self._named(ranks) if certain else f"one of {self._named(ranks)}"
        return f"{who} was lost at {what}: the process has ended, or its machine cannot be reached{words}"

    def _give_up(self, rank: int, pid: int) -> None:
        """Say so to what has started us all, and end the process if it is stopped: it would not heed anything else."""
        if self._hosts[rank] != self._hosts[self._place.rank]:
            return
        if job := distributed.job():
            job.give_up(rank)
        try:
            import psutil
        except ImportError:  # what started us will end it, after a while
            return
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if pid and process.ppid() == os.getppid() and process.status() == psutil.STATUS_STOPPED:
                process.kill()

    def _named(self, ranks: list[int]) -> str:
        """Ranks and, if there are several, their machines."""
        if len(set(self._hosts)) == 1:
            return named(ranks)
        return f"{named(ranks)} ({', '.join(dict.fromkeys(self._hosts[rank] for rank in ranks))})"

    def _ask(self, question: Callable[[], T], otherwise: T) -> T:
        """What the store answers; `otherwise`: it does not."""
        try:
            return within(_STORE_SECONDS, question)  # a store whose process is stopped never answers
        except (RuntimeError, TimeoutError):
            return otherwise
