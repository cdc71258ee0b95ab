"""The numbers of a metric, from what was kept of real and generated images."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

import torch

from gan.errors import GanError
from gan.metric_names import Metric
from gan.metrics import (
    diversity,
    frechet,
    inception_score,
    kernel_distance,
    perceptual_path,
    precision_recall,
    sliced_wasserstein,
)
from gan.metrics.collected import Key
from gan.metrics.reals import Reals

NEIGHBOURS = 3
_SPLITS = 10
_SUBSETS, _SUBSET = 100, 1000

Numbers = Generator[None, None, dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Plan:
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
        """Of the metric."""
        return self.metric.name


def results(plan: Plan, real: Reals, fakes: Any, seed: int, device: torch.device) -> Numbers:
    """The numbers by their names.

    Args:
        real: in which `plan.reals` is known.
        fakes: what was kept of the generated images: rows `[N, d]` or a Gaussian.
        seed: of all choices.
        device: where they are computed.
    """
    metric = plan.metric
    reals: Any = None if plan.reals is None else real.known(plan.reals, plan.sha256)
    numbers: Sequence[float]
    if metric.kind == "fid":
        numbers = [(yield from frechet.frechet_distance(reals, fakes, device))]
    elif metric.kind == "kid":
        distance = kernel_distance.kernel_distance(reals, fakes, _SUBSETS, _SUBSET, seed, device)
        numbers = [(yield from distance)]
    elif metric.kind == "pr":
        radii = yield from _radii(plan, real, reals, device)
        numbers = yield from precision_recall.precision_recall(reals, fakes, NEIGHBOURS, device, radii)
    elif metric.kind == "is":
        numbers = yield from inception_score.inception_score(fakes, _SPLITS, device)
    elif metric.kind == "ppl":
        numbers = [perceptual_path.length(fakes[:, 0])]
    elif metric.kind == "diversity":
        return (yield from _diversity(metric.name, reals, fakes))
    else:
        assert metric.kind == "swd"
        return (yield from _levels(metric.name, reals, fakes, real.dataset.image_shape, seed, device))
    return dict(zip(metric.results, map(float, numbers), strict=True))


def _radii(plan: Plan, real: Reals, rows: torch.Tensor, device: torch.device) -> Generator[None, None, torch.Tensor]:
    """Those of the balls around real rows, which are kept with them: half of the work and more."""
    assert plan.reals is not None
    key = dataclasses.replace(plan.reals, view=f"radii of {plan.reals.view}")
    known = real.known(key, plan.sha256)
    if isinstance(known, torch.Tensor):
        return known[:, 0]
    found = (yield from precision_recall.radii(rows, NEIGHBOURS, device)).cpu()
    real.keep(key, plan.sha256, found[:, None])
    return found


def _diversity(name: str, reals: torch.Tensor, fakes: torch.Tensor) -> Numbers:
    of_fakes = yield from diversity.mean_distance(fakes)
    of_reals = yield from diversity.mean_distance(reals)
    if of_reals == 0:
        raise GanError("the images of the dataset are all the same, so there is nothing to compare with")
    return {name: of_fakes / of_reals, f"{name}_fakes": of_fakes, f"{name}_reals": of_reals}


def _levels(
    name: str, reals: torch.Tensor, fakes: torch.Tensor, image_shape: Sequence[int], seed: int, device: torch.device
) -> Numbers:
    empty = torch.zeros([1, *image_shape], dtype=torch.uint8)
    shapes = {height: each.shape[1:] for height, each in sliced_wasserstein.descriptors(empty, [0]).items()}
    levels = yield from sliced_wasserstein.distances(_apart(reals, shapes), _apart(fakes, shapes), seed, device)
    mean = sum(levels.values()) / len(levels)
    return {name: mean, **{f"{name}_{height}": distance for height, distance in levels.items()}}


def joined(patches: Mapping[int, torch.Tensor]) -> torch.Tensor:
    """Patches of all levels as rows `[N, d]`."""
    return torch.cat([each.flatten(1) for each in patches.values()], dim=1)


def _apart(rows: torch.Tensor, shapes: Mapping[int, Sequence[int]]) -> dict[int, torch.Tensor]:
    """What `joined` has joined."""
    parts = rows.split([math.prod(shape) for shape in shapes.values()], dim=1)
    return {height: part.unflatten(1, list(shape)) for (height, shape), part in zip(shapes.items(), parts, strict=True)}
