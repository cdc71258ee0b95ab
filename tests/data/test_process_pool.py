"""A function computed in processes: in order, within bounds, and whatever happens to a process costs one item."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from gan.data import process_pool
from gan.data.process_pool import Failed, default_workers, in_processes
from gan.errors import GanError

ROOT = Path(__file__).parents[2]
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks at processes in /proc")


def square(i: int) -> int:
    return i * i


def fragile(i: int) -> int:
    """What an item can do to its process: 3 fails, 5 is killed, 7 leaves, 11 returns what cannot be sent."""
    if i == 3:
        raise ValueError("three\n  lines\n")
    if i == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    if i == 7:
        os._exit(9)
    return (lambda: i) if i == 11 else i  # type: ignore[return-value]


REASONS = {
    3: "ValueError: three lines",
    5: "its process was killed by SIGKILL (often: out of memory)",
    7: "its process ended with exit code 9",
}


def children() -> list[int]:
    """Processes forked by this one, zombies among them."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    if sys.platform == "linux":
        resource_tracker.ensure_running()  # a process of multiprocessing itself, which stays
        before = children()
        yield
        assert children() == before
    else:
        yield


@pytest.mark.parametrize("workers", [None, 0, 1, 2, 5])
def test_results_come_in_the_order_of_the_items(workers):
    def slow_when_even(i):
        time.sleep(0.003 * (i % 2 == 0))
        return i * i

    function = slow_when_even if process_pool._FORK or workers == 0 else square
    assert list(in_processes(function, range(40), workers)) == [(i, i * i) for i in range(40)]


def test_no_items():
    assert list(in_processes(square, [], 2)) == []


def test_as_many_as_processors():
    assert default_workers() == (len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count())


@linux
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_what_kills_a_process_costs_one_item(workers):
    results = dict(in_processes(fragile, range(16), workers))
    failed = {i: result.reason for i, result in results.items() if isinstance(result, Failed)}
    assert "lambda" in failed.pop(11)
    assert failed == REASONS
    assert [i for i in results if i not in (3, 5, 7, 11)] == [r for r in results.values() if not isinstance(r, Failed)]


def test_errors_are_the_items_own_without_processes_too():
    def function(i):
        if i == 1:
            raise GanError("x.png: is empty")
        if i == 2:
            raise MemoryError
        return i

    assert list(in_processes(function, range(4), 0)) == [
        (0, 0),
        (1, Failed("x.png: is empty")),
        (2, Failed("MemoryError")),
        (3, 3),
    ]


@linux
def test_every_item_may_kill_its_process():
    results = list(in_processes(lambda i: os.kill(os.getpid(), signal.SIGKILL), range(12), 3))
    assert [i for i, result in results if isinstance(result, Failed)] == list(range(12))


@linux
def test_a_process_that_hangs_is_given_up():
    def function(i):
        if i == 2:
            time.sleep(60)
        return i

    began = time.monotonic()
    results = dict(in_processes(function, range(12), 2, silence=0.3))
    assert results.pop(2) == Failed("its process did not answer for 0.3 s")
    assert list(results.values()) == [i for i in range(12) if i != 2]
    assert time.monotonic() - began < 10


@linux
def test_a_process_is_not_blamed_while_nobody_waits_for_it():
    results = in_processes(lambda i: time.sleep(0.1) or i, range(3), 1, silence=0.3)
    with contextlib.closing(results):
        for i in range(3):
            assert next(results) == (i, i)
            time.sleep(0.4)


@linux
def test_processes_are_started_once_and_replaced_once():
    pids = [pid for _, pid in in_processes(lambda i: time.sleep(0.002) or os.getpid(), range(50), 3)]
    assert len(set(pids)) == 3

    def dies_once(i):
        if i == 10:
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(0.002)
        return os.getpid()

    import faulthandler

    faulthandler.disable()  # its traceback would be on the screen
    try:
        results = [result for _, result in in_processes(dies_once, range(50), 3)]
    finally:
        faulthandler.enable()
    assert results[10] == Failed("its process was killed by SIGSEGV (a decoder crashed)")
    del results[10]
    assert len(set(results)) == 4


