import json
import os
import signal
import sys
import threading
import time

import pytest

from torch_utils.distributed import JOB_FOLDER, DistributedError
from torch_utils.launch import launch

# A worker without torch: what it does in its first, second, ... life stands in FATE, by rank.
WORKER = """
import json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, os.getcwd())
from torch_utils import distributed
out, fate = Path(sys.argv[1]), json.loads(sys.argv[2])
place, job = distributed.place(), distributed.job()
life = len(list(out.glob(f"{place.rank}-*")))
(out / f"{place.rank}-{life}").write_text(json.dumps([place.size, place.local_rank, job.is_restart, job.run_dir]))
def stop(number, frame):
    (out / f"signal-{place.rank}").write_text(signal.Signals(number).name)
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGUSR1, lambda number, frame: (out / f"save-{place.rank}").write_text(""))
while len(list(out.glob(f"?-{life}"))) < place.size:
    time.sleep(0.01)
if ["no run"] not in fate:
    job.remember("runs/00007")
what = fate[place.rank][life]
if what == "wait":
    time.sleep(60)
elif what == "refuse":
    job.fail(3)
    sys.exit(3)
elif what == "no run":
    sys.exit(1)
elif what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(what)
"""


@pytest.fixture
def run(tmp_path):
    """Runs workers with the given fates; (exit code, what was reported)."""

    def run(*fates, max_restarts=2):
        said = []
        command = [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(fates)]
        return launch(command, len(fates), max_restarts, said.append), said

    return run


def lives(tmp_path):
    return sorted(path.name for path in tmp_path.glob("?-?"))


def test_a_killed_worker_starts_all_again_in_the_same_run(run, tmp_path, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    exit_code, said = run(["wait", 0], ["killed", 0])
    assert exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert JOB_FOLDER not in os.environ
    [line] = said
    assert line.startswith("rank 1 was killed (SIGKILL")
    assert line.endswith("all start again from the last training state (1 of 2)")
    assert lives(tmp_path) == ["0-0", "0-1", "1-0", "1-1"]
    assert (tmp_path / "1-0").read_text() == "[2, 1, false, null]"
    assert (tmp_path / "0-1").read_text() == '[2, 0, true, "runs/00007"]'
    assert capfd.readouterr() == ("", "")  # nothing of PyTorch's own words


def test_what_ended_first_is_named_and_restarts_end(run, tmp_path):
    with pytest.raises(DistributedError, match=r"rank 0 has failed \(exit code 1\).*--max-restarts 1 are used up"):
        run([75, 1], ["wait", 75], max_restarts=1)
    assert lives(tmp_path) == ["0-0", "0-1", "1-0", "1-1"]


@pytest.mark.parametrize(("fate", "exit_code"), [("refuse", 3), ("no run", 1), (130, 130)])
def test_what_starting_again_does_not_mend_ends_at_once(run, tmp_path, fate, exit_code):
    assert run(["wait"], [fate]) == (exit_code, [])
    assert lives(tmp_path) == ["0-0", "1-0"]


def test_signals_reach_the_workers(run, tmp_path):
    def send():
        wait_for(tmp_path, "?-0", 2)
        time.sleep(0.2)  # until they have their handlers
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(tmp_path, "save-?", 2)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=send)
    thread.start()
    assert run(["wait"], ["wait"]) == (130, [])
    thread.join()
    assert {path.read_text() for path in tmp_path.glob("signal-?")} <= {"SIGINT", "SIGTERM"}
    assert len(list(tmp_path.glob("signal-?"))) == 2


def wait_for(folder, pattern, number):
    deadline = time.monotonic() + 20
    while len(list(folder.glob(pattern))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)
