"""A dataset in the making, interrupted in every way: it is continued, and comes out the same in every byte."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

from gan.data import unfinished
from gan.data.journal import Journal
from gan.data.unfinished import Unfinished, open_unfinished
from gan.errors import DiskFullError, GanError

ROOT = Path(__file__).parents[2]
KEY = "source and settings"
EXTRA = {"dataset.json": b'{"labels": null}'}
KINDS = ["pets.zip", "pets"]
Step = tuple[dict, str | None, bytes | None]
both_kinds = pytest.mark.parametrize("name", KINDS)


def steps(number: int = 9, size: int = 24) -> list[Step]:
    """What is added: files of several sizes, one of them empty, and images that were left out."""
    rng = random.Random(0)
    made: list[Step] = []
    for i in range(number):
        if i % 4 == 2:
            made.append(({"index": i, "problem": "cannot be read: \udcff \u2028"}, None, None))
        else:
            data = rng.randbytes(0 if i == 1 else rng.randrange(size))
            made.append(({"index": i, "label": [0.1, 2]}, f"{i % 2}/{i}ä.png", data))
    return made


STEPS = steps()


def go_on(made: Unfinished, todo: list[Step] = STEPS, until: int | None = None) -> None:
    """Do what is left, as a program would that starts again."""
    assert made.records == [record for record, _, _ in todo[: len(made.records)]]
    for record, name, data in todo[len(made.records) : until]:
        made.add(record, name, data)


def complete(dest: Path, key: str = KEY, todo: list[Step] = STEPS) -> Unfinished:
    with open_unfinished(dest, key) as made:
        go_on(made, todo)
        made.finish(EXTRA)
    return made


def content(dest: Path) -> dict[str, bytes]:
    """The bytes of a zip file, or of all files in a folder."""
    if dest.is_file():
        return {"": dest.read_bytes()}
    return {path.relative_to(dest).as_posix(): path.read_bytes() for path in dest.rglob("*") if path.is_file()}


def leftovers(dest: Path) -> list[str]:
    return sorted(path.name for path in dest.parent.iterdir() if path != dest)


def data_and_journal(dest: Path) -> tuple[Path, Path]:
    return dest.parent / f".{dest.name}.unfinished", dest.parent / f".{dest.name}.unfinished.journal"


def around(boundaries: Iterable[int], end: int, stride: int = 7) -> list[int]:
    """Both sides of each boundary, and every so many of the other positions."""
    near = {boundary + i for boundary in boundaries for i in (-1, 0, 1)}
    return sorted({i for i in near if 0 <= i <= end} | {0, end} | set(range(0, end, stride)))


FILES = {name: data for _, name, data in STEPS if name is not None and data is not None} | EXTRA


def write_plain(path: Path) -> bytes:
    """The zip file that is to come out, made without the code that is tested."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in FILES.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, data)
    return path.read_bytes()


@pytest.fixture
def plain(tmp_path: Path) -> dict[str, dict[str, bytes]]:
    """What is to come out of each kind, whatever happens."""
    return {"pets.zip": {"": write_plain(tmp_path / "plain.zip")}, "pets": FILES}


@pytest.fixture
def fast_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is flushed: where a power failure makes no difference."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)
    monkeypatch.setattr(os, "sync", lambda: None, raising=False)


@both_kinds
def test_without_interruption(tmp_path, plain, name):
    dest = tmp_path / "new" / "folder" / name
    made = complete(dest)
    assert (made.records, made.started_over, made.unlocked) == ([], None, None)
    assert content(dest) == plain[name]
    assert leftovers(dest) == []


@both_kinds
def test_interrupted_after_every_step(tmp_path, plain, name, fast_disk):
    dest = tmp_path / "a" / name
    for done in range(len(STEPS) + 1):
        with open_unfinished(dest, KEY) as made:
            assert made.started_over is None
            assert len(made.records) == max(done - 1, 0)
            go_on(made, until=done)
        assert not dest.exists()
    complete(dest)
    assert content(dest) == plain[name]
    assert leftovers(dest) == []