@linux
def test_a_waiting_item_of_a_dead_process_is_computed_by_another(tmp_path):
    """With one process, item 1 waits in its pipe while item 0 kills it."""

    def function(i):
        with open(tmp_path / str(i), "a") as file:
            file.write("x")
        if i == 0:
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGKILL)
        return i

    results = list(in_processes(function, range(4), 1))
    assert isinstance(results[0][1], Failed)
    assert results[1:] == [(1, 1), (2, 2), (3, 3)]
    assert [(tmp_path / str(i)).read_text() for i in range(4)] == ["x"] * 4


@linux
def test_a_process_that_dies_while_it_has_nothing_to_do_costs_nothing(tmp_path):
    weights, others = [1, 1, 10, 1, 1], children()

    def function(i):
        (tmp_path / str(i)).touch()
        return i, os.getpid()

    results = in_processes(function, range(5), 2, weight=weights.__getitem__, budget=2)
    with contextlib.closing(results):
        assert next(results)[1][0] == 0
        deadline = time.monotonic() + 30
        while not (tmp_path / "1").exists() and time.monotonic() < deadline:  # on a busy machine that takes a while
            time.sleep(0.01)
        time.sleep(0.2)  # until its result is on its way
        for pid in set(children()) - set(others):
            os.kill(pid, signal.SIGKILL)  # item 1 is done, and item 2 waits for it to be taken
        time.sleep(0.1)
        assert [result[0] for _, result in results] == [1, 2, 3, 4]


@linux
def test_large_results_both_ways_round():
    """Larger than any pipe, from several processes at once, to one who takes its time."""

    def function(i):
        return bytes([i]) * 5_000_000

    for i, result in in_processes(function, range(12), 3):
        time.sleep(0.005)
        assert result == bytes([i]) * 5_000_000


@linux
@pytest.mark.parametrize(
    ("weights", "budget", "most"), [([1] * 40, 3, 3), ([1, 1, 5, 1, 1, 1, 7, 1] * 5, 3, 3), ([0] * 40, 0, 8)]
)
def test_memory_is_bounded(tmp_path, weights, budget, most):
    """Items leave a mark when they begin; the sum of those begun and not yet taken never exceeds the budget."""

    def function(i):
        (tmp_path / str(i)).touch()
        return i

    taken = set()
    results = in_processes(function, range(40), 2, weight=weights.__getitem__, budget=budget)
    with contextlib.closing(results):
        for i, _ in results:
            taken.add(i)
            time.sleep(0.004)
            begun = {int(path.name) for path in tmp_path.iterdir()} - taken
            assert sum(weights[j] for j in begun) <= budget or len(begun) == 1
            assert len(begun) <= most


@linux
def test_the_window_does_not_grow_behind_a_slow_item(tmp_path):
    def function(i):
        (tmp_path / str(i)).touch()
        if i == 0:
            time.sleep(0.5)

    results = in_processes(function, range(100), 2)
    with contextlib.closing(results):
        next(results)
        assert len(list(tmp_path.iterdir())) <= 2 * process_pool._AHEAD + 1


@linux
def test_without_any_process_the_work_goes_on_here(monkeypatch):
    def no_fork():
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    said = []
    monkeypatch.setattr(os, "fork", no_fork)
    results = list(in_processes(lambda i: os.getpid(), range(5), 2, report=said.append))
    assert results == [(i, os.getpid()) for i in range(5)]
    assert said == [
        "only 0 of 2 worker processes could be started (Resource temporarily unavailable); "
        "the work is now done by this one process, slowly"
    ]


@linux
def test_some_processes_are_better_than_none(monkeypatch):
    """Two are started, and no other one, not even when one of them has died."""
    fork, forked, said = os.fork, [], []

    def two_forks():
        if len(forked) == 2:
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        forked.append(1)
        return fork()

    monkeypatch.setattr(os, "fork", two_forks)
    results = dict(in_processes(fragile, [*range(8), *range(100, 130)], 4, report=said.append))
    assert {i: result.reason for i, result in results.items() if isinstance(result, Failed)} == REASONS
    assert said[0] == "only 2 of 4 worker processes could be started (Cannot allocate memory)"
    assert said[-1].endswith("by this one process, slowly")
    assert all(result == i for i, result in results.items() if i not in REASONS)


