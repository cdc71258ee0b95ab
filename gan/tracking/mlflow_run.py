"""One run in an MLflow store. Everything here may take seconds or raise; mlflow_tracker.py keeps that from training."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from gan.tracking.jsonl import read_records, record_nimg
from gan.tracking.mlflow_import import import_mlflow

RUN_DIR_TAG = "gan.run_dir"
GRID_FOLDER = "grids"
MAX_METRICS_PER_REQUEST = 1000  # these five are MLflow's own limits
MAX_PARAMS_PER_REQUEST = 100
MAX_NAME_LENGTH = 250
MAX_PARAM_LENGTH = 6000
MAX_TAG_LENGTH = 5000
MAX_PREVIEW_SIZE = 2048  # pixels, long side; a full grid would cost MLflow 20 s of CPU


@dataclass(frozen=True)
class Tick:
    """The metrics of one tick."""

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
    run_name: str
    run_dir: Path
    params: Mapping[str, Any]
    tags: Mapping[str, Any]
    run_id: str | None
    """The run to continue, when known."""
    nimg: int
    """Images seen when training started; above 0, the run is a continued one."""


class MlflowRun:
    """The run of `spec`: found again or made by `open`, then written to. Use it from one thread."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._client: Any = None
        self._created = False
        self._held_grids: set[str] | None = None  # file names; None until asked
        self._start_time = int(time.time() * 1000)
        self.run_id = spec.run_id
        self.experiment_id: str | None = None
        self.newest_nimg = -1
        self.is_open = False

    def open(self) -> None:
        """Find or make the run. After a failure it may be called again, and makes no second run."""
        self._client = import_mlflow().MlflowClient(tracking_uri=self._spec.uri)
        run = self._run_by_id() or self._run_by_folder() or self._create_run()
        self.run_id, self.experiment_id = run.info.run_id, run.info.experiment_id
        if self._created:
            self._log_params()
        else:
            self._set_tags()
            self._client.update_run(self.run_id, status="RUNNING")
        kimg = run.data.metrics.get("Progress/kimg")
        self.newest_nimg = -1 if kimg is None else round(kimg * 1000)
        self.is_open = True

    def log_ticks(self, ticks: Sequence[Tick]) -> None:
        """Send the oldest of `ticks`, as many as one request holds; `newest_nimg` then says how far that went.

        A request sent twice, because its answer got lost, is stored once: MLflow drops values that are equal in all.
        """
        from mlflow.entities import Metric

        metrics: list[Any] = []
        for tick in ticks:
            if metrics and len(metrics) + len(tick.metrics) > MAX_METRICS_PER_REQUEST:
                break
            metrics += [Metric(name, value, tick.timestamp, tick.nimg) for name, value in tick.metrics]
            newest_nimg = tick.nimg
        self._client.log_batch(self.run_id, metrics=metrics, synchronous=True)
        self.newest_nimg = newest_nimg

    def log_image(self, name: str, path: Path, nimg: int) -> None:
        """Send a preview for the viewer's step slider, then the picture whole, below grids/; once a file name."""
        from PIL import Image

        if self._held_grids is None:
            held = [] if self._created else self._client.list_artifacts(self.run_id, GRID_FOLDER)
            self._held_grids = {PurePosixPath(file.path).name for file in held}
        if path.name in self._held_grids:
            return
        with Image.open(path) as image:
            image.thumbnail((MAX_PREVIEW_SIZE, MAX_PREVIEW_SIZE))
            self._client.log_image(self.run_id, image, key=_allowed_name(name), step=nimg, synchronous=True)
        self._client.log_artifact(self.run_id, str(path), GRID_FOLDER)
        self._held_grids.add(path.name)

    def check(self) -> None:
        """Raise when the store does not answer."""
        self._client.get_run(self.run_id)

    def terminate(self, status: str) -> None:
        """Set the final status, 'FINISHED', 'KILLED' or 'FAILED'."""
        self._client.set_terminated(self.run_id, status)

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
        return run if run.info.lifecycle_stage == "active" else None

    def _run_by_folder(self) -> Any:
        """The newest run of this run folder.

        When training starts anew, only the one that we made ourselves in a request whose answer got lost.
        """
        quote = '"' if "'" in str(self._spec.run_dir) else "'"
        found = self._client.search_runs(
            [self._experiment_id()],
            f"tags.`{RUN_DIR_TAG}` = {quote}{self._spec.run_dir}{quote}",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if not found or (self._spec.nimg == 0 and found[0].info.start_time != self._start_time):
            return None
        return found[0]

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

    def _log_params(self) -> None:
        from mlflow.entities import Param

        params = [Param(key, value) for key, value in flat_params(self._spec.params)]
        for start in range(0, len(params), MAX_PARAMS_PER_REQUEST):
            chunk = params[start : start + MAX_PARAMS_PER_REQUEST]
            self._client.log_batch(self.run_id, params=chunk, synchronous=True)

    def _set_tags(self) -> None:
        from mlflow.entities import RunTag

        tags = [RunTag(key, value) for key, value in self._tags().items()]
        self._client.log_batch(self.run_id, tags=tags, synchronous=True)

    def _tags(self) -> dict[str, str]:
        tags = {_allowed_name(key): str(value)[:MAX_TAG_LENGTH] for key, value in self._spec.tags.items()}
        return {**tags, RUN_DIR_TAG: str(self._spec.run_dir)}


def tick_of(nimg: int, record: Mapping[str, Any]) -> Tick:
    """The means of a stats.jsonl record; what is not finite is left out."""
    metrics = []
    for name, entry in record.items():
        mean = entry.get("mean") if isinstance(entry, dict) else None
        if isinstance(mean, (int, float)) and math.isfinite(mean):
            metrics.append((_allowed_name(name), float(mean)))
    seconds = record.get("timestamp")
    if not isinstance(seconds, (int, float)):
        seconds = time.time()
    return Tick(nimg, int(seconds * 1000), tuple(metrics[:MAX_METRICS_PER_REQUEST]))


def recorded_ticks(path: Path, after: int, up_to: int) -> Iterator[Tick]:
    """The ticks of a stats.jsonl file with after < nimg <= up_to."""
    for record in read_records(path):
        nimg = record_nimg(record)
        if nimg is not None and after < nimg <= up_to:
            yield tick_of(nimg, record)


def flat_params(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested options as ('data.mirror', 'True') pairs, cut to the lengths that MLflow takes."""
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from flat_params(value, f"{prefix}{key}.")
        else:
            yield _allowed_name(f"{prefix}{key}"), str(value)[:MAX_PARAM_LENGTH]


def _allowed_name(name: object) -> str:
    return re.sub(r"[^\w\-. /]", "_", str(name), flags=re.ASCII)[:MAX_NAME_LENGTH]
