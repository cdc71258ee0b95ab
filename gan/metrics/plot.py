"""Metrics of snapshots as curves over the length of training, in a PNG. matplotlib draws, which mlflow brings."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gan.files import atomic_path
from gan.metric_names import METRICS, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_COLUMNS = 3
_WIDTH, _HEIGHT = 4.6, 3.2  # inches of a panel
_DPI = 130
_WIDE_RANGE = 10  # largest / smallest, from which on a scale is logarithmic: early snapshots would flatten the rest
_FEW_POINTS = 60  # which are told apart when they are marked


@dataclasses.dataclass(frozen=True)
class Point:
    """A snapshot that has been measured."""

    x: float
    """kimg, or the place among `names`"""
    results: Mapping[str, float]


Curves = Mapping[str, Sequence[Point]]
"""points of a run in their order, by the name of the run"""


def draw(dest: Path, panels: Mapping[str, Curves], title: str, names: Sequence[str] = ()) -> None:
    """Write a PNG with a panel for each metric.

    Args:
        panels: by name of the metric.
        title: what the pictures are of; with one run there is no other legend.
        names: of the points at x = 0, 1, ..., where kimg does not tell them apart.

    Raises GanError if it cannot be written, ImportError without matplotlib.
    """
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it speaks of its cache of fonts
    from matplotlib.figure import Figure

    columns = min(len(panels), _COLUMNS)
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(_WIDTH * columns, 1.3 * _WIDTH), _HEIGHT * rows + 0.3), layout="constrained")
    figure.suptitle(_plain(title), fontsize=10)
    for i, (metric, curves) in enumerate(panels.items()):
        _draw_panel(figure.add_subplot(rows, columns, i + 1), METRICS[metric], curves, names)
    with atomic_path(dest) as path:
        figure.savefig(path, format="png", dpi=_DPI)


def _draw_panel(axes: Axes, metric: Metric, curves: Curves, names: Sequence[str]) -> None:
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    results = [result for result in metric.results if not result.endswith("_std")]
    numbers: list[float] = []
    for color, (run, points) in enumerate(curves.items()):
        for result in results:
            found = [(point.x, point.results[result]) for point in points if _is_finite(point.results.get(result))]
            if not found:
                continue
            numbers += [number for _, number in found]
            words = [run] if len(curves) > 1 else []
            words += [result.removeprefix(f"{metric.name}_")] if len(results) > 1 else []
            decides = result == results[0]
            style = "none" if names else "-" if decides else "--"
            marker = "o" if names or len(found) <= _FEW_POINTS else None
            axes.plot(
                *zip(*found, strict=True),
                color=f"C{color}",
                linestyle=style,
                linewidth=1.3,
                label=_plain(", ".join(words)),
                marker=marker,
                markersize=3,
            )
            if decides and len(found) > 1 and metric.decides:
                _mark_best(axes, found, metric.higher_is_better, f"C{color}")
    axes.set_title(metric.name, fontsize=10)
    if metric.kind == "diversity":
        axes.set_ylabel("1 is that of the images", fontsize=8)
        axes.axhline(1, color="gray", linewidth=0.8, linestyle=":")
    else:
        axes.set_ylabel("higher is better" if metric.higher_is_better else "lower is better", fontsize=8)
    axes.margins(y=0.14)  # room for the number of the best
    if names:
        axes.set_xticks(range(len(names)), [_plain(name) for name in names], rotation=30, ha="right")
    else:
        axes.set_xlabel("kimg", fontsize=8)
    if not numbers:
        axes.text(0.5, 0.5, "no finite number", transform=axes.transAxes, ha="center", fontsize=8)
    elif min(numbers) > 0 and max(numbers) > _WIDE_RANGE * min(numbers):
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter("")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    if any(axes.get_legend_handles_labels()[1]):
        axes.legend(fontsize=7)


def _mark_best(axes: Axes, points: Sequence[tuple[float, float]], higher_is_better: bool, color: str) -> None:
    """A ring and the number; of equally good ones the newest, as for network-snapshot-best.pkl."""
    x, y = max(points, key=lambda point: (point[1] if higher_is_better else -point[1], point[0]))
    axes.plot([x], [y], linestyle="none", marker="o", markersize=9, fillstyle="none", color=color)
    axes.annotate(
        f"{y:.4g}",
        (x, y),
        textcoords="offset points",
        xytext=(0, 9 if higher_is_better else -9),
        ha="center",
        va="bottom" if higher_is_better else "top",
        fontsize=8,
        color=color,
    )


def _is_finite(number: object) -> bool:
    return isinstance(number, (int, float)) and math.isfinite(number)


def _plain(text: str) -> str:
    """Text that matplotlib takes for no formula."""
    return text.replace("$", r"\$")
