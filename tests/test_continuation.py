from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from gan.config import DataInfo, TrainConfig
from gan.continuation import Continuation, continued
from gan.resolve import resolve
from gan.train_options import TrainOptions

INFO = DataInfo("a.zip", "a", 1000, 64, 64, 3)


def run(**options: Any) -> TrainConfig:
    return resolve(TrainOptions(data="a.zip", **options), INFO)


def go_on(config: TrainConfig, **options: Any) -> Continuation:
    return continued(config, TrainOptions(resume="run", **options), list(options))


def test_nothing_given_changes_nothing() -> None:
    config = run(gamma=2.0)
    assert go_on(config) == Continuation(config, [], [])


def test_repeating_the_command_of_the_run_is_fine() -> None:
    given: dict[str, Any] = {
        "data": "a.zip",
        "cfg": "paper256",
        "gamma": 2.0,
        "batch": 32,
        "aug": "ada",
        "augpipe": "bgcf",
        "target": 0.5,
        "mirror": True,
        "subset": 100,
        "cbase": 2048,
        "seed": 3,
        "fp32": True,
        "kimg": 100,
        "keep": 3,
    }
    config = resolve(TrainOptions(**given), INFO)
    assert go_on(config, **given) == Continuation(config, [], [])


def test_what_only_says_where_and_how_long_is_honoured_and_said() -> None:
    going_on = go_on(run(batch=32), kimg=50, device="cpu", ops="ref", workers=3, keep=2, keep_every=10, save_every=2.5)
    assert going_on.problems == []
    assert going_on.changed == [
        "--kimg 50, which was 25000",
        "--device cpu, which was auto",
        "--ops ref, which was auto",
        "--workers 3, which was not given",
        "--keep 2, which was not given",
        "--keep-every 10, which was not given",
        "--save-every 2.5, which was 10",
    ]
    assert (going_on.config.total_kimg, going_on.config.save_every) == (50, 2.5)


def test_what_makes_the_run_what_it_is_is_refused_with_the_reason() -> None:
    config = run(gamma=2.0)
    going_on = go_on(config, gamma=3.0, batch=8, cbase=512, seed=1, aug="noaug", desc="x", demo=True)
    assert going_on.config == config
    assert len(going_on.problems) == 7
    assert going_on.problems[0] == (
        "--gamma 3: the run has 2, and what is learned depends on it; leave it out, or start a new run from its "
        "weights with --data DATASET --resume SNAPSHOT"
    )
    assert "--cbase 512: the run has 16384, and the networks are what they are" in going_on.problems[2]


def test_every_option_is_honoured_or_refused() -> None:
    config = run()
    other: dict[type, Any] = {bool: True, int: 7, float: 0.25, str: "x"}
    for field in dataclasses.fields(TrainOptions):
        if field.name in ("resume", "at", "outdir", "gpus", "batch_gpu", "fp32", "precision", "keep_every"):
            continue  # those say which run; these have tests of their own
        kind = next(t for t in other if t.__name__ in str(field.type))
        value = not field.default if kind is bool else other[kind]
        going_on = go_on(config, **{field.name: value})
        assert len(going_on.changed) + len(going_on.problems) == 1, field.name


def test_half_precision_needs_layers_for_it() -> None:
    assert go_on(run(), fp32=True).config.precision == "fp32"
    assert go_on(run(), precision="bf16").config.precision == "bf16"
    assert "no layers for less" in go_on(run(fp32=True), precision="bf16").problems[0]


def test_batch_gpu_changes_and_must_divide() -> None:
    assert go_on(run(batch=32), batch_gpu=8).config.batch_gpu == 8
    assert "--batch-gpu 5 does not divide" in go_on(run(batch=32), batch_gpu=5).problems[0]
    found = go_on(run(batch=32, batch_gpu=8), batch_gpu="auto")
    assert (found.config.fit_batch_gpu, found.config.batch_gpu) == (True, 32)


@pytest.mark.parametrize(("gpus", "batch_gpu"), [(2, 16), (4, 8), (8, 4)])
def test_on_more_gpus_the_share_of_each_is_smaller(gpus: int, batch_gpu: int) -> None:
    going_on = go_on(run(batch=32), gpus=gpus)
    assert going_on.problems == []
    assert (going_on.config.gpus, going_on.config.batch_gpu) == (gpus, batch_gpu)
    assert going_on.changed == [f"--gpus {gpus}, which was 1", f"--batch-gpu {batch_gpu}, which was 32"]


def test_a_batch_that_cannot_be_shared_is_refused() -> None:
    assert "--batch 32 is not divisible by --gpus 3" in go_on(run(batch=32), gpus=3).problems[0]


def test_where_named_networks_are_holds_in_every_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zoo").mkdir()
    monkeypatch.chdir(tmp_path)
    config = run(resume="ffhq256", pretrained_base="zoo")
    assert (config.init_from, config.pretrained_base) == ("ffhq256", str(tmp_path / "zoo"))
    assert go_on(config, pretrained_base="zoo") == Continuation(config, [], [])
    assert go_on(run(resume="ffhq256"), pretrained_base="zoo").config.pretrained_base == str(tmp_path / "zoo")
    assert run(resume="ffhq256", pretrained_base="http://a.example/b").pretrained_base == "http://a.example/b"


def test_keep_every_needs_keep() -> None:
    assert "--keep-every 7 goes with --keep" in go_on(run(), keep_every=7).problems[0]
