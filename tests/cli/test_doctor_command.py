from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from gan.cli import main
from gan.doctor import examine, facts

SURFACE = "--data --outdir --device --json --help"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["doctor", *arguments])


def test_the_command_line_is_frozen() -> None:
    shown = re.findall(r"^ {2}(--[\w-]+)", run("--help").output, flags=re.MULTILINE)
    assert sorted(shown) == sorted(SURFACE.split())


def test_it_prints_one_screen_that_ends_with_what_to_do(tmp_path: Path) -> None:
    result = run("--device", "cpu")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert len(lines) <= 40
    assert lines[0].startswith("Program:   stylegan2-ada-trainer ")
    assert sum(line.startswith("Next:      ") for line in lines[-2:]) == 1
    assert all(len(line) <= 80 for line in lines if "->" not in line)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_train_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("it can")
    result = run("--device", "cuda", "--json")
    assert result.exit_code == 1
    printed = json.loads(result.stdout)
    assert set(printed) == {"facts", "can_train", "next"}
    assert printed["can_train"] is False
    (fatal,) = [fact for fact in printed["facts"] if fact["fatal"]]
    assert fatal["topic"] == "Device"
    assert fatal["text"].startswith("--device cuda: ")


def test_options_reach_the_examination(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(examine, "examine", lambda *args: seen.append(args) or facts.Report([]))
    assert run("--device", "mps", "--outdir", "runs", "--data", "x.zip").exit_code == 0
    assert run().exit_code == 0
    assert seen == [("mps", Path("runs"), "x.zip"), ("auto", Path("training-runs"), None)]


def test_a_bad_command_examines_nothing() -> None:
    result = run("--device", "tpu", "--nonsense")
    assert result.exit_code == 2
    assert [line.split(":")[0] for line in result.output.splitlines()] == ["error", "error"]
