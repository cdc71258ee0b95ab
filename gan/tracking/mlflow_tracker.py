"""MLflow behind the Tracker interface: all of it on one background thread, so that training never waits for it."""

from __future__ import annotations

import shlex
import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from gan.tracking.mlflow_folder import (
    Note,
    Picture,
    read_note,
    recorded_measured,
    recorded_pictures,
    recorded_ticks,
    spec_of,
    write_note,
)
from gan.tracking.mlflow_import import import_mlflow, set_environment_defaults
from gan.tracking.mlflow_run import MlflowRun, Tick, measured_of, tick_of
from gan.tracking.mlflow_store import count, import_problem, listed, reason, store_problem
from gan.tracking.tracker import Report, print_line

CLOSE_SECONDS = 20.0
MAX_RETRY_SECONDS = 60.0
MAX_WAITING_TICKS = 10_000
MAX_IMAGE_ATTEMPTS = 3
TICKS_AT_ONCE = 100


class MlflowTracker:
    """Records a run in MLflow: in mlflow.db and mlartifacts/ beside `run_dir`, or where MLFLOW_TRACKING_URI says.

    A `continued` run has seen `nimg` images; its `run_id` is that of `state()`, and without one the run that was
    recorded for this folder is looked up. Ticks and pictures that never arrived are then sent from the folder.
    `branch` counts how often training went back to an older state: what follows is a run of its own in MLflow, with
    all ticks and pictures up to there, and the runs before stay as they are.

    Nothing here raises or blocks, apart from `close`, which takes CLOSE_SECONDS at most. Importing MLflow and making
    its database takes 10 s of a core; that begins at the first tick, or else when it is closed.
    """

    def __init__(
        self,
        run_dir: Path,
        experiment: str,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        run_id: str | None = None,
        nimg: int = 0,
        continued: bool = False,
        branch: int = 0,
        report: Report = print_line,
    ) -> None:
        set_environment_defaults()
        self._spec = spec_of(run_dir, experiment, params, tags, run_id=run_id, continued=continued, branch=branch)
        self._shown_uri = self._spec.shown_uri
        self._run = MlflowRun(self._spec)
        self._report_line = report
        self._changed = threading.Condition()  # guards the seven fields below
        self._ticks: deque[Tick] = deque()
        self._measured: deque[Tick] = deque()
        self._images: deque[Picture] = deque()
        self._refused: list[Picture] = []  # to be tried again when the store takes another one
        self._missed_up_to: int | None = nimg if continued else None  # to be read from the folder, once connected
        self._final_status: str | None = None
        self._off = False  # no MLflow here, or closed
        self._failing = False
        self._complete = False  # the final status arrived
        self._image_attempts = 0
        self._image_reported = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._started = False

    def tick(self, nimg: int, record: dict[str, Any]) -> None:
        """Queue the means of a record as the metrics of step `nimg`."""
        tick = tick_of(nimg, record)
        self._start()
        with self._changed:
            if self._off:
                return
            if len(self._ticks) >= MAX_WAITING_TICKS:
                self._missed_up_to = self._ticks[-1].nimg
                self._ticks.clear()
            self._ticks.append(tick)
            self._changed.notify()

    def image(self, name: str, path: Path, nimg: int) -> None:
        """Queue a picture; its file stays where it is until the store has it."""
        with self._changed:
            if self._off:
                return
            self._images.append(Picture(name, Path(path), nimg))
            self._changed.notify()

    def measured(self, nimg: int, results: Mapping[str, float], timestamp: float) -> None:
        """Queue the numbers of a metric as metrics of step `nimg`."""
        with self._changed:
            if self._off:
                return
            self._measured.append(measured_of(nimg, results, timestamp))
            self._changed.notify()

    def state(self) -> dict[str, Any]:
        """{'run_id': the MLflow run, or None while it is not known yet}."""
        return {"run_id": self._run.run_id}

    def close(self, status: str) -> None:
        """Send what waits, set the run's status, and name what could not be delivered."""
        with self._changed:
            if self._final_status is not None:
                return
            self._final_status = status
            self._changed.notify()
        self._start()
        self._thread.join(CLOSE_SECONDS)
        with self._changed:
            undelivered = self._undelivered()
            self._off = True
        if undelivered:
            self._report_line(
                f"WARNING:   MLflow at {self._shown_uri} did not get {undelivered}; to send what is missing: "
                f"python -m gan mlflow-sync {shlex.quote(str(self._spec.run_dir))}"
            )

    def _undelivered(self) -> str:
        """What the store lacks, in words; empty when it has everything."""
        if self._off:
            return ""
        parts = []
        if kimg := [tick.nimg / 1000 for tick in self._ticks]:
            parts.append(f"{count(len(kimg), 'tick')} (kimg {kimg[0]:.1f} to {kimg[-1]:.1f})")
        if self._measured:
            parts.append(count(len(self._measured), "measurement"))
        if pictures := len(self._images) + len(self._refused):
            parts.append(count(pictures, "picture"))
        if not parts and not self._complete:
            parts.append("the end of the run")
        return listed(parts)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._thread.start()

    # Everything below runs on the background thread.

    def _work(self) -> None:
        if self._spec.branch != read_note(self._spec.run_dir).branch:  # mlflow-sync needs to know, server or not
            self._write_note()
        try:
            import_mlflow()
        except Exception as error:  # a broken installation raises all sorts
            self._give_up(error)
            return
        closing = False
        delay = 0.0
        while not closing:
            closing = self._wait(delay)
            try:
                finished = self._deliver(closing)
            except Exception as error:
                self._report_failure(error)
                finished = False
            delay = 0.0 if finished else min(max(1.0, 2 * delay), MAX_RETRY_SECONDS)

    def _wait(self, delay: float) -> bool:
        """Wait for work, or after a failure for `delay` seconds. True when the run is being closed."""
        with self._changed:
            if delay:
                self._changed.wait_for(lambda: self._final_status is not None, timeout=delay)
            elif self._run.is_open:
                self._changed.wait_for(lambda: self._has_any() or self._final_status is not None)
            return self._final_status is not None

    def _has_any(self) -> bool:
        return bool(self._ticks or self._measured or self._images)

    def _deliver(self, closing: bool) -> bool:
        """Send what waits. False when a picture is to be tried again; raises when the store fails."""
        if not self._run.is_open:
            self._run.open()
            self._write_note()
            self._say(f"MLflow records this run; to look at it: {self._place()}")
        self._queue_missed()
        self._send_ticks()
        self._send_measured()
        if self._failing:
            self._failing = False
            self._say(f"MLflow at {self._shown_uri} is back; it has every tick so far")
        if closing and self._final_status is not None:
            self._run.terminate(self._final_status)
            self._complete = True
            with self._changed:
                self._images.extend(self._refused)
                self._refused.clear()
        return self._send_images()

    def _write_note(self) -> None:
        write_note(self._spec.run_dir, Note(self._run.run_id, self._shown_uri, self._spec.branch))

    def _queue_missed(self) -> None:
        with self._changed:
            up_to, self._missed_up_to = self._missed_up_to, None
        if up_to is not None:
            ticks = list(recorded_ticks(self._spec.run_dir, up_to))
            measured = recorded_measured(self._spec.run_dir, ticks, up_to)
            pictures = recorded_pictures(self._spec.run_dir, ticks, up_to)
            with self._changed:  # what the store has is passed over
                self._ticks.extendleft(reversed(ticks))
                self._measured.extendleft(reversed(measured))
                self._images.extendleft(reversed(pictures))

    def _send_ticks(self) -> None:
        while True:
            with self._changed:
                while self._ticks and self._ticks[0].nimg in self._run.held:
                    self._ticks.popleft()
                first = islice(self._ticks, TICKS_AT_ONCE)
                batch = [tick for tick in first if tick.nimg not in self._run.held]
            if not batch:
                return
            self._run.log_ticks(batch)

    def _send_measured(self) -> None:
        while self._measured:
            self._run.log_measured([self._measured[0]])
            with self._changed:
                self._measured.popleft()

    def _send_images(self) -> bool:
        """Send the pictures that wait. False when one failed and is to be tried again."""
        while True:
            with self._changed:
                if not self._images:
                    return True
                image = self._images[0]
            try:
                sent = self._run.log_image(*image)
            except Exception as error:
                self._run.check()  # a store that is down raises here, and the picture waits until it is back
                self._image_attempts += 1
                if self._image_attempts < MAX_IMAGE_ATTEMPTS and self._final_status is None:
                    return False
                self._report_refused_image(image, error)
                with self._changed:
                    self._refused.append(image)
            else:
                with self._changed:
                    if sent:
                        self._images.extend(self._refused)
                        self._refused.clear()
            self._image_attempts = 0
            with self._changed:
                self._images.popleft()

    def _give_up(self, error: Exception) -> None:
        self._say(f"{import_problem(error)}; training goes on without it, and stats.jsonl holds every number")
        with self._changed:
            self._off = True
            self._ticks.clear()
            self._measured.clear()
            self._images.clear()

    def _report_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            problem = store_problem(self._shown_uri, error)
            self._say(f"{problem}; training goes on, ticks are kept and sent when it is back")

    def _report_refused_image(self, image: Picture, error: Exception) -> None:
        if not self._image_reported:
            self._image_reported = True
            self._say(f"MLflow does not take the picture {image.path} ({reason(error)}); training goes on")

    def _place(self) -> str:
        if self._shown_uri.startswith("http"):
            return f"{self._shown_uri}/#/experiments/{self._run.experiment_id}/runs/{self._run.run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self._shown_uri)}"

    def _say(self, text: str) -> None:
        if not self._off:
            self._report_line(text)
