"""By which metrics a run is measured, as detectors are there now, and what is said of the others."""

from __future__ import annotations

from collections.abc import Iterator

from gan.config import TrainConfig
from gan.metric_names import AUTO, INCEPTION, METRICS, VGG, chosen, detectors_of
from gan.metrics.detectors import Detectors
from torch_utils.world import ALONE, World

_PREFETCH = "python -m gan metrics --prefetch"


def tracked(config: TrainConfig, detectors: Detectors, world: World = ALONE) -> tuple[list[str], list[str]]:
    """The metrics that every process can compute, and lines for people about that."""
    absent = [name for name in (INCEPTION, VGG) if detectors.path(name) is None]
    absent_by_rank = world.gather(absent, "the detectors")
    anywhere = {name for names in absent_by_rank for name in names}
    asked = chosen(config.metrics, lambda name: name not in anywhere)
    names = [name for name in asked if METRICS[name].detector not in anywhere]
    left_out = [name for name in asked if name not in names]
    lines = list(_left_out_lines(left_out, absent_by_rank, detectors))
    if names:
        why = f" (no detector here: {_PREFETCH})" if config.metrics == AUTO and not detectors_of(names) else ""
        lines.append(f"{', '.join(names)} at each snapshot, in up to {config.metrics_budget:g} % of the time{why}")
    elif not left_out:
        lines.append("none")
    return names, [f"Metrics:   {line}" for line in lines]


def _left_out_lines(metrics: list[str], absent_by_rank: list[list[str]], detectors: Detectors) -> Iterator[str]:
    """Why metrics that were asked for are not measured."""
    needed = detectors_of(metrics)
    here = [name for name in needed if name in absent_by_rank[0]]
    listed = ", ".join(metrics)
    if here:
        yield f"{listed} left out: {detectors.missing_line(here)}"
    elif needed:
        ranks = [str(rank) for rank, absent in enumerate(absent_by_rank) if set(absent) & set(needed)]
        yield f"{listed} left out: no detector for rank {', '.join(ranks)}; {_PREFETCH} on its machine"
