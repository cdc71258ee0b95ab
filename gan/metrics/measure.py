"""Measure a generator network by any number of metrics, a portion at a time, alone or by several processes.

All metrics share one pass over generated images; what is not yet known of the real ones takes another, and each
perceptual path length has one of its own. The numbers are then computed on rank 0.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from gan.errors import GanError
from gan.metric_names import METRICS, Metric
from gan.metrics import diversity, numbers, sliced_wasserstein
from gan.metrics.collected import FORMS, Collector, Key, LostError, by_all, in_words
from gan.metrics.detector import Detector
from gan.metrics.exact import without_tf32
from gan.metrics.fakes import Fakes, Paths, random_state_kept
from gan.metrics.frechet import Gaussian
from gan.metrics.numbers import Plan, joined
from gan.metrics.parts import BLOCK, Parts
from gan.metrics.reals import Reals
from gan.networks import Generator as Network
from gan.networks import prepare_weights
from torch_utils.distributed import DistributedError
from torch_utils.memory import is_out_of_memory, release_memory
from torch_utils.world import ALONE, World

__all__ = ["Measurement", "Measuring", "Reals"]

T = TypeVar("T")
View = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""what is kept of images uint8 `[N, C, H, W]` with these numbers: rows `[N, d]`"""
Found = dict[Key, "torch.Tensor | Gaussian | None"]

_PORTION_SECONDS = 0.05  # at least, as what comes in between takes time too
# On a CPU a block takes seconds if it is large, or looked at by a detector, which sees 224 or 299 pixels squared.
_CPU_PIXELS = BLOCK * 64 * 64
_CPU_DETECTOR_IMAGES = 2
_BLOCKS_UNCHECKED = 32
_PATCHES, _REDUCED, _DETECTORS_SAY = "patches", "reduced pictures", ("features", "probabilities")


@dataclasses.dataclass(frozen=True)
class Measurement:
    """The numbers of one metric."""

    metric: str
    results: dict[str, float]
    seconds: float
    """of work until it was there; metrics that are measured together share most of it"""
    num_reals: int | None
    num_fakes: int
    """pictures, or pairs of them"""
    detector: str | None
    """name of its file"""
    detector_sha256: str | None
    seed: int
    resize_filter: str | None
    """that the dataset was made with, as far as that is known"""


class _Source(Protocol):
    """A set of images, in blocks."""

    def block(self, index: int) -> Generator[None, None, torch.Tensor]: ...

    def indices(self, index: int) -> Sequence[int]: ...

    def check(self) -> None: ...


