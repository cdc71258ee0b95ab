import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pytest
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import torch_utils.launch as launching
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
what = fate[place.rank][life]
def stop(number, frame):
    (out / f"signal-{place.rank}").write_text(signal.Signals(number).name)
    if what == "break":
        os.kill(os.getpid(), signal.SIGKILL)
    os._exit(75 if what == "lose" else 130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
signal.signal(signal.SIGUSR1, lambda number, frame: (out / f"save-{place.rank}").write_text(""))
if not any("no run" in lives for lives in fate):
    job.remember("runs/00007")
(out / f"{place.rank}-{life}").write_text(json.dumps([place.size, place.local_rank, job.run_dir, place.serves]))
while len(list(out.glob(f"?-{life}"))) < place.size:
    time.sleep(0.01)
if what in ("wait", "lose", "break"):
    time.sleep(60)
elif what == "refuse":
    job.fail(3)
    sys.exit(3)
elif what == "no run":
    sys.exit(1)
elif what == "given up":
    job.give_up(place.rank)
    what = "killed"
if what == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
sys.exit(what)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs workers with the given fates; (exit code, what was reported)."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))

    def run(*fates, max_restarts=2, in_vain=None):
        said = []
        command = [sys.executable, "-c", WORKER, str(tmp_path), json.dumps(fates)]
        try:
            return launch(command, len(fates), max_restarts, said.append, in_vain), said
        finally:
            assert list(temporary.iterdir()) == []

    return run


def lives(tmp_path):
    return sorted(path.name for path in tmp_path.glob("?-?"))


def test_a_killed_worker_starts_all_again_in_the_same_run(run, tmp_path, capfd):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    exit_code, said = run(["wait", "wait", 0], ["killed", "given up", 0])
    assert exit_code == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert JOB_FOLDER not in os.environ
    killed, given_up = said
    assert killed.startswith("rank 1 was killed (SIGKILL")
    assert killed.endswith("all start again from the last training state (1 of 2)")
    assert given_up.startswith("rank 1 did not come in time and was ended: all start again")
    assert lives(tmp_path) == ["0-0", "0-1", "0-2", "1-0", "1-1", "1-2"]
    assert (tmp_path / "1-0").read_text() == '[2, 1, "runs/00007", false]'
    assert (tmp_path / "0-1").read_text() == '[2, 0, "runs/00007", false]'
    assert capfd.readouterr() == ("", "")  # nothing of PyTorch's own words


def test_what_ended_first_is_named_and_restarts_end(run, tmp_path):
    exit_code, said = run(["killed", 7], ["lose", "lose"], max_restarts=1)  # these end because of the others
    assert exit_code == 7
    assert said[0].startswith("rank 0 was killed")
    assert said[1:] == ["--max-restarts 1 are used up; --resume continues the run"]
    assert lives(tmp_path) == ["0-0", "0-1", "1-0", "1-1"]


def test_what_was_said_by_those_that_have_lost_each_other_is_not_said_again(run):
    with pytest.raises(DistributedError, match=r"^--max-restarts is 0; --resume continues the run$"):
        run([75], ["lose"], max_restarts=0)


def test_whoever_has_no_restarts_says_what_there_is_to_do(run):
    with pytest.raises(DistributedError, match=r"^rank 0 was killed \(SIGKILL.*\), and type it again$"):
        run(["killed"], max_restarts=0, in_vain="type it again")


def test_the_cause_is_who_was_not_asked_to_end():
    def ended(*exit_codes):
        failures = {
            rank: ProcessFailure(local_rank=rank, pid=1, exitcode=exit_code, error_file="")
            for rank, exit_code in enumerate(exit_codes)
        }
        return launching._cause(failures)[0]

    assert ended(75, -signal.SIGTERM, -signal.SIGSEGV) == 2
    assert ended(-signal.SIGTERM, 75) == 1
    assert ended(130, 75, 1) == 2
    assert ended(130, 75) == 1


@pytest.mark.parametrize(("fate", "exit_code"), [("refuse", 3), ("no run", 1), (130, 130)])
def test_what_starting_again_does_not_mend_ends_at_once(run, tmp_path, monkeypatch, fate, exit_code):
    if fate == "refuse":  # as on Windows
        monkeypatch.setattr(launching, "_HAS_LIBUV", False)
    assert run(["wait"], [fate]) == (exit_code, [])
    assert lives(tmp_path) == ["0-0", "1-0"]
    assert json.loads((tmp_path / "0-0").read_text())[3] is (fate == "refuse")  # who makes the store


@contextlib.contextmanager
def meanwhile(do):
    thread = threading.Thread(target=do)
    thread.start()
    yield
    thread.join()


def test_signals_reach_the_workers(run, tmp_path):
    stranger = subprocess.Popen(["sleep", "60"])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    kept = []

    def send():
        wait_for(tmp_path, "?-0", 2)
        kept.append(signal.getsignal(signal.SIGHUP))
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(tmp_path, "save-?", 2)
        os.kill(os.getpid(), signal.SIGINT)

    try:
        with meanwhile(send):
            assert run(["wait"], ["wait"]) == (130, [])
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()
        signal.signal(signal.SIGHUP, before)
    assert kept == [signal.SIG_IGN]
    assert {path.read_text() for path in tmp_path.glob("signal-?")} <= {"SIGINT", "SIGTERM"}
    assert len(list(tmp_path.glob("signal-?"))) == 2


def test_a_run_that_breaks_while_it_is_stopped_is_not_called_saved(run, tmp_path):
    def send():
        wait_for(tmp_path, "?-0", 2)
        os.kill(os.getpid(), signal.SIGTERM)

    with meanwhile(send):
        exit_code, [line] = run(["break"], ["lose"])
    assert exit_code == 75
    assert line.startswith("rank 0 was killed (SIGKILL")
    assert line.endswith("while the run was being stopped: it was not saved, --resume goes on from the last state")


def test_workers_that_start_are_ended_without_a_word(run, tmp_path):
    def send():
        wait_for(tmp_path, "0-0", 1)
        os.kill(os.getpid(), signal.SIGUSR1)  # nothing is there that could be saved
        time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    with meanwhile(send):
        assert run(["wait", "no run"], ["wait"]) == (130, ["interrupted"])
    assert {path.read_text() for path in tmp_path.glob("signal-?")} == {"SIGTERM"}
    assert list(tmp_path.glob("save-?")) == []


def wait_for(folder, pattern, number):
    deadline = time.monotonic() + 20
    while len(list(folder.glob(pattern))) < number:
        assert time.monotonic() < deadline
        time.sleep(0.02)