def test_a_zip_is_continued_wherever_it_was_cut_off(tmp_path, plain, fast_disk):
    """Data and journal end anywhere, in any combination that there can be, and garbage may follow."""
    whole = tmp_path / "whole" / "pets.zip"
    with open_unfinished(whole, KEY) as made:
        go_on(made)
        ends = [*(entry.offset for entry in made._entries[1:]), made._end]
        boundaries = [*ends, *(end - entry.size for end, entry in zip(ends, made._entries, strict=True))]
    data, journal = (path.read_bytes() for path in data_and_journal(whole))
    dest = tmp_path / "cut" / "pets.zip"
    dest.parent.mkdir()
    rng = random.Random(1)
    lines = itertools.accumulate(map(len, journal.splitlines(keepends=True)))
    cuts = [(i, len(journal)) for i in around(boundaries, len(data))]
    cuts += [(len(data), i) for i in around(lines, len(journal))]
    cuts += [(rng.randrange(len(data)), rng.randrange(len(journal))) for _ in range(60)]
    recovered = set()
    for number, (data_end, journal_end) in enumerate(cuts):
        junk = [b"", b"", b"\0" * 99, rng.randbytes(50), b"{}\n", b"\n", b"00000000 \n"][number % 7]
        left = data_and_journal(dest)
        left[0].write_bytes(data[:data_end] + junk)
        left[1].write_bytes(journal[:journal_end] + junk)
        recovered.add(len(complete(dest).records))
        assert content(dest) == plain["pets.zip"], (data_end, journal_end, junk)
    assert recovered == set(range(len(STEPS) + 1))
    assert leftovers(dest) == []


def test_a_folder_is_continued_wherever_it_was_cut_off(tmp_path, plain, fast_disk):
    whole = tmp_path / "whole" / "pets"
    with open_unfinished(whole, KEY) as made:
        go_on(made)
    data, journal = data_and_journal(whole)
    lines = journal.read_bytes()
    names = [name for _, name, _ in STEPS if name]
    dest = tmp_path / "cut" / "pets"
    rng = random.Random(1)
    boundaries = itertools.accumulate(map(len, lines.splitlines(keepends=True)))
    for number, end in enumerate(around(boundaries, len(lines), 40)):
        left = data_and_journal(dest)
        shutil.copytree(data, left[0])
        left[1].write_bytes(lines[:end])
        torn = left[0] / rng.choice(names)
        change = [torn.unlink, lambda: os.truncate(torn, torn.stat().st_size // 2), lambda: torn.write_bytes(b"x")]  # noqa: B023
        if number % 4:
            change[number % 4 - 1]()
        (left[0] / "dataset.json").write_bytes(b"of a run that was killed when it was almost done")
        (left[0] / "00009").mkdir()
        complete(dest)
        assert content(dest) == plain["pets"], (end, torn)
        assert not (dest / "00009").exists()
        shutil.rmtree(dest)
        assert leftovers(dest) == []


def test_changed_bytes_are_not_continued(tmp_path, plain, fast_disk):
    """A disk that is failing: every byte of the data, one after the other."""
    dest = tmp_path / "pets.zip"
    with open_unfinished(dest, KEY) as made:
        go_on(made)
    data, journal = (path.read_bytes() for path in data_and_journal(dest))
    for i in range(len(data)):
        left = data_and_journal(dest)
        left[0].write_bytes(data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :])
        left[1].write_bytes(journal)
        made = complete(dest)
        assert len(made.records) < len(STEPS)
        assert (made.started_over is None) == (made.records != [])
        assert content(dest) == plain["pets.zip"], i


def test_more_entries_than_a_plain_directory_holds(tmp_path, fast_disk):
    """Above 65,535 entries a zip file has a directory of another kind."""
    todo: list[Step] = [({"i": i}, f"{i}.png", b"%d" % i) for i in range(65_600)]
    dest = tmp_path / "many.zip"
    with open_unfinished(dest, KEY) as made:
        go_on(made, todo, 2_000)
    made = complete(dest, todo=todo)
    assert len(made.records) == 2_000
    with zipfile.ZipFile(dest) as archive:
        assert archive.namelist() == [*(str(name) for _, name, _ in todo), *EXTRA]
        assert [archive.read(f"{i}.png") for i in (0, 1_999, 2_000, 65_599)] == [b"0", b"1999", b"2000", b"65599"]


def test_a_directory_of_the_other_kind_is_that_of_zipfile(tmp_path, monkeypatch):
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 5)
    plain = write_plain(tmp_path / "plain.zip")
    assert b"PK\x06\x06" in plain
    dest = tmp_path / "pets.zip"
    with open_unfinished(dest, KEY) as made:
        go_on(made, until=7)
    complete(dest)
    assert dest.read_bytes() == plain


