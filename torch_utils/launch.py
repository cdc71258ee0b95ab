"""Several processes of one command on this machine, started and watched by PyTorch's elastic launcher."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from torch_utils.distributed import JOB_FOLDER, LOST_EXIT_CODE, STOPPED_EXIT_CODE, DistributedError, Job

_FORWARDED = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
_HAS_LIBUV = os.name != "nt"
"""not every build of PyTorch for Windows has it, without which the launcher cannot meet its workers over a socket"""
_TOGETHER_SECONDS = 3  # after the first of them workers that end do so because of it


def launch(
    command: Sequence[str],
    processes: int,
    max_restarts: int,
    report: Callable[[str], None],
    in_vain: str | None = None,
) -> int:
    """Run a command as several workers until it is done; its exit code.

    Workers are started again, with a line for `report`, if one was killed, failed by itself or lost the others, unless
    a worker says that this is of no use (`Job.fail`) or somebody asked them to stop. Raises DistributedError when they
    have been started again often enough, which is said in the words of --max-restarts, or as `in_vain` has it.
    """
    folder = tempfile.mkdtemp(prefix="gan-job-")
    job = Job(Path(folder))
    for name in ("torch.distributed", "torch.distributed.elastic"):  # what they have to say is said here
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
    environment = {JOB_FOLDER: folder}
    if not _HAS_LIBUV:
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # workers make the store themselves
    try:
        with _environment(environment), _Signals(job) as signals:
            for restarts in range(max_restarts + 1):
                job.start()
                failures = _run(command, processes, folder)
                if not failures:
                    return 0
                if job.failed is not None:
                    return job.failed
                rank, failure = _cause(failures)
                reason = _reason(rank, failure, job.take_given_up())
                if signals.stopped or failure.exitcode in (STOPPED_EXIT_CODE, -signal.SIGINT):
                    return _stopped(failures, reason, job, signals, report)
                fails_itself = failure.exitcode > 0 and failure.exitcode != LOST_EXIT_CODE
                if fails_itself and job.run_dir is None:
                    return failure.exitcode  # it failed before there was anything to go on with
                if restarts < max_restarts:
                    where = "from the beginning" if job.run_dir is None else "from the last training state"
                    report(f"{reason}: all start again {where} ({restarts + 1} of {max_restarts})")
            ending = f"--max-restarts {max_restarts} are used up" if max_restarts else "--max-restarts is 0"
            if in_vain is not None:
                ending = in_vain
            elif job.run_dir is not None:
                ending += "; --resume continues the run"
            if fails_itself:  # and has said how
                report(ending)
                return failure.exitcode
            raise DistributedError(f"{reason}, and {ending}" if failure.exitcode < 0 else ending)
    except KeyboardInterrupt:
        report("interrupted")
        return STOPPED_EXIT_CODE
    except SignalException as error:
        return 128 + error.sigval
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _stopped(
    failures: Mapping[int, ProcessFailure], reason: str, job: Job, signals: _Signals, report: Callable[[str], None]
) -> int:
    """The exit code after a request to stop, and a line if nobody else has said what has become of it."""
    exit_codes = {failure.exitcode for failure in failures.values()}
    if not job.begun:
        if signals.interrupted:
            report("interrupted")
    elif signals.stopped and STOPPED_EXIT_CODE not in exit_codes and exit_codes - {-signal.SIGINT, -signal.SIGTERM}:
        report(f"{reason} while the run was being stopped: it was not saved, --resume goes on from the last state")
        return LOST_EXIT_CODE
    return STOPPED_EXIT_CODE


def _run(command: Sequence[str], processes: int, folder: str) -> Mapping[int, ProcessFailure]:
    """Run workers until they end; how those failed that did, by rank."""
    run_id = uuid.uuid4().hex
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0" if _HAS_LIBUV else os.path.join(folder, f"meeting-{run_id}"),
        rdzv_configs={} if _HAS_LIBUV else {"store_type": "file"},
        local_addr="127.0.0.1",
        run_id=run_id,
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=folder),
        signals_to_handle="SIGQUIT",  # the others are forwarded here, as often as they come
    )
    try:
        elastic_launch(config, command[0])(*command[1:])
    except ChildFailedError as error:
        return error.failures
    return {}


def _cause(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank that ended first, as far as can be told, and how."""
    begun = min(failure.timestamp for failure in failures.values())

    def order(item: tuple[int, ProcessFailure]) -> tuple[bool, int]:
        exit_code = item[1].exitcode
        kind = 0 if exit_code < 0 else {LOST_EXIT_CODE: 2, STOPPED_EXIT_CODE: 3}.get(exit_code, 1)
        # PyTorch's launcher sends it to those that are left
        return item[1].timestamp > begun + _TOGETHER_SECONDS, 4 if exit_code == -signal.SIGTERM else kind

    return min(failures.items(), key=order)


def _reason(rank: int, failure: ProcessFailure, given_up: Collection[int]) -> str:
    if failure.exitcode < 0:
        if rank in given_up:
            return f"rank {rank} did not come in time and was ended"
        of = ", as the system does when memory runs out" if failure.signal_name() == "SIGKILL" else ""
        return f"rank {rank} was killed ({failure.signal_name()}{of})"
    if failure.exitcode == LOST_EXIT_CODE:
        return "the processes have lost each other"
    return f"rank {rank} has failed (exit code {failure.exitcode})"


class _Signals:
    """While open, what this process is told the workers are told."""

    def __init__(self, job: Job) -> None:
        self.stopped = False
        self.interrupted = False
        self._job = job
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in _FORWARDED if hasattr(signal, name)):
                if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGINT:  # nohup means it
                    self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        asks_to_stop = number != getattr(signal, "SIGUSR1", None)
        self.stopped = self.stopped or asks_to_stop
        self.interrupted = self.interrupted or number == signal.SIGINT
        workers = _workers()
        if asks_to_stop and not workers:
            raise KeyboardInterrupt
        if not self._job.begun:  # they are starting: there is nothing to save, and each would say it was stopped
            number = signal.SIGTERM
            if not asks_to_stop:
                return
        if os.name != "nt":  # there a console tells them itself
            for worker in workers:
                with contextlib.suppress(psutil.NoSuchProcess):
                    worker.send_signal(number)


def _workers() -> list[psutil.Process]:
    """Those whom this process has to tell what it is told: children with sessions of their own."""
    children = psutil.Process().children()
    if os.name == "nt":
        return children
    workers = []
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            if os.getsid(child.pid) == child.pid:
                workers.append(child)
    return workers


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """What workers inherit."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
