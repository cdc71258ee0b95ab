"""One run in an MLflow store. Everything here may take seconds or raise; mlflow_tracker.py keeps that from training."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gan.errors import without_password
from gan.tracking.jsonl import mean_of
from gan.tracking.mlflow_import import import_mlflow
from gan.tracking.mlflow_store import public_uri

RUN_DIR_TAG = "gan.run_dir"
BRANCH_TAG = "gan.branch"
PROGRESS = "Progress/kimg"  # every tick has it
GRID_FOLDER = "grids"
PREVIEW_FOLDER = "images"  # MLflow's own
MEASURED_PREFIX = "Metrics/"
MAX_METRICS_PER_REQUEST = 1000  # these five are MLflow's own limits
MAX_PARAMS_PER_REQUEST = 100
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
MAX_PREVIEW_SIZE = 2048  # pixels, long side; a full grid would cost MLflow 20 s of CPU


@dataclass(frozen=True)
class Tick:
    """The numbers of one tick, or of a measurement of the snapshot at that moment."""

    nimg: int
    timestamp: int
    """Milliseconds since 1970."""
    metrics: tuple[tuple[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class RunSpec:
    """Which run, in which store."""

    uri: str
    artifact_location: str | None
    """Where a new experiment keeps its files; None leaves it to the server."""
    experiment: str
    run_dir: Path
    params: Mapping[str, Any]
    tags: Mapping[str, Any]
    run_id: str | None
    """The run to continue, when known."""
    continued: bool
    """Whether the folder may have a run already; if not, one is made."""
    branch: int = 0
    """Above 0 after training went back to an older state: each time the rest is a run of its own."""
    start_time: int | None = None
    """Of a run that is made, in milliseconds since 1970; None: now."""

    @property
    def shown_uri(self) -> str:
        """The address without a password."""
        return public_uri(self.uri)

    @property
    def run_name(self) -> str:
        """As the run is called in MLflow."""
        return self.run_dir.name + (f" (branch {self.branch})" if self.branch else "")

    @property
    def folder_tag(self) -> str:
        """What a run is found by again; no other branch has it."""
        return str(self.run_dir) + (f" (branch {self.branch})" if self.branch else "")


class MlflowRun:
    """The run of `spec`: found again or made by `open`, then written to. Use it from one thread."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._client: Any = None
        self._created = False
        self._held_pictures: set[str] | None = None  # file names of grids; None: to be asked
        self._held_previews: set[str] = set()  # the beginnings of their file names
        self._held_measured: dict[str, set[int]] = {}  # of each number that was asked for: the nimg that the store has
        self._start_time = int(time.time() * 1000) if spec.start_time is None else spec.start_time
        self.run_id = spec.run_id
        self.experiment_id: str | None = None
        self.status = "RUNNING"
        self.held: set[int] = set()
        """The ticks that the store has, as their nimg."""
        self.is_open = False

    def open(self, running: bool = True) -> None:
        """Find or make the run, and say that it is `running`.

        After a failure it may be called again, and makes no second run.
        """
        self._client = import_mlflow().MlflowClient(tracking_uri=self._spec.uri)
        run = self._run_by_id() or self._run_by_folder() or self._create_run()
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        self.status = run.info.status
        self._log_params(known=run.data.params)
        if not self._created:
            self._set_tags()
            if running:
                self._client.update_run(self.run_id, status="RUNNING")
            self.held = self._steps_of(PROGRESS)
        self.is_open = True

    def log_ticks(self, ticks: Sequence[Tick]) -> int:
        """Send the first of `ticks`, as many as one request holds; returns how many, and they are in `held` then.

        A request sent twice, because its answer got lost, is stored once: MLflow drops values that are equal in all.
        """
        from mlflow.entities import Metric

        metrics: list[Any] = []
        sent: list[int] = []
        for tick in ticks:
            if metrics and len(metrics) + len(tick.metrics) > MAX_METRICS_PER_REQUEST:
                break
            metrics += [Metric(name, value, tick.timestamp, tick.nimg) for name, value in tick.metrics]
            sent.append(tick.nimg)
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        self.held.update(sent)
        return len(sent)

    def log_measured(self, measured: Sequence[Tick]) -> int:
        """Send measurements but for the numbers that the store has, which it cannot replace; how many were sent."""
        from mlflow.entities import Metric

        sent = 0
        for tick in measured:
            missing = [(name, value) for name, value in tick.metrics if tick.nimg not in self._measured_at(name)]
            metrics = [Metric(name, value, tick.timestamp, tick.nimg) for name, value in missing]
            if metrics:
                self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
                sent += 1
            for name, _ in missing:
                self._held_measured[name].add(tick.nimg)
        return sent

    def _measured_at(self, name: str) -> set[int]:
        """Where the store has a number; it is asked once."""
        if name not in self._held_measured:
            self._held_measured[name] = self._steps_of(name)
        return self._held_measured[name]

    def _steps_of(self, name: str) -> set[int]:
        return {metric.step for metric in self._client.get_metric_history(self.run_id, name)}

    def log_image(self, name: str, path: Path, nimg: int) -> bool:
        """Send a preview for the viewer's step slider, then the picture whole, below grids/; once a file name.

        Returns False when the store has the picture already.
        """
        from PIL import Image

        held = self._find_held_pictures() if self._held_pictures is None else self._held_pictures
        if path.name in held:
            return False
        self._held_pictures = None  # unless all goes well: what failed here may have arrived
        preview = _preview_name(name, nimg)
        if preview not in self._held_previews:
            with Image.open(path) as image:
                image.thumbnail((MAX_PREVIEW_SIZE, MAX_PREVIEW_SIZE))
                self._client.log_image(self.run_id, image, key=_allowed_name(name), step=nimg, synchronous=True)
            self._held_previews.add(preview)
        self._client.log_artifact(self.run_id, str(path), GRID_FOLDER)
        self._held_pictures = {*held, path.name}
        return True

    def check(self) -> None:
        """Raise when the store does not answer."""
        self._client.get_run(self.run_id)

    def terminate(self, status: str, end_time: int | None = None) -> None:
        """Set the final status, 'FINISHED', 'KILLED' or 'FAILED', as of `end_time` in milliseconds since 1970."""
        self._client.set_terminated(self.run_id, status, end_time)
        self.status = status

    def _find_held_pictures(self) -> set[str]:
        """Ask which pictures the store has; of a preview without its picture, the picture is still to come."""
        grids = self._client.list_artifacts(self.run_id, GRID_FOLDER)
        previews = self._client.list_artifacts(self.run_id, PREVIEW_FOLDER)
        # MLflow writes a preview as two files, NAME+step+STEP+timestamp+..., of which the .webp is the last.
        whole = [PurePosixPath(file.path).name for file in previews if file.path.endswith(".webp")]
        self._held_previews = {name.partition("+timestamp+")[0] for name in whole}
        return {PurePosixPath(file.path).name for file in grids}

    def _run_by_id(self) -> Any:
        from mlflow.exceptions import MlflowException

        if self.run_id is None:
            return None
        try:
            run = self._client.get_run(self.run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        same_branch = run.data.tags.get(BRANCH_TAG, "0") == str(self._spec.branch)
        return run if same_branch and run.info.lifecycle_stage == "active" else None

    def _run_by_folder(self) -> Any:
        """The newest run of this run folder and branch.

        When training starts anew, only the one that we made ourselves in a request whose answer got lost. A server
        that hung may have got that request twice, and makes two runs of it when it goes on.
        """
        tag = self._spec.folder_tag
        quote = '"' if "'" in tag else "'"
        found = self._client.search_runs(
            [self._experiment_id()],
            f"tags.`{RUN_DIR_TAG}` = {quote}{tag}{quote}",
            order_by=["attributes.start_time DESC"],
        )
        if self._created:
            own, *twins = [run for run in found if run.info.start_time == self._start_time] or [None]
            for twin in twins:
                self._client.delete_run(twin.info.run_id)
            return own
        return found[0] if found and self._spec.continued else None

    def _create_run(self) -> Any:
        self._created = True
        return self._client.create_run(
            self._experiment_id(), start_time=self._start_time, tags=self._tags(), run_name=self._spec.run_name
        )

    def _experiment_id(self) -> str:
        from mlflow.exceptions import MlflowException

        name = self._spec.experiment
        experiment = self._client.get_experiment_by_name(name)
        if experiment is None:
            try:
                return self._client.create_experiment(name, artifact_location=self._spec.artifact_location)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another run may start at the same moment
                    raise
                experiment = self._client.get_experiment_by_name(name)
        return experiment.experiment_id

    def _log_params(self, known: Mapping[str, str]) -> None:
        """Send the options that are not `known`: all of a new run, none as a rule of one that was found."""
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in flat_params(self._spec.params) if key not in known]
        for start in range(0, len(params), MAX_PARAMS_PER_REQUEST):
            chunk = params[start : start + MAX_PARAMS_PER_REQUEST]
            self._client.log_batch(self.run_id, params=chunk, synchronous=True)

    def _set_tags(self) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in self._tags().items()]
        self._client.log_batch(self.run_id, tags=tags, synchronous=True)

    def _tags(self) -> dict[str, str]:
        tags = {_allowed_name(key): str(value)[:MAX_TAG_LENGTH] for key, value in self._spec.tags.items()}
        return {**tags, RUN_DIR_TAG: self._spec.folder_tag, BRANCH_TAG: str(self._spec.branch)}


