import errno
import gc
import json
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
from gan.tracking.mlflow_run import MAX_PARAM_LENGTH, MlflowRun, flat_params, tick_of

NAME = "00000-test"


@pytest.fixture
def start(outdir):
    """Starts trackers on one store; keyword arguments replace those of a new run."""
    trackers = []

    def start(**changes):
        settings = {
            "run_dir": outdir / NAME,
            "experiment": "gan",
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
    Image.fromarray(np.zeros((300, 3000, 4), np.uint8)).save(picture)
    tracker.image("fakes", picture, 4000)
    tracker.measured(4000, {"swd": 9.5, "swd_16": math.inf}, 1.7e9)
    tracker.close("FINISHED")

    run = store.get_run(tracker.state()["run_id"])
    assert run.info.status == "FINISHED"
    assert run.info.run_name == NAME
    assert run.info.artifact_uri.startswith(str(outdir / "mlartifacts"))
    assert run.data.params == {"batch": "32", "data.mirror": "True"}
    assert run.data.tags["gan.cfg"] == "auto"
    assert run.data.tags["gan.run_dir"] == str(outdir / NAME)
    assert run.data.metrics == {"Loss/G/loss": 0.5, "Progress/tick": 1.0, "Progress/kimg": 4.0, "Metrics/swd": 9.5}
    assert steps(store, run.info.run_id) == [0, 4000]
    (measured,) = store.get_metric_history(run.info.run_id, "Metrics/swd")
    assert (measured.step, measured.timestamp) == (4000, 1_700_000_000_000)
    assert [file.path for file in store.list_artifacts(run.info.run_id, "grids")] == ["grids/fakes000004.png"]
    previews = [file.path for file in store.list_artifacts(run.info.run_id, "images") if file.path.endswith(".png")]
    assert len(previews) == 1
    assert previews[0].startswith("images/fakes+step+4000+")
    with Image.open(store.download_artifacts(run.info.run_id, previews[0], str(outdir))) as preview:
        assert (preview.size, preview.mode) == ((2048, 205), "RGBA")
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

    # The last state was saved at 4000.
    second = start(run_id=run_id, nimg=4000, continued=True, params={"batch": 64, "gamma": 1})
    assert second.state() == {"run_id": run_id}
    for nimg in (8000, 12000):
        second.tick(nimg, record(nimg, **{"Loss/G/loss": 0.75}))
    second.image("fakes", picture, 8000)
    wait_until(lambda: steps(store, run_id)[-1] == 12000)
    assert store.get_run(run_id).info.status == "RUNNING"
    second.close("FINISHED")
    assert steps(store, run_id) == [0, 4000, 8000, 12000]
    assert store.get_run(run_id).data.params == {"batch": "32", "data.mirror": "True", "gamma": "1"}
    assert store.get_run(run_id).info.status == "FINISHED"
    assert len(store.list_artifacts(run_id, "images")) == 2  # one preview and MLflow's own thumbnail


def test_continued_without_id_finds_the_run_of_its_folder(start, store, outdir, record):
    first = start()
    first.tick(4000, record(4000))
    first.close("KILLED")
    other = start(run_dir=outdir / "00001-test")
    other.tick(4000, record(4000))
    other.close("KILLED")
    again = start(nimg=4000, continued=True)
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


def test_a_request_that_arrived_twice_without_an_answer_leaves_one_run(start, store, record, monkeypatch):
    create = MlflowRun._create_run
    made = []

    def twice(run):
        if made:
            raise AssertionError("made again")
        made.extend([create(run), create(run)])
        raise ConnectionResetError(104, "Connection reset by peer")

    monkeypatch.setattr(MlflowRun, "_create_run", twice)
    lines = []
    tracker = start(report=lines.append)
    tracker.tick(0, record(0))
    wait_until(lambda: any("is back" in line for line in lines))
    tracker.close("FINISHED")
    (run,) = store.search_runs([made[0].info.experiment_id])
    assert run.info.run_id == tracker.state()["run_id"]
    assert run.data.params == {"batch": "32", "data.mirror": "True"}


def test_what_the_store_never_got_is_sent_from_stats_jsonl(start, store, outdir, record):
    stats = JsonlTracker(outdir / NAME)
    for nimg in (0, 4000, 8000, 12000):
        stats.tick(nimg, record(nimg))
    tracker = start(run_id="0" * 32, nimg=8000, continued=True)  # recorded in a store that is gone
    tracker.tick(12000, record(12000))
    tracker.close("FINISHED")
    assert tracker.state()["run_id"] != "0" * 32
    assert steps(store, tracker.state()["run_id"]) == [0, 4000, 8000, 12000]


def test_a_hole_is_filled(start, store, outdir, record):
    stats = JsonlTracker(outdir / NAME)
    first = start()
    for nimg in (0, 4000, 8000, 12000):
        stats.tick(nimg, record(nimg))
        if nimg != 4000:
            first.tick(nimg, record(nimg))
    first.close("KILLED")
    second = start(nimg=12000, continued=True)
    second.tick(16000, record(16000))
    second.close("FINISHED")
    assert second.state() == first.state()
    assert steps(store, first.state()["run_id"]) == [0, 4000, 8000, 12000, 16000]


def test_a_run_killed_before_its_first_state_keeps_its_mlflow_run(start, store, outdir, record):
    first = start()
    first.tick(4000, record(4000))
    first.close("KILLED")
    second = start(continued=True)
    for nimg in (4000, 8000):
        second.tick(nimg, record(nimg, **{"Timing/total_sec": nimg}))
    second.close("FINISHED")
    assert second.state() == first.state()
    assert steps(store, first.state()["run_id"]) == [4000, 8000]


def draw(path):
    Image.new("L", (8, 8)).save(path)
    return path


def grids(store, run_id):
    return sorted(file.path for file in store.list_artifacts(run_id, "grids"))


def preview_steps(store, run_id):
    paths = [file.path for file in store.list_artifacts(run_id, "images") if file.path.endswith(".png")]
    return sorted(tuple(path.removeprefix("images/").split("+")[0:3:2]) for path in paths)


def test_pictures_that_the_store_never_got_are_sent_from_the_folder(start, store, outdir, record):
    stats = JsonlTracker(outdir / NAME)
    first = start()
    for nimg in (125, 4100):
        stats.tick(nimg, record(nimg))
        first.tick(nimg, record(nimg))
    paths = [draw(outdir / NAME / f"{name}.png") for name in ("reals", "fakes_init", "fakes000000", "fakes000004")]
    draw(outdir / NAME / "fakes000008.png")  # made after the state from which the run continues
    first.image("reals", paths[0], 0)
    first.image("fakes", paths[2], 125)
    first.close("KILLED")
    second = start(nimg=4100, continued=True)
    second.close("FINISHED")
    run_id = second.state()["run_id"]
    assert run_id == first.state()["run_id"]
    assert grids(store, run_id) == sorted(f"grids/{path.name}" for path in paths)
    assert preview_steps(store, run_id) == [("fakes", "0"), ("fakes", "125"), ("fakes", "4100"), ("reals", "0")]


def test_preview_that_arrived_without_its_picture_is_not_sent_again(start, store, outdir):
    picture = draw(outdir / NAME / "fakes_init.png")
    first = start()
    first.close("KILLED")
    run_id = first.state()["run_id"]
    with Image.open(picture) as image:
        store.log_image(run_id, image, key="fakes", step=0)
    second = start(continued=True)
    second.close("FINISHED")
    assert grids(store, run_id) == ["grids/fakes_init.png"]
    assert preview_steps(store, run_id) == [("fakes", "0")]


def test_preview_that_arrived_without_an_answer_is_not_sent_again(start, store, outdir, record, monkeypatch):
    log_image = type(store).log_image
    sent = []

    def without_an_answer(*args, **kwargs):
        log_image(*args, **kwargs)
        sent.append(args)
        if len(sent) == 2:
            raise TimeoutError("timed out")

    monkeypatch.setattr(type(store), "log_image", without_an_answer)
    tracker = start()
    for name in ("reals", "fakes"):
        tracker.image(name, draw(outdir / NAME / f"{name}.png"), 0)
    tracker.tick(0, record(0))
    wait_until(lambda: len(sent) == 2)
    tracker.close("FINISHED")
    run_id = tracker.state()["run_id"]
    assert grids(store, run_id) == ["grids/fakes.png", "grids/reals.png"]
    assert preview_steps(store, run_id) == [("fakes", "0"), ("reals", "0")]


def test_a_branch_is_a_run_of_its_own_with_the_whole_history(start, store, outdir, record):
    stats = JsonlTracker(outdir / NAME)
    first = start()
    for nimg in (0, 4000, 8000):
        stats.tick(nimg, record(nimg))
        first.tick(nimg, record(nimg))
    draw(outdir / NAME / "fakes000000.png")
    first.close("KILLED")
    first_id = first.state()["run_id"]

    JsonlTracker(outdir / NAME, nimg=4000)
    second = start(run_id=first_id, nimg=4000, continued=True, branch=1)
    second.tick(8000, record(8000, **{"Loss/G/loss": 0.75}))
    second.close("KILLED")
    run_id = second.state()["run_id"]
    assert run_id != first_id
    run, first_run = store.get_run(run_id), store.get_run(first_id)
    assert (run.info.run_name, first_run.info.run_name) == (f"{NAME} (branch 1)", NAME)
    assert (run.data.tags["gan.branch"], first_run.data.tags["gan.branch"]) == ("1", "0")
    assert first_run.data.tags["gan.run_dir"] == str(outdir / NAME)
    assert steps(store, run_id) == steps(store, first_id) == [0, 4000, 8000]
    assert (run.data.metrics["Loss/G/loss"], first_run.data.metrics["Loss/G/loss"]) == (0.75, 0.5)
    assert grids(store, run_id) == ["grids/fakes000000.png"]

    (outdir / NAME / "mlflow-run.json").unlink()
    for settings in ({"run_id": run_id}, {"run_id": first_id}, {}):  # a state may still name the older run
        again = start(nimg=8000, continued=True, branch=1, **settings)
        again.close("KILLED")
        assert again.state() == {"run_id": run_id}
    assert len(store.search_runs([run.info.experiment_id])) == 2


def test_note_in_the_run_folder(start, outdir, monkeypatch):
    tracker = start()
    tracker.close("FINISHED")
    note = {"run_id": tracker.state()["run_id"], "tracking_uri": f"sqlite:///{outdir / 'mlflow.db'}", "branch": 0}
    assert json.loads((outdir / NAME / "mlflow-run.json").read_text()) == note
    (outdir / NAME).rename(outdir / "00000-moved")  # its tag in the store names the old folder
    again = start(run_dir=outdir / "00000-moved", continued=True)
    again.close("FINISHED")
    assert again.state() == tracker.state()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{closed_port()}")
    elsewhere = start(run_dir=outdir / "00000-moved", continued=True, branch=1)
    elsewhere.close("KILLED")
    text = (outdir / "00000-moved/mlflow-run.json").read_text()
    assert (json.loads(text)["run_id"], json.loads(text)["branch"]) == (None, 1)
    assert "secret" not in text


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
    assert len(refused) == len(lines) - 2 == 1
    assert "missing0.png (No such file or directory)" in refused[0]
    assert "did not get 2 pictures; to send what is missing: python -m gan mlflow-sync" in lines[-1]


def closed_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_server_that_does_not_answer(start, outdir, record, monkeypatch, capfd):
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
        f"WARNING:   MLflow at http://127.0.0.1:{port} did not get 10 ticks (kimg 0.0 to 36.0); to send what is "
        f"missing: python -m gan mlflow-sync {outdir / NAME}",
    ]
    assert capfd.readouterr() == ("", "")


