"""What each way into the program says when a package is missing without which nothing goes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRAIN = ("train.py", "--data", "gan")
GENERATE = ("generate.py", "--seeds", "0", "--network", "x.pkl")
PACK = ("dataset_tool.py", "--source", "gan", "--dest", "x.zip")
# Without the modules named before the colon, run a script or `gan` as if it were typed.
RUN = """
import runpy, sys
without, script, *sys.argv[1:] = sys.argv[1:]
sys.modules.update(dict.fromkeys(without.split(",")))
sys.argv[0] = script
sys.path.insert(0, "")
runpy.run_module("gan", run_name="__main__") if script == "gan" else runpy.run_path(script, run_name="__main__")
"""


def run(without: str, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, without, *command], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("without", "command", "said"),
    [
        ("click", ("train.py", "--help"), "click is"),
        ("click", ("gan", "doctor"), "click is"),
        ("numpy", TRAIN, "numpy is"),
        ("torch", GENERATE, "torch is"),
        ("torch", ("gan", "build-ops"), "torch is"),
        ("PIL", PACK, "pillow is"),
        ("click,torch,numpy,PIL", PACK, "click, torch, numpy, pillow are"),
    ],
)
def test_a_missing_package_is_one_line_with_a_command(without: str, command: tuple[str, ...], said: str) -> None:
    result = run(without, *command)
    packages = said.rpartition(" ")[0].replace(",", "")
    assert result.stderr == f"error: {said} not installed; python -m pip install -c constraints.txt {packages}\n"
    assert (result.returncode, result.stdout) == (1, "")


def test_the_doctor_does_without_numpy() -> None:
    result = run("torch,numpy", "gan", "doctor")  # without torch for the sake of time
    assert result.returncode == 1
    assert (
        "Packages:  numpy is not installed\n           -> python -m pip install -c constraints.txt numpy\n"
        in result.stdout
    )
    assert "Disk:      not examined, for want of torch, numpy\n" in result.stdout
    assert "fault of this program" not in result.stdout


def test_other_modules_that_are_missing_are_faults_of_ours() -> None:
    result = run("gan.cli.options", "train.py", "--help")
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback")
