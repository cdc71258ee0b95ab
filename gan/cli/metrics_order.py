"""What a command line of `gan metrics` comes to: which files are measured, by what, against which images."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gan.cli.metrics_sources import Datasets, Item, items_of, sources_of
from gan.errors import GanError, UsageError
from gan.files import nearest_existing
from gan.metric_names import AUTO, METRICS, NONE, chosen, detectors_of
from gan.train_options import TrainOptions, check_values

if TYPE_CHECKING:
    from gan.metrics.detectors import Detectors
    from gan.tracking.measurements import Measured


@dataclasses.dataclass(frozen=True)
class Request:
    """The command line as typed; None: not given."""

    networks: list[str]
    data: str | None = None
    metrics: str | None = None
    detectors: str | None = None
    pretrained_base: str | None = None
    seed: int = 0
    device: str = "auto"
    ops: str = "auto"
    batch: int = 32
    gpus: int = 1
    plot: str | None = None
    json: bool = False
    force: bool = False


@dataclasses.dataclass(frozen=True)
class Order:
    """What is to be done."""

    items: list[Item]
    metrics: list[str]
    detectors: str | None
    """folder in which they are looked for first"""
    digests: dict[str, str]
    """sha256 of the detectors that are used"""
    seed: int
    lines: list[str]
    """to be said at the start"""
    left_out: list[str]
    """what cannot be measured, and why: a line each"""
    first_by: list[str]
    """metrics in the order in which they say which snapshot of a run is the best"""

    @property
    def runs(self) -> dict[str, Item]:
        """The folders of the runs that results go to, and one of the files in each."""
        return {item.run_dir: item for item in reversed(self.items) if item.run_dir is not None}


def order_of(request: Request, datasets: Datasets, problems: Sequence[str]) -> Order:
    """What is to be done. Raises UsageError with everything that is wrong, GanError if nothing can be measured."""
    problems = [*problems, *_problems_of_values(request)]
    sources = sources_of(request.networks, problems)
    config = next((source.config for source in sources if source.config is not None), None)
    items = list(items_of(sources, request.data, datasets, problems))
    if problems:
        raise UsageError(problems)
    from gan.metrics.detectors import Detectors

    folder = request.detectors or (None if config is None else config.detectors)
    detectors = Detectors(folder)
    asked = request.metrics or (AUTO if config is None or config.metrics == NONE else config.metrics)
    names, lines, left_out = _measurable(asked, detectors)
    digests = {name: _digest(detectors, name) for name in detectors_of(names)}
    tracked = [] if config is None else chosen(config.metrics, lambda name: detectors.problem_with(name) is None)
    first_by = list(dict.fromkeys([*tracked, *names, *METRICS]))
    order = Order(items, names, folder, digests, request.seed, lines, left_out, first_by)
    found = {} if request.force else measured_before(order, datasets)
    items = [
        dataclasses.replace(item, metrics=[name for name in names if name not in found.get(item.source, {})])
        for item in items
    ]
    return dataclasses.replace(order, items=items)


def measured_before(order: Order, datasets: Datasets) -> dict[str, dict[str, Measured]]:
    """What the files of the runs say already, by model file and metric."""
    found: dict[str, dict[str, Measured]] = {}
    for run in order.runs:
        for measured in known(order, run, datasets):
            found.setdefault(str(Path(run) / measured.snapshot), {})[measured.metric] = measured
    return found


def known(order: Order, run: str, datasets: Datasets) -> Iterator[Measured]:
    """What a run was measured by, oldest first, as far as it can be compared with what is measured now."""
    from gan.tracking import measurements

    item = order.runs[run]
    num_images = len(datasets.get(item.data, item.cond))
    fingerprint = datasets.fingerprint(item.data, item.cond)
    for metric in order.metrics:
        now = measurements.as_measured_now(metric, num_images, fingerprint, order.digests, order.seed)
        yield from (found for found in measurements.read(Path(run), metric) if found.comparable == now)


def _problems_of_values(request: Request) -> list[str]:
    r = request
    problems = check_values(TrainOptions(gpus=r.gpus, detectors=r.detectors, metrics=r.metrics or AUTO))
    if r.metrics == NONE:
        problems.append("--metrics none: there is nothing to do then; name some, or leave it out")
    if r.batch < 1:
        problems.append(f"--batch {r.batch}: must be a whole number from 1 on")
    if r.seed < 0:
        problems.append(f"--seed {r.seed}: must be a whole number from 0 on")
    return problems if r.plot is None else [*problems, *_problems_with_plot(r.plot)]


def _problems_with_plot(plot: str) -> Iterator[str]:
    """What would keep curves from being written, before anything is measured."""
    from gan.packages import install, is_there

    if not plot.lower().endswith(".png"):
        yield f"--plot {plot}: is written as a PNG; let the name end in .png"
    if not is_there("matplotlib"):
        yield f"--plot {plot}: matplotlib is not installed; {install('matplotlib')}"
    if os.path.isdir(plot):
        yield f"--plot {plot}: is a folder; name a file in it"
        return
    folder = nearest_existing(Path(plot).parent)
    if not folder.is_dir():
        yield f"--plot {plot}: {folder} is a file, not a folder; choose another place"
    elif not os.access(folder, os.W_OK):
        yield f"--plot {plot}: {folder} cannot be written to; choose another place"


def _measurable(asked: str, detectors: Detectors) -> tuple[list[str], list[str], list[str]]:
    """(metrics, lines to be said, lines of what is left out) of what is asked for, as detectors are there."""
    wanted = detectors_of(chosen(asked, lambda name: True))
    wrong = {name: problem for name in wanted if (problem := detectors.problem_with(name)) is not None}
    names = chosen(asked, lambda name: name not in wrong)
    there = [name for name in names if METRICS[name].detector not in wrong]
    lines, left_out = [], []
    if asked == AUTO and wrong:
        absent = any(detectors.path(name) is None for name in wrong)
        why = "no detector here: python -m gan metrics --prefetch" if absent else "; ".join(wrong.values())
        lines.append(f"Metrics:   {', '.join(there)} ({why})")
    for detector, problem in wrong.items():
        without = [name for name in names if METRICS[name].detector == detector]
        if without:
            left_out.append(f"{', '.join(without)} left out: {problem}")
    if not there:
        raise GanError("\n".join(left_out))
    return there, lines, left_out


def _digest(detectors: Detectors, name: str) -> str:
    with contextlib.suppress(GanError):  # whoever loads it says so
        return detectors.sha256(name) or ""
    return ""
