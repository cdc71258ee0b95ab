"""The cache that the processes of a machine fill together: who dies or fails, the others go on, with right pixels."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import write_dataset

from gan.data import cache, cache_file, dataset, shared_store
from gan.data.cache_file import FileStore
from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream
from gan.data.shared_store import SharedStore
from torch_utils.distributed import Place

pytestmark = pytest.mark.skipif(not shared_store.can_share(), reason="processes cannot share a file here")

N, BATCH = 24, 4
EPOCH = N // BATCH  # batches

Batches = list[tuple[np.ndarray, list[int]]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_dataset(folder / "pets.zip", N, size=8)


@pytest.fixture(autouse=True)
def memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where files are in memory; a folder of the test, as nothing may be left on this machine."""
    folder = tmp_path / "memory"
    folder.mkdir()
    monkeypatch.setattr(cache, "_MEMORY", folder)
    return folder


@pytest.fixture
def decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[str]]:
    """What was decoded, by all processes."""
    log = tmp_path / "decoded"
    log.touch()
    real = dataset.decode

    def decode(content: bytes, where: str) -> np.ndarray:
        with open(log, "a") as file:
            file.write(f"{where}\n")
        return real(content, where)

    monkeypatch.setattr(dataset, "decode", decode)
    return lambda: log.read_text().splitlines()


def place(rank: int, size: int = 2) -> Place:
    return Place(rank, size, rank, size)


def opened(path: Path, rank: int, size: int = 2, said: list[str] | None = None, **options: Any) -> BatchStream:
    def report(topic: str, line: str) -> None:
        if said is not None:
            said.append(line)

    options = {"cache": "disk", **options}
    return BatchStream(ImageDataset(path), BATCH, 0, report=report, place=place(rank, size), **options)


def take(stream: BatchStream, number: int) -> Batches:
    return [(images.numpy().copy(), indices.tolist()) for images, indices in itertools.islice(stream, number)]


def in_turn(streams: list[BatchStream], number: int) -> list[Batches]:
    """A batch of each, then the next, as in training."""
    found: list[Batches] = [[] for _ in streams]
    for _ in range(number):
        assert all(stream.wait(20) for stream in streams)
        for stream, mine in zip(streams, found, strict=True):
            mine += take(stream, 1)
    return found


def expected(path: Path, rank: int, size: int, number: int, start: int = 0) -> Batches:
    whole = ImageDataset(path)
    stream = BatchStream(whole, BATCH, 0)
    found = [(images[rank::size], indices[rank::size]) for images, indices in take(stream, start + number)]
    stream.close()
    return found[start:]


def same(one: Batches, other: Batches) -> bool:
    return all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(one, other, strict=True))


def caches_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "cache" in p.name)


def is_complete(path: Path) -> bool:
    """Whether there is a cache, and nothing else, and its pixels are those of the dataset."""
    whole = ImageDataset(path)
    (name,) = caches_in(path.parent)
    assert name == whole.content().file_in(path.parent).name
    choice = cache.choose(whole, "disk")
    assert "complete: nothing is decoded" in choice.lines[0]
    kept = np.empty(whole.content().shape, dtype=np.uint8)
    cache.found_store(choice).take(np.arange(N), kept)
    return np.array_equal(kept, whole.images(np.arange(N)))


class Processes:
    """Forked: each does `life(rank)`, and exits with 1 if that raises an error."""

    def __init__(self, count: int, life: Callable[[int], None]) -> None:
        self.pids = []
        for rank in range(count):
            pid = os.fork()
            if pid == 0:
                code = 1
                try:
                    life(rank)
                    code = 0
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(code)
            self.pids.append(pid)

    def codes(self) -> list[int]:
        """Exit codes; -9: killed."""
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in self.pids]


