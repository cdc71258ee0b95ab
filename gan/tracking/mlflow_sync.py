"""Sending MLflow what it missed of a run, after the training: no thread, and errors for people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gan.errors import GanError
from gan.tracking import jsonl
from gan.tracking.mlflow_folder import (
    Note,
    read_note,
    recorded_measured,
    recorded_pictures,
    recorded_ticks,
    spec_of,
    write_note,
)
from gan.tracking.mlflow_import import import_mlflow, set_environment_defaults
from gan.tracking.mlflow_run import MlflowRun
from gan.tracking.mlflow_store import URI_VARIABLE, count, import_problem, reason, store_problem


@dataclass(frozen=True)
class Sent:
    """What was sent, and where to."""

    ticks: int
    measurements: int
    pictures: int
    newest_kimg: float
    """of the run; MLflow has every tick up to there"""
    uri: str
    """without a password"""


def sync(run_dir: Path, experiment: str, params: Mapping[str, Any], total_kimg: float) -> Sent:
    """Send what the MLflow run of a folder has not, ticks, measurements, pictures, oldest first, and its final status.

    A run that MLflow does not know is made. What lies in set-aside-NN/ stays there: those branches ended, and MLflow
    has of them what it got. Raises GanError if the folder has no ticks or the store fails.
    """
    ticks = list(recorded_ticks(run_dir))
    if not ticks:
        raise GanError(f"{run_dir / jsonl.FILE_NAME}: holds no tick; there is nothing that MLflow could have missed")
    set_environment_defaults()
    try:
        import_mlflow()
    except Exception as error:  # a broken installation raises all sorts
        raise GanError(f"{import_problem(error)}; nothing was sent") from error
    newest = ticks[-1]
    branch = read_note(run_dir).branch
    spec = spec_of(run_dir, experiment, params, {}, continued=True, branch=branch, start_time=ticks[0].timestamp)
    run = MlflowRun(spec)
    refused = []
    try:
        run.open(running=False)
        write_note(spec.run_dir, Note(run.run_id, spec.shown_uri, branch))
        missing = [tick for tick in ticks if tick.nimg not in run.held]
        done = 0
        while done < len(missing):
            done += run.log_ticks(missing[done:])
        measured = run.log_measured(recorded_measured(spec.run_dir, ticks, newest.nimg))
        pictures = 0
        for picture in recorded_pictures(spec.run_dir, ticks, newest.nimg):
            try:
                pictures += run.log_image(*picture)
            except Exception as error:
                run.check()  # a store that is down raises here; otherwise it is this picture
                refused.append(f"{picture.path} ({reason(error)})")
        status = "FINISHED" if newest.nimg >= total_kimg * 1000 else "KILLED"
        if run.status != status and (run.status, status) != ("FAILED", "KILLED"):  # the one that knows more stays
            run.terminate(status, newest.timestamp)
    except Exception as error:  # every kind of store has its own
        server = spec.uri.startswith("http")
        remedy = f"start it or check {URI_VARIABLE}, and run this again" if server else "mend that and run this again"
        raise GanError(f"{store_problem(spec.uri, error)}; {remedy}") from error
    if refused:
        pictures_refused = count(len(refused), "picture")
        raise GanError(f"MLflow does not take {pictures_refused}, the first is {refused[0]}; it has all the rest")
    return Sent(len(missing), measured, pictures, newest.nimg / 1000, spec.shown_uri)