class FlakyRun:
    """A run in a store that fails while `down` is set, without MLflow."""

    down = False
    image_error = None

    def __init__(self, spec):
        self.run_id, self.experiment_id, self.held, self.is_open = "r", "1", set(), False
        self.received, self.measured, self.images, self.status = [], [], [], None

    def check(self):
        if self.down:
            raise ConnectionRefusedError(111, "Connection refused")

    def open(self):
        self.check()
        self.is_open = True

    def log_ticks(self, ticks):
        self.check()
        self.received += [tick.nimg for tick in ticks[:3]]
        self.held.update(self.received)

    def log_measured(self, measured):
        self.check()
        self.measured += [(tick.nimg, dict(tick.metrics)) for tick in measured]

    def log_image(self, name, path, nimg):
        self.check()
        if self.image_error is not None:
            raise self.image_error
        self.images.append(nimg)
        return True

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
    tracker = MlflowTracker(tmp_path / NAME, "gan", {}, {}, report=lines.append)
    tracker._start()
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


def test_measurements_of_an_outage_arrive_later_or_are_named(flaky, record):
    tracker, lines, run = flaky
    run.down = True
    tracker.measured(8000, {"swd": 5.0}, 1.7e9)
    tracker.tick(9000, record(9000))
    wait_until(lambda: lines)
    run.down = False
    wait_until(lambda: run.measured)
    run.down = True
    tracker.measured(8000, {"fid50k": 4.0}, 1.7e9)
    tracker.close("FINISHED")
    assert (run.received, run.measured) == ([9000], [(8000, {"Metrics/swd": 5.0})])
    assert "did not get 1 measurement; to send what is missing: python -m gan mlflow-sync" in lines[-1]


