"""A forked process: it ends when it is told to, once, and how is told."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from gan.data.child_process import Forked, killed_by, signals_blocked, too_few

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def test_how_it_ends_is_known_once_it_has_ended():
    child = Forked(lambda: time.sleep(60))
    assert child.wait(0.01) is None
    assert child.end() == -signal.SIGKILL
    child.kill()  # there is none any more
    assert child.wait(0) == child.end() == -signal.SIGKILL
    assert Forked(lambda: os._exit(7)).wait(5) == 7
    assert Forked(lambda: None).wait(5) == 0


def test_nothing_of_the_parent_runs_behind_its_life(capfd):
    def life() -> None:
        raise SystemExit(3)

    assert Forked(life).wait(5) == 0
    assert capfd.readouterr() == ("", "")


def test_any_thread_may_end_it_and_all_know_how_it_ended():
    for _ in range(5):
        child, codes = Forked(lambda: time.sleep(60)), []
        threads = [threading.Thread(target=lambda: codes.append(child.end())) for _ in range(4)]  # noqa: B023
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert codes == [-signal.SIGKILL] * 4


def test_one_whose_end_was_seen_elsewhere_is_no_error():
    child = Forked(lambda: None)
    os.waitpid(child.pid, 0)
    assert child.end() is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_that_ask_are_for_the_parent(number):
    with signals_blocked():
        child = Forked(lambda: time.sleep(60))
    os.kill(child.pid, number)
    assert child.wait(0.02) is None
    assert child.end() == -signal.SIGKILL
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_what_is_said():
    assert killed_by(-signal.SIGKILL) == "was killed by SIGKILL (often: out of memory)"
    assert killed_by(-signal.SIGBUS) == "was killed by SIGBUS"
    assert killed_by(-99) == "was killed by signal 99"
    assert too_few(1, 3, "no room", "alone") == "only 1 of 3 worker processes could be started (no room)"
    assert too_few(0, 3, "no room", "alone") == "only 0 of 3 worker processes could be started (no room); alone"