class TestProcesses:
    @pytest.mark.parametrize(("mode", "workers"), [("disk", 0), ("ram", 0), ("disk", 2), ("ram", 2)])
    def test_each_image_is_decoded_once_and_the_shares_are_those_of_one(
        self, data: Path, memory: Path, decoded: Callable[[], list[str]], mode: str, workers: int
    ) -> None:
        number = 3 * EPOCH
        wanted = [expected(data, rank, 2, number) for rank in range(2)]
        before = len(decoded())
        barrier = multiprocessing.get_context("fork").Barrier(2)

        def life(rank: int) -> None:
            said: list[str] = []
            stream = opened(data, rank, 2, said, cache=mode, workers=workers)
            assert isinstance(stream._store, SharedStore)
            found: Batches = []
            for _ in range(number):
                assert stream.wait(20)
                barrier.wait(20)  # nobody is ahead
                found += take(stream, 1)
                barrier.wait(20)
            assert same(found, wanted[rank])
            assert stream.worker_pids == []
            stream.close()
            assert said == ([f"complete in {stream._store.path}"] if mode == "disk" else [])
            assert stream._dataset._store is stream._store

        assert Processes(2, life).codes() == [0, 0]
        times = len(decoded()) - before
        assert N <= times <= N + 8 * bool(workers)  # two that decode ahead may ask for the same around an epoch's end
        assert list(memory.iterdir()) == []
        assert is_complete(data) if mode == "disk" else caches_in(data.parent) == []

    @pytest.mark.parametrize("moment", ["pixels", "checksum", "between"])
    def test_one_that_is_killed_while_it_writes_leaves_nothing_wrong(self, data: Path, moment: str) -> None:
        wanted = expected(data, 0, 2, 16 * EPOCH)
        real, writes = SharedStore._write, itertools.count()

        def write(self: SharedStore, content: Any, offset: int) -> None:
            number = next(writes)
            if number < 5:  # the header, and two images
                real(self, content, offset)
                return
            if moment == "pixels":
                real(self, memoryview(content)[:50], offset)
            elif number < 6:
                real(self, content, offset)
                return
            elif moment == "checksum":
                real(self, memoryview(content)[:2], offset)
            os.kill(os.getpid(), signal.SIGKILL)

        def life(rank: int) -> None:
            if rank == 1:
                SharedStore._write = write  # type: ignore[method-assign]
            stream = opened(data, rank)
            if rank == 1:
                take(stream, 16 * EPOCH)
            else:
                time.sleep(0.3)  # the other one is dead
                assert same(take(stream, 16 * EPOCH), wanted)
            stream.close()

        assert Processes(2, life).codes() == [0, -signal.SIGKILL]
        assert is_complete(data)

    @pytest.mark.parametrize("mode", ["disk", "ram"])
    def test_what_killed_ones_had_decoded_serves_the_next_if_it_is_a_file(
        self, data: Path, memory: Path, decoded: Callable[[], list[str]], mode: str
    ) -> None:
        barrier = multiprocessing.get_context("fork").Barrier(2)

        def life(rank: int) -> None:
            stream = opened(data, rank, cache=mode)
            take(stream, 3)
            barrier.wait(20)
            os.kill(os.getpid(), signal.SIGKILL)

        assert Processes(2, life).codes() == [-signal.SIGKILL] * 2
        assert list(memory.iterdir()) == []
        assert len(caches_in(data.parent)) == (mode == "disk")
        there = len(decoded())
        assert there >= 3 * BATCH
        streams = [opened(data, rank, cache=mode) for rank in range(2)]
        found = in_turn(streams, 3 * EPOCH)
        for stream in streams:
            stream.close()
        times = len(decoded()) - there
        if mode == "disk":  # those that were taken are in the file; of the others decoded, what the kill left time for
            assert N - len(set(decoded()[:there])) <= times <= N - 3 * BATCH
        else:
            assert times == N
        assert all(same(mine, expected(data, rank, 2, 3 * EPOCH)) for rank, mine in enumerate(found))
        assert is_complete(data) if mode == "disk" else caches_in(data.parent) == []

    def test_many_that_begin_and_leave_at_any_time_do_no_harm(self, data: Path) -> None:
        wanted = [expected(data, rank, 4, 4 * EPOCH) for rank in range(4)]

        def life(number: int) -> None:
            rng, deadline = np.random.default_rng(number), time.monotonic() + 0.6
            while time.monotonic() < deadline:
                rank, count = int(rng.integers(4)), int(rng.integers(1, 4 * EPOCH))
                stream = opened(data, rank, 4)
                assert same(take(stream, count), wanted[rank][:count])
                stream.close()
                with contextlib.suppress(OSError):
                    os.unlink(cache.choose(ImageDataset(data), "disk").path or "")  # may be deleted at any time

        assert Processes(4, life).codes() == [0] * 4
        left = caches_in(data.parent)
        assert [name for name in left if name.endswith(".tmp")] == []


