"""What `gan metrics` shows of its measurements: a table, one JSON object, curves."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gan.cli.metrics_order import Order, Request, known
from gan.cli.metrics_sources import Datasets, Item
from gan.errors import GanError, printable
from gan.files import explain_os_error
from gan.metric_names import METRICS
from gan.packages import install

if TYPE_CHECKING:
    from gan.cli.metrics_work import Work
    from gan.metrics.plot import Point
    from gan.tracking.measurements import Measured

PLOT_NAME = "metrics.png"


@dataclasses.dataclass(frozen=True)
class Row:
    """A model file and what it was measured by."""

    item: Item
    measured: dict[str, Measured]
    """by metric"""

    def number(self, metric: str, result: str) -> float | None:
        """A finite number of one metric."""
        found = self.measured.get(metric)
        number = math.nan if found is None else found.results.get(result, math.nan)
        return number if math.isfinite(number) else None


def report(rows: Sequence[Row], request: Request, order: Order, datasets: Datasets, work: Work) -> None:
    """Print what came of it all, and draw it."""
    from gan.training import best

    plots = []
    try:
        if request.plot is None:
            plots = [path for run in order.runs if (path := _plot_run(order, run, datasets)) is not None]
        else:
            plots = [Path(request.plot)]
            _plot(plots[0], order, rows, datasets)
    except GanError as error:
        plots = []
        work.fail(str(error))
    tops = {run: top for run in order.runs if (top := best.best_snapshot(Path(run), order.first_by)) is not None}
    if request.json:
        found = {
            "snapshots": [_for_programs(row) for row in rows],
            "best": {run: dataclasses.asdict(top) for run, top in tops.items()},
            "failures": work.failures,
            "plots": [str(path) for path in plots],
        }
        click.echo(json.dumps(found))
        return
    if any(row.measured for row in rows):
        click.echo(table(rows, order.metrics))
    for run, top in tops.items():
        click.echo(printable(top.line if len(order.runs) == 1 else f"{top.line} of {run}"))
    for path in plots:
        click.echo(printable(f"Curves:    {path}"))


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A line for each file and a column for each number; the best of several is marked with *."""
    names = _names([row.item for row in rows])
    columns = [(metric, result) for metric in metrics for result in METRICS[metric].results]
    cells = [["", *(result for _, result in columns)], *([name] for name in names)]
    for metric, result in columns:
        numbers = [row.number(metric, result) for row in rows]
        ranks = METRICS[metric].decides and not result.endswith("_std")
        best = _best(numbers, METRICS[metric].higher_is_better) if ranks else None
        for line, number in zip(cells[1:], numbers, strict=True):
            mark = "*" if best is not None and number == best else " "
            line.append(f"{'-' if number is None else f'{number:.4g}'}{mark}")
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for i, (name, *row) in enumerate(cells):
        texts = [text if i else f"{text} " for text in row]  # over the numbers, not over the marks
        aligned = [text.rjust(width + 1) for text, width in zip(texts, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]).rstrip())
    return "\n".join(lines)


def _for_programs(row: Row) -> dict[str, Any]:
    item = row.item
    return {
        "network": item.shown if item.run_dir is None else item.source,
        "run_dir": item.run_dir,
        "kimg": item.kimg,
        "data": item.data,
        "measurements": [measured.record for measured in row.measured.values()],
    }


def _plot_run(order: Order, run: str, datasets: Datasets) -> Path | None:
    """Write the curves of a run beside its snapshots; None: fewer than two of them were measured."""
    panels = _panels_of_runs(order, [run], datasets)
    points = {point.x for curves in panels.values() for curve in curves.values() for point in curve}
    if len(points) < 2:
        return None
    dest = Path(run) / PLOT_NAME
    _draw(dest, panels, _name_of(run))
    return dest


def _plot(dest: Path, order: Order, rows: Sequence[Row], datasets: Datasets) -> None:
    """Write curves of everything: of runs all that they were measured by, of other files what was measured now."""
    from gan.metrics.plot import Point

    if all(row.item.run_dir is not None for row in rows):
        _draw(dest, _panels_of_runs(order, list(order.runs), datasets), ", ".join(map(_name_of, order.runs)))
        return
    panels: dict[str, dict[str, list[Point]]] = {}
    for metric in order.metrics:
        found = [(x, row.measured[metric]) for x, row in enumerate(rows) if metric in row.measured]
        panels[metric] = {"": [Point(x, measured.results) for x, measured in found]}
    _draw(dest, panels, "", _names([row.item for row in rows]))


def _panels_of_runs(order: Order, runs: Sequence[str], datasets: Datasets) -> dict[str, dict[str, list[Point]]]:
    """Curves of everything comparable that the runs were measured by."""
    from gan.metrics.plot import Point

    panels: dict[str, dict[str, list[Point]]] = {}
    for run in runs:
        newest = {(m.metric, m.kimg): m.results for m in known(order, run, datasets) if m.kimg is not None}
        for (metric, kimg), results in sorted(newest.items()):
            panels.setdefault(metric, {}).setdefault(_name_of(run), []).append(Point(kimg, results))
    return {metric: panels[metric] for metric in order.metrics if metric in panels}


def _name_of(run: str) -> str:
    return printable(Path(run).resolve().name)


def _draw(dest: Path, panels: dict[str, dict[str, list[Point]]], title: str, names: Sequence[str] = ()) -> None:
    from gan.metrics.plot import draw

    try:
        draw(dest, {metric: curves for metric, curves in panels.items() if curves}, title, names)
    except ImportError as error:
        raise GanError(f"{dest}: drawing it needs matplotlib: {install('matplotlib')}") from error
    except OSError as error:
        raise explain_os_error(error, dest) from error


def _names(items: Sequence[Item]) -> list[str]:
    """Of files, as short as they are told apart."""
    several = len({item.run_dir for item in items if item.run_dir is not None}) > 1
    return [printable(item.source if several and item.run_dir else item.shown) for item in items]


def _best(numbers: Sequence[float | None], higher_is_better: bool) -> float | None:
    """Of at least two numbers the best one."""
    found = [number for number in numbers if number is not None]
    if len(found) < 2:
        return None
    return max(found) if higher_is_better else min(found)
