"""What an examination finds. One that fails or hangs is a fact too: nothing here raises or waits for long."""

from __future__ import annotations

import dataclasses
import os
import re
import textwrap
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gan.errors import one_line, printable
from gan.packages import lacking

_WIDTH = 69  # and 11 before it: the 80 columns of a terminal
AGAIN = "python -m gan doctor"
_REPORT = "report this, with all lines of this page: it is a fault of this program"


@dataclasses.dataclass(frozen=True)
class Fact:
    """One thing that was found."""

    topic: str
    text: str
    remedy: str | None = None
    """what to type, or to do; None: nothing is missing"""
    fatal: bool = False
    """training cannot run at all"""
    good: bool = True
    """as it should be; what has a remedy is not, whatever stands here"""


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that was found."""

    facts: Sequence[Fact]

    @property
    def can_train(self) -> bool:
        """Whether training can run at all."""
        return not any(fact.fatal for fact in self.facts)

    @property
    def next_step(self) -> str:
        """What to do now."""
        if not self.can_train:
            return f'training cannot run yet: do what stands behind "->", then {AGAIN} again'
        if any(fact.remedy for fact in self.facts):
            return f'training runs; "->" makes it better, then {AGAIN} again. To go on: python -m gan demo'
        if not all(map(_is_good, self.facts)):
            return "training runs, but not everything is as it should be: see above. To go on: python -m gan demo"
        return "all is well: python -m gan demo, or python train.py --data DATASET"

    def lines(self) -> list[str]:
        """Aligned, for a screen; a remedy stands behind `->`, on one line, so that it can be copied."""
        lines: list[str] = []
        topic = ""
        for fact in self.facts:
            label = f"{fact.topic}:" if fact.topic != topic else ""
            topic = fact.topic
            lines += _aligned(label, fact.text)
            if fact.remedy:
                lines.append(f"{'':<11}-> {printable(fact.remedy)}")
        return lines + _aligned("Next:", self.next_step)

    def to_dict(self) -> dict[str, Any]:
        """For machines."""
        facts = [dataclasses.asdict(fact) | {"good": _is_good(fact)} for fact in self.facts]
        return {"facts": facts, "can_train": self.can_train, "next": self.next_step}


def _is_good(fact: Fact) -> bool:
    return fact.good and fact.remedy is None


def examined(
    topic: str, seconds: float, examine: Callable[[], Iterable[Fact]], silent: str = "no answer"
) -> list[Fact]:
    """The facts that `examine` yields; what keeps it from ending within `seconds` comes last.

    A driver or a network share may hang for ever, so it has a thread of its own, which is then left behind; `silent`
    says so.
    """
    found: list[Fact] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            for fact in examine():
                found.append(fact)
        except Exception as error:  # whatever it is: the other facts are worth printing
            errors.append(error)

    thread = threading.Thread(target=run, name=f"doctor-{topic}", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        return [*found, Fact(topic, f"{silent} in {seconds:g} s; the rest was left out", good=False)]
    return [*found, *(_failed(topic, error) for error in errors)]


def _failed(topic: str, error: Exception) -> Fact:
    packages = lacking(error) if isinstance(error, ModuleNotFoundError) else []
    if packages:  # which has its remedy where packages are looked at
        return Fact(topic, f"not examined, for want of {', '.join(packages)}", good=False)
    return Fact(topic, f"could not be examined ({_where(error)})", _REPORT)


def _aligned(label: str, text: str) -> list[str]:
    # textwrap leaves no-break spaces alone: commands stay whole.
    whole = re.sub(r"python (-m gan \w+|train\.py --data DATASET)", lambda found: found[0].replace(" ", "\xa0"), text)
    lines = textwrap.wrap(whole, _WIDTH, break_long_words=False, break_on_hyphens=False)
    shown = [printable(line.replace("\xa0", " ")) for line in lines]
    return [f"{label if i == 0 else '':<11}{line}" for i, line in enumerate(shown)]


def unset(variable: str) -> str:
    """The command that removes a variable from the environment."""
    return f"set {variable}=, or $env:{variable}='' in PowerShell" if os.name == "nt" else f"unset {variable}"


def _where(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {one_line(error)}, {Path(frame.filename).name} line {frame.lineno}"