@both_kinds
@pytest.mark.parametrize("what", ["key", "journal is gone", "journal is garbage", "data is garbage"])
def test_what_cannot_be_continued_is_said_and_made_anew(tmp_path, plain, name, what, fast_disk):
    dest = tmp_path / "a" / name
    with open_unfinished(dest, "another key" if what == "key" else KEY) as made:
        go_on(made)
    data, journal = data_and_journal(dest)
    if what == "journal is gone":
        journal.unlink()
    elif what == "journal is garbage":
        journal.write_bytes(b"\0" * 1000)
    elif what == "data is garbage":
        for path in [path for path in data.rglob("*") if path.is_file()] or [data]:
            path.write_bytes(b"\0" * 1000)
    made = complete(dest)
    assert made.records == []
    why = {
        "key": "it was begun with other images, other settings or another version",
        "data is garbage": "it is damaged",
    }.get(what, "its journal is damaged")
    assert made.started_over == f"{dest}: what an earlier run has left cannot be continued ({why}); starting over"
    assert content(dest) == plain[name]
    assert leftovers(dest) == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
@pytest.mark.parametrize("key", [KEY, "another key"])
@both_kinds
def test_killed_when_all_was_done_but_for_the_journal(tmp_path, plain, name, key, monkeypatch, fast_disk):
    """It is of no use to the next one, which says nothing of it and takes it along."""
    dest = tmp_path / "a" / name
    pid = os.fork()
    if pid == 0:
        monkeypatch.setattr(Journal, "remove", lambda self: os.kill(os.getpid(), signal.SIGKILL))
        with contextlib.suppress(BaseException):
            complete(dest)
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    assert content(dest) == plain[name]
    assert leftovers(dest) == [data_and_journal(dest)[1].name]
    if dest.is_dir():
        shutil.rmtree(dest)  # which packing asks for, as it is not empty
    made = complete(dest, key)
    assert (made.records, made.started_over) == ([], None)
    assert content(dest) == plain[name]
    assert leftovers(dest) == []


@both_kinds
def test_what_was_there_stays_until_the_end(tmp_path, plain, name, fast_disk):
    dest = tmp_path / "a" / name
    dest.parent.mkdir()
    if name == "pets.zip":
        dest.write_bytes(b"old")
    else:
        dest.mkdir()
    before = content(dest)
    with open_unfinished(dest, KEY) as made:
        go_on(made)
        assert content(dest) == before
        made.finish(EXTRA)
    assert content(dest) == plain[name]


@both_kinds
def test_discard_leaves_nothing(tmp_path, name):
    dest = tmp_path / name
    with open_unfinished(dest, KEY) as made:
        go_on(made)
        made.discard()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_empty_is_not_replaced(tmp_path, plain, fast_disk):
    dest = tmp_path / "a" / "pets"
    with open_unfinished(dest, KEY) as made:
        go_on(made)
        dest.mkdir()
        (dest / "mine.txt").touch()
        with pytest.raises(GanError, match=r"pets: Directory not empty$"):
            made.finish(EXTRA)
    (dest / "mine.txt").unlink()
    assert len(complete(dest).records) == len(STEPS)
    assert content(dest) == plain["pets"]


@pytest.mark.skipif(os.name != "posix", reason="permissions, limits of names")
@both_kinds
def test_names_as_long_as_the_file_system_takes_them(tmp_path, plain, name, fast_disk):
    longest = "ä" * 120 + "b" * (255 - 240 - len(Path(name).suffix)) + Path(name).suffix
    other = longest.replace("b.", "c.") if "." in longest else longest[:-1] + "c"
    for dest in (tmp_path / "a" / longest, tmp_path / "a" / other):
        with open_unfinished(dest, KEY) as made:
            go_on(made, until=5)
    assert len(leftovers(dest)) == 4
    for dest in (tmp_path / "a" / longest, tmp_path / "a" / other):
        assert len(complete(dest).records) == 5
        assert content(dest) == plain[name]
    with pytest.raises(GanError, match=r"this name is too long; choose one of at most 255 bytes$"):
        open_unfinished(tmp_path / ("x" * 256), KEY)