def tick_of(nimg: int, record: Mapping[str, Any]) -> Tick:
    """The means of a stats.jsonl record; what is not finite is left out."""
    means = ((name, mean_of(record, name)) for name in record)
    metrics = [(_allowed_name(name), mean) for name, mean in means if mean is not None]
    seconds = record.get("timestamp")
    if not isinstance(seconds, (int, float)):
        seconds = time.time()
    return Tick(nimg, int(seconds * 1000), tuple(metrics[:MAX_METRICS_PER_REQUEST]))


def measured_of(nimg: int, results: Mapping[str, float], timestamp: float) -> Tick:
    """The numbers of a metric; what is not finite is left out. `timestamp`: seconds."""
    metrics = [(_allowed_name(MEASURED_PREFIX + name), value) for name, value in results.items()]
    return Tick(nimg, int(timestamp * 1000), tuple((name, value) for name, value in metrics if math.isfinite(value)))


def flat_params(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested options as ('data.mirror', 'True') pairs, cut to the lengths that MLflow takes."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flat_params(value, f"{prefix}{key}.")
        else:
            yield _allowed_name(f"{prefix}{key}"), without_password(str(value))[:MAX_PARAM_LENGTH]


def _preview_name(name: str, nimg: int) -> str:
    """How MLflow begins the file names of the preview `name` at step `nimg`."""
    return f"{_allowed_name(name).replace('/', '~')}+step+{nimg}"


def _allowed_name(name: object) -> str:
    return re.sub(r"[^\w\-. /]", "_", str(name), flags=re.ASCII)[:MAX_NAME_LENGTH]
