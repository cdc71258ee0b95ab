from __future__ import annotations

import signal
import time
from typing import Any

import pytest
import torch

from gan.errors import GanError
from gan.training.signals import Signals
from gan.training.turns import Asked, Batch, Turns
from torch_utils.distributed import Place
from torch_utils.world import World


class Images:
    """A stream whose batches are there or not; GanError: that is raised instead."""

    def __init__(self, *there: bool | GanError) -> None:
        self.there, self.given = list(there), 0

    def wait(self, seconds: float) -> bool:
        return bool(self.there[0]) or bool(self.there.pop(0))

    def __next__(self) -> Batch:
        now = self.there.pop(0)
        if isinstance(now, GanError):
            raise now
        self.given += 1
        return torch.full([1], self.given), torch.zeros(1)


class WithAnother(World):
    """Two processes, of which the other one asks for these things, turn by turn."""

    def __init__(self, *asked: Asked) -> None:
        super().__init__(Place(0, 2))
        self.asked = list(asked)

    def agree(self, bits: int, what: str) -> int:
        return bits | self.asked.pop(0)

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, "x.zip: image 7 is damaged"]


def turns_with(*asked: Asked, signals: Signals | None = None) -> Turns:
    return Turns(WithAnother(*asked), signals or Signals(), lambda: Asked(0))


def look(turns: Turns, images: Images) -> int | None:
    batch = turns.look(images)  # type: ignore[arg-type]
    return None if batch is None else int(batch[0])


def test_a_batch_is_kept_until_every_process_has_one() -> None:
    turns, images = turns_with(Asked.WAIT, Asked.WAIT, Asked(0), Asked(0)), Images(True, True)
    assert [look(turns, images) for _ in range(4)] == [None, None, 1, 2]


def test_while_images_do_not_come_requests_of_all_processes_are_followed() -> None:
    signals = Signals()
    turns = turns_with(Asked(0), Asked.SAVE, Asked(0), signals=signals)
    images = Images(False, False, True)
    assert look(turns, images) is None
    assert turns.asked == Asked.WAIT
    assert look(turns, images) is None
    assert turns.asked == Asked.WAIT | Asked.SAVE
    signals.stop_requested = True
    assert look(turns, images) is None
    assert turns.asked & Asked.STOP
    assert images.given == 0  # not waited for any more


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="Windows has none")
def test_a_state_that_all_processes_are_told_to_save_is_saved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Signals() as signals:
        turns = turns_with(Asked.SAVE, Asked(0), Asked(0), signals=signals)
        look(turns, Images(True))
        assert turns.asked == Asked.SAVE  # the other process was told a moment before this one
        signal.raise_signal(signal.SIGUSR1)
        now += 60  # a long step
        look(turns, Images(True))
        assert turns.asked == Asked(0)
        signal.raise_signal(signal.SIGUSR1)
        look(turns, Images(True))
        assert turns.asked == Asked.SAVE


def test_what_keeps_the_images_of_another_process_is_said_with_its_rank() -> None:
    turns = turns_with(Asked.NO_IMAGES)
    look(turns, Images(True))
    assert turns.asked == Asked.NO_IMAGES
    assert str(turns.problem()) == "rank 1: x.zip: image 7 is damaged"


@pytest.mark.parametrize("other", [Asked(0), Asked.WAIT])
def test_a_process_without_images_does_not_ask_for_them_again(other: Asked) -> None:
    turns, images = turns_with(other, other), Images(GanError("gone"))
    for _ in range(2):
        assert look(turns, images) is None
        assert turns.asked & Asked.NO_IMAGES
    assert str(turns.problem()) == "gone"
