"""What happens before each step: the next batch, and what is asked for. What one process asks for, all of them do."""

from __future__ import annotations

import enum
import math
import time
from collections.abc import Callable

import torch

from gan.data.loader import BatchStream
from gan.errors import GanError
from gan.training.signals import Signals
from torch_utils.world import World

Batch = tuple[torch.Tensor, torch.Tensor]

_SIGNAL_SECONDS = 1.0  # after which a request is noticed while images do not come


class Asked(enum.IntFlag):
    """What a process asks for."""

    WAIT = enum.auto()
    """its images are not there, or its files"""
    STOP = enum.auto()
    SAVE = enum.auto()
    SAVE_QUIETLY = enum.auto()
    """because it is time to"""
    FAILED = enum.auto()
    """training has failed"""
    NO_IMAGES = enum.auto()
    """there are none to be had for it any more"""
    MEASURE = enum.auto()
    """a portion of the metrics of a snapshot, after this step"""
    MEASURED = enum.auto()
    """the metrics of a snapshot are there: on to the next"""


class Turns:
    """Takes all processes of a run to the next step together. One that only waits is not taken for one that hangs.

    Args:
        world: the processes that train together.
        signals: what was asked of this one from outside.
        own: what else this one asks for.
    """

    asked = Asked(0)
    """what any process asked for in the last `look`"""
    error: GanError | None = None
    """why there are no images for this one any more"""
    seconds = 0.0
    """that this one waited for images in the last `look`"""

    def __init__(self, world: World, signals: Signals, own: Callable[[], Asked]) -> None:
        self._world, self._signals, self._own = world, signals, own
        self._batch: Batch | None = None
        self._saves_at = -math.inf

    def look(self, batches: BatchStream) -> Batch | None:
        """The next batch, if it comes within a second and to all processes: none of them asks to wait then."""
        own, begin = self._requests(), time.perf_counter()
        if self._batch is None and self.error is None and not own & (Asked.STOP | Asked.FAILED):
            self._world.doing("waiting for images")
            try:
                self._batch = next(batches) if batches.wait(_SIGNAL_SECONDS) else None
            except GanError as error:
                self.error = error
            own |= self._requests()
        self.seconds = time.perf_counter() - begin
        if self.error is not None:
            own |= Asked.NO_IMAGES
        elif self._batch is None:
            own |= Asked.WAIT
        self.asked = Asked(self._world.agree(own, "the start of a step"))
        if self.asked & Asked.SAVE and self._world.size > 1:
            self._saves_at = time.monotonic()  # whoever started the processes may have told each of them
        if self.asked & Asked.WAIT:
            return None
        batch, self._batch = self._batch, None
        return batch

    def any_waits(self, waits: bool) -> bool:
        """Whether any process waits for its files; all ask at the same time."""
        return bool(self._world.agree(Asked.WAIT if waits else 0, "the files of rank 0"))

    def problem(self) -> GanError:
        """Why there are no images, for all processes; one that has images itself says whose problem it is."""
        known = self._world.gather(None if self.error is None else str(self.error), "what is wrong with the images")
        first = next(f"rank {rank}: {text}" for rank, text in enumerate(known) if text is not None)
        return self.error or GanError(first)

    def _requests(self) -> Asked:
        asked = self._own()
        if self._signals.stop_requested:
            asked |= Asked.STOP
        if self._signals.take_save_request(self._saves_at):
            asked |= Asked.SAVE
        return asked
