"""MLflow behind the Tracker interface: all of it on one background thread, so that training never waits for it."""

from __future__ import annotations

import os
import shlex
import threading
from collections import deque
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit, urlunsplit

from gan.tracking import jsonl
from gan.tracking.mlflow_import import import_mlflow, set_environment_defaults
from gan.tracking.mlflow_run import MlflowRun, RunSpec, Tick, recorded_ticks, tick_of
from gan.tracking.tracker import Report, print_line

CLOSE_SECONDS = 20.0
MAX_RETRY_SECONDS = 60.0
MAX_WAITING_TICKS = 10_000
MAX_WAITING_IMAGES = 32
MAX_IMAGE_ATTEMPTS = 3
TICKS_AT_ONCE = 100


class _Image(NamedTuple):
    name: str
    path: Path
    nimg: int


class MlflowTracker:
    """Records a run in MLflow: in `outdir`/mlflow.db and `outdir`/mlartifacts, or where MLFLOW_TRACKING_URI says.

    The run folder is `outdir`/`run_name`. To continue a run give its `run_id` (from `state()`) and `nimg`, the images
    seen so far; without the id, the run that was recorded for this folder is looked up. Ticks that never arrived are
    then sent from stats.jsonl. Nothing here raises or blocks, apart from `close`, which takes CLOSE_SECONDS at most.
    Importing MLflow and making its database takes 10 s of a core; with `wait_for_tick` that begins at the first tick.
    """

    def __init__(
        self,
        run_name: str,
        experiment: str,
        outdir: str | Path,
        params: Mapping[str, Any],
        tags: Mapping[str, Any],
        run_id: str | None = None,
        nimg: int = 0,
        report: Report = print_line,
        wait_for_tick: bool = False,
    ) -> None:
        set_environment_defaults()
        outdir = Path(outdir).absolute()
        chosen_uri = os.environ.get("MLFLOW_TRACKING_URI")
        spec = RunSpec(
            uri=chosen_uri or f"sqlite:///{(outdir / 'mlflow.db').as_posix()}",
            artifact_location=None if chosen_uri else str(outdir / "mlartifacts"),
            experiment=experiment,
            run_name=run_name,
            run_dir=outdir / run_name,
            params=dict(params),
            tags=dict(tags),
            run_id=run_id,
            nimg=nimg,
        )
        self._shown_uri = _without_password(spec.uri)
        self._stats_path = spec.run_dir / jsonl.FILE_NAME
        self._run = MlflowRun(spec)
        self._report_line = report
        self._changed = threading.Condition()  # guards the six fields below
        self._ticks: deque[Tick] = deque()
        self._images: deque[_Image] = deque()
        self._missed_up_to: int | None = nimg if nimg > 0 else None  # ticks to read from stats.jsonl, once connected
        self._final_status: str | None = None
        self._pictures_dropped = 0
        self._off = False  # no MLflow here, or closed
        self._failing = False
        self._image_attempts = 0
        self._image_reported = False
        self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
        self._started = False
        if not wait_for_tick:
            self._start()

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
        """Queue a picture; with too many waiting, the oldest stays in the run folder alone."""
        with self._changed:
            if self._off:
                return
            if len(self._images) >= MAX_WAITING_IMAGES:
                self._images.popleft()
                self._pictures_dropped += 1
            self._images.append(_Image(name, Path(path), nimg))
            self._changed.notify()

    def state(self) -> dict[str, Any]:
        """{'run_id': the MLflow run, or None while it is not known yet}."""
        return {"run_id": self._run.run_id}

    def close(self, status: str) -> None:
        """Send what waits, set the run's status, and name the ticks that could not be delivered."""
        with self._changed:
            if self._final_status is not None:
                return
            self._final_status = status
            self._changed.notify()
        self._start()
        self._thread.join(CLOSE_SECONDS)
        with self._changed:
            undelivered = [tick.nimg / 1000 for tick in self._ticks]
            pictures = self._pictures_dropped + len(self._images)
            self._off = True
        if undelivered:
            self._report_line(
                f"Warning: MLflow at {self._shown_uri} did not get {len(undelivered)} ticks (kimg {undelivered[0]:.1f} "
                f"to {undelivered[-1]:.1f}); stats.jsonl holds them, and continuing the run sends them"
            )
        if pictures:
            self._report_line(f"Warning: MLflow did not get {pictures} pictures; they lie in the run folder")

    def _start(self) -> None:
        if not self._started:
            self._started = True
            self._thread.start()

    # Everything below runs on the background thread.

    def _work(self) -> None:
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
                self._changed.wait_for(lambda: self._ticks or self._images or self._final_status is not None)
            return self._final_status is not None

    def _deliver(self, closing: bool) -> bool:
        """Send what waits. False when a picture is to be tried again; raises when the store fails."""
        if not self._run.is_open:
            self._run.open()
            self._say(f"MLflow records this run; to look at it: {self._place()}")
        self._queue_missed()
        self._send_ticks()
        if self._failing:
            self._failing = False
            self._say(f"MLflow at {self._shown_uri} is back; it has every tick so far")
        if closing and self._final_status is not None:
            self._run.terminate(self._final_status)
        return self._send_images()

    def _queue_missed(self) -> None:
        with self._changed:
            up_to, self._missed_up_to = self._missed_up_to, None
        if up_to is not None:
            missed = list(recorded_ticks(self._stats_path, self._run.newest_nimg, up_to))
            with self._changed:
                self._ticks.extendleft(reversed(missed))

    def _send_ticks(self) -> None:
        while True:
            with self._changed:
                while self._ticks and self._ticks[0].nimg <= self._run.newest_nimg:
                    self._ticks.popleft()
                batch = list(islice(self._ticks, TICKS_AT_ONCE))
            if not batch:
                return
            self._run.log_ticks(batch)

    def _send_images(self) -> bool:
        """Send the pictures that wait. False when one failed and is to be tried again."""
        while True:
            with self._changed:
                if not self._images:
                    return True
                image = self._images[0]
            try:
                self._run.log_image(*image)
            except Exception as error:
                self._run.check()  # a store that is down raises here, and the picture waits until it is back
                self._image_attempts += 1
                if self._image_attempts < MAX_IMAGE_ATTEMPTS and self._final_status is None:
                    return False
                self._report_refused_image(image, error)
            self._image_attempts = 0
            with self._changed:
                if self._images and self._images[0] is image:
                    self._images.popleft()

    def _give_up(self, error: Exception) -> None:
        if isinstance(error, ModuleNotFoundError) and error.name == "mlflow":
            problem = "MLflow is not installed (pip install mlflow)"
        else:
            problem = f"MLflow cannot be imported ({_reason(error)})"
        self._say(f"{problem}; training goes on without it, and stats.jsonl holds every number")
        with self._changed:
            self._off = True
            self._ticks.clear()
            self._images.clear()

    def _report_failure(self, error: Exception) -> None:
        if not self._failing:
            self._failing = True
            silent = self._shown_uri.startswith("http") and any(isinstance(e, OSError) for e in _chain(error))
            self._say(
                f"MLflow at {self._shown_uri} {'does not answer' if silent else 'failed'} ({_reason(error)}); "
                "training goes on, ticks are kept and sent when it is back"
            )

    def _report_refused_image(self, image: _Image, error: Exception) -> None:
        if not self._image_reported:
            self._image_reported = True
            self._say(f"MLflow does not take the picture {image.path} ({_reason(error)}); training goes on")

    def _place(self) -> str:
        if self._shown_uri.startswith("http"):
            return f"{self._shown_uri}/#/experiments/{self._run.experiment_id}/runs/{self._run.run_id}"
        return f"mlflow ui --backend-store-uri {shlex.quote(self._shown_uri)}"

    def _say(self, text: str) -> None:
        if not self._off:
            self._report_line(text)


def _chain(error: BaseException) -> list[BaseException]:
    """The error and what caused it, innermost last."""
    errors = [error]
    while (inner := errors[-1].__cause__ or errors[-1].__context__) is not None and inner not in errors:
        errors.append(inner)
    return errors


def _reason(error: BaseException) -> str:
    innermost = _chain(error)[-1]
    if isinstance(innermost, OSError):  # "Connection refused" and not the six lines around it
        return innermost.strerror or str(innermost)
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _without_password(uri: str) -> str:
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri.rstrip("/")
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])).rstrip("/")