def test_pictures_that_were_refused_are_tried_again_when_one_is_taken(flaky, record, tmp_path):
    tracker, lines, run = flaky
    run.image_error = OSError(errno.ENOSPC, "No space left on device")
    for nimg in (4000, 8000):
        tracker.image("fakes", tmp_path / f"fakes{nimg}.png", nimg)
    wait_until(lambda: len(tracker._refused) == 2)
    tracker.tick(8000, record(8000))
    wait_until(lambda: run.received == [8000])
    run.image_error = None
    tracker.image("fakes", tmp_path / "fakes12000.png", 12000)
    wait_until(lambda: run.images == [12000, 4000, 8000])
    tracker.close("FINISHED")
    assert len(lines) == 1
    assert "does not take the picture" in lines[0]


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
    assert "did not get 1 tick (kimg 4.0 to 4.0)" in lines[0]
    run.held.add(4000)
    released.set()


@pytest.mark.usefixtures("no_mlflow")
def test_without_mlflow_one_line_says_so(tmp_path, record):
    lines = []
    run = {"run_id": "abc", "nimg": 4000, "continued": True}
    tracker = MlflowTracker(tmp_path / NAME, "gan", {}, {}, report=lines.append, **run)
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
            time.sleep(0.1)

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    began = time.perf_counter()
    child = os.fork()
    if child == 0:
        os._exit(0 if mlflow_import._fork_gate.acquire(blocking=False) else 1)
    assert time.perf_counter() - began > 0.05
    assert os.waitpid(child, 0)[1] == 0
    thread.join()