class TestStreams:
    """Of one process, which is the same to them."""

    @pytest.fixture
    def pair(self, data: Path) -> Iterator[tuple[list[BatchStream], list[list[str]]]]:
        said: list[list[str]] = [[], []]
        streams = [opened(data, rank, 2, said[rank]) for rank in range(2)]
        yield streams, said
        for stream in streams:
            stream.close()

    def test_the_last_one_to_leave_removes_what_is_not_complete(self, data: Path) -> None:
        streams = [opened(data, rank, workers=rank) for rank in range(2)]
        in_turn(streams, 2)
        (temporary,) = caches_in(data.parent)
        assert temporary.endswith(".tmp")
        streams[0].close()
        assert caches_in(data.parent) == [temporary]
        assert same(take(streams[1], 1), expected(data, 1, 2, 1, start=2))
        streams[1].close()
        assert caches_in(data.parent) == []

    def test_a_full_disk_is_said_by_who_meets_it_and_the_other_makes_the_cache(
        self, data: Path, pair: tuple[list[BatchStream], list[list[str]]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        streams, said = pair
        full, real = streams[1]._store, SharedStore._write

        def write(self: SharedStore, content: Any, offset: int) -> None:
            if self is full:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(self, content, offset)

        monkeypatch.setattr(SharedStore, "_write", write)
        found = in_turn(streams, 16 * EPOCH)
        for stream in streams:
            stream.close()  # waits for what is being written
        assert all(same(mine, expected(data, rank, 2, 16 * EPOCH)) for rank, mine in enumerate(found))
        ((line,), (other,)) = said
        assert line.startswith("complete in ")
        assert other.startswith("off, every image is decoded from now on: ")
        assert "no space left on the device; free some" in other
        assert is_complete(data)

    def test_a_disk_that_is_full_for_all_leaves_nothing_behind(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also if processes that decode go on, which were forked while the file was open."""

        def write(self: SharedStore, content: Any, offset: int) -> None:
            raise OSError(errno.EDQUOT, "Quota exceeded")

        said: list[list[str]] = [[], []]
        streams = [opened(data, rank, 2, said[rank], workers=1) for rank in range(2)]
        monkeypatch.setattr(SharedStore, "_write", write)
        found = in_turn(streams, 2 * EPOCH)
        assert all(same(mine, expected(data, rank, 2, 2 * EPOCH)) for rank, mine in enumerate(found))
        assert [len(lines) for lines in said] == [1, 1]
        assert [len(stream.worker_pids) for stream in streams] == [1, 1]
        assert caches_in(data.parent) == []
        for stream in streams:
            stream.close()

    def test_an_image_that_is_not_what_was_written_is_never_shown(
        self, data: Path, pair: tuple[list[BatchStream], list[list[str]]]
    ) -> None:
        streams, said = pair
        found = in_turn(streams, 2)
        (temporary,) = data.parent.glob(".*.tmp")
        streams[1].close()  # so that there is something left to do in the second epoch
        with open(temporary, "r+b") as file:
            file.seek(cache_file.HEADER_BYTES)
            file.write(bytes(N * 8 * 8 * 3))  # such as what a disk has lost
        found[0] += take(streams[0], 2 * EPOCH)
        assert same(found[0], expected(data, 0, 2, 2 + 2 * EPOCH))
        (line,) = said[0]
        assert line.startswith("off, every image is decoded from now on: ")
        assert "an image in it is not what was written" in line
        assert caches_in(data.parent) == []

    @pytest.mark.parametrize("other", ["nothing", "another"])
    def test_a_file_that_is_removed_in_the_making_serves_on_and_is_not_mistaken_for_another(
        self, data: Path, pair: tuple[list[BatchStream], list[list[str]]], other: str
    ) -> None:
        streams, said = pair
        in_turn(streams, 2)
        (temporary,) = data.parent.glob(".*.tmp")
        temporary.unlink()
        late = opened(data, 0) if other == "another" else None
        found = in_turn(streams, 3 * EPOCH)
        assert all(same(mine, expected(data, rank, 2, 3 * EPOCH, start=2)) for rank, mine in enumerate(found))
        for stream in streams:
            stream.close()  # waits for what is being written
        assert said == [[], []]
        assert all(stream._store is not None and stream._store.complete for stream in streams)
        assert [name for name in caches_in(data.parent) if name.endswith(".cache")] == []
        if late is not None:
            take(late, 16 * EPOCH)
            late.close()
            assert is_complete(data)

    @pytest.mark.parametrize("alone", [True, False])
    def test_another_run_makes_the_same_cache(
        self, data: Path, pair: tuple[list[BatchStream], list[list[str]]], alone: bool
    ) -> None:
        """By itself it makes a file of its own; several processes join in."""
        streams, said = pair
        more = [opened(data, 0, 1)] if alone else [opened(data, rank, said=said[rank]) for rank in range(2)]
        found = in_turn([*streams, *more], 3 * EPOCH)
        assert all(same(mine, expected(data, rank, 2, 3 * EPOCH)) for rank, mine in enumerate(found[:2]))
        for stream in (*streams, *more):
            stream.close()
        assert isinstance(more[0]._store, FileStore if alone else SharedStore)
        assert all(line.startswith("complete in ") for lines in said for line in lines)
        assert is_complete(data)

    @pytest.mark.parametrize("processes", [1, 2])
    def test_a_cache_that_another_run_has_completed_is_not_replaced(self, data: Path, processes: int) -> None:
        """On NFS it would be gone for the run that reads it."""
        streams = [opened(data, rank, processes) for rank in range(processes)]
        other = opened(data, 0, 1)
        take(other, 2 * EPOCH)
        other.close()
        complete = ImageDataset(data).content().file_in(data.parent)
        before = complete.stat().st_ino
        found = in_turn(streams, 16 * EPOCH)
        for stream in streams:
            stream.close()
            assert stream._store is not None
            assert stream._store.complete
        assert complete.stat().st_ino == before
        assert all(same(mine, expected(data, rank, processes, 16 * EPOCH)) for rank, mine in enumerate(found))
        assert is_complete(data)

    def test_one_that_is_slow_to_begin_a_file_does_no_harm_to_what_others_complete(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        content, real, others = ImageDataset(data).content(), os.pwrite, [1]

        def pwrite(*arguments: Any) -> int:
            if others:
                other = opened(data, others.pop())
                take(other, 16 * EPOCH)
                other.close()
            return real(*arguments)

        monkeypatch.setattr(shared_store.time, "sleep", lambda seconds: None)
        monkeypatch.setattr(shared_store.os, "pwrite", pwrite)
        SharedStore(content, content.file_in(data.parent), place(0)).close()
        assert others == []
        assert is_complete(data)

    def test_memory_is_shared_within_a_run_and_its_name_stays_until_all_are_there(
        self, data: Path, memory: Path
    ) -> None:
        content, path = ImageDataset(data).content(), memory / "pets.ram"

        def join(rank: int, port: int) -> SharedStore:
            return SharedStore(content, path, dataclasses.replace(place(rank), address="a", port=port), in_memory=True)

        killed = join(0, 1)
        killed._leave.detach()
        os.close(killed._handle)
        first = join(1, 1)
        (left,) = memory.iterdir()
        others = [join(rank, 2) for rank in range(2)]
        assert list(memory.iterdir()) == [left]
        last = join(0, 1)
        assert list(memory.iterdir()) == []
        image = np.full((1, *content.shape[1:]), 7, dtype=np.uint8)
        first.put(np.array([3]), image)
        assert [bool(store.has(np.array([3]))[0]) for store in (last, *others)] == [True, False, False]

    @pytest.mark.parametrize("kind", ["foreign", "link", "folder", "no locks"])
    def test_where_no_file_can_be_shared_each_has_its_own(
        self, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = opened(data, 0)
        assert isinstance(first._store, SharedStore)
        temporary = first._store._temporary
        first.close()
        assert not temporary.exists()
        if kind == "foreign":
            temporary.write_bytes(b"GANMAKES something else")
            temporary.chmod(0o600)
        elif kind == "link":
            temporary.symlink_to(data)
        elif kind == "folder":
            temporary.mkdir()
        else:

            def refuse(*arguments: object) -> None:
                raise OSError(errno.ENOLCK, "No locks available")

            monkeypatch.setattr(shared_store.fcntl, "flock", refuse)
        before = data.read_bytes()
        streams = [opened(data, rank) for rank in range(2)]
        found = in_turn(streams, 16 * EPOCH)
        assert all(same(mine, expected(data, rank, 2, 16 * EPOCH)) for rank, mine in enumerate(found))
        for stream in streams:
            assert stream.lines[1].startswith("each process fills its own: ")
            stream.close()
        assert data.read_bytes() == before
        assert (temporary.is_symlink() or temporary.exists()) == (kind != "no locks")
        assert len(list(data.parent.glob("*.cache"))) == 1

    def test_images_kept_on_the_device_are_shares_too(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The device is the CPU here."""
        monkeypatch.setattr(BatchStream, "_free_memory", lambda self: 10**9)
        streams = [opened(data, rank, cache="device") for rank in range(2)]
        assert all(stream.lines[0].startswith("device, ") for stream in streams)
        found = in_turn(streams, 3 * EPOCH)
        assert all(same(mine, expected(data, rank, 2, 3 * EPOCH)) for rank, mine in enumerate(found))
        for stream in streams:
            stream.close()


def test_what_is_chosen_for_several_processes(data: Path, memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = ImageDataset(data)
    size = whole.content().num_bytes
    room = {data.parent: 2 * size, memory: size}
    monkeypatch.setattr(cache, "free_bytes", lambda folder: room[folder])
    monkeypatch.setattr(cache, "available_bytes", lambda: 4 * size)

    def choose(mode: str = "auto", processes: int = 2) -> cache.Choice:
        return cache.choose(ImageDataset(data), mode, gpu_free=100 * size, place=place(0, processes))

    assert (choose(processes=1).mode, choose().mode, choose("device").mode) == ("device", "disk", "device")
    assert choose().shared_by == place(0)
    room[data.parent] -= 1
    assert (choose().mode, choose().shared_by) == ("ram", place(0))
    assert "of memory, the same for all processes, filled" in choose().lines[0]
    room[memory] -= 1
    assert choose().mode == "off"  # 4 times 2 times as much
    ram = choose("ram", 4)
    assert (ram.mode, ram.shared_by) == ("ram", None)
    assert "of memory for each process, filled" in ram.lines[0]
    assert choose("ram", 5).mode == "off"
    assert "of memory, filled" in choose("ram", 1).lines[0]
    stream = BatchStream(whole, BATCH, 0, cache="disk", report=lambda topic, line: None)
    take(stream, 3 * EPOCH)
    stream.close()
    assert (choose().mode, choose().found) == ("device", True)
    monkeypatch.setattr(cache, "_gpu_problem", lambda *arguments: "no room")
    assert [(choose(mode).mode, choose(mode).found) for mode in ("auto", "device")] == [("disk", True)] * 2
