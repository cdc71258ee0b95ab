"""train.py for tests with several processes: light runs, and something that happens to one rank after a step.

In the environment, DISTURBED="RANK STEP SIGNAL WHOM FILE": after its STEP-th step that rank sends SIGNAL to itself
("self") or to what has started it ("launcher"), once; from then on its process id is in FILE.
"""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import pytest
from runs import after_step, make_light

from gan.cli.train import train


def disturb() -> contextlib.AbstractContextManager[None]:
    """What is to happen in this process, if anything."""
    rank, step, name, whom, file = os.environ.get("DISTURBED", "- 0 - - -").split(" ", 4)
    if rank != os.environ.get("RANK") or Path(file).exists():
        return contextlib.nullcontext()

    def happen() -> None:
        Path(file).write_text(str(os.getpid()))
        os.kill(os.getpid() if whom == "self" else os.getppid(), getattr(signal, name))

    return after_step(int(step), happen)


if __name__ == "__main__":
    with pytest.MonkeyPatch.context() as patch, disturb():
        make_light(patch)
        train()
