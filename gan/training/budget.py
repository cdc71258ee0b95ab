"""A share of the time of a run, for what is done beside it."""

from __future__ import annotations

import time


class Budget:
    """So many percent of the time since it was made."""

    def __init__(self, percent: float) -> None:
        self._share = percent / 100
        self._spent, self._begun = 0.0, time.monotonic()

    def spend(self, seconds: float) -> None:
        """That much of it is used."""
        self._spent += seconds

    def allows(self, seconds: float = 0.0) -> bool:
        """Whether more may be begun after so many more seconds."""
        return self._spent + seconds <= self._share * (time.monotonic() - self._begun)
