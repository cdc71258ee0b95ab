import errno
import io
from unittest import mock

import pytest

from gan.tracking import Console, Trackers, format_tick, format_time

MEANS = {
    "Progress/tick": 12.0,
    "Progress/kimg": 48.0,
    "Progress/augment": 0.0312,
    "Timing/total_sec": 311.2,
    "Timing/sec_per_tick": 24.61,
    "Timing/sec_per_kimg": 6.154,
    "Timing/maintenance_sec": 0.94,
    "Resources/cpu_mem_gb": 2.314,
    "Resources/peak_gpu_mem_gb": 5.018,
}
LINE = "tick 12 kimg 48.0 time 5m 11s sec/tick 24.6 sec/kimg 6.15 maintenance 0.9 cpumem 2.31 gpumem 5.02 augment 0.031"


def entries(**changes):
    return {name: {"num": 1, "mean": mean, "std": 0.0} for name, mean in {**MEANS, **changes}.items()}


def test_status_line():
    assert format_tick(entries(), total_kimg=1920.0) == LINE + " eta 3h 12m"


def test_metrics_are_in_the_line_and_in_the_time_that_is_left():
    record = entries(**{"Timing/sec_per_tick": 20.0, "Timing/sec_per_kimg": 3.0, "Timing/metrics": 5.0})
    line = format_tick(record, total_kimg=1048.0)
    assert "sec/tick 20.0 sec/kimg 3.00 maintenance 0.9 metrics 5.0 cpumem" in line
    assert line.endswith(" eta 1h 06m")  # of 4 s a kimg


def test_status_line_ends_with_the_health():
    words = "augment at its bound for 120 kimg: the data set may be too small"
    assert format_tick({**entries(), "health": words}, total_kimg=1920.0) == f"{LINE} eta 3h 12m health {words}"


def test_status_line_without_gpu_speed_or_finite_numbers():
    record = entries(**{"Timing/sec_per_kimg": None, "Progress/augment": float("nan")})
    del record["Resources/peak_gpu_mem_gb"]
    line = format_tick(record, total_kimg=1000.0)
    assert "gpumem 0.00 augment 0.000" in line
    assert "eta" not in line


def test_the_first_tick_promises_no_end_because_its_one_step_is_slow():
    assert "eta" not in format_tick(entries(**{"Progress/tick": 0.0}), total_kimg=1000.0)


def test_log_writes_to_the_file_alone(tmp_path, capsys):
    console = Console(tmp_path, total_kimg=1.0)
    console.log("error: what happened")
    assert (tmp_path / "log.txt").read_text() == "error: what happened\n"
    assert capsys.readouterr().out == ""


def test_nothing_is_left_when_the_last_tick_overshoots():
    assert format_tick(entries(), total_kimg=47.0).endswith(" eta 0s")


@pytest.mark.parametrize(
    ("seconds", "text", "short"),
    [
        (0, "0s", "0s"),
        (45.4, "45s", "45s"),
        (59.6, "1m 00s", "1m 00s"),
        (311, "5m 11s", "5m 11s"),
        (3600, "1h 00m 00s", "1h 00m"),
        (11525, "3h 12m 05s", "3h 12m"),
        (2 * 86400 + 3 * 3600 + 600, "2d 03h 10m", "2d 03h"),
    ],
)
def test_format_time(seconds, text, short):
    assert format_time(seconds) == text
    assert format_time(seconds, max_units=2) == short


def test_prints_and_logs_and_appends_when_continued(tmp_path, capsys):
    console = Console(tmp_path, total_kimg=1920.0)
    console.print("training starts")
    console.tick(48000, entries())
    assert (tmp_path / "log.txt").read_text().splitlines()[0] == "training starts"  # before any close
    console.close("FINISHED")
    console.print("after the end")
    Console(tmp_path, total_kimg=1920.0).print("continued")
    assert (tmp_path / "log.txt").read_text().splitlines() == ["training starts", LINE + " eta 3h 12m", "continued"]
    assert capsys.readouterr().out.splitlines()[-2:] == ["after the end", "continued"]


def test_screen_that_knows_ascii_only_and_then_goes_away(tmp_path, monkeypatch):
    console = Console(tmp_path, total_kimg=1.0)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", screen)
    console.print("caf\u00e9 \udce9")  # the last is a byte of a file name that was no UTF-8
    assert screen.buffer.getvalue() == b"caf? ?\n"
    screen.close()
    console.print("still logged")
    assert (tmp_path / "log.txt").read_text(encoding="utf-8") == "caf\u00e9 ?\nstill logged\n"


def test_full_disk_is_named_once_and_printing_goes_on(tmp_path, capsys):
    console = Console(tmp_path, total_kimg=1.0)
    console._log.close()
    console._log = mock.Mock(write=mock.Mock(side_effect=OSError(errno.ENOSPC, "full")))
    console.print("one")
    console.print("two")
    first, warning, last = capsys.readouterr().out.splitlines()
    assert (first, last) == ("one", "two")
    assert "log.txt: no space left on the device" in warning


class Broken:
    def tick(self, nimg, record):
        raise OSError("disk\nfull")

    def image(self, name, path, nimg):
        raise ValueError

    def state(self):
        raise ValueError

    def close(self, status):
        raise ValueError


class Noting:
    def __init__(self, notes, name):
        self.notes, self.name = notes, name

    def tick(self, nimg, record):
        self.notes.append(("tick", self.name, nimg, record))

    def image(self, name, path, nimg):
        self.notes.append(("image", self.name, name, nimg))

    def state(self):
        return {self.name: 1}

    def close(self, status):
        self.notes.append(("close", self.name, status))


def test_trackers_forward_and_name_a_failure_once(tmp_path):
    notes, lines = [], []
    trackers = Trackers([Noting(notes, "first"), Broken(), Noting(notes, "last")], lines.append)
    trackers.tick(4000, {"a": 1})
    trackers.image("fakes", tmp_path / "fakes.png", 4000)
    assert trackers.state() == {"first": 1, "last": 1}
    trackers.close("KILLED")
    assert notes == [
        ("tick", "first", 4000, {"a": 1}),
        ("tick", "last", 4000, {"a": 1}),
        ("image", "first", "fakes", 4000),
        ("image", "last", "fakes", 4000),
        ("close", "last", "KILLED"),
        ("close", "first", "KILLED"),
    ]
    assert lines == ["tracking: Broken failed (disk full); training goes on"]


def test_ctrl_c_is_not_swallowed():
    class Interrupted(Broken):
        def tick(self, nimg, record):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trackers([Interrupted()]).tick(0, {})


def test_of_several_processes_only_the_first_has_a_log(tmp_path, capsys):
    console = Console(tmp_path, total_kimg=1.0, logs=False)
    console.print("seen")
    console.log("nowhere")
    console.close("FINISHED")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == "seen\n"
