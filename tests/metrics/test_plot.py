"""Curves of metrics, as what matplotlib is told to draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import PIL.Image
import pytest

from gan.metrics.plot import Point, draw

figure = pytest.importorskip("matplotlib.figure")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The panels of each picture that is written."""
    found: list[Any] = []
    save = figure.Figure.savefig

    def noted(self: Any, path: Path, **settings: Any) -> None:
        found.extend(self.axes)
        save(self, path, **settings)

    monkeypatch.setattr(figure.Figure, "savefig", noted)
    return found


def curve(panel: Any, label: str = "") -> list[tuple[float, float]]:
    line = next(line for line in panel.get_lines() if label in ("", line.get_label()))
    return list(zip(*line.get_data(), strict=True))


def test_each_metric_has_a_panel_and_its_best_a_number(tmp_path: Path, drawn: list[Any]) -> None:
    swd = [Point(0, {"swd": 300.0, "swd_16": 9.0}), Point(4, {"swd": 20.0}), Point(8, {"swd": 21.0})]
    score = [
        Point(0, {"is50k_mean": 1.5, "is50k_std": 0.1}),
        Point(4, {"is50k_mean": 2.0}),
        Point(8, {"is50k_mean": 2.0}),
    ]
    draw(tmp_path / "a" / "x.png", {"swd": {"run": swd}, "is50k": {"run": score}}, "costs $5 and $6")
    left, right = drawn
    assert (left.get_title(), right.get_title()) == ("swd", "is50k")
    assert (left.get_ylabel(), right.get_ylabel()) == ("lower is better", "higher is better")
    assert curve(left) == [(0, 300), (4, 20), (8, 21)]
    assert ([text.get_text() for text in left.texts], left.texts[0].xy) == (["20"], (4, 20))
    assert right.texts[0].xy == (8, 2)  # the newest of equally good ones
    assert (left.get_yscale(), right.get_yscale()) == ("log", "linear")
    assert left.get_legend() is None
    with PIL.Image.open(tmp_path / "a" / "x.png") as picture:
        picture.load()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.png"]


def test_the_best_diversity_is_that_of_the_images(tmp_path: Path, drawn: list[Any]) -> None:
    points = [Point(0, {"diversity": 1.5}), Point(4, {"diversity": 0.75})]
    draw(tmp_path / "x.png", {"diversity": {"run": points}}, "")
    (panel,) = drawn
    assert panel.get_ylabel() == "1 is that of the images"
    assert not panel.texts
    assert list(panel.get_lines()[-1].get_ydata()) == [1, 1]


def test_several_runs_and_numbers_are_told_apart(tmp_path: Path, drawn: list[Any]) -> None:
    points = [Point(0, {"pr50k3_precision": 0.5, "pr50k3_recall": 0.25}), Point(4, {"pr50k3_precision": 0.75})]
    draw(tmp_path / "x.png", {"pr50k3": {"one": points, "two": points}}, "")
    (panel,) = drawn
    labels = [text.get_text() for text in panel.get_legend().get_texts()]
    assert labels == ["one, precision", "one, recall", "two, precision", "two, recall"]
    assert curve(panel, "two, recall") == [(0, 0.25)]


def test_files_without_kimg_stand_side_by_side(tmp_path: Path, drawn: list[Any]) -> None:
    points = [Point(0, {"kid50k": -0.001}), Point(2, {"kid50k": 0.5})]
    draw(tmp_path / "x.png", {"kid50k": {"": points}}, "", ["ffhq256", "bad.pkl", "c.pkl"])
    (panel,) = drawn
    assert [text.get_text() for text in panel.get_xticklabels()] == ["ffhq256", "bad.pkl", "c.pkl"]
    assert panel.get_yscale() == "linear"  # KID may be negative
    assert {line.get_linestyle() for line in panel.get_lines()} == {"None"}


def test_numbers_that_are_none_leave_gaps(tmp_path: Path, drawn: list[Any]) -> None:
    points = [Point(0, {"swd": float("nan")}), Point(4, {"swd": 3.0}), Point(8, {})]
    draw(tmp_path / "x.png", {"swd": {"run": points}, "diversity": {"run": points}}, "")
    swd, diversity = drawn
    assert curve(swd) == [(4, 3)]
    assert [text.get_text() for text in diversity.texts] == ["no finite number"]