@both_kinds
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_line_and_what_is_there_is_continued(tmp_path, plain, name, number, monkeypatch, fast_disk):
    dest = tmp_path / "a" / name
    made = open_unfinished(dest, KEY)
    room = 40

    def write(self, name, data):
        nonlocal room
        room -= len(data)
        if room < 0:
            raise OSError(number, os.strerror(number))
        return real(self, name, data)

    real = type(made)._write
    with monkeypatch.context() as patch:
        patch.setattr(type(made), "_write", write)
        with made, pytest.raises(DiskFullError, match=rf"{name}: no space left on the device; free some, or choose"):
            go_on(made)
    made = complete(dest)
    assert 0 < len(made.records) < len(STEPS)
    assert content(dest) == plain[name]


def test_a_disk_that_is_really_full(tmp_path, plain):
    """As the system does it: a limit on the size of files, at many sizes; that file may be the data or the journal."""
    code = """
import resource, signal, sys
sys.path[:0] = ["tests/data", "tests"]
from pathlib import Path
import test_unfinished as t
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for limit in range(0, 1800, 97):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    dest = Path(sys.argv[1]) / str(limit) / "pets.zip"
    try:
        t.complete(dest)
        print(limit, "complete")
    except t.GanError as error:
        print(limit, error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    made = t.complete(dest)
    print(limit, len(made.records))
"""
    if sys.platform != "linux":
        pytest.skip("limits of Linux")
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "a"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0].endswith("pets.zip: File too large")
    assert lines[-2].endswith("complete")
    for dest in (tmp_path / "a").glob("*/pets.zip"):
        assert content(dest) == plain["pets.zip"]
        assert leftovers(dest) == []


def test_errors_of_the_system_are_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(GanError, match=r"a part of this path is a file"):
        open_unfinished(tmp_path / "file" / "pets.zip", KEY)
    (tmp_path / ".pets.zip.unfinished").mkdir()
    with pytest.raises(GanError, match=r"pets.zip: Is a directory$"):
        open_unfinished(tmp_path / "pets.zip", KEY)


# A program that makes a dataset, waits in the middle if it is told to, and is killed there, or goes on.
PROGRAM = """
import sys, time
sys.path[:0] = ["tests/data", "tests"]
from pathlib import Path
import test_unfinished as t
with t.open_unfinished(Path(sys.argv[1]), t.KEY) as made:
    t.go_on(made, until=int(sys.argv[2]))
    made._note()
    print("ready", flush=True)
    t.go_on(made) if len(sys.argv) > 3 else time.sleep(60)
"""


def start(dest: Path, until: int) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, dest, str(until)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.skipif(os.name != "posix", reason="no such locks, no kill -9")
def test_one_process_at_a_time_until_it_is_killed(tmp_path, plain):
    dest = tmp_path / "a" / "pets.zip"
    process = start(dest, 5)
    try:
        before = content(dest.parent)
        with pytest.raises(GanError, match=r"is being made by another process; wait for it, or choose another name$"):
            open_unfinished(dest, "whatever the key")
        assert content(dest.parent) == before
    finally:
        process.kill()
        process.communicate()
    made = complete(dest)
    assert len(made.records) == 5
    assert content(dest) == plain["pets.zip"]


@both_kinds
def test_one_user_at_a_time_in_a_process_too(tmp_path, plain, name, fast_disk):
    """Of which the lock knows nothing; and those who were refused do not end it."""
    dest, other = tmp_path / "a" / name, tmp_path / "a" / f"other-{name}"
    with open_unfinished(dest, KEY) as made:
        go_on(made, until=5)
        for path in (dest, dest.parent / ".." / "a" / name):
            with pytest.raises(GanError, match=rf"{name}: is being made by this process already; wait for it, or"):
                open_unfinished(path, KEY)
        complete(other)
        refused = subprocess.run(
            [sys.executable, "-c", PROGRAM, dest, "5"], cwd=ROOT, capture_output=True, text=True, timeout=30
        )
        assert "is being made by another process" in refused.stderr
    assert len(complete(dest).records) == 5
    assert content(dest) == content(other) == plain[name]
    assert leftovers(dest) == [other.name]


@pytest.mark.parametrize("method", ["finish", "discard"])
def test_what_could_not_be_ended_can_be_opened_again(tmp_path, plain, monkeypatch, method, fast_disk):
    dest = tmp_path / "pets"
    with open_unfinished(dest, KEY) as made, monkeypatch.context() as patch:
        go_on(made)
        patch.setattr(os, "replace", refuse)
        patch.setattr(shutil, "rmtree", refuse)
        with pytest.raises(GanError, match=r"pets: Input/output error$"):
            made.finish(EXTRA) if method == "finish" else made.discard()
    complete(dest)
    assert content(dest) == plain["pets"]


