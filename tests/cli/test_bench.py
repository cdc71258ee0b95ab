from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from bench.results import result_of
from click.testing import CliRunner, Result

import gan.bench.measure
import gan.cli.bench as module

TINY = ["--cbase", 128, "--cmax", 8, "--map-depth", 1, "--batch", 8, "--device", "cpu", "--precision", "fp32"]
SURFACE = """
--data --cfg --demo --cond --mirror --gamma --batch --batch-gpu --aug --p --augpipe --freezed --seed --fp32 --workers
--cache --cache-dir --cbase --cmax --map-depth --mbstd-group --device --precision --tf32 --cuda-graphs --ops
--resolution
--against --quick --json --help
"""


def run(*arguments: object) -> Result:
    return CliRunner().invoke(module.bench, [str(a) for a in arguments])


def problems(result: Result) -> list[str]:
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return [line.removeprefix("error: ") for line in result.output.splitlines() if line.startswith("error: ")]


@pytest.fixture(autouse=True)
def one_period(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as possible, however busy the machine is."""
    measure = gan.bench.measure.measure

    def short(*args: Any, **kwargs: Any) -> Any:
        return measure(*args, **{**kwargs, "seconds": 300, "periods": 1, "ceiling_seconds": 0.001})

    monkeypatch.setattr(gan.bench.measure, "measure", short)


def test_the_command_line_is_frozen() -> None:
    shown = re.findall(r"^ {2}(?:-\w, )?(--[\w-]+)", run("--help").output, flags=re.MULTILINE)
    assert sorted(shown) == sorted(SURFACE.split())


def test_json_is_one_object_whose_figures_agree() -> None:
    result = run("--resolution", "24x16", *TINY, "--quick", "--json")
    assert result.exit_code == 0, result.output
    printed = json.loads(result.stdout)
    assert set(printed) == {
        *("hardware", "computing", "options", "method", "phases", "step_ms", "images_per_second", "sec_per_kimg"),
        *("data_wait_ms", "other_ms", "ceiling", "memory", "plain", "ratio", "advice", "seconds"),
    }
    assert printed["options"]["p"] == 0.2
    assert (printed["options"]["width"], printed["options"]["height"]) == (24, 16)
    step = printed["step_ms"]["median"]
    assert printed["sec_per_kimg"] == pytest.approx(step / 8)
    assert printed["images_per_second"] == pytest.approx(8000 / step)
    phases = printed["phases"].values()
    for phase in phases:
        assert phase["ms_per_step"] == pytest.approx(phase["ms"] * phase["calls_per_step"])
    whole = sum(phase["ms_per_step"] for phase in phases) + printed["data_wait_ms"] + printed["other_ms"]
    assert whole == pytest.approx(step)
    assert printed["ceiling"]["share"] == pytest.approx(printed["ceiling"]["step_ms"] / step)
    assert (printed["plain"], printed["ratio"]) == (None, None)
    assert all(isinstance(sentence, str) for sentence in printed["advice"])


def test_the_table_beside_the_plain_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(config: Any, dataset: Any, *, against_plain: bool, report: Any, **settings: Any) -> Any:
        assert against_plain
        assert (config.data.width, config.data.height) == (16, 16)
        assert (settings["firm"], settings["periods"]) == (False, 7)
        report("Computing: with something")
        report("Cache:     of random images is nobody's business")
        result = result_of(precision="fp32")
        return dataclasses.replace(result, plain=dataclasses.replace(result.ours, median_ms=2500), plain_peak=8.0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gan.bench.measure, "measure", known)
    result = run("--resolution", 16, *TINY, "--against", "plain")
    assert result.exit_code == 0, result.output
    begins = [line.split()[0] for line in result.stdout.splitlines() if line and not line.startswith(" ")]
    expected = "Data: Options: Computing: Measured: Gmain Greg Dmain Dreg data other step Speed Plain Ratio Ceiling"
    assert begins == [*expected.split(), "Memory", "Advice"]
    for part in (
        "at p 0.2, held there",
        "2.50 (plain / ours",
        "50% of the ceiling",
        "31.25 sec/kimg",
        "--precision auto",
    ):
        assert part in result.stdout
    assert max(map(len, result.stdout.splitlines())) < 125
    assert list(tmp_path.iterdir()) == []


def test_every_problem_is_listed_at_once() -> None:
    result = run(
        "--resolution", 100, "--p", 3, "--batch", "x", "--cond", "--against", "fast", "--bach", 2, "--gamma", -1
    )
    assert result.exit_code == 2
    listed = "\n".join(problems(result))
    for part in (
        "--resolution 100x100: training needs a small size doubled some times, no side beyond 2048; try 96x96",
        "--p 3.0: must be from 0 to 1",
        "--batch x: is not a valid integer",
        "--cond: random images have no labels; add --data DATASET",
        "--against fast: is not 'plain'",
        "--bach: no such option; did you mean --batch?",
        "--gamma -1.0: must be at least 0",
    ):
        assert part in listed


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--data", "nope.zip"], "--data nope.zip: no such file or folder"),
        (["--data", "nope.zip", "--resolution", 32], "--resolution: goes with random images only"),
        (["--batch", 12, "--batch-gpu", 5], "--batch-gpu 5 does not divide --batch 12"),
        (["--aug", "noaug", "--p", 0.1], "--p 0.1 goes with --aug fixed only"),
        (["--p", "nan"], "--p nan: must be from 0 to 1"),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16: CPUs have no fast float16"),
        (["--device", "cpu", "--cuda-graphs", "on"], "--cuda-graphs on: cpu has none; leave it out"),
        (
            ["--device", "cpu", "--ops", "cuda"],
            "--ops cuda: is for NVIDIA GPUs, and the device is cpu; leave it out",
        ),
        (["--cbase", 8], "--cbase 8: leaves no channels at 64x64"),
        (["--cond", "--data", "TINY"], "has no labels"),
        (["--resolution", -3], "--resolution -3: is neither a number nor a width and a height; write it like 256"),
        (["--resolution", 0], "--resolution 0x0: training needs a small size doubled some times"),
        (["--resolution", "4096x2048"], "no side beyond 2048; try 2048x2048"),
    ],
)
def test_a_bad_setting_is_one_clear_line(arguments: list[object], problem: str, tiny_dataset: Path) -> None:
    result = run(*(str(tiny_dataset) if argument == "TINY" else argument for argument in arguments))
    assert result.exit_code == 2, result.output
    assert any(problem in line for line in problems(result)), result.output


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 1, "error: --batch-gpu 8: a step needs more memory than there is; try --batch-gpu 4"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 1, "try --batch-gpu 4"),
    ],
)
def test_what_ends_a_measurement_is_said(
    error: BaseException, code: int, text: str, tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise error

    monkeypatch.setattr(gan.bench.measure, "measure", fail)
    result = run("--data", tiny_dataset, *TINY, "--json")
    assert result.exit_code == code
    assert text in result.stderr
    assert result.stdout == ""