@linux
@pytest.mark.parametrize("after", [0, 1, 3])
def test_closing_ends_processes_at_once(after):
    results = in_processes(lambda i: time.sleep(60 * (i > 2)) or i, range(100), 3)
    for _ in range(after):
        next(results)
    began = time.monotonic()
    results.close()
    assert time.monotonic() - began < 2


@linux
def test_an_error_of_whoever_uses_the_results_ends_the_processes():
    def use():
        with contextlib.closing(in_processes(lambda i: i, range(1000), 2)) as results:
            for _ in results:
                raise KeyError

    with pytest.raises(KeyError):
        use()


@linux
def test_it_works_in_a_thread_and_twice_at_a_time():
    found = {}

    def work(name):
        found[name] = [r for _, r in in_processes(fragile, range(12), 2)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert [[r for r in found[i] if not isinstance(r, Failed)] for i in range(2)] == [[0, 1, 2, 4, 6, 8, 9, 10]] * 2


def test_where_there_is_no_fork_processes_are_spawned(monkeypatch):
    monkeypatch.setattr(process_pool, "_FORK", False)
    results = dict(in_processes(fragile, range(9), 2))
    assert [results[i] for i in (0, 1, 2, 4, 6, 8)] == [0, 1, 2, 4, 6, 8]
    assert {i: results[i].reason for i in (3, 7)} == {i: REASONS[i] for i in (3, 7)}
    assert isinstance(results[5], Failed)


UNGUARDED = """
from gan.data import process_pool
process_pool._FORK = False
print(list(process_pool.in_processes(abs, [-1, -2, -3], 2, report=print)))
"""


def test_a_script_that_cannot_be_spawned_costs_no_item(tmp_path):
    """Without `if __name__ == "__main__"` a spawned process ends before it begins to work."""
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED)
    result = subprocess.run(
        [sys.executable, script],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    lines = result.stdout.splitlines()
    assert lines[-1] == "[(-1, 1), (-2, 2), (-3, 3)]"
    assert lines[-2].endswith("the work is now done by this one process, slowly")


# A program that is at work: tells the processes it has, and goes on until something is done to it.
PROGRAM = """
import os, signal, sys, time
from pathlib import Path
from gan.data.process_pool import in_processes

def function(i):
    time.sleep(0.05)
    return b"x" * 300_000

results = in_processes(function, range(10_000), 3)
for i, result in results:
    if i == 3:
        print(Path(f"/proc/self/task/{os.getpid()}/children").read_text(), flush=True)
    if i == 5 and "exit" in sys.argv:
        sys.exit(7)  # `results` is still there
"""


def program(*args: str, sigint=signal.SIG_DFL) -> tuple[subprocess.Popen, list[int]]:
    """The program in a process group of its own, and its worker processes.

    `sigint`: what it finds, whether or not these tests are a background job, which ignores it.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )
    assert process.stdout is not None
    pids = [int(pid) for pid in process.stdout.readline().split()]
    assert len(pids) == 3
    return process, pids


def running(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            found += [pid] * (state != "Z")  # whoever adopts it may be slow to see that it has ended
    return found


def wait_until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + 5
    while running(pids) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running(pids) == []


@linux
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_processes_end_when_their_parent_does(number):
    process, pids = program()
    process.send_signal(number)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode in (-number, 1)
    assert ("KeyboardInterrupt" in errors) == (number == signal.SIGINT)
    wait_until_gone(pids)


@linux
def test_ctrl_c_goes_to_all_processes_and_only_the_parent_answers():
    process, pids = program()
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=10)[1]
    assert errors.count("Traceback") == 1
    wait_until_gone(pids)


@linux
def test_a_program_that_ends_in_the_middle_does_not_hang():
    process, pids = program("exit")
    assert process.communicate(timeout=10)[1] == ""
    assert process.returncode == 7
    assert running(pids) == []


@linux
def test_processes_ignore_the_signals_that_their_parent_was_started_to_ignore():
    """As in a background job of a shell script."""
    process, pids = program(sigint=signal.SIG_IGN)
    os.killpg(process.pid, signal.SIGINT)
    for pid in pids:
        os.kill(pid, signal.SIGTERM)
    time.sleep(0.2)
    assert process.poll() is None
    assert running(pids) == pids
    process.kill()
    process.communicate(timeout=10)
    wait_until_gone(pids)