@pytest.mark.parametrize("enabled", [True, False])
def test_the_import_leaves_the_collector_as_it_was(enabled, monkeypatch):
    pytest.importorskip("mlflow")
    seen = []
    monkeypatch.setattr(mlflow_import.importlib, "import_module", lambda name: seen.append(gc.isenabled()))
    try:
        (gc.enable if enabled else gc.disable)()
        mlflow_import.import_mlflow()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert set(seen) == {False}


@pytest.mark.usefixtures("no_mlflow")
def test_what_the_import_made_is_kept_from_the_collector_once(tmp_path, monkeypatch):
    (tmp_path / "mlflow.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mlflow")
    monkeypatch.setattr(mlflow_import, "_IMPORTED_LATER", ())
    seen = []
    monkeypatch.setattr(gc, "freeze", lambda: seen.append(gc.isenabled()))
    for _ in range(2):
        mlflow_import.import_mlflow()
    assert seen == [False]


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
    nested = {"a": {"b": [1], "c": {}}, "long": "x" * 10_000, "none": None, "init_from": "https://me:secret@a.org/x"}
    expected = {
        "a.b": "[1]",
        "a.c": "{}",
        "long": "x" * MAX_PARAM_LENGTH,
        "none": "None",
        "init_from": "https://a.org/x",
    }
    assert dict(flat_params(nested)) == expected
