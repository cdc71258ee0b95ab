"""How many images a step takes at a time, and fewer from where memory runs out."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, TypeVar

import torch

from gan.config import TrainConfig, usable_batch_gpu
from gan.errors import GanError
from torch_utils.memory import is_out_of_memory, release_memory

if TYPE_CHECKING:
    from gan.training.graphs import PhaseGraphs

T = TypeVar("T")

# oneDNN, when there is no memory for code that it compiles. It goes on saying so when there is memory again.
_BROKEN = "could not create a primitive"


def copied(copy: Callable[[], T], give_way: Callable[[], None], remedy: str) -> T:
    """A copy on the device beside the training, made once more after `give_way` where memory runs out.

    Raises GanError, naming the `remedy`, if that does not help.
    """
    try:
        return copy()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    give_way()  # here, where the error refers to nothing any more
    try:
        return copy()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise GanError(f"out of memory beside the training, for a copy to write: {remedy}") from error


class MicroBatch:
    """The number of images at a time, `size`. It only ever gets smaller, and only where memory runs out.

    Args:
        config: the run; its `batch_gpu` comes first.
        device: where the step computes.
        report: takes a line for people.
        on_smaller: is told the new size; None: running out of memory is an error like any other.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        report: Callable[[str], None],
        on_smaller: Callable[[int], None] | None = None,
    ) -> None:
        self.size = config.batch_gpu
        self._usable, self._group = usable_batch_gpu(config), config.network.mbstd_group_size
        self._batch, self._device = config.batch_size, device
        self._report, self._on_smaller = report, on_smaller

    def fitting(self, name: str, attempt: Callable[[int], T], graphs: PhaseGraphs | None) -> T:
        """`attempt(size)` of the phase `name`, which begins again with a smaller size where memory runs out.

        It begins with the same random numbers, except where phases are recorded, whose generator is not to be touched.
        """
        random = random_state(self._device) if graphs is None else None
        while True:
            try:
                return attempt(self.size)
            except Exception as error:
                if self._on_smaller is not None and _BROKEN in str(error):
                    raise GanError(
                        f"{name}: oneDNN {error}, most likely because memory ran out while it compiled; it does not "
                        f"recover, so start again with --resume and a --batch-gpu below {self.size}"
                    ) from error
                if not is_out_of_memory(error) or not self._may_shrink(graphs):
                    raise
            # Here the error is gone, and with it the last that referred to the tensors of the attempt.
            if graphs is not None:
                graphs.forget()
            release_memory(self._device)
            self._shrink(name)
            if random is not None:
                restore_random_state(self._device, random)

    @contextlib.contextmanager
    def whatever_its_size(self, what: str) -> Iterator[None]:
        """For what takes the same memory whatever the size is: running out is said to whoever can do something."""
        try:
            yield
        except Exception as error:
            if not is_out_of_memory(error) or self._recording():
                raise
            raise GanError(
                f"out of memory in {what}, which a smaller --batch-gpu does not help; make the networks smaller with "
                f"--cbase and --cmax, or train where there is more memory"
            ) from error

    def _may_shrink(self, graphs: PhaseGraphs | None) -> bool:
        """A recording that breaks off, and recorded phases that hold memory which others need, are for `graphs`."""
        if self._on_smaller is None or self._recording():
            return False
        return graphs is None or not graphs.gives_way()

    def _recording(self) -> bool:
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _shrink(self, name: str) -> None:
        images = at_a_time(self.size)
        smaller = [size for size in self._usable if 2 * size <= self.size]
        if not smaller:
            raise GanError(
                f"out of memory in {name} with {images}, the fewest there can be; make the networks smaller with "
                f"--cbase and --cmax, or train where there is more memory"
            )
        self.size = smaller[-1]
        groups = groups_note(self.size, self._group)
        self._report(
            f"Memory:    out of memory in {name} with {images}; going on with {self.size} (the batch stays "
            f"{self._batch}{groups})"
        )
        assert self._on_smaller is not None
        self._on_smaller(self.size)


def random_state(device: torch.device) -> torch.Tensor | None:
    """Of the generator that a phase draws from; reading it waits for nothing. None: not known here (MPS)."""
    if device.type == "cuda":
        return torch.cuda.get_rng_state(device)
    return torch.get_rng_state() if device.type == "cpu" else None


def restore_random_state(device: torch.device, random: torch.Tensor) -> None:
    """What `random_state` gave."""
    if device.type == "cuda":
        torch.cuda.set_rng_state(random, device)
    else:
        torch.set_rng_state(random)


def at_a_time(batch_gpu: int) -> str:
    """A micro-batch in words."""
    return f"{batch_gpu} image{'s' * (batch_gpu > 1)} at a time"


def groups_note(batch_gpu: int, group: int) -> str:
    """What a micro-batch below the minibatch-stddev group means for it; nothing from there on."""
    return "" if batch_gpu >= group else f", but minibatch-stddev sees groups of {batch_gpu} instead of {group}"
