"""Measure a generator network by any number of metrics, a portion at a time, alone or by several processes.

All metrics share one pass over generated images; what is not yet known of the real ones takes another, and each
perceptual path length has one of its own. The numbers are then computed on rank 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch

from gan.errors import GanError, one_line
from gan.metric_names import METRICS, Metric
from gan.metrics import (
    diversity,
    frechet,
    inception_score,
    kernel_distance,
    perceptual_path,
    precision_recall,
    sliced_wasserstein,
)
from gan.metrics.collected import FORMS, Collector, Key
from gan.metrics.detector import Detector
from gan.metrics.exact import without_tf32
from gan.metrics.fakes import Fakes, Paths, random_state_kept
from gan.metrics.frechet import Gaussian
from gan.metrics.parts import BLOCK, Parts, free_memory, is_out_of_memory
from gan.metrics.reals import Reals
from gan.networks import Generator as Network
from torch_utils.distributed import DistributedError
from torch_utils.world import ALONE, World

__all__ = ["Measurement", "Measuring", "Reals"]

T = TypeVar("T")
View = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""what is kept of images uint8 `[N, C, H, W]` with these numbers: rows `[N, d]`"""
Found = dict[Key, "torch.Tensor | Gaussian | None"]

_NEIGHBOURS = 3
_SPLITS = 10
_SUBSETS, _SUBSET = 100, 1000
_PORTION_SECONDS = 0.05  # at least, as what comes in between takes time too
# On a CPU a block takes seconds if it is large, or looked at by a detector, which sees 224 or 299 pixels squared.
_CPU_PIXELS = BLOCK * 64 * 64
_CPU_DETECTOR_IMAGES = 2
_PATCHES, _REDUCED = "patches", "reduced pictures"


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


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What a metric takes here."""

    metric: Metric
    num_reals: int | None
    num_fakes: int
    reals: Key | None
    fakes: Key
    sha256: str | None
    """of its detector"""

    @property
    def name(self) -> str:
        return self.metric.name


class Measuring:
    """The evaluation of one generator network. Nothing that goes wrong is raised but the loss of other processes.

    All ranks make one at the same moment and call `advance` equally often until rank 0 is done.

    Args:
        G: changed by nobody meanwhile, and not by this.
        metrics: names.
        images_at_once: at most; fewer where memory runs out.
        seed: of the generated images, and of everything else that is drawn.
        force_fp32: generate in full precision throughout.
        free_memory: called when memory has run out, before fewer images are tried.
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
        free_memory: Callable[[], None] = free_memory,
    ) -> None:
        self._G, self._reals, self._device, self._world = G, reals, device, world
        self._at_once, self._look_at_once = images_at_once, images_at_once
        if device.type == "cpu":
            self._at_once = min(images_at_once, max(_CPU_PIXELS // math.prod(G.img_size), 1))
            self._look_at_once = min(images_at_once, _CPU_DETECTOR_IMAGES)
        self._seed, self._force_fp32, self._free_memory = seed, force_fp32, free_memory
        self._metrics = [METRICS[name] for name in dict.fromkeys(metrics)]
        self._detectors: dict[str, Detector] = {}
        self._view_parts: dict[str, Parts] = {}
        self._portions = self._run()
        self._seconds = 0.0
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
        begun = time.perf_counter()
        try:
            with torch.no_grad(), _exact_convolutions(), without_tf32(), random_state_kept(self._device):
                next(self._portions)
                # Several processes advance together: a portion of one is to be a portion of all.
                while self._world.size == 1 and time.perf_counter() - begun < _PORTION_SECONDS:
                    next(self._portions)
        except StopIteration:
            self.done = True
        except DistributedError:
            raise
        except Exception as error:
            measured = {measurement.metric for measurement in self.measurements}
            self._fail([m.name for m in self._metrics if m.name not in measured], _text(error))
            self.done = True
        finally:
            self._seconds += time.perf_counter() - begun
        if self.done:
            self._portions.close()
            self._detectors.clear()

    def _run(self) -> Generator[None, None, None]:
        plans = yield from self._planned()
        self._blocks = self._expected(plans)
        plans, new_reals = yield from self._see_reals(plans)
        plans, fakes = yield from self._see_fakes(plans)
        if not self._world.is_first:
            return
        for key, (sha256, content) in new_reals.items():
            if isinstance(content, Gaussian):
                content = _on(content.with_half(), torch.device("cpu"))  # a GPU has better things to hold until then
                yield
            self._reals.keep(key, sha256, content)
            yield
        for plan in plans:
            try:
                results = yield from self._results(plan, fakes[plan.fakes])
            except Exception as error:
                self._fail([plan.name], _text(error))
                continue
            finally:
                yield
            self.measurements.append(
                Measurement(
                    metric=plan.name,
                    results=results,
                    seconds=self._seconds,
                    num_reals=plan.num_reals,
                    num_fakes=plan.num_fakes,
                    detector=plan.metric.detector,
                    detector_sha256=plan.sha256,
                    seed=self._seed,
                    resize_filter=self._reals.dataset.resize_filter,
                )
            )
            yield

    # What is to be done

    def _planned(self) -> Generator[None, None, list[_Plan]]:
        """Load the detectors; what each metric takes that has what it needs, the same on all ranks."""
        answers: dict[str, list[str | None]] = {}  # name: what is wrong, sha256
        for name in dict.fromkeys(metric.detector for metric in self._metrics if metric.detector):
            try:
                self._detectors[name] = detector = self._reals.detectors.load(name, self._device)
                answers[name] = [None, detector.sha256]
            except Exception as error:
                answers[name] = [_text(error), None]
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

    def _plan(self, metric: Metric, sha256: str | None) -> _Plan:
        num_fakes, num_reals = metric.num_fakes, None
        if metric.max_reals != 0:
            num_reals = min(len(self._reals), metric.max_reals or len(self._reals))
        if metric.kind in ("swd", "diversity"):
            assert num_reals is not None
            num_fakes = num_reals = min(num_fakes, num_reals)
        views = {"swd": _PATCHES, "diversity": _REDUCED, "is": f"probabilities {metric.detector}"}
        view = f"paths {metric.name}" if metric.kind == "ppl" else views.get(metric.kind, f"features {metric.detector}")
        form = "moments" if metric.kind == "fid" else "rows"
        reals = None if num_reals is None else Key(view, form, num_reals)
        return _Plan(metric, num_reals, num_fakes, reals, Key(view, form, num_fakes), sha256)

    def _expected(self, plans: Sequence[_Plan]) -> int:
        """Blocks of this rank, roughly: what is known of the real images is not."""
        of_pass = [max((p.num_fakes for p in plans if p.metric.kind != "ppl"), default=0)]
        of_pass += [2 * p.num_fakes for p in plans if p.metric.kind == "ppl"]
        return max(sum(of_pass) // (BLOCK * self._world.size), 1)

    # Passes

    def _see_reals(
        self, plans: list[_Plan]
    ) -> Generator[None, None, tuple[list[_Plan], dict[Key, tuple[str | None, torch.Tensor | Gaussian]]]]:
        """Have all that the metrics need of the real images known; what was not before, for rank 0 to keep."""
        needed = {plan.reals: plan.sha256 for plan in plans if plan.reals is not None}
        unknown = []
        if self._world.is_first:
            for number, (key, sha256) in enumerate(needed.items()):
                if self._reals.known(key, sha256) is None:
                    unknown.append(number)
        unknown = self._world.share(unknown, "what is known of the real images")
        keys = [key for number, key in enumerate(needed) if number in unknown]
        if not keys:
            return plans, {}
        self._blocks += -(-max(key.number for key in keys) // BLOCK) // self._world.size
        source = _RealSource(self._reals, self._device)
        found, lost = yield from self._see("the real images", lambda: source, keys)
        plans = self._without(plans, lost, lambda plan: plan.reals)
        return plans, {key: (needed[key], content) for key, content in found.items() if content is not None}

    def _see_fakes(self, plans: list[_Plan]) -> Generator[None, None, tuple[list[_Plan], Found]]:
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
                problems |= dict.fromkeys((key.view for key in keys), _text(error))
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
                found[key] = yield from collector.together(self._world)
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
            yield
            for view, some in taking.items():
                if some:
                    try:
                        yield from self._look_at(images, source.indices(block), view, some, block)
                    except DistributedError:
                        raise
                    except Exception as error:
                        problems[view] = _text(error)
            self._blocks_done += 1
        source.check()

    def _look_at(
        self, images: torch.Tensor, indices: Sequence[int], view: str, collectors: Sequence[Collector], block: int
    ) -> Generator[None, None, None]:
        number = min(len(images), max(collector.number for collector in collectors) - block * BLOCK)
        look = self._view(view)
        at_once = self._look_at_once if view.startswith(("features", "probabilities")) else self._at_once
        parts = self._view_parts.setdefault(view, Parts(at_once, self._free_memory))
        rows = yield from parts.of(number, lambda part, of: look(images[part:number:of], indices[part:number:of]))
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
        return lambda images, indices: _joined(sliced_wasserstein.descriptors(images, indices, self._seed))

    def _without(
        self, plans: Sequence[_Plan], problems: Mapping[str, str], key_of: Callable[[_Plan], Key | None]
    ) -> list[_Plan]:
        """The plans that can go on."""
        left: list[_Plan] = []
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

    # Numbers

    def _results(self, plan: _Plan, fakes: Any) -> Generator[None, None, dict[str, float]]:
        metric = plan.metric
        reals: Any = None if plan.reals is None else self._reals.known(plan.reals, plan.sha256)
        numbers: Sequence[float]
        if metric.kind == "fid":
            numbers = [frechet.frechet_distance(_on(reals, self._device), fakes)]
        elif metric.kind == "kid":
            distance = kernel_distance.kernel_distance(
                reals, fakes, subsets=_SUBSETS, size=_SUBSET, seed=self._seed, device=self._device
            )
            numbers = [(yield from distance)]
        elif metric.kind == "pr":
            numbers = yield from precision_recall.precision_recall(reals, fakes, _NEIGHBOURS, device=self._device)
        elif metric.kind == "is":
            numbers = inception_score.inception_score(fakes, _SPLITS)
        elif metric.kind == "ppl":
            numbers = [perceptual_path.length(fakes[:, 0])]
        elif metric.kind == "diversity":
            return (yield from self._diversity(metric, reals, fakes))
        else:
            return (yield from self._levels(metric, reals, fakes))
        return dict(zip(metric.results, map(float, numbers), strict=True))

    def _diversity(
        self, metric: Metric, reals: torch.Tensor, fakes: torch.Tensor
    ) -> Generator[None, None, dict[str, float]]:
        of_fakes = yield from diversity.mean_distance(fakes)
        of_reals = yield from diversity.mean_distance(reals)
        if of_reals == 0:
            raise GanError("the images of the dataset are all the same, so there is nothing to compare with")
        name = metric.results[0]
        return {name: of_fakes / of_reals, f"{name}_fakes": of_fakes, f"{name}_reals": of_reals}

    def _levels(
        self, metric: Metric, reals: torch.Tensor, fakes: torch.Tensor
    ) -> Generator[None, None, dict[str, float]]:
        empty = torch.zeros([1, *self._reals.dataset.image_shape], dtype=torch.uint8)
        shapes = {height: each.shape[1:] for height, each in sliced_wasserstein.descriptors(empty, [0]).items()}
        levels = yield from sliced_wasserstein.distances(
            _apart(reals, shapes), _apart(fakes, shapes), seed=self._seed, device=self._device
        )
        name = metric.results[0]
        return {
            name: sum(levels.values()) / len(levels),
            **{f"{name}_{height}": distance for height, distance in levels.items()},
        }

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


def _joined(patches: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Patches of all levels as rows `[N, d]`."""
    return torch.cat([each.flatten(1) for each in patches.values()], dim=1)


def _apart(rows: torch.Tensor, shapes: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
    """What `_joined` has joined."""
    parts = rows.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {height: part.unflatten(1, list(shape)) for (height, shape), part in zip(shapes.items(), parts, strict=True)}


def _on(gaussian: Gaussian, device: torch.device) -> Gaussian:
    if device.type == "mps":
        return gaussian
    half = None if gaussian.half is None else gaussian.half.to(device)
    return Gaussian(gaussian.number, gaussian.mean.to(device), gaussian.cov.to(device), half)


@contextlib.contextmanager
def _exact_convolutions() -> Any:
    """Inside, convolutions on NVIDIA GPUs do without TF32, whatever training has allowed."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _text(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, GanError):
        return str(error)
    if is_out_of_memory(error):
        return "out of memory, with one image at a time; measure it with python -m gan metrics where there is more"
    return f"{type(error).__name__}: {one_line(error)}"
