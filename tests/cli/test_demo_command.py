from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import PIL.Image
import pytest
from click.testing import CliRunner

from gan.cli import main
from gan.data import sources
from gan.resolve import resolve


@pytest.mark.usefixtures("light_runs")
def test_the_demo_draws_packs_trains_samples_and_says_what_to_do_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A hundred pictures in place of thousands, and four steps of training.
    monkeypatch.setattr(sources, "DemoSource", functools.partial(sources.DemoSource, count=100))
    monkeypatch.setattr("gan.cli.order.resolve", lambda *about: dataclasses.replace(resolve(*about), total_kimg=0.064))
    result = CliRunner().invoke(main, ["demo", "--kimg", "1"])
    assert result.exit_code == 0, result.output
    for command in (
        "python dataset_tool.py --source demo",
        "python train.py --demo",
        "python generate.py --seeds 0-35",
    ):
        assert f"$ {command}" in result.output
    text = result.output[result.output.index("What it wrote:") :]
    for line in text.splitlines()[1:6]:
        assert (tmp_path / line.split()[0]).is_file(), line
    assert PIL.Image.open(tmp_path / "demo/out/grid.png").size == (6 * 64, 6 * 64)
    (run_dir,) = (tmp_path / "demo/training-runs").glob("0*")
    assert json.loads((run_dir / "training_options.json").read_text())["network"]["channel_base"] == 1024
    assert text.count("python train.py") == 2
    assert "mlflow ui" in text


def test_help_names_every_command() -> None:
    output = CliRunner().invoke(main, ["--help"]).output
    for command in ("dataset-tool", "train", "generate", "demo"):
        assert command in output
