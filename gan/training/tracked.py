"""By which metrics a run is measured, as detectors are there now, and what is said of the others."""

from __future__ import annotations

from gan.config import TrainConfig
from gan.metric_names import AUTO, METRICS, chosen, detectors_of
from gan.metrics.detectors import Detectors
from torch_utils.world import ALONE, World

_PREFETCH = "python -m gan metrics --prefetch"


def tracked(config: TrainConfig, detectors: Detectors, world: World = ALONE) -> tuple[list[str], list[str]]:
    """The metrics that every process can compute, and lines for people about that."""
    wanted = detectors_of(chosen(config.metrics, lambda name: True))
    here = {name: problem for name in wanted if (problem := detectors.problem_with(name)) is not None}
    wrong: dict[str, str] = {}  # by detector
    for rank, there in enumerate(world.gather(here, "the detectors")):
        for name, problem in there.items():
            wrong.setdefault(name, problem if rank == 0 else f"rank {rank}: {problem}")
    missing = [name for name in wrong if detectors.path(name) is None]
    wrong |= dict.fromkeys(missing, detectors.missing_line(missing))
    asked = chosen(config.metrics, lambda name: name not in wrong)
    names = [name for name in asked if METRICS[name].detector not in wrong]
    lines = []
    for problem in dict.fromkeys(wrong.values()):
        without = [name for name in asked if wrong.get(METRICS[name].detector or "") == problem]
        if without:
            lines.append(f"{', '.join(without)} left out: {problem}")
    if names:
        at_each = f"{', '.join(names)} at each snapshot, in up to {config.metrics_budget:g} % of the time"
        lines.append(at_each + (_why_no_more(wrong, detectors) if config.metrics == AUTO else ""))
    elif not lines:
        lines.append("none")
    return names, [f"Metrics:   {line}" for line in lines]


def _why_no_more(wrong: dict[str, str], detectors: Detectors) -> str:
    """That `auto` has made do with what needs no detector."""
    if any(detectors.path(name) is None for name in wrong):
        return f" (no detector here: {_PREFETCH})"
    return "".join(f" ({problem})" for problem in wrong.values())
