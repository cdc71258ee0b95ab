"""What a run prints: plain lines, on the screen and in RUN_DIR/log.txt."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from gan.files import explain_os_error
from gan.tracking.jsonl import mean_of

FILE_NAME = "log.txt"


class Console:
    """Prints lines to standard output and appends them to RUN_DIR/log.txt; safe to call from several threads.

    Without `logs` there is no file: of several processes the first has it.
    A tracker too: each tick prints its status line, with the time left until `total_kimg` thousand images.
    Printing never raises; a log file that cannot be written is named once.
    Raises GanError when log.txt cannot be opened at the start.
    """

    def __init__(self, run_dir: str | Path, total_kimg: float, logs: bool = True) -> None:
        self._path = Path(run_dir) / FILE_NAME
        self._total_kimg = total_kimg
        self._lock = threading.Lock()
        self._log_failed = False
        self._log: TextIO | None = None
        if not logs:
            return
        try:
            self._log = open(self._path, "a", encoding="utf-8", errors="replace", buffering=1)  # noqa: SIM115
        except OSError as error:
            raise explain_os_error(error, self._path) from error

    def print(self, text: str = "") -> None:
        """Print one line, or several."""
        with self._lock:
            _print_to_screen(text)
            self._append(text)

    def log(self, text: str) -> None:
        """Append one line to log.txt alone: the screen shows it by other means."""
        with self._lock:
            self._append(text)

    def _append(self, text: str) -> None:
        if self._log is None:
            return
        try:
            self._log.write(text + "\n")
        except OSError as error:
            if not self._log_failed:
                self._log_failed = True
                _print_to_screen(f"{explain_os_error(error, self._path)}; training goes on without its log")

    def tick(self, nimg: int, record: dict[str, Any]) -> None:
        """Print the status line."""
        self.print(format_tick(record, self._total_kimg))

    def image(self, name: str, path: Path, nimg: int) -> None:
        """Nothing: pictures are not for the screen."""

    def measured(self, nimg: int, results: Mapping[str, float], timestamp: float) -> None:
        """Nothing: whoever measures says it, with the name of the snapshot."""

    def state(self) -> dict[str, Any]:
        """Nothing: continuing appends to the log."""
        return {}

    def close(self, status: str) -> None:
        """Close log.txt; later lines go to the screen alone."""
        with self._lock:
            if self._log is not None:
                with contextlib.suppress(OSError):  # a full disk was reported when it filled up
                    self._log.close()
                self._log = None


def format_tick(record: dict[str, Any], total_kimg: float) -> str:
    """The status line of one tick, from its stats.jsonl record; `eta` is left out in the first tick.

    Last comes how training is doing, in words, if the record says it in `health`.
    """
    kimg = _mean(record, "Progress/kimg")
    sec_per_kimg, sec_per_tick = _mean(record, "Timing/sec_per_kimg"), _mean(record, "Timing/sec_per_tick")
    measuring = _mean(record, "Timing/metrics")  # of which sec_per_kimg says nothing
    fields = [
        f"tick {_mean(record, 'Progress/tick'):.0f}",
        f"kimg {kimg:.1f}",
        f"time {format_time(_mean(record, 'Timing/total_sec'))}",
        f"sec/tick {sec_per_tick:.1f}",
        f"sec/kimg {sec_per_kimg:.2f}",
        f"maintenance {_mean(record, 'Timing/maintenance_sec'):.1f}",
        *([f"metrics {measuring:.1f}"] if measuring > 0 else []),
        f"cpumem {_mean(record, 'Resources/cpu_mem_gb'):.2f}",
        f"gpumem {_mean(record, 'Resources/peak_gpu_mem_gb'):.2f}",
        f"augment {_mean(record, 'Progress/augment'):.3f}",
    ]
    if sec_per_kimg > 0 and _mean(record, "Progress/tick") > 0:  # the first tick is one slow step
        training = sec_per_tick - measuring
        in_all = sec_per_kimg * (sec_per_tick / training if training > 0 else 1)
        fields.append(f"eta {format_time(max(total_kimg - kimg, 0) * in_all, max_units=2)}")
    if "health" in record:
        fields.append(f"health {record['health']}")
    return " ".join(fields)


def format_time(seconds: float, max_units: int = 3) -> str:
    """Seconds as 45s, 5m 11s, 3h 12m 05s or 2d 03h 10m; at most `max_units` of the largest units that apply."""
    total = round(seconds)
    amounts = {"d": total // 86400, "h": total // 3600 % 24, "m": total // 60 % 60, "s": total % 60}
    units = list(amounts)
    while len(units) > 1 and amounts[units[0]] == 0:
        units.pop(0)
    first, *rest = units[:max_units]
    return " ".join([f"{amounts[first]}{first}", *(f"{amounts[unit]:02d}{unit}" for unit in rest)])


def _mean(record: dict[str, Any], name: str) -> float:
    return mean_of(record, name) or 0.0


def _print_to_screen(text: str) -> None:
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"  # may know fewer letters than the name of a folder
    with contextlib.suppress(OSError, ValueError):  # the reader of a pipe may have gone, but the log still fills
        print(text.encode(encoding, "replace").decode(encoding), flush=True)
