"""Files appear whole or not at all."""

import errno
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from gan.errors import DiskFullError, GanError, UsageError
from gan.files import (
    Locked,
    atomic_path,
    explain_os_error,
    lock,
    nearest_existing,
    readable_size,
    remove_leftovers,
    temporary_beside,
    write_png,
    write_text,
)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_file_has_its_name_only_once_it_is_whole(tmp_path):
    dest = tmp_path / "new" / "folder" / "file.bin"
    with atomic_path(dest) as path:
        assert path.parent == dest.parent
        path.write_bytes(b"half")
        assert not dest.exists()
        path.write_bytes(b"whole")
    assert contents(dest.parent) == {"file.bin": b"whole"}


def test_it_replaces_what_was_there(tmp_path):
    dest = tmp_path / "file.bin"
    dest.write_bytes(b"old")
    with atomic_path(str(dest)) as path:
        path.write_bytes(b"new")
        assert dest.read_bytes() == b"old"
    assert contents(tmp_path) == {"file.bin": b"new"}


@pytest.mark.parametrize(
    "error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(1), GanError("mine")], ids=repr
)
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, error):
    dest = tmp_path / "file.bin"
    dest.write_bytes(b"old")

    def write():
        with atomic_path(dest) as path:
            path.write_bytes(b"half of the new")
            raise error

    with pytest.raises(type(error)) as caught:
        write()
    assert caught.value is error
    assert contents(tmp_path) == {"file.bin": b"old"}


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no space left on the device; free some, or choose another place"),
        (errno.EDQUOT, "no space left on the device; free some, or choose another place"),
        (errno.EACCES, "cannot be written (permission denied); choose a folder that you may write to"),
        (errno.EROFS, "cannot be written (permission denied); choose a folder that you may write to"),
        (errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_errors_of_the_system_become_one_line_and_leave_the_old_file(tmp_path, monkeypatch, number, message, function):
    dest = tmp_path / "file.bin"
    dest.write_bytes(b"old")

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(GanError) as caught:
        write_text(dest, "new")
    assert str(caught.value) == f"{dest}: {message}"
    assert isinstance(caught.value, DiskFullError) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert contents(tmp_path) == {"file.bin": b"old"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_while_writing_is_said_so(tmp_path):
    def write():
        with atomic_path(tmp_path / "file.bin"), open("/dev/full", "wb") as full:
            full.write(b"x")

    with pytest.raises(DiskFullError, match=r"file\.bin: no space left on the device; free some"):
        write()
    assert contents(tmp_path) == {}


@pytest.mark.skipif(os.name != "posix", reason="folders that can be flushed")
@pytest.mark.parametrize("number", [None, errno.EINVAL, errno.EIO])
def test_the_name_is_flushed_to_disk_after_the_content_where_the_system_can(tmp_path, monkeypatch, number):
    flushed, real = [], os.fsync

    def fsync(handle):
        is_folder = stat.S_ISDIR(os.fstat(handle).st_mode)
        flushed.append((is_folder, (tmp_path / "file").exists()))
        if is_folder and number is not None:
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "new")
    assert flushed == [(False, False), (True, True)]
    assert contents(tmp_path) == {"file": b"new"}


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path):
    left = [temporary_beside(tmp_path / name).name for name in ("net.pkl", "training-state.pt", "a b.png")]
    others = [
        "net.pkl",
        "net.pkl.tmp",
        ".tmp",
        ".net.pkl.abcd1234.tmp2",
        ".net.tmp",
        "x.net.abcd1234.tmp",
        ".n.abc-1234.tmp",
    ]
    for name in others:
        (tmp_path / name).touch()
    (tmp_path / ".folder.abcd1234.tmp").mkdir()
    (tmp_path / "deeper").mkdir()
    temporary_beside(tmp_path / "deeper/file")
    assert remove_leftovers(tmp_path) == sorted(left)
    assert {path.name for path in tmp_path.iterdir()} == {*others, "deeper", ".folder.abcd1234.tmp"}
    assert len(list((tmp_path / "deeper").iterdir())) == 1
    assert remove_leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("num_bytes", "text"), [(0, "0.0 MB"), (281_300_000, "281.3 MB"), (1e9, "1.0 GB"), (41_230_000_000, "41.2 GB")]
)
def test_sizes_are_readable(num_bytes, text):
    assert readable_size(num_bytes) == text


def test_the_nearest_folder_that_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert nearest_existing(tmp_path) == tmp_path
    assert nearest_existing(tmp_path / "new" / "deeper") == tmp_path
    assert nearest_existing(Path("new/deeper")).samefile(tmp_path)


def test_a_folder_that_may_not_be_written_to_is_said_so(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", fail)
    with pytest.raises(GanError, match="cannot be written"):
        write_text(tmp_path / "file.txt", "")


@pytest.mark.parametrize("below", ["file/x.txt", "file/deeper/x.txt"])
def test_a_path_below_a_file_is_said_so(tmp_path, below):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(GanError, match="a part of this path is a file, not a folder; choose another place"):
        write_text(tmp_path / below, "")
    assert contents(tmp_path) == {"file": b"old"}


def test_a_folder_in_the_place_of_the_file_is_an_error_and_stays(tmp_path):
    (tmp_path / "dest").mkdir()
    with pytest.raises(GanError, match="dest: "):
        write_text(tmp_path / "dest", "")
    assert [path.name for path in tmp_path.iterdir()] == ["dest"]


@pytest.mark.skipif(os.name != "posix", reason="file modes")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_it_as_the_umask_says(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "")
        assert os.umask(mask) == mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "file", "größer ✓\n")
    assert contents(tmp_path) == {"file": "größer ✓\n".encode()}


@pytest.mark.parametrize(("shape", "mode"), [((1, 5, 7), "L"), ((3, 5, 7), "RGB")])
@pytest.mark.parametrize("backwards", [False, True])
def test_pictures_come_back_as_they_were(tmp_path, shape, mode, backwards):
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    image = image[:, :, ::-1] if backwards else image
    write_png(tmp_path / "image.png", image)
    with PIL.Image.open(tmp_path / "image.png") as file:
        assert (file.mode, file.format) == (mode, "PNG")
        pixels = np.asarray(file)
    assert np.array_equal(pixels[None] if mode == "L" else pixels.transpose(2, 0, 1), image)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
def test_a_lock_is_one_of_the_process_and_ends_when_the_file_is_closed(tmp_path):
    def taken() -> bool:
        pid = os.fork()  # the file that it inherits is no lock of its own
        if pid == 0:
            code = 2
            try:
                with open(tmp_path / "lock", "a") as file:
                    code = 1 if lock(file) else 0
            except Locked:
                code = 7
            finally:
                os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, 7)
        return code == 7

    with open(tmp_path / "lock", "a") as file:
        assert not taken()
        assert lock(file) is None
        assert taken()
    assert not taken()


def test_an_error_without_a_reason_still_says_something():
    assert str(explain_os_error(OSError("disk on fire"), "a/b")) == "a/b: disk on fire"


def test_usage_errors_hold_all_problems():
    error = UsageError(["--a 1: bad", "--b 2: worse"])
    assert str(error) == "--a 1: bad\n--b 2: worse"
    assert error.problems == ["--a 1: bad", "--b 2: worse"]
    assert isinstance(error, GanError)
    assert (GanError.exit_code, UsageError.exit_code) == (1, 2)
