"""Whole training steps, timed as a run takes them: the trainer's own objects and loader, all phases in proportion.

A *period* is the shortest stretch of steps that holds every phase as often as training does: 16, with one R1 and four
path-length regularisations. Where the time allows, whole periods are timed. Where one step takes many seconds, single
whole steps of each kind are, weighted by how often a period has that kind; `Method` says which it was and what could
not be measured in the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from gan import schedule
from gan.bench.ceiling import Ceiling, measure_ceiling, precision_name, synchronize
from gan.bench.flops import Flops, phase_flops, seconds_at
from gan.bench.machine import OtherLoad, describe_machine, memory_now, memory_of, peak_memory
from gan.bench.result import Method, PhaseTime, Result, Share, Timing
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.labels import LabelTable
from gan.training import resources
from gan.training.batches import batches_on
from gan.training.devices import choose_half_dtype, prepare
from gan.training.fit import fitted
from gan.training.state import TrainingState
from gan.training.step import TrainStep

_PLAIN_GUESS = 3  # how many times slower than ours the plain step is taken to be before it has been seen
_FEW_IMAGES = 1000  # so few are read before the measurement


@dataclasses.dataclass(frozen=True)
class Block:
    """Consecutive steps, timed as a whole."""

    steps: int
    seconds: float
    wait: float
    """seconds of it that the host waited for images"""
    phase_ms: dict[str, float]
    """mean milliseconds of a call"""
    calls: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Steps that a sample consists of: `steps` from batch index `first` on, counted `weight` times."""

    first: int
    steps: int
    weight: int


def measure(
    config: TrainConfig,
    dataset: ImageDataset,
    *,
    against_plain: bool = False,
    seconds: float = 120.0,
    firm: bool = False,
    periods: int = 5,
    ceiling_seconds: float = 0.3,
    report: Callable[[str], None] = lambda text: None,
) -> Result:
    """Time training steps of `config`, its augmentation probability held at `config.augment.initial_p`.

    Args:
        against_plain: also time `gan.bench.plain.PlainStep`, in turn with ours.
        seconds: how long it may take in all. One step with every phase is taken whatever it takes.
        firm: rather leave out the plain step than take longer.
        periods: how many are timed, where there is time.
        ceiling_seconds: for each rate of the hardware.
        report: is told what happens, a line at a time.
    """
    deadline = time.monotonic() + seconds
    load = OtherLoad()
    device, half_dtype = prepare(config)
    left_out: list[str] = []
    config, found = fitted(config, device, half_dtype, dataset)
    if found is not None:
        report(f"Memory:    {found}")
    with contextlib.closing(_Feed(device, dataset, config, report)) as feed:
        before = memory_now(device)
        ours = _Contestant("ours", config, device, half_dtype, dataset, feed)
        computing = resources.computing(device, ours.state.G, half_dtype)
        report(f"Computing: {computing}")
        in_use = resources.kernels_in_use()
        report(f"Kernels:   {in_use}")
        computing += f"; {in_use}"
        ours.warm_up(deadline)
        memory = memory_of(ours.state, before)
        contestants, plain_peak = [ours], None
        if against_plain:
            if not firm or (1 + _PLAIN_GUESS) * ours.warm.seconds < deadline - time.monotonic():
                plain_before = memory_now(device)
                plain = _Contestant("plain", config, device, half_dtype, dataset, feed)
                plain.warm_up(deadline)
                contestants.append(plain)
                if device.type == "cuda":
                    plain_peak = peak_memory(device) - plain_before
            else:
                left_out.append("plain: its steps would have taken longer than there was time")
        flops = phase_flops(ours.state.G, ours.state.D, device, config.batch_size, _pl_batch(config))
        halves = {half_dtype, choose_half_dtype("auto", device)}
        rates = measure_ceiling(device, halves, config.tf32, ceiling_seconds)
        timings, what = _take_turns(contestants, deadline, periods, left_out)
    if device.type == "cuda":
        computing += "; phases recorded as CUDA graphs" if ours.step.graphs is not None else "; no CUDA graphs"
    share = _share(config, device, timings[0], flops, rates)
    machine = describe_machine(device, load)
    plain_timing = timings[1] if len(timings) > 1 else None
    method = Method(what, tuple(left_out), tuple(feed.lines))
    return Result(config, machine, computing, method, timings[0], plain_timing, share, memory, plain_peak)


