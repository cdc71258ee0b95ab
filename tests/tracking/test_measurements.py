"""The files of metrics: what is written is read again, whatever else is in them, and the best is found."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from gan.errors import GanError
from gan.metric_names import INCEPTION, METRICS
from gan.metrics.measure import Measurement
from gan.tracking import jsonl, measurements


def record(
    snapshot: int,
    number: float,
    metric: str = "swd",
    seed: int = 3,
    nimg: int | None = None,
    **results: float,
) -> dict[str, Any]:
    detector = (None, None) if metric == "swd" else ("seer.pt", "abc")
    results = results or {metric: number, f"{metric}_16": number + 1}
    measurement = Measurement(metric, results, 75.4, 100, 50, *detector, seed, "lanczos")
    return measurements.record_of(measurement, f"network-snapshot-{snapshot:06d}.pkl", 2, dataset="d1", nimg=nimg)


def names(run_dir: Path) -> list[str]:
    return [measured.snapshot for measured in measurements.read(run_dir)]


def test_a_line_has_the_fields_of_the_lineage_and_what_makes_it_comparable(tmp_path: Path) -> None:
    assert "nimg" not in record(1, 1.0)
    measurements.append(tmp_path, record(200, 12.5, "fid50k_full", nimg=200_064))
    (line,) = (tmp_path / "metric-fid50k_full.jsonl").read_text().splitlines()
    found = json.loads(line)
    assert found.pop("timestamp") > 1.7e9
    assert found == {
        "results": {"fid50k_full": 12.5, "fid50k_full_16": 13.5},
        "metric": "fid50k_full",
        "total_time": 75.4,
        "total_time_str": "1m 15s",
        "num_gpus": 2,
        "snapshot_pkl": "network-snapshot-000200.pkl",
        "num_reals": 100,
        "num_fakes": 50,
        "seed": 3,
        "detector": {"file": "seer.pt", "sha256": "abc"},
        "resize_filter": "lanczos",
        "dataset": "d1",
        "nimg": 200_064,
    }


def test_what_is_no_measurement_is_left_out(tmp_path: Path) -> None:
    measurements.append(tmp_path, record(1, 4.0))
    path = tmp_path / "metric-swd.jsonl"
    with open(path, "a") as file:
        file.write("[" * 100_000 + "\n")
        file.write('{"results": {"swd": 1' + 400 * "0" + '}, "snapshot_pkl": "network-snapshot-000009.pkl"}\n')
        file.write('[1]\n{"results": 3, "snapshot_pkl": "a"}\n{"results": {"swd": 1}}\nnothing\n\n{"resu')
    measurements.append(tmp_path, record(2, 3.0))  # behind a torn line
    measurements.append(tmp_path, record(3, math.nan))
    (tmp_path / "metric-.jsonl").write_text(json.dumps(record(9, 1.0)) + "\n")
    found = list(measurements.read(tmp_path))
    assert [(m.metric, m.kimg, m.results) for m in found] == [
        ("swd", 1, {"swd": 4.0, "swd_16": 5.0}),
        ("swd", 9, {}),
        ("swd", 2, {"swd": 3.0, "swd_16": 4.0}),
        ("swd", 3, {}),
    ]
    assert list(measurements.read(tmp_path, "fid50k")) == []
    assert found[0].record["seed"] == 3


def test_what_comes_after_a_state_is_dropped(tmp_path: Path) -> None:
    for kimg in (1, 2, 3):
        measurements.append(tmp_path, record(kimg, 1.0))
        measurements.append(tmp_path, record(kimg, 1.0, "fid50k"))
    before = (tmp_path / "metric-swd.jsonl").read_bytes().splitlines(keepends=True)
    other = {**record(0, 1.0), "snapshot_pkl": "elsewhere.pkl"}
    measurements.append(tmp_path, other)
    measurements.drop_beyond(tmp_path, 2_900)
    assert (tmp_path / "metric-swd.jsonl").read_bytes().splitlines(keepends=True)[:2] == before[:2]
    one, two = "network-snapshot-000001.pkl", "network-snapshot-000002.pkl"
    assert names(tmp_path) == [one, two, one, two, "elsewhere.pkl"]
    measurements.drop_beyond(tmp_path / "nowhere", 0)
    measurements.drop_beyond(tmp_path, 2_000)
    assert names(tmp_path)[:2] == [one, two]


def test_the_image_counts_where_a_line_knows_it(tmp_path: Path) -> None:
    measurements.append(tmp_path, record(2, 1.0, nimg=2_900))
    measurements.drop_beyond(tmp_path, 2_900)
    assert len(names(tmp_path)) == 1
    measurements.drop_beyond(tmp_path, 2_400)
    assert names(tmp_path) == []
    line = {"Progress/kimg": {"mean": 2.9}}
    jsonl.append(tmp_path / "stats.jsonl", jsonl.line_of({"Progress/kimg": {"mean": 1.9}}) + jsonl.line_of(line))
    kimgs = (1, 2, 3)
    found = [measurements.nimg_of(tmp_path, f"network-snapshot-{kimg:06d}.pkl") for kimg in kimgs]
    assert (found, measurements.nimg_of(tmp_path, "elsewhere.pkl")) == ([1900, 2900, 3000], None)


def test_a_file_that_cannot_be_read_is_passed_over(tmp_path: Path) -> None:
    assert measurements.unreadable(tmp_path) is None
    (tmp_path / "metric-fid50k.jsonl").mkdir()
    for kimg in (1, 2):
        measurements.append(tmp_path, record(kimg, 1.0))
    assert len(names(tmp_path)) == 2
    assert "metric-fid50k.jsonl" in str(measurements.unreadable(tmp_path))
    with pytest.raises(GanError, match=r"metric-fid50k\.jsonl"):
        measurements.drop_beyond(tmp_path, 1_000)
    assert len(names(tmp_path)) == 1


def test_as_it_is_measured_now(tmp_path: Path) -> None:
    digests = {INCEPTION: "abc"}
    for metric in ("swd", "fid50k", "is50k"):
        info, sha256 = METRICS[metric], "abc" if METRICS[metric].detector else None
        num_reals = {"swd": 100, "fid50k": 100, "is50k": None}[metric]
        num_fakes = 100 if metric == "swd" else info.num_fakes
        measurement = Measurement(metric, {metric: 1.0}, 1.0, num_reals, num_fakes, info.detector, sha256, 3, None)
        line = measurements.record_of(measurement, "network-snapshot-000001.pkl", 2, dataset="d1")
        measurements.append(tmp_path, line)
        (measured,) = measurements.read(tmp_path, metric)
        assert measured.comparable == measurements.as_measured_now(metric, 100, "d1", digests, 3)
        others = [(99, "d1", digests, 3), (100, "d2", digests, 3), (100, "d1", digests, 4)]
        others += [(100, "d1", {INCEPTION: "abd"}, 3)] if sha256 else []
        for i, other in enumerate(others):
            same = metric == "is50k" and i == 0  # it takes no real images
            assert (measured.comparable == measurements.as_measured_now(metric, *other)) is same


class TestBest:
    def found(self, run_dir: Path, metric: str, there: tuple[int, ...] = (1, 2, 3)) -> tuple[str, float] | None:
        return measurements.best(run_dir, metric, {f"network-snapshot-{kimg:06d}.pkl" for kimg in there})

    @pytest.mark.parametrize(("metric", "kimg"), [("fid50k", 2), ("is50k", 1)])
    def test_is_the_lowest_or_the_highest(self, tmp_path: Path, metric: str, kimg: int) -> None:
        for i, number in enumerate((5.0, 1.0, 3.0), 1):
            first = "is50k_mean" if metric == "is50k" else metric
            measurements.append(tmp_path, record(i, 0, metric, **{first: number, "z": -9.0, "a": 90.0}))
        assert self.found(tmp_path, metric) == (f"network-snapshot-{kimg:06d}.pkl", (5.0, 1.0)[kimg - 1])
        rest = self.found(tmp_path, metric, tuple({1, 2, 3} - {kimg}))
        assert rest == ("network-snapshot-000003.pkl", 3.0)
        assert self.found(tmp_path, metric, ()) is None

    def test_the_last_line_of_a_snapshot_counts_and_the_newest_of_equals(self, tmp_path: Path) -> None:
        for kimg, number in ((1, 1.0), (2, 4.0), (3, 4.0), (1, 6.0)):
            measurements.append(tmp_path, record(kimg, number))
        assert self.found(tmp_path, "swd") == ("network-snapshot-000003.pkl", 4.0)
        measurements.append(tmp_path, record(3, math.inf))
        assert self.found(tmp_path, "swd") == ("network-snapshot-000002.pkl", 4.0)

    def test_is_among_those_that_were_measured_alike(self, tmp_path: Path) -> None:
        for kimg, number in ((1, 5.0), (2, 4.0)):
            measurements.append(tmp_path, record(kimg, number))
        for number in (3.0, 2.0):
            measurements.append(tmp_path, record(1, number, seed=7))
        assert self.found(tmp_path, "swd") == ("network-snapshot-000002.pkl", 4.0)
        assert self.found(tmp_path, "swd", (1,)) == ("network-snapshot-000001.pkl", 2.0)  # as many: the newest

    def test_is_none_where_more_is_not_better(self, tmp_path: Path) -> None:
        measurements.append(tmp_path, record(1, 1.0, "diversity"))
        assert self.found(tmp_path, "diversity") is None

    def test_of_none_is_none(self, tmp_path: Path) -> None:
        assert self.found(tmp_path, "swd") is None


def test_a_line_that_cannot_be_written_is_an_error_for_people(tmp_path: Path) -> None:
    (tmp_path / "metric-swd.jsonl").mkdir()
    with pytest.raises(GanError, match=r"metric-swd\.jsonl"):
        measurements.append(tmp_path, record(1, 1.0))
