"""MLflow behind a real server that is not there, dies, hangs or is full, and a training that must not notice."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from PIL import Image

from gan.cli.mlflow_sync import mlflow_sync
from gan.config import DataInfo
from gan.resolve import resolve
from gan.tracking import JsonlTracker, MlflowTracker, mlflow_tracker
from gan.tracking.mlflow_run import MlflowRun
from gan.train_options import TrainOptions
from gan.training import run_folder

NAME = "00000-test"
pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="processes cannot be stopped on this system")


class Server:
    """`mlflow server` with SQLite on a port of its own, in a process group of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            self._port = str(listener.getsockname()[1])
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None
        self._command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", self._port]
        self._command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"]
        self._command += ["--artifacts-destination", str(folder / "mlartifacts")]
        self._environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}

    def start(self) -> None:
        if self._process is not None:
            return
        silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(self._command, env=self._environment, start_new_session=True, **silent)
        wait_until(self._answers, seconds=120)
        with contextlib.suppress(ImportError):
            import psutil

            # From now on without what starts it, whose import takes 3 s.
            for worker in psutil.Process(self._process.pid).children():
                self._command, self._environment = worker.cmdline(), worker.environ()

    def kill(self) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    @contextlib.contextmanager
    def hanging(self) -> Iterator[None]:
        """Answers nothing, but takes connections."""
        assert self._process is not None
        os.killpg(self._process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.killpg(self._process.pid, signal.SIGCONT)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Cannot write a byte to a file."""
        psutil = pytest.importorskip("psutil")
        if not hasattr(psutil.Process, "rlimit"):
            pytest.skip("the limits of another process cannot be set on this system")
        assert self._process is not None
        parent = psutil.Process(self._process.pid)
        processes = [parent, *parent.children(recursive=True)]
        limits = [process.rlimit(psutil.RLIMIT_FSIZE) for process in processes]
        for process, (_, hard) in zip(processes, limits, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            for process, limit in zip(processes, limits, strict=True):
                process.rlimit(psutil.RLIMIT_FSIZE, limit)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=1):
                return True
        except OSError:
            return False


@pytest.fixture(scope="module")
def _server(empty_store: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    if empty_store is None:
        pytest.skip("mlflow is not installed")
    folder = tmp_path_factory.mktemp("server")
    shutil.copy(empty_store, folder / "mlflow.db")
    server = Server(folder)
    yield server
    server.kill()


@pytest.fixture
def server(_server: Server, monkeypatch: pytest.MonkeyPatch) -> Server:
    """The server that MLFLOW_TRACKING_URI names, which may run or not; what takes seconds is shortened."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", _server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(mlflow_tracker, "MAX_RETRY_SECONDS", 0.3)
    return _server


class Training:
    """What the loop does with its trackers; each call is timed."""

    def __init__(
        self, outdir: Path, experiment: str, make_record: Callable[..., dict[str, Any]], nimg: int = 0
    ) -> None:
        self.run_dir = outdir / NAME
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self.lines: list[str] = []
        self.slowest = 0.0
        self._make_record, self.experiment = make_record, experiment
        self._stats = JsonlTracker(self.run_dir, nimg)
        self.tracker = MlflowTracker(
            self.run_dir, experiment, {"batch": 32}, {}, nimg=nimg, continued=nimg > 0, report=self.lines.append
        )

    def ticks(self, *kimgs: int) -> None:
        """Ticks, with a sheet at each."""
        for kimg in kimgs:
            nimg = kimg * 1000
            record = self._make_record(nimg)
            self._stats.tick(nimg, record)
            path = self.run_dir / f"fakes{kimg:06d}.png"
            Image.new("L", (8, 8)).save(path)
            self._timed(lambda nimg=nimg, record=record: self.tracker.tick(nimg, record))
            self._timed(lambda nimg=nimg, path=path: self.tracker.image("fakes", path, nimg))
            self._timed(self.tracker.state)

    def wait_for(self, text: str) -> None:
        wait_until(lambda: any(text in line for line in self.lines), seconds=60)

    def wait_until_delivered(self) -> None:
        wait_until(lambda: not self.tracker._ticks and not self.tracker._images, seconds=60)

    def die(self) -> None:
        """As if the process were killed: nothing is sent any more, apart from a request that is under way."""
        self.tracker._deliver = lambda closing: False  # type: ignore[method-assign]
        self.tracker.close("KILLED")

    def check_store(self, *kimgs: int) -> None:
        """Asserts that MLflow has one run, and in it these ticks and pictures once each and in order."""
        import mlflow

        client = mlflow.MlflowClient()
        experiment = client.get_experiment_by_name(self.experiment)
        (run,) = client.search_runs([experiment.experiment_id], f"tags.`gan.run_dir` = '{self.run_dir}'")
        for name in ("Progress/kimg", "Loss/G/loss"):
            history = client.get_metric_history(run.info.run_id, name)
            assert [metric.step for metric in history] == [kimg * 1000 for kimg in kimgs]
        grids = [file.path for file in client.list_artifacts(run.info.run_id, "grids")]
        assert sorted(grids) == [f"grids/fakes{kimg:06d}.png" for kimg in kimgs]
        previews = client.list_artifacts(run.info.run_id, "images")
        steps = {int(file.path.split("+")[2]) for file in previews if file.path.endswith(".webp")}
        assert sorted(steps) == [kimg * 1000 for kimg in kimgs]
        assert run.data.params["batch"] == "32"
        assert run.info.status == "FINISHED"

    def _timed(self, call: Callable[[], Any]) -> None:
        begin = time.perf_counter()
        call()
        self.slowest = max(self.slowest, time.perf_counter() - begin)


@pytest.fixture
def training(tmp_path: Path, record: Callable[..., dict[str, Any]], request: pytest.FixtureRequest) -> Iterator[Any]:
    """Starts trainings in an experiment of this test; none of their calls may ever have taken a second."""
    trainings: list[Training] = []

    def start(folder: str = "runs", nimg: int = 0) -> Training:
        trainings.append(Training(tmp_path / folder, request.node.name, record, nimg))
        return trainings[-1]

    yield start
    for training in trainings:
        training.tracker.close("KILLED")
        assert training.slowest < 1


def wait_until(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.02)


def test_absent_at_the_start(server: Server, training: Callable[..., Training]) -> None:
    server.kill()
    run = training()
    run.ticks(1, 2, 3)
    run.wait_for("does not answer")
    server.start()
    run.ticks(4)
    run.wait_for("is back; it has every tick so far")
    run.tracker.close("FINISHED")
    run.check_store(1, 2, 3, 4)


def test_hanging_in_the_middle(server: Server, training: Callable[..., Training]) -> None:
    server.start()
    run = training()
    run.ticks(1, 2)
    run.wait_until_delivered()
    with server.hanging():
        run.ticks(3, 4)
        run.wait_for("does not answer")
        run.ticks(5)
    run.ticks(6)
    run.wait_for("is back")
    run.tracker.close("FINISHED")
    run.check_store(1, 2, 3, 4, 5, 6)


def test_hanging_while_the_run_is_made(
    server: Server, training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch
) -> None:
    server.start()
    run_created = MlflowRun._create_run
    attempts: list[int] = []

    def create(self: MlflowRun) -> Any:
        attempts.append(1)
        if len(attempts) > 1:
            return run_created(self)
        with server.hanging():
            return run_created(self)

    monkeypatch.setattr(MlflowRun, "_create_run", create)
    run = training()
    run.ticks(1, 2)
    run.wait_for("is back")
    run.tracker.close("FINISHED")
    run.check_store(1, 2)


def test_full_in_the_middle_and_at_the_end_which_mlflow_sync_sends(
    server: Server, training: Callable[..., Training]
) -> None:
    server.start()
    run = training()
    run.ticks(1, 2)
    run.wait_until_delivered()
    with server.full():
        run.ticks(3, 4)
        run.wait_for("; training goes on")
    run.ticks(5)
    run.wait_for("is back")
    run.wait_until_delivered()
    with server.full():
        run.ticks(6, 7)
        run.tracker.close("FINISHED")
    assert "did not get 2 ticks (kimg 6.0 to 7.0) and 2 pictures; to send what is missing: " in run.lines[-1]
    config = resolve(TrainOptions(data="x.zip", kimg=7), DataInfo("x.zip", run.experiment, 40, 16, 16, 3))
    run_folder.write_options(run.run_dir, config)
    result = CliRunner().invoke(mlflow_sync, [str(run.run_dir)])
    assert result.output == f"sent 2 ticks and 2 pictures to {server.uri}; it has every tick up to kimg 7.0\n"
    run.check_store(1, 2, 3, 4, 5, 6, 7)


def test_killed_in_the_middle_and_the_training_too(server: Server, training: Callable[..., Training]) -> None:
    server.start()
    lasting, killed = training("lasting"), training("killed")
    for run in (lasting, killed):
        run.ticks(1, 2)
        run.wait_until_delivered()
    server.kill()
    for run in (lasting, killed):
        run.ticks(3, 4)
        run.wait_for("does not answer")
    killed.die()
    continued = training("killed", nimg=3000)
    continued.ticks(4, 5)
    server.start()
    lasting.ticks(5)
    for run in (lasting, continued):
        run.wait_for("is back")
        run.tracker.close("FINISHED")
        run.check_store(1, 2, 3, 4, 5)
