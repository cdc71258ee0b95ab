"""What training knows of tracking: the interface, and a list of trackers of which none can stop a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

Report = Callable[[str], None]


class Tracker(Protocol):
    """Takes what a run has to show. No method may hold up training for more than milliseconds, `close` apart."""

    def tick(self, nimg: int, record: dict[str, Any]) -> None:
        """Once a tick, at `nimg` images seen.

        `record` is one stats.jsonl line: {"Loss/G/loss": {"num", "mean", "std"}, ..., "timestamp": seconds,
        "health": how training is doing, in words}.
        """

    def image(self, name: str, path: Path, nimg: int) -> None:
        """A picture that lies finished in the run folder, for instance the grid 'fakes'; called on any thread."""

    def measured(self, nimg: int, results: Mapping[str, float], timestamp: float) -> None:
        """The numbers of a metric, for the snapshot at `nimg` images; `timestamp`: seconds, when they were there."""

    def state(self) -> dict[str, Any]:
        """Plain values for the training state, given back when the run is continued."""

    def close(self, status: str) -> None:
        """The run ends 'FINISHED', 'KILLED' or 'FAILED'. Sends what is pending within a bounded time."""


def print_line(text: str) -> None:
    """The report of a tracker that was given no other: standard output."""
    print(text, flush=True)


class Trackers:
    """Forwards to every tracker in order (`close`: in reverse). One that raises is named once and never stops training.

    A failing tracker is still called afterwards: a full disk or a server may come back.
    """

    def __init__(self, trackers: Sequence[Tracker], report: Report = print_line) -> None:
        self._trackers = list(trackers)
        self._report = report
        self._named: set[int] = set()

    def tick(self, nimg: int, record: dict[str, Any]) -> None:
        """Forward one tick."""
        for tracker in self._trackers:
            self._guard(tracker, lambda t: t.tick(nimg, record))

    def image(self, name: str, path: Path, nimg: int) -> None:
        """Forward one picture."""
        for tracker in self._trackers:
            self._guard(tracker, lambda t: t.image(name, path, nimg))

    def measured(self, nimg: int, results: Mapping[str, float], timestamp: float) -> None:
        """Forward the numbers of a metric."""
        for tracker in self._trackers:
            self._guard(tracker, lambda t: t.measured(nimg, results, timestamp))

    def state(self) -> dict[str, Any]:
        """The states of all trackers in one dictionary."""
        merged: dict[str, Any] = {}
        for tracker in self._trackers:
            self._guard(tracker, lambda t: merged.update(t.state()))
        return merged

    def close(self, status: str) -> None:
        """Close every tracker, the last one first: it may still report through those before it."""
        for tracker in reversed(self._trackers):
            self._guard(tracker, lambda t: t.close(status))

    def _guard(self, tracker: Tracker, call: Callable[[Tracker], None]) -> None:
        try:
            call(tracker)
        except Exception as error:
            if id(tracker) not in self._named:
                self._named.add(id(tracker))
                reason = " ".join(str(error).split()) or type(error).__name__
                self._report(f"tracking: {type(tracker).__name__} failed ({reason}); training goes on")