def refuse(*args: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes")
@both_kinds
def test_killed_at_any_moment(tmp_path, name, fast_disk):
    """Again and again, wherever it is; each run goes on from where the last one was killed."""
    todo, rng = steps(1500, 3000), random.Random(0)
    complete(tmp_path / "whole" / name, todo=todo)
    whole = digest(tmp_path / "whole" / name)
    kills = rounds = 0
    while kills < 5:  # where others keep the cores busy, few hit before all is done; then once more from the start
        dest = tmp_path / f"{rounds}" / name
        kills += killed_until_made(dest, todo, rng)
        data_and_journal(dest)[1].unlink(missing_ok=True)  # killed when all was done but for this
        assert digest(dest) == whole
        assert leftovers(dest) == []
        rounds += 1
        assert rounds < 20, kills


def killed_until_made(dest: Path, todo: list[Step], rng: random.Random) -> int:
    """Have processes make `dest`, each killed soon after a random number of steps; how many died of it."""
    journal = data_and_journal(dest)[1]
    kills = done = 0

    def lines() -> int:
        with contextlib.suppress(FileNotFoundError):
            return journal.read_bytes().count(b"\n")
        return 0

    while not dest.exists():
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(BaseException):
                complete(dest, todo=todo)
            os._exit(0)
        until = done + rng.randrange(250)
        deadline = time.monotonic() + 30
        while lines() < until and not dest.exists() and time.monotonic() < deadline:
            time.sleep(0.0005)
        time.sleep(rng.random() * 0.003)
        os.kill(pid, signal.SIGKILL)
        kills += os.WIFSIGNALED(os.waitpid(pid, 0)[1])
        assert lines() >= done or not journal.exists()
        done = lines()
    return kills


def digest(path: Path) -> str:
    return hashlib.sha256(repr(sorted(content(path).items())).encode()).hexdigest()


def test_the_journal_is_written_behind_the_data_and_soon(tmp_path, monkeypatch):
    dest = tmp_path / "pets.zip"
    data, journal = data_and_journal(dest)
    with open_unfinished(dest, KEY) as made:
        begun = journal.stat().st_size
        for i in range(unfinished._NOTES - 1):
            made.add({"i": i}, f"{i}.png", b"x")
        assert journal.stat().st_size == begun
        made.add({"i": -1}, "last.png", b"y")
        assert journal.read_bytes().count(b"\n") == unfinished._NOTES + 1
        assert data.stat().st_size == made._end
        made._noted -= unfinished._NOTE_EVERY
        made.add({"i": -2})
        assert journal.read_bytes().endswith(b'[null,{"i":-2}]\n')


def test_from_time_to_time_it_is_flushed_to_the_disk(tmp_path, monkeypatch):
    flushed: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        flushed.append(os.readlink(f"/proc/self/fd/{handle}") if sys.platform == "linux" else "")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted)
    with open_unfinished(tmp_path / "pets.zip", KEY) as made:
        made._noted -= unfinished._NOTE_EVERY
        made.add({})
        assert flushed == []
        made._noted -= unfinished._NOTE_EVERY
        made._synced -= unfinished._SYNC_EVERY
        made.add({})
        made._wait_for_sync()
        assert [Path(path).name for path in flushed] == [".pets.zip.unfinished", ".pets.zip.unfinished.journal"]


def test_a_disk_that_fails_when_it_is_flushed(tmp_path, monkeypatch):
    with open_unfinished(tmp_path / "pets.zip", KEY) as made:
        monkeypatch.setattr(os, "fsync", refuse)
        made._noted = made._synced = 0.0
        made.add({})
        monkeypatch.undo()
        with pytest.raises(GanError, match=r"pets.zip: Input/output error$"):
            made.finish({})


@pytest.mark.skipif(os.name != "posix", reason="no such locks")
def test_a_lock_that_cannot_be_is_said(tmp_path, monkeypatch):
    import fcntl

    def lockf(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with open_unfinished(tmp_path / "pets.zip", KEY) as made:
        assert made.unlocked == (
            f"{tmp_path}/pets.zip: cannot be locked (No locks available); take care that no other process makes it"
        )
