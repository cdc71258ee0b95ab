import errno
import json
from pathlib import Path
from unittest import mock

import pytest

from gan.errors import GanError
from gan.tracking import JsonlTracker
from gan.tracking.jsonl import read_records, record_nimg


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_tick_is_on_disk_at_once(tmp_path, record):
    tracker = JsonlTracker(tmp_path)
    for nimg in (0, 4000):
        tracker.tick(nimg, record(nimg))
        assert lines(tmp_path / "stats.jsonl")[-1] == record(nimg)
    tracker.close("FINISHED")
    assert len(lines(tmp_path / "stats.jsonl")) == 2


def test_nonfinite_becomes_null(tmp_path, record):
    JsonlTracker(tmp_path).tick(0, record(0, **{"Loss/D/loss": float("nan"), "Loss/r1": float("inf")}))
    text = (tmp_path / "stats.jsonl").read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert json.loads(text)["Loss/D/loss"] == {"num": 1, "mean": None, "std": 0.0}


def test_continue_drops_what_is_beyond_and_keeps_the_rest_byte_for_byte(tmp_path, record):
    path = tmp_path / "stats.jsonl"
    odd_spacing = b'{ "Progress/kimg":{"mean":4.0} }\n{"note":  "no kimg"}\n'
    tracker = JsonlTracker(tmp_path)
    for nimg in (8000, 12000):
        tracker.tick(nimg, record(nimg))
    written = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(odd_spacing + written[0] + written[1] + b'{"Progress/kimg": {"me')
    JsonlTracker(tmp_path, nimg=8000).tick(16000, record(16000))
    assert path.read_bytes().startswith(odd_spacing + written[0])
    assert [record_nimg(r) for r in read_records(path)] == [4000, None, 8000, 16000]


def test_continue_leaves_a_whole_file_alone(tmp_path, record):
    JsonlTracker(tmp_path).tick(4000, record(4000))
    before = (tmp_path / "stats.jsonl").stat()
    JsonlTracker(tmp_path, nimg=4000)
    assert (tmp_path / "stats.jsonl").stat().st_ino == before.st_ino


@pytest.mark.parametrize("kimg", [4.0004, 3.9996])  # a mean is a float: half an image either way is the same tick
def test_tick_at_the_saved_state_is_kept(tmp_path, kimg):
    (tmp_path / "stats.jsonl").write_text(json.dumps({"Progress/kimg": {"mean": kimg}}) + "\n")
    JsonlTracker(tmp_path, nimg=4000)
    assert len(lines(tmp_path / "stats.jsonl")) == 1


def test_full_disk_leaves_no_half_line_and_loses_no_tick(tmp_path, record):
    tracker = JsonlTracker(tmp_path)
    tracker.tick(0, record(0))
    before = (tmp_path / "stats.jsonl").read_bytes()
    real_open = open

    class FullDisk:
        def __init__(self, *args, **kwargs):
            self.file = real_open(*args, **kwargs)

        def __enter__(self):
            return self

        def __exit__(self, *args):
            self.file.close()

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            return self.file.write(data[:10])

    with mock.patch("builtins.open", FullDisk), pytest.raises(GanError, match="no space left") as caught:
        tracker.tick(4000, record(4000))
    assert caught.value.__cause__.errno == errno.ENOSPC
    assert (tmp_path / "stats.jsonl").read_bytes() == before
    tracker.tick(8000, record(8000))
    assert lines(tmp_path / "stats.jsonl") == [record(0), record(4000), record(8000)]
