"""The arithmetic of a measurement, and one of a tiny network with the plain step beside it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import write_dataset

from gan.bench.images import count_at, random_dataset
from gan.bench.measure import Block, Kind, kinds_of_steps, measure, timing_of
from gan.bench.result import Result
from gan.config import DataInfo
from gan.data.dataset import ImageDataset
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.resources import kernels_in_use

INTERVALS = {"Gmain": 1, "Greg": 4, "Dmain": 1, "Dreg": 16}
TINY = {
    "cbase": 128,
    "cmax": 8,
    "map_depth": 1,
    "batch": 4,
    "aug": "noaug",
    "device": "cpu",
    "precision": "fp32",
    "cache": "ram",
}


def measured(path: Path, seconds: float, **settings: object) -> Result:
    dataset = ImageDataset(write_dataset(path / "tiny.zip"))
    config = resolve(TrainOptions(data="x", **TINY), DataInfo("x", "x", len(dataset), 16, 16, 3))  # type: ignore[arg-type]
    return measure(config, dataset, seconds=seconds, periods=1, ceiling_seconds=0.001, **settings)  # type: ignore[arg-type]


def test_kinds_of_steps_are_as_frequent_as_in_training() -> None:
    assert kinds_of_steps(INTERVALS, 16) == [Kind(1, 1, 12), Kind(4, 1, 3), Kind(0, 1, 1)]
    assert kinds_of_steps({"Gmain": 1, "Dmain": 1}, 4) == [Kind(0, 1, 4)]


def test_single_steps_weighted_give_what_the_period_gives() -> None:
    ms = {"Gmain": 10.0, "Greg": 20.0, "Dmain": 30.0, "Dreg": 40.0}

    def block(*names: str) -> Block:
        seconds = (sum(ms[name] for name in names) + 5) / 1000  # 2 of them for images
        return Block(1, seconds, 0.002, {name: ms[name] for name in names}, dict.fromkeys(names, 1))

    sample = [(block("Gmain", "Dmain"), 12), (block("Gmain", "Greg", "Dmain"), 3), (block(*ms), 1)]
    total = 16 * (10 + 30 + 5) + 4 * 20 + 40
    calls = {"Gmain": 16, "Greg": 4, "Dmain": 16, "Dreg": 1}
    period = [(Block(16, total / 1000, 16 * 0.002, ms, calls), 1)]
    for samples in ([sample], [period], [sample, period]):
        timing = timing_of(samples, batch=8)
        assert timing.median_ms == pytest.approx(total / 16)
        assert timing.phases["Greg"].ms_per_step == pytest.approx(20 / 4)
        assert timing.phases["Dreg"].ms_per_step == pytest.approx(40 / 16)
        assert (timing.data_wait_ms, timing.other_ms) == (pytest.approx(2), pytest.approx(3))
        assert timing.sec_per_kimg == pytest.approx(total / 16 / 8)
        assert timing.images_per_second * timing.sec_per_kimg == pytest.approx(1000)
        assert timing.spread is None


def test_the_middle_of_several_samples_is_reported() -> None:
    samples = [[(Block(1, s, 0.0, {"Gmain": 900 * s}, {"Gmain": 1}), 1)] for s in (0.5, 0.1, 0.2, 0.3)]
    timing = timing_of(samples, batch=1)
    assert (timing.median_ms, timing.min_ms, timing.max_ms) == pytest.approx((250, 100, 500))
    assert timing.phases["Gmain"].ms == pytest.approx(225)
    assert timing.spread == pytest.approx(1.6)


def test_waiting_behind_a_gpu_adds_nothing() -> None:
    block = Block(1, 0.1, 0.09, {"Gmain": 99.0}, {"Gmain": 1})
    timing = timing_of([[(block, 1)]], batch=1)
    assert (timing.data_wait_ms, timing.other_ms) == (pytest.approx(1), pytest.approx(0))


def test_both_steps_are_timed_in_turn(tmp_path: Path) -> None:
    said: list[str] = []
    result = measured(tmp_path, seconds=300, against_plain=True, report=said.append)
    assert result.method.what == "1 period of 16 whole steps in turn"
    assert result.method.left_out == ()
    assert result.plain is not None
    assert result.ratio == pytest.approx(result.plain.median_ms / result.ours.median_ms)
    assert list(result.ours.phases) == ["Gmain", "Greg", "Dmain", "Dreg"]
    assert [p.calls_per_step for p in result.ours.phases.values()] == [1, 1 / 4, 1, 1 / 16]
    parts = [p.ms_per_step for p in result.ours.phases.values()]
    whole = sum(parts) + result.ours.data_wait_ms + result.ours.other_ms
    assert whole == pytest.approx(result.ours.median_ms, rel=1e-6)
    assert 0 < result.share_of_ceiling < 1
    assert result.memory.peak > result.memory.weights > 0
    shown = [line for line in said if line.startswith(("Computing:", "Kernels:"))]
    assert shown[0].startswith("Computing: CPU with 1 thread, float32")
    assert shown[1] == f"Kernels:   {kernels_in_use()}"
    assert result.computing == f"{shown[0].removeprefix('Computing: ')}; {kernels_in_use()}"


def test_without_time_one_step_is_taken_and_the_rest_named(tmp_path: Path) -> None:
    result = measured(tmp_path, seconds=0, against_plain=True, firm=True)
    assert result.plain is None
    assert result.ours.samples == 1
    assert "weighted as 16 steps have them: 12 with Gmain Dmain, 3 with" in result.method.what
    assert [text.split()[0] for text in result.method.left_out] == ["plain:", "every"]
    assert result.ours.phases["Greg"].calls_per_step == 1 / 4


def test_random_images_are_packed_like_others(tmp_path: Path) -> None:
    dataset = random_dataset(tmp_path / "random.zip", (64, 64), mirror=True)
    assert dataset.image_shape == (3, 64, 64)
    assert len(dataset) == 2 * count_at((64, 64))
