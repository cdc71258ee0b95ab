import math
import os
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from PIL import Image

from gan.tracking import JsonlTracker, MlflowTracker, mlflow_import, mlflow_tracker
from gan.tracking.mlflow_run import MAX_PARAM_LENGTH, flat_params, tick_of

NAME = "00000-test"


@pytest.fixture
def start(outdir):
    """Starts trackers on one store; keyword arguments replace those of a new run."""
    trackers = []

    def start(**changes):
        settings = {
            "run_name": NAME,
            "experiment": "gan",
            "outdir": outdir,
            "params": {"batch": 32, "data": {"mirror": True}},
            "tags": {"gan.cfg": "auto"},
            "report": lambda line: None,
        }
        trackers.append(MlflowTracker(**{**settings, **changes}))
        return trackers[-1]

    yield start
    for tracker in trackers:
        tracker.close("KILLED")


@pytest.fixture
def store(outdir):
    """The store as MLflow itself sees it."""
    mlflow = pytest.importorskip("mlflow")
    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{outdir / 'mlflow.db'}")


def steps(store, run_id, name="Progress/kimg"):
    return [metric.step for metric in store.get_metric_history(run_id, name)]


def wait_until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen in time"
        time.sleep(0.01)


def test_a_run_as_mlflow_shows_it(start, store, outdir, record, capfd):
    lines = []
    tracker = start(report=lines.append)
    for nimg in (0, 4000):
        tracker.tick(nimg, record(nimg, **{"Loss/D/loss": math.nan}))
    picture = outdir / NAME / "fakes000004.png"
    Image.fromarray(np.zeros((300, 3000, 3), np.uint8)).save(picture)
    tracker.image("fakes", picture, 4000)
    tracker.close("FINISHED")

    run = store.get_run(tracker.state()["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == NAME
    assert run.info.artifact_uri.startswith(str(outdir / "mlartifacts"))
    assert run.data.params == {"batch": "32", "data.mirror": "True"}
    assert run.data.tags["gan.cfg"] == "auto"
    assert run.data.tags["gan.run_dir"] == str(outdir / NAME)
    assert run.data.metrics == {"Loss/G/loss": 0.5, "Progress/tick": 1.0, "Progress/kimg": 4.0}
    assert steps(store, run.info.run_id) == [0, 4000]
    assert [file.path for file in store.list_artifacts(run.info.run_id, "grids")] == ["grids/fakes000004.png"]
    previews = [file.path for file in store.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(previews) == 1
    assert previews[0].startswith("images/fakes+step+4000+")
    with Image.open(store.download_artifacts(run.info.run_id, previews[0], str(outdir))) as preview:
        assert preview.size == (2048, 205)
    assert len(lines) == 1
    assert lines[0].startswith("MLflow records this run; to look at it: mlflow ui --backend-store-uri sqlite:///")
    assert capfd.readouterr() == ("", "")


def test_continued_by_id(start, store, outdir, record):
    first = start()
    for nimg in (0, 4000, 8000):
        first.tick(nimg, record(nimg))
    picture = outdir / NAME / "fakes.png"
    Image.new("L", (8, 8)).save(picture)
    first.image("fakes", picture, 8000)
    first.close("KILLED")
    run_id = first.state()["run_id"]

    second = start(run_id=run_id, nimg=4000, params={"batch": 64})  # the last state was saved at 4000
    assert second.state() == {"run_id": run_id}
    for nimg in (8000, 12000):
        second.tick(nimg, record(nimg, **{"Loss/G/loss": 0.75}))
    second.image("fakes", picture, 8000)
    wait_until(lambda: steps(store, run_id)[-1] == 12000)
    assert store.get_run(run_id).info.status == "RUNNING"
    second.close("FINISHED")
    assert steps(store, run_id) == [0, 4000, 8000, 12000]
    assert store.get_run(run_id).data.params["batch"] == "32"
    assert store.get_run(run_id).info.status == "FINISHED"
    assert len(store.list_artifacts(run_id, "images")) == 2  # one preview and MLflow's own thumbnail


def test_continued_without_id_finds_the_run_of_its_folder(start, store, record):
    first = start()
    first.tick(4000, record(4000))
    first.close("KILLED")
    other = start(run_name="00001-test")
    other.tick(4000, record(4000))
    other.close("KILLED")
    again = start(nimg=4000)
    again.tick(8000, record(8000))
    again.close("FINISHED")
    assert again.state() == first.state() != other.state()
    assert steps(store, first.state()["run_id"]) == [4000, 8000]


def test_a_new_run_in_the_folder_of_a_deleted_one_is_a_new_run(start):
    first = start()
    first.close("FINISHED")
    second = start()
    second.close("FINISHED")
    assert first.state() != second.state()


def test_what_the_store_never_got_is_sent_from_stats_jsonl(start, store, outdir, record):
    stats = JsonlTracker(outdir / NAME)
    for nimg in (0, 4000, 8000, 12000):
        stats.tick(nimg, record(nimg))
    tracker = start(run_id="0" * 32, nimg=8000)  # recorded in a store that is gone
    tracker.tick(12000, record(12000))
    tracker.close("FINISHED")
    assert tracker.state()["run_id"] != "0" * 32
    assert steps(store, tracker.state()["run_id"]) == [0, 4000, 8000, 12000]


def test_picture_that_is_refused_is_named_once_and_ticks_go_on(start, store, outdir, record, monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "MAX_IMAGE_ATTEMPTS", 1)
    lines = []
    tracker = start(report=lines.append)
    for nimg in (0, 4000):
        tracker.image("fakes", outdir / NAME / f"missing{nimg}.png", nimg)
        tracker.tick(nimg, record(nimg))
    tracker.close("FINISHED")
    assert steps(store, tracker.state()["run_id"]) == [0, 4000]
    refused = [line for line in lines if "does not take the picture" in line]
    assert len(refused) == len(lines) - 1 == 1
    assert "missing0.png (No such file or directory)" in refused[0]


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_server_that_does_not_answer(start, record, monkeypatch, capfd):
    pytest.importorskip("mlflow")
    port = closed_port()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{port}")
    lines, blocked = [], 0.0
    tracker = start(report=lines.append)
    for nimg in range(0, 40000, 4000):
        began = time.perf_counter()
        tracker.tick(nimg, record(nimg))
        blocked = max(blocked, time.perf_counter() - began)
    wait_until(lambda: lines)
    assert tracker.state() == {"run_id": None}
    began = time.perf_counter()
    tracker.close("FINISHED")
    assert time.perf_counter() - began < 10
    assert blocked < 0.1
    assert lines == [
        f"MLflow at http://127.0.0.1:{port} does not answer (Connection refused); "
        "training goes on, ticks are kept and sent when it is back",
        f"Warning: MLflow at http://127.0.0.1:{port} did not get 10 ticks (kimg 0.0 to 36.0); "
        "stats.jsonl holds them, and continuing the run sends them",
    ]
    assert capfd.readouterr() == ("", "")


class FlakyRun:
    """A run in a store that fails while `down` is set, without MLflow."""

    down = False
    image_error = None

    def __init__(self, spec):
        self.run_id, self.experiment_id, self.newest_nimg, self.is_open = "r", "1", -1, False
        self.received, self.images, self.status = [], [], None

    def check(self):
        if self.down:
            raise ConnectionRefusedError(111, "Connection refused")

    def open(self):
        self.check()
        self.is_open = True

    def log_ticks(self, ticks):
        self.check()
        self.received += [tick.nimg for tick in ticks[:3]]
        self.newest_nimg = self.received[-1]

    def log_image(self, name, path, nimg):
        self.check()
        self.images.append(nimg)

    def terminate(self, status):
        self.status = status


@pytest.fixture
def flaky(monkeypatch, tmp_path):
    """A tracker on a FlakyRun, its lines, and the run."""
    monkeypatch.setattr(mlflow_tracker, "MlflowRun", FlakyRun)
    monkeypatch.setattr(mlflow_tracker, "import_mlflow", lambda: None)
    monkeypatch.setattr(mlflow_tracker, "MAX_RETRY_SECONDS", 0.02)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    (tmp_path / NAME).mkdir()
    lines = []
    tracker = MlflowTracker(NAME, "gan", tmp_path, {}, {}, report=lines.append)
    wait_until(lambda: lines)
    del lines[:]
    yield tracker, lines, tracker._run
    tracker.close("KILLED")


def test_ticks_of_an_outage_arrive_later_in_order_and_once(flaky, record, tmp_path):
    tracker, lines, run = flaky
    run.down = True
    for nimg in range(0, 40000, 4000):
        tracker.tick(nimg, record(nimg))
        tracker.image("fakes", tmp_path / "fakes.png", nimg)
    wait_until(lambda: lines)
    time.sleep(0.1)
    run.down = False
    wait_until(lambda: len(run.images) == 10)
    tracker.close("FINISHED")
    assert run.received == run.images == list(range(0, 40000, 4000))
    assert run.status == "FINISHED"
    assert [line.split(" (")[0] for line in lines] == [
        "MLflow at http://server does not answer",
        "MLflow at http://server is back; it has every tick so far",
    ]


def test_more_ticks_than_are_kept_are_read_from_stats_jsonl(flaky, record, tmp_path, monkeypatch):
    monkeypatch.setattr(mlflow_tracker, "MAX_WAITING_TICKS", 4)
    tracker, _, run = flaky
    run.down = True
    stats = JsonlTracker(tmp_path / NAME)
    for nimg in range(0, 40000, 4000):
        stats.tick(nimg, record(nimg))
        tracker.tick(nimg, record(nimg))
    assert len(tracker._ticks) <= 4
    run.down = False
    tracker.close("FINISHED")
    assert run.received == list(range(0, 40000, 4000))


def test_close_gives_up_on_a_store_that_hangs(flaky, record, monkeypatch):
    tracker, lines, run = flaky
    monkeypatch.setattr(mlflow_tracker, "CLOSE_SECONDS", 0.2)
    released = threading.Event()
    monkeypatch.setattr(run, "log_ticks", lambda ticks: released.wait(10))
    tracker.tick(4000, record(4000))
    began = time.perf_counter()
    tracker.close("FINISHED")
    assert time.perf_counter() - began < 2
    assert "did not get 1 ticks (kimg 4.0 to 4.0)" in lines[0]
    run.newest_nimg = 4000
    released.set()


@pytest.mark.usefixtures("no_mlflow")
def test_without_mlflow_one_line_says_so(tmp_path, record):
    lines = []
    tracker = MlflowTracker(NAME, "gan", tmp_path, {}, {}, run_id="abc", nimg=4000, report=lines.append)
    tracker.tick(8000, record(8000))
    wait_until(lambda: lines)
    tracker.tick(12000, record(12000))
    tracker.image("fakes", tmp_path / "fakes.png", 12000)
    assert tracker.state() == {"run_id": "abc"}
    tracker.close("FINISHED")
    assert lines == [
        "MLflow is not installed (pip install mlflow); training goes on without it, and stats.jsonl holds every number"
    ]


def test_settings_of_the_user_stay(monkeypatch, flaky):
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    assert os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] == "1"
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "33")
    mlflow_import.set_environment_defaults()
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == "33"


def test_importing_the_package_imports_no_mlflow():
    code = "import sys, gan.tracking; sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # newer Pythons dislike any fork beside threads
def test_fork_waits_for_the_import():
    mlflow_import._install_fork_gate()
    held = threading.Event()

    def hold():
        with mlflow_import._fork_gate:
            held.set()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(0 if mlflow_import._fork_gate.acquire(blocking=False) else 1)
    assert time.perf_counter() - began > 0.2
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


def test_tick_of_leaves_out_what_is_no_number():
    record = {
        "Loss/G/loss": {"mean": 1},
        "a": {"mean": None},
        "b": {"mean": math.inf},
        "odd name:\u00e9": {"mean": 2.0},
    }
    tick = tick_of(5, {**record, "timestamp": 1.5})
    assert tick.metrics == (("Loss/G/loss", 1.0), ("odd name__", 2.0))
    assert (tick.nimg, tick.timestamp) == (5, 1500)


def test_flat_params():
    params = dict(flat_params({"a": {"b": [1], "c": {}}, "long": "x" * 10_000, "none": None}))
    assert params == {"a.b": "[1]", "a.c": "{}", "long": "x" * MAX_PARAM_LENGTH, "none": "None"}
