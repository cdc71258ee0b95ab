"""stats.jsonl in the run folder: one line a tick, the record that everything else can be rebuilt from."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from gan.files import atomic_path, explain_os_error

FILE_NAME = "stats.jsonl"


class JsonlTracker:
    """Appends a line a tick to RUN_DIR/stats.jsonl; continuing at `nimg` images first drops the lines beyond it.

    Raises GanError when the file cannot be written; the lines that failed are kept and written with the next tick.
    `unwritten`: those of an earlier start, from its `state()`.
    """

    def __init__(self, run_dir: str | Path, nimg: int = 0, unwritten: str | None = None) -> None:
        self._path = Path(run_dir) / FILE_NAME
        drop_lines_beyond(self._path, nimg)
        there = {record_nimg(record) for record in read_records(self._path)}
        lines = (unwritten or "").encode().splitlines(keepends=True)  # they may have been written after that state
        self._unwritten = b"".join(line for line in lines if record_nimg(_parse(line) or {}) not in there)

    def tick(self, nimg: int, record: dict[str, Any]) -> None:
        """Append one line."""
        self._unwritten += line_of(record)
        self._write()

    def image(self, name: str, path: Path, nimg: int) -> None:
        """Nothing: the picture lies in the run folder already."""

    def measured(self, nimg: int, results: Mapping[str, float], timestamp: float) -> None:
        """Nothing: each metric has a file of its own (`measurements`)."""

    def state(self) -> dict[str, Any]:
        """{'unwritten_ticks': lines that a full disk did not take yet}; `nimg` says which others to keep."""
        return {"unwritten_ticks": self._unwritten.decode()}

    def close(self, status: str) -> None:
        """Try once more to write lines that failed."""
        self._write()

    def _write(self) -> None:
        if not self._unwritten:
            return
        append(self._path, self._unwritten)
        self._unwritten = b""


def line_of(record: Mapping[str, Any]) -> bytes:
    """A record as a line. Non-finite numbers become null, which JSON has and NaN it has not."""
    return json.dumps(_without_nonfinite(record), allow_nan=False).encode() + b"\n"


def append(path: Path, lines: bytes) -> None:
    """Append whole lines to a file, or nothing. Raises GanError when it cannot be written."""
    try:
        with open(path, "ab+", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
            file.seek(max(start - 1, 0))
            if file.read(1) not in (b"", b"\n"):
                lines = b"\n" + lines  # after one that a killed process left torn
            try:
                if file.write(lines) != len(lines):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(start)  # a full disk takes half a line; the next try writes it whole
                raise
    except OSError as error:
        raise explain_os_error(error, path) from error


def drop_lines_beyond(path: Path, nimg: int) -> None:
    """Remove from the file `path` a torn last line and every line beyond `nimg` images.

    The other lines stay as they are, byte for byte. Raises GanError when the file cannot be replaced.
    """
    drop_lines(path, lambda record: (record_nimg(record) or 0) > nimg)


def drop_lines(path: Path, is_beyond: Callable[[dict[str, Any]], bool]) -> None:
    """Remove from a file a torn last line and every record of this kind; the other lines stay, byte for byte."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    records = [_parse(line) for line in lines]
    kept = [
        line
        for line, record in zip(lines, records, strict=True)
        if line.endswith(b"\n") and not (record is not None and is_beyond(record))
    ]
    if len(kept) < len(lines):
        with atomic_path(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a stats.jsonl file, oldest first. Lines that hold none are passed over; so is a missing file."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for line in file:
            record = _parse(line)
            if record is not None:
                yield record


def record_nimg(record: dict[str, Any]) -> int | None:
    """How many images training had seen at this record, or None when it does not say."""
    kimg = mean_of(record, "Progress/kimg")
    return None if kimg is None else round(kimg * 1000)


def mean_of(record: Mapping[str, Any], name: str) -> float | None:
    """The mean of one entry of a record, or None when there is none that is finite."""
    entry = record.get(name)
    return finite(entry.get("mean")) if isinstance(entry, Mapping) else None


def finite(value: object) -> float | None:
    """A number that was read; None: it is not finite, or none at all."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    try:
        return float(value) if math.isfinite(value) else None
    except OverflowError:  # JSON has whole numbers of any length
        return None


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or too deep
        return None
    return record if isinstance(record, dict) else None


def _without_nonfinite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nonfinite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nonfinite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