class _Feed:
    """The images, out of the loader of a run."""

    def __init__(
        self, device: torch.device, dataset: ImageDataset, config: TrainConfig, report: Callable[[str], None]
    ) -> None:
        def say(topic: str, line: str) -> None:
            report(f"{topic + ':':<11}{line}")

        self._stream = batches_on(device, dataset, config, start=0, report=say)
        self.lines = self._stream.lines
        for line in self.lines:
            say("Cache", line)
        self.batch = next(self._stream)
        if dataset.num_unflipped <= _FEW_IMAGES and config.cache != "off":
            for _ in range(len(dataset) // config.batch_size + 2):  # once around: then all are in the cache
                self.advance()

    def advance(self) -> float:
        """Get the next batch; the seconds that it took."""
        begin = time.perf_counter()
        self.batch = next(self._stream)
        return time.perf_counter() - begin

    def close(self) -> None:
        """End what reads images."""
        self._stream.close()


class _Contestant:
    """A step with a state of its own."""

    def __init__(
        self,
        name: str,
        config: TrainConfig,
        device: torch.device,
        half_dtype: torch.dtype,
        dataset: ImageDataset,
        feed: _Feed,
    ) -> None:
        self.config, self.device, self._feed = config, device, feed
        self.state = TrainingState(config, device)
        self.state.set_half_dtype(half_dtype)
        labels = LabelTable.of(dataset, device)
        self.step: Any
        if name == "plain":
            from gan.bench.plain import PlainStep

            self.step = PlainStep(self.state, config, labels)
        else:
            self.step = TrainStep(self.state, config, labels)
        self.intervals = config.phase_intervals()
        self.period = math.lcm(*self.intervals.values(), config.augment.ada_interval)
        self.warm: Block

    def warm_up(self, deadline: float) -> None:
        """Take a first step, which has every phase, and another where that costs little; `warm` is its time."""
        self.warm = self.run(Kind(0, 1, 1))
        if self.warm.seconds < 0.1 * (deadline - time.monotonic()):
            self.warm = self.run(Kind(0, 1, 1))

    def run(self, kind: Kind) -> Block:
        """Take and time some steps."""
        self.state.progress.nimg = kind.first * self.config.batch_size  # which phases are due follows from it
        if self.state.augment is not None:
            self.state.augment.p.fill_(self.config.augment.initial_p)
        self.step.timer.flush()
        wait = 0.0
        begin = time.perf_counter()
        for _ in range(kind.steps):
            self.step(*self._feed.batch)
            wait += self._feed.advance()
        synchronize(self.device)
        seconds = time.perf_counter() - begin
        due = range(kind.first, kind.first + kind.steps)
        calls = {name: sum(schedule.is_due(i, every) for i in due) for name, every in self.intervals.items()}
        calls = {name: count for name, count in calls.items() if count}
        return Block(kind.steps, seconds, wait, self.step.timer.flush(), calls)

    def predicted(self, kind: Kind) -> float:
        """Seconds that `run` will take, judged by the first step."""
        rest = self.warm.seconds - sum(self.warm.phase_ms.values()) / 1000
        total = kind.steps * max(rest, 0.0)
        for i in range(kind.first, kind.first + kind.steps):
            due = (name for name, every in self.intervals.items() if schedule.is_due(i, every))
            total += sum(self.warm.phase_ms[name] for name in due) / 1000
        return total


def _take_turns(
    contestants: Sequence[_Contestant], deadline: float, periods: int, left_out: list[str]
) -> tuple[list[Timing], str]:
    """The timing of each contestant, and how it was taken."""
    period = contestants[0].period
    whole = Kind(0, period, 1)
    turn = " in turn" if len(contestants) > 1 else ""
    if sum(c.predicted(whole) for c in contestants) < deadline - time.monotonic():
        samples = _whole_periods(contestants, whole, deadline, periods)
        what = f"{len(samples[0])} period{'s' * (len(samples[0]) > 1)} of {period} whole steps{turn}"
    else:
        kinds = kinds_of_steps(contestants[0].intervals, period)
        samples = _single_steps(contestants, kinds, deadline, periods, left_out)
        weights = ", ".join(f"{k.weight} with {_named(contestants[0].intervals, k)}" for k in kinds)
        what = f"single whole steps of each kind{turn}, weighted as {period} steps have them: {weights}"
    return [timing_of(s, c.config.batch_size) for s, c in zip(samples, contestants, strict=False)], what


Samples = list[list[tuple[Block, int]]]  # samples of blocks with their weights


def _whole_periods(contestants: Sequence[_Contestant], whole: Kind, deadline: float, periods: int) -> list[Samples]:
    begin = time.monotonic()
    longest = sum(c.predicted(whole) for c in contestants)
    if periods > 1 and 3 * longest < deadline - begin:  # the first period of all still finds things for the first time
        for contestant in contestants:
            contestant.run(whole)
    samples: list[Samples] = [[] for _ in contestants]
    while len(samples[0]) < periods:
        started = time.monotonic()
        if samples[0] and started + longest > deadline:
            break
        for contestant, taken in zip(contestants, samples, strict=True):
            taken.append([(contestant.run(whole), whole.weight)])
        longest = time.monotonic() - started
    return samples


def _single_steps(
    contestants: Sequence[_Contestant], kinds: Sequence[Kind], deadline: float, most: int, left_out: list[str]
) -> list[Samples]:
    passes: list[list[list[Block]]] = []  # [pass][kind][contestant]
    while not passes or (len(passes[-1]) == len(kinds) and len(passes) < most):
        taken: list[list[Block]] = []
        for kind in kinds:
            before = passes[0][len(taken)] if passes else taken[-1] if taken else [None] * len(contestants)
            due = _due(contestants[0].intervals, kind)
            cost = sum(_filled(block, c, due).seconds for block, c in zip(before, contestants, strict=True))
            if time.monotonic() + cost > deadline:
                break
            taken.append([contestant.run(kind) for contestant in contestants])
        if passes and len(taken) < len(kinds):
            break
        passes.append(taken)
    measured = passes[0]
    intervals = contestants[0].intervals
    if not measured:
        left_out.append(
            "every step but the very first, which is slower than those after it: there was no time for more"
        )
        if len(contestants) > 1:
            left_out.append("plain: its very first step says nothing")
            contestants = contestants[:1]
    elif len(measured) < len(kinds):
        missing = sorted(
            {name for k in kinds[len(measured) :] for name in _due(intervals, k)}
            - _due(intervals, kinds[len(measured) - 1])
        )
        left_out.append(
            f"{' and '.join(missing)} after warming up: taken from the very first step, there was no more time"
        )
    result: list[Samples] = []
    for i, contestant in enumerate(contestants):
        samples = []
        for taken in passes:
            blocks = [blocks_of_kind[i] for blocks_of_kind in taken]
            for kind in kinds[len(blocks) :]:
                blocks.append(_filled(blocks[-1] if blocks else None, contestant, _due(intervals, kind)))
            samples.append([(block, kind.weight) for block, kind in zip(blocks, kinds, strict=True)])
        result.append(samples)
    return result


def _filled(base: Block | None, contestant: _Contestant, due: set[str]) -> Block:
    """A step with the phases `due`: a measured one that lacks some of them, completed out of the first step."""
    warm = contestant.warm
    if base is None:
        rest = warm.seconds - sum(warm.phase_ms.values()) / 1000
        base = Block(1, max(rest, warm.wait), warm.wait, {}, {})
    new = {name: warm.phase_ms[name] for name in due if name not in base.calls}
    seconds = base.seconds + sum(new.values()) / 1000
    times = {**base.phase_ms, **new}
    ordered = {name: times[name] for name in contestant.intervals if name in times}
    return Block(1, seconds, base.wait, ordered, dict.fromkeys(ordered, 1))


def kinds_of_steps(intervals: dict[str, int], period: int) -> list[Kind]:
    """The kinds of steps in a period, told apart by the phases that are due, the most frequent first."""
    found: dict[frozenset[str], list[int]] = {}
    for i in range(period):
        due = frozenset(name for name, every in intervals.items() if schedule.is_due(i, every))
        found.setdefault(due, []).append(i)
    return sorted((Kind(at[0], 1, len(at)) for at in found.values()), key=lambda kind: -kind.weight)


def timing_of(samples: Samples, batch: int) -> Timing:
    """The timing that these samples amount to. Phases, waits and the rest are those of the median step."""

    def step_ms(sample: list[tuple[Block, int]]) -> float:
        steps = sum(weight * block.steps for block, weight in sample)
        return 1000 * sum(weight * block.seconds for block, weight in sample) / steps

    ordered = sorted(samples, key=step_ms)
    times = [step_ms(sample) for sample in ordered]
    middle = [part for sample in ordered[(len(ordered) - 1) // 2 : len(ordered) // 2 + 1] for part in sample]
    steps = sum(weight * block.steps for block, weight in middle)
    phases = {}
    for name in max((block.calls for block, _ in middle), key=len):
        calls = sum(weight * block.calls.get(name, 0) for block, weight in middle)
        total = sum(
            weight * block.calls[name] * block.phase_ms[name] for block, weight in middle if name in block.calls
        )
        phases[name] = PhaseTime(total / calls, calls / steps)
    median = statistics.median(times)
    rest = max(median - sum(phase.ms_per_step for phase in phases.values()), 0.0)
    # A GPU works on while the host waits for images: only what exceeds that adds to the step.
    wait = min(1000 * sum(weight * block.wait for block, weight in middle) / steps, rest)
    return Timing(median, times[0], times[-1], len(times), phases, wait, rest - wait, batch)


def _due(intervals: dict[str, int], kind: Kind) -> set[str]:
    return {name for name, every in intervals.items() if schedule.is_due(kind.first, every)}


def _named(intervals: dict[str, int], kind: Kind) -> str:
    return " ".join(name for name in intervals if name in _due(intervals, kind))


def _pl_batch(config: TrainConfig) -> int:
    """Images of a path-length phase, as TrainStep takes them."""
    return config.batch_size // config.batch_gpu * max(config.batch_gpu // config.loss.pl_batch_shrink, 1)


def _share(config: TrainConfig, device: torch.device, timing: Timing, flops: dict[str, Flops], rates: Ceiling) -> Share:
    def name_of(dtype: torch.dtype) -> str:
        return precision_name(dtype, device, config.tf32)

    dtypes = {dtype for counted in flops.values() for dtype in counted}
    by_dtype = {dtype: rates.matmul[name_of(dtype)] for dtype in dtypes}
    phases = {name: 1000 * seconds_at(flops[name], by_dtype) for name in timing.phases}
    per_step: dict[str, float] = {}
    for phase, time_of in timing.phases.items():
        for dtype, count in flops[phase].items():
            per_step[name_of(dtype)] = per_step.get(name_of(dtype), 0.0) + count * time_of.calls_per_step
    ideal = sum(ms * timing.phases[name].calls_per_step for name, ms in phases.items())
    return Share(rates.matmul, rates.copy, per_step, phases, ideal)
