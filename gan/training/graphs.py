"""Phases recorded as CUDA graphs: one launch instead of thousands.

A recorded phase reads and writes fixed memory, so everything that it shares with the outside lives in tensors that are
changed in place: batches, parameters, gradients, moments, statistics, running means. Numbers that change (p, the
path-length mean) are tensors already, and the random numbers follow the seed of the step, as they do unrecorded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from gan.errors import GanError
from gan.training.micro_batch import is_out_of_memory, release_memory

_WARMUP = 1  # ordinary runs of a phase before it is recorded: libraries choose their algorithms, state comes to be


class PhaseGraphs:
    """Runs phases, and records each after it has run a few times.

    Args:
        device: a CUDA device.
        report: takes one line if recording turns out to be impossible; the phases then go on running unrecorded.
        required: raise instead.
    """

    def __init__(self, device: torch.device, report: Callable[[str], None], required: bool = False) -> None:
        self._report, self._required = report, required
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self._runs: dict[str, int] = {}
        self._inputs: tuple[torch.Tensor, ...] = ()
        self.active = True
        self.gave_way = False
        """recording ended because it took memory that a phase needed"""

    def inputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """The tensors' values, in memory that stays where it is."""
        if not self._inputs:
            self._inputs = tuple(tensor.clone() for tensor in tensors)
        for own, tensor in zip(self._inputs, tensors, strict=True):
            own.copy_(tensor)
        return self._inputs

    def run(self, name: str, phase: Callable[[], None]) -> None:
        """Run `phase`, from its recording if there is one."""
        runs = self._runs[name] = self._runs.get(name, 0) + 1
        if name in self._graphs:
            self._graphs[name].replay()
        elif not self.active:
            phase()
        elif runs <= _WARMUP:
            self._run_aside(name, phase)
        elif self._record(name, phase):
            self._graphs[name].replay()  # recording only wrote down what to do
        else:
            phase()

    def gives_way(self) -> bool:
        """Whether recorded phases hold memory that they give up for a phase that needs it."""
        return bool(self._graphs) and not self._required

    def forget(self) -> None:
        """Drop what is recorded, because the phases have changed: each runs, and is recorded, anew."""
        self._graphs.clear()
        self._runs.clear()
        torch.cuda.synchronize()
        self._pool = torch.cuda.graph_pool_handle()  # one whose last recording is gone takes no other

    def _run_aside(self, name: str, phase: Callable[[], None]) -> None:
        """Run on the stream that recordings are made on, so that what it sets up is set up there."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                phase()
            fits = True
        except RuntimeError as error:
            if not is_out_of_memory(error) or not self.gives_way():
                raise
            fits = False
        if not fits:
            # The phases recorded before hold their memory. A phase begins by zeroing its gradients: it can begin again.
            self.gave_way = True
            self._give_up(f"there is not enough memory for {name} beside those that are recorded")
            phase()
        current.wait_stream(self._stream)

    def _record(self, name: str, phase: Callable[[], None]) -> bool:
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        try:
            # thread_local: the threads of the data path and of the files may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
                phase()
        except RuntimeError as error:
            torch.cuda.set_stream(current)  # a recording that breaks off leaves its own stream behind
            self.gave_way = is_out_of_memory(error)
            if self._required and self.gave_way:
                raise GanError(
                    f"--cuda-graphs on: out of memory while {name} was recorded; leave it out, or give a smaller "
                    f"--batch-gpu"
                ) from error
            if self._required:
                raise
            del graph
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            self._give_up(f"{name} could not be recorded: {reason}")
            return False
        self._graphs[name] = graph
        return True

    def _give_up(self, reason: str) -> None:
        """Run everything unrecorded from now on."""
        self.active = False
        self._graphs.clear()
        torch.cuda.synchronize()
        release_memory(torch.device("cuda"))
        self._report(f"CUDA graphs are off, because {reason}")