class Measuring:
    """The evaluation of one generator network. Nothing that goes wrong is raised but the loss of other processes.

    All ranks make one at the same moment and call `advance` equally often until rank 0 is done.

    Args:
        G: changed by nobody meanwhile, and not by this.
        metrics: names.
        images_at_once: at most; fewer where memory runs out.
        seed: of the generated images, and of everything else that is drawn.
        force_fp32: generate in full precision throughout.
        free_memory: called when memory has run out, before less of it is taken.
    """

    def __init__(
        self,
        G: Network,
        reals: Reals,
        metrics: Sequence[str],
        *,
        device: torch.device,
        world: World = ALONE,
        images_at_once: int = BLOCK,
        seed: int = 0,
        force_fp32: bool = False,
        free_memory: Callable[[], None] | None = None,
    ) -> None:
        self._G, self._reals, self._device, self._world = G, reals, device, world
        self._at_once, self._look_at_once = images_at_once, images_at_once
        if device.type == "cpu":
            self._at_once = min(images_at_once, max(_CPU_PIXELS // math.prod(G.img_size), 1))
            self._look_at_once = min(images_at_once, _CPU_DETECTOR_IMAGES)
        self._seed, self._force_fp32 = seed, force_fp32
        self._free_memory = free_memory or (lambda: release_memory(device))
        self._metrics = [METRICS[name] for name in dict.fromkeys(metrics)]
        self._detectors: dict[str, Detector] = {}
        self._view_parts: dict[str, Parts] = {}
        self._portions = self._run()
        self._seconds, self._begun = 0.0, 0.0
        self._blocks, self._blocks_done = 1, 0
        self.done = False
        """of rank 0, whether everything is over; of others, whether they are no longer needed"""
        self.measurements: list[Measurement] = []
        """on rank 0, as they come"""
        self.failures: list[str] = []
        """on rank 0, a line for each thing that went wrong: which metrics, what, what to do"""

    @property
    def share(self) -> float:
        """How far it is, roughly: 0 to 1."""
        return 1.0 if self.done else min(self._blocks_done / self._blocks, 0.99)

    def advance(self) -> None:
        """Do one portion."""
        if self.done:
            return
        self._begun = time.perf_counter()
        try:
            with torch.no_grad(), without_tf32(), random_state_kept(self._device):
                next(self._portions)
                # Several processes advance together: a portion of one is to be a portion of all.
                while self._world.size == 1 and time.perf_counter() - self._begun < _PORTION_SECONDS:
                    next(self._portions)
        except StopIteration:
            self.done = True
        except DistributedError:
            raise
        except Exception as error:
            measured = {measurement.metric for measurement in self.measurements}
            self._fail([m.name for m in self._metrics if m.name not in measured], in_words(error))
            self.done = True
        finally:
            self._seconds += time.perf_counter() - self._begun
        if self.done:
            self._portions.close()
            self._detectors.clear()

    def _run(self) -> Generator[None, None, None]:
        prepare_weights(self._G)
        plans = yield from self._planned()
        self._blocks = self._expected(plans)
        plans, new_reals = yield from self._see_reals(plans)
        plans, fakes = yield from self._see_fakes(plans)
        if not self._world.is_first:
            return
        for key, (sha256, content) in new_reals.items():
            try:
                if isinstance(content, Gaussian):
                    rooted = yield from self._with_memory(functools.partial(_rooted, content))
                    content = rooted.on(torch.device("cpu"))  # a GPU has better things to hold until then
                self._reals.keep(key, sha256, content)
            except Exception as error:
                self._fail([plan.name for plan in plans if plan.reals == key], in_words(error))
                plans = [plan for plan in plans if plan.reals != key]
            yield
        for plan in plans:
            try:
                results = yield from self._numbers(plan, fakes[plan.fakes])
            except Exception as error:
                self._fail([plan.name], in_words(error))
                yield
                continue
            self.measurements.append(
                Measurement(
                    metric=plan.name,
                    results=results,
                    seconds=self._seconds + time.perf_counter() - self._begun,
                    num_reals=plan.num_reals,
                    num_fakes=plan.num_fakes,
                    detector=plan.metric.detector,
                    detector_sha256=plan.sha256,
                    seed=self._seed,
                    resize_filter=self._reals.dataset.resize_filter,
                )
            )
            yield

    def _numbers(self, plan: Plan, fakes: Any) -> Generator[None, None, dict[str, float]]:
        return self._with_memory(lambda device: numbers.results(plan, self._reals, fakes, self._seed, device))

    def _with_memory(self, compute: Callable[[torch.device], Generator[None, None, T]]) -> Generator[None, None, T]:
        """What is computed on the device; where memory runs out once more when some is free, then on the CPU."""
        for _ in range(2):
            try:
                return (yield from compute(self._device))
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            self._free_memory()  # here, where the error refers to nothing any more
        return (yield from compute(torch.device("cpu")))

    # What is to be done

    def _planned(self) -> Generator[None, None, list[Plan]]:
        """Load the detectors; what each metric takes that has what it needs, the same on all ranks."""
        answers: dict[str, list[str | None]] = {}  # name: what is wrong, sha256
        for name in dict.fromkeys(metric.detector for metric in self._metrics if metric.detector):
            try:
                self._detectors[name] = detector = self._reals.detectors.load(name, self._device)
                answers[name] = [None, detector.sha256]
            except Exception as error:
                answers[name] = [in_words(error), None]
            yield
        of_ranks = self._world.gather(answers, "the detectors of the metrics")
        plans = []
        wrong: dict[str, list[str]] = {}
        for metric in self._metrics:
            sha256 = None
            if metric.detector is not None:
                problem = next((rank[metric.detector][0] for rank in of_ranks if rank[metric.detector][0]), None)
                digests = {rank[metric.detector][1] for rank in of_ranks}
                if problem is None and len(digests) > 1:
                    problem = f"{metric.detector} is not the same file for all processes; give all of them one"
                if problem is not None:
                    wrong.setdefault(problem, []).append(metric.name)
                    continue
                sha256 = answers[metric.detector][1]
            plans.append(self._plan(metric, sha256))
        for problem, names in wrong.items():
            self._fail(names, problem)
        return plans

    def _plan(self, metric: Metric, sha256: str | None) -> Plan:
        num_reals, num_fakes = metric.num_reals(len(self._reals)), metric.num_fakes_against(len(self._reals))
        views = {"swd": f"{_PATCHES} {self._seed}", "diversity": _REDUCED, "is": f"probabilities {metric.detector}"}
        view = f"paths {metric.name}" if metric.kind == "ppl" else views.get(metric.kind, f"features {metric.detector}")
        form = "moments" if metric.kind == "fid" else "rows"
        reals = None if num_reals is None else Key(view, form, num_reals)
        return Plan(metric, num_reals, num_fakes, reals, Key(view, form, num_fakes), sha256)

    def _expected(self, plans: Sequence[Plan]) -> int:
        """Blocks of this rank, roughly: what is known of the real images is not."""
        of_pass = [max((p.num_fakes for p in plans if p.metric.kind != "ppl"), default=0)]
        of_pass += [2 * p.num_fakes for p in plans if p.metric.kind == "ppl"]
        return max(sum(of_pass) // (BLOCK * self._world.size), 1)

    # Passes

    def _see_reals(
        self, plans: list[Plan]
    ) -> Generator[None, None, tuple[list[Plan], dict[Key, tuple[str | None, torch.Tensor | Gaussian]]]]:
        """Have all that the metrics need of the real images known; what was not before, for rank 0 to keep."""
        needed = {plan.reals: plan.sha256 for plan in plans if plan.reals is not None}

        def unknown_here() -> list[int]:
            known = [not self._world.is_first or self._reals.known(*one) is not None for one in needed.items()]
            return [number for number, is_known in enumerate(known) if not is_known]

        try:
            unknown = by_all(self._world, unknown_here, "the known real images")
        except LostError as error:
            lost = {key.view: str(error) for key in needed}
            return self._without(plans, lost, lambda plan: plan.reals), {}
        unknown = self._world.share(unknown, "what is known of the real images")
        keys = [key for number, key in enumerate(needed) if number in unknown]
        if not keys:
            return plans, {}
        self._blocks += -(-max(key.number for key in keys) // BLOCK) // self._world.size
        source = _RealSource(self._reals, self._device)
        found, lost = yield from self._see("the real images", lambda: source, keys)
        plans = self._without(plans, lost, lambda plan: plan.reals)
        return plans, {key: (needed[key], content) for key, content in found.items() if content is not None}

    def _see_fakes(self, plans: list[Plan]) -> Generator[None, None, tuple[list[Plan], Found]]:
        common: dict[str, Any] = {"device": self._device, "seed": self._seed}
        everything: Found = {}
        keys = list(dict.fromkeys(plan.fakes for plan in plans if plan.metric.kind != "ppl"))

        def fakes() -> _Source:
            parts = Parts(self._at_once, self._free_memory)
            return _FakeSource(Fakes(self._G, self._reals.labels, parts=parts, force_fp32=self._force_fp32, **common))

        if keys:
            found, lost = yield from self._see("the generated images", fakes, keys)
            everything |= found
            plans = self._without(plans, lost, lambda plan: plan.fakes)
        for plan in [plan for plan in plans if plan.metric.kind == "ppl"]:

            def paths(metric: Metric = plan.metric) -> _Source:
                assert metric.detector is not None
                parts = Parts(max(self._at_once // 2, 1), self._free_memory)
                lpips = self._detectors[metric.detector].lpips
                return _FakeSource(Paths(self._G, self._reals.labels, metric, lpips, parts=parts, **common))

            found, lost = yield from self._see(f"the paths of {plan.name}", paths, [plan.fakes])
            everything |= found
            plans = self._without(plans, lost, lambda plan: plan.fakes)
        return plans, everything

    def _see(
        self, what: str, make_source: Callable[[], _Source], keys: Sequence[Key]
    ) -> Generator[None, None, tuple[Found, dict[str, str]]]:
        """A pass over images, in which each process looks at every so many-th block.

        Returns:
            What was asked for, on rank 0; and what went wrong, by view, on all.
        """
        collectors: dict[Key, Collector] = {key: FORMS[key.form](key.number, self._world) for key in keys}
        problems: dict[str, str] = {}
        own: Generator[None, None, None] | None = self._look(make_source, collectors, problems)
        while True:
            try:
                if own is not None:
                    next(own)
            except StopIteration:
                own = None
            except DistributedError:
                raise
            except Exception as error:
                problems |= dict.fromkeys((key.view for key in keys), in_words(error))
                own = None
            if not self._world.agree(int(own is not None), what):
                break
            yield
        yield
        all_problems: dict[str, str] = {}
        for of_rank in self._world.gather(problems, f"how it went with {what}"):
            all_problems = {**of_rank, **all_problems}
        found: Found = {}
        for key, collector in collectors.items():
            if key.view not in all_problems:
                try:
                    found[key] = yield from collector.together(self._world)
                except LostError as error:
                    all_problems[key.view] = str(error)
        return found, all_problems

    def _look(
        self, make_source: Callable[[], _Source], collectors: Mapping[Key, Collector], problems: dict[str, str]
    ) -> Generator[None, None, None]:
        """The blocks of this process."""
        source = make_source()
        by_view: dict[str, list[Collector]] = {}
        for key, collector in collectors.items():
            by_view.setdefault(key.view, []).append(collector)
        number = max(collector.number for collector in collectors.values())
        for block in range(self._world.rank, math.ceil(number / BLOCK), self._world.size):
            taking = {
                view: [collector for collector in some if collector.number > block * BLOCK]
                for view, some in by_view.items()
                if view not in problems
            }
            if not any(taking.values()):
                continue
            images = yield from source.block(block)
            if block // self._world.size % _BLOCKS_UNCHECKED == 0:
                source.check()  # now, and not after hours
            yield
            for view, some in taking.items():
                if some:
                    try:
                        yield from self._look_at(images, source.indices(block), view, some, block)
                    except DistributedError:
                        raise
                    except Exception as error:
                        problems[view] = in_words(error)
            self._blocks_done += 1
        source.check()

    def _look_at(
        self, images: torch.Tensor, indices: Sequence[int], view: str, collectors: Sequence[Collector], block: int
    ) -> Generator[None, None, None]:
        number = min(len(images), max(collector.number for collector in collectors) - block * BLOCK)
        look = self._view(view)
        at_once = self._look_at_once if view.startswith(_DETECTORS_SAY) else self._at_once
        parts = self._view_parts.setdefault(view, Parts(at_once, self._free_memory))
        rows = yield from parts.of(number, lambda part, of: look(images[part:number:of], indices[part:number:of]))
        if view.startswith(_DETECTORS_SAY) and not rows.isfinite().all():
            path = self._detectors[view.partition(" ")[2]].path
            raise GanError(f"{path}: gives values that are no finite numbers; give another one with --detectors")
        for collector in collectors:
            collector.add(block, rows)
        yield

    def _view(self, view: str) -> View:
        kind, _, name = view.partition(" ")
        if kind == "features":
            return lambda images, indices: self._detectors[name].features(images)
        if kind == "probabilities":
            return lambda images, indices: self._detectors[name].probabilities(images)
        if kind == "paths":
            return lambda distances, indices: distances[:, None]
        if view == _REDUCED:
            return lambda images, indices: diversity.reduced(images)
        assert kind == _PATCHES
        return lambda images, indices: joined(sliced_wasserstein.descriptors(images, indices, self._seed))

    def _without(
        self, plans: Sequence[Plan], problems: Mapping[str, str], key_of: Callable[[Plan], Key | None]
    ) -> list[Plan]:
        """The plans that can go on."""
        left: list[Plan] = []
        names: dict[str, list[str]] = {}
        for plan in plans:
            key = key_of(plan)
            if key is not None and key.view in problems:
                names.setdefault(problems[key.view], []).append(plan.name)
            else:
                left.append(plan)
        for problem, metrics in names.items():
            self._fail(metrics, problem)
        return left

    def _fail(self, metrics: Sequence[str], problem: str) -> None:
        if metrics and self._world.is_first:
            self.failures.append(f"{', '.join(metrics)}: {problem}")


class _RealSource:
    def __init__(self, reals: Reals, device: torch.device) -> None:
        self._reals, self._device = reals, device

    def block(self, index: int) -> Generator[None, None, torch.Tensor]:
        return (yield from self._reals.block(index, self._device))

    def indices(self, index: int) -> Sequence[int]:
        return self._reals.indices(index).tolist()

    def check(self) -> None:
        """They are what they are."""


class _FakeSource:
    def __init__(self, drawn: Fakes | Paths) -> None:
        self.block, self.check = drawn.block, drawn.check

    def indices(self, index: int) -> Sequence[int]:
        return range(index * BLOCK, (index + 1) * BLOCK)


def _rooted(gaussian: Gaussian, device: torch.device) -> Generator[None, None, Gaussian]:
    return gaussian.on(device).with_half()
