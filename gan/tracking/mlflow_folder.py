"""What a run folder tells of a run: what MLflow is to have, ticks, measurements and pictures, and which run it is."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gan.errors import GanError
from gan.files import write_text
from gan.tracking import jsonl, measurements
from gan.tracking.mlflow_run import RunSpec, Tick, measured_of, tick_of
from gan.tracking.mlflow_store import public_uri, store_of

NOTE_FILE = "mlflow-run.json"


class Picture(NamedTuple):
    """A finished picture of the run folder, as `Tracker.image` takes it."""

    name: str
    path: Path
    nimg: int


@dataclass(frozen=True)
class Note:
    """The content of mlflow-run.json, which spares looking for the MLflow run of a folder."""

    run_id: str | None = None
    tracking_uri: str = ""
    """without a password"""
    branch: int = 0

    def run_id_in(self, tracking_uri: str, branch: int) -> str | None:
        """The run, if it is one of this store and branch."""
        return self.run_id if (self.tracking_uri, self.branch) == (tracking_uri, branch) else None


def read_note(run_dir: Path) -> Note:
    """The note in the folder; an empty one when there is none that can be read."""
    try:
        values = json.loads((run_dir / NOTE_FILE).read_text(encoding="utf-8"))
        return Note(values["run_id"], str(values["tracking_uri"]), int(values["branch"]))
    except (OSError, ValueError, TypeError, KeyError):
        return Note()


def write_note(run_dir: Path, note: Note) -> None:
    """Write the note if it is new. A failure is nobody's trouble: without a note the run is looked up in the store."""
    if note != read_note(run_dir):
        with contextlib.suppress(GanError, OSError):
            write_text(run_dir / NOTE_FILE, json.dumps(asdict(note), indent=2) + "\n")


def spec_of(
    run_dir: Path,
    experiment: str,
    params: Mapping[str, Any],
    tags: Mapping[str, Any],
    *,
    run_id: str | None = None,
    continued: bool,
    branch: int,
    start_time: int | None = None,
) -> RunSpec:
    """The MLflow run of a folder. The `run_id` of a `continued` one, where it is not given, is that of the note."""
    run_dir = run_dir.absolute()
    uri, artifact_location = store_of(run_dir.parent)
    if continued and run_id is None:
        run_id = read_note(run_dir).run_id_in(public_uri(uri), branch)
    return RunSpec(
        uri=uri,
        artifact_location=artifact_location,
        experiment=experiment,
        run_dir=run_dir,
        params=params,
        tags=tags,
        run_id=run_id,
        continued=continued,
        branch=branch,
        start_time=start_time,
    )


def recorded_ticks(run_dir: Path, up_to: int | None = None) -> Iterator[Tick]:
    """The ticks in stats.jsonl, oldest first; those beyond `up_to` images are left out."""
    for record in jsonl.read_records(run_dir / jsonl.FILE_NAME):
        nimg = jsonl.record_nimg(record)
        if nimg is not None and (up_to is None or nimg <= up_to):
            yield tick_of(nimg, record)


def recorded_measured(run_dir: Path, ticks: Sequence[Tick], up_to: int) -> list[Tick]:
    """What snapshots of the run were measured by, the last time; those beyond `up_to` images are left out."""
    exact, found = _exact(ticks), dict[tuple[str, str], Tick]()
    for measured in measurements.read(run_dir):
        timestamp, nimg = jsonl.finite(measured.record.get("timestamp")), measured.nimg
        if measured.kimg is None or timestamp is None:
            continue
        if measured.record.get("nimg") is None:  # the name alone is known
            nimg = exact.get(measured.kimg, nimg)
        if nimg is not None and nimg <= up_to:
            found[measured.metric, measured.snapshot] = measured_of(nimg, measured.results, timestamp)
    return list(found.values())


def _exact(ticks: Sequence[Tick]) -> dict[int, int]:
    """{thousands of images, as in names of files: images} of the ticks."""
    return {tick.nimg // 1000: tick.nimg for tick in ticks}


def recorded_pictures(run_dir: Path, ticks: Sequence[Tick], up_to: int) -> list[Picture]:
    """The sheets in the folder, oldest first; those beyond `up_to` images are left out.

    The number in a sheet's name is cut to thousands of images; the `ticks` tell when exactly it was made.
    """
    exact = _exact(ticks)
    first = [Picture("reals", run_dir / "reals.png", 0), Picture("fakes", run_dir / "fakes_init.png", 0)]
    later = []
    for path in run_dir.glob("fakes*.png"):
        if match := re.fullmatch(r"fakes(\d{6,})\.png", path.name):
            kimg = int(match[1])
            later.append(Picture("fakes", path, exact.get(kimg, kimg * 1000)))
    later.sort(key=lambda picture: picture.nimg)
    return [picture for picture in [*first, *later] if picture.nimg <= up_to and picture.path.exists()]
