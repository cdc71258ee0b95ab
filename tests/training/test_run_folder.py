from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from gan.errors import GanError
from gan.training import run_folder

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from pathlib import Path
from gan.training import run_folder
with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_two_processes_cannot_train_in_one_folder_and_a_killed_one_holds_nothing(tmp_path: Path) -> None:
    pytest.importorskip("fcntl")
    command = [sys.executable, "-c", HOLD, tmp_path]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            said = f"is being trained by process {holder.pid} on "
            with pytest.raises(GanError, match=said), run_folder.locked(tmp_path):
                pass
        finally:
            holder.kill()
    with run_folder.locked(tmp_path):
        pass


def test_what_is_later_goes_into_a_numbered_folder(tmp_path: Path) -> None:
    files = ["stats.jsonl", "log.txt", "reals.png", "fakes_init.png", "training_options.json"]
    files += [f"fakes{kimg:06d}.png" for kimg in (0, 4, 8)] + [f"network-snapshot-{kimg:06d}.pkl" for kimg in (0, 4, 8)]
    for name in files:
        (tmp_path / name).write_text(name)
    aside = run_folder.new_set_aside(tmp_path)
    run_folder.set_aside(tmp_path, 4125, aside)
    assert aside.name == "set-aside-01"
    assert {path.name for path in aside.iterdir()} == {
        *("stats.jsonl", "training_options.json", "fakes000004.png", "network-snapshot-000004.pkl"),
        *("fakes000008.png", "network-snapshot-000008.pkl"),
    }
    left = {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert left == set(files) - {"fakes000008.png", "network-snapshot-000008.pkl"}
    assert run_folder.new_set_aside(tmp_path).name == "set-aside-02"
    assert run_folder.new_set_aside(tmp_path, above=6).name == "set-aside-07"
