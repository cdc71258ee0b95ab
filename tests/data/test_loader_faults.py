"""What happens to a stream of batches when files or worker processes fail: one line each, and nothing is lost."""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import faulthandler
import gc
import io
import itertools
import json
import os
import signal
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from pictures import noise

from gan.data import cache_file, decode_workers, loader
from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream
from gan.data.sampler import epoch_order
from gan.errors import GanError

N, BATCH, SIZE = 24, 2, 32
EPOCH = N // BATCH  # batches
PIXELS = noise(N, SIZE, SIZE, 3)
NAMES = [f"{i:02d}.png" for i in range(N)]
LAST = NAMES[epoch_order(N, 0, 0)[-1]]  # due in the last batch of the first epoch

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs worker processes")

Batches = list[tuple[np.ndarray, list[int]]]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def changed(data: bytes) -> bytes:
    """Four bytes in the middle are others."""
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 255 for byte in data[middle : middle + 4]) + data[middle + 4 :]


def write_zip(path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for i in epoch_order(N, 0, 0):  # what is cut off is due last
            archive.writestr(NAMES[i], png(PIXELS[i]))
    return path


def write_folder(path: Path) -> Path:
    path.mkdir()
    for name, pixels in zip(NAMES, PIXELS, strict=True):
        (path / name).write_bytes(png(pixels))
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_zip(tmp_path / "pets.zip")


@pytest.fixture
def quiet() -> Iterator[None]:
    """A process that crashes writes no traceback of its own."""
    enabled = faulthandler.is_enabled()
    faulthandler.disable()
    yield
    if enabled:
        faulthandler.enable()


def opened(path: Path, said: list[str] | None = None, **options: Any) -> BatchStream:
    """`said` takes the lines on the reading of images."""

    def report(topic: str, line: str) -> None:
        if said is not None and topic == "Data":
            said.append(line)

    options = {"workers": 2, **options}
    return BatchStream(ImageDataset(path), BATCH, seed=0, report=report, **options)


def into(said: list[str]) -> Callable[[str, str], None]:
    """What takes the lines of a stream."""
    return lambda topic, line: said.append(line)


def take(stream: BatchStream, number: int) -> Batches:
    return [(images.numpy().copy(), indices.tolist()) for images, indices in itertools.islice(stream, number)]


def expected(number: int) -> Batches:
    order = np.concatenate([epoch_order(N, 0, epoch) for epoch in range(-(-number // EPOCH))])
    rows = order[: number * BATCH].reshape(-1, BATCH)
    return [(PIXELS[batch].transpose(0, 3, 1, 2), batch.tolist()) for batch in rows]


def same(one: Batches, other: Batches) -> bool:
    return all(np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(one, other, strict=True))


def alive(pids: list[int], zombies: bool = True) -> list[int]:
    """Those that there are; `zombies`: even if only to be waited for."""
    found = []
    for pid in pids:
        with contextlib.suppress(ProcessLookupError, FileNotFoundError):
            os.kill(pid, 0)
            if zombies or Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(pid)
    return found


def remove(path: Path) -> None:
    (path / LAST).unlink()


def cut(path: Path) -> None:
    (path / LAST).write_bytes((path / LAST).read_bytes()[:-100])


def corrupt(path: Path) -> None:
    (path / LAST).write_bytes(changed((path / LAST).read_bytes()))


def corrupt_palette(path: Path) -> None:
    """Which pyspng does not decode."""
    buffer = io.BytesIO()
    PIL.Image.fromarray(PIXELS[0]).quantize(64).save(buffer, "PNG")
    (path / LAST).write_bytes(changed(buffer.getvalue()))


def resize(path: Path) -> None:
    (path / LAST).write_bytes(png(np.zeros([16, 16, 3], dtype=np.uint8)))


def make_folder(path: Path) -> None:
    (path / LAST).unlink()
    (path / LAST).mkdir()


def lock(path: Path) -> None:
    (path / LAST).chmod(0)
    if os.access(path / LAST, os.R_OK):
        pytest.skip("may read everything")


def corrupt_zip(path: Path) -> None:
    """In the file that is open, as a failing disk does it."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(LAST)
    begin = info.header_offset + 30 + len(LAST)
    data = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(begin)
        file.write(changed(data[begin : begin + info.compress_size]))


def cut_zip(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        begin = archive.getinfo(LAST).header_offset
    with open(path, "r+b") as file:
        file.truncate(begin + 40)


FAULTS: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "removed": ("folder", remove, "cannot be read (No such file or directory); restore it, or pack again"),
    "cut": ("folder", cut, "is damaged (a checksum in it is wrong); remove it and pack again"),
    "corrupt": ("folder", corrupt, "is damaged (a checksum in it is wrong); remove it and pack again"),
    "corrupt palette": ("folder", corrupt_palette, "is damaged (a checksum in it is wrong); remove it and pack again"),
    "other size": ("folder", resize, "is 16x16 RGB, not 32x32 RGB"),
    "a folder": ("folder", make_folder, "cannot be read (Is a directory); restore it, or pack again"),
    "locked": ("folder", lock, "cannot be read (Permission denied); restore it, or pack again"),
    "corrupt zip": ("zip", corrupt_zip, f"cannot be read (Bad CRC-32 for file '{LAST}'); restore it, or pack again"),
    "corrupt deflated zip": ("deflated", corrupt_zip, "cannot be read ("),
    "cut zip": ("zip", cut_zip, "cannot be read ("),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_breaks_is_named_when_it_is_due_with_workers_and_without(tmp_path: Path, fault: str) -> None:
    kind, spoil, message = FAULTS[fault]
    errors = set()
    for i, (num_workers, mode) in enumerate(itertools.product((0, 2), ("off", "ram", "disk"))):
        path = tmp_path / str(i) / "pets.zip"
        path.parent.mkdir()
        if kind == "folder":
            write_folder(path)
        else:
            write_zip(path, zipfile.ZIP_DEFLATED if kind == "deflated" else zipfile.ZIP_STORED)
        dataset = ImageDataset(path)
        said: list[str] = []
        stream = BatchStream(dataset, BATCH, 0, workers=num_workers, cache=mode, report=into(said))
        pids = stream.worker_pids
        found = take(stream, 2)  # one of each process: both have opened the zip
        spoil(path)
        found += take(stream, EPOCH - 3)
        with pytest.raises(GanError) as caught:
            next(stream)
        assert same(found, expected(EPOCH - 1))
        errors.add(str(caught.value).replace(str(path), "PATH"))
        assert said == []
        assert alive(pids) == []
        assert [p for p in path.parent.iterdir() if p != path] == []  # half a cache
    (error,) = errors
    assert error.startswith(f"PATH: {LAST} {message}")
    assert "\n" not in error


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_zip_that_is_removed_or_replaced_while_it_is_open_serves_on(data: Path, num_workers: int) -> None:
    """What was replaced is another file; this one lives as long as somebody reads it."""
    for replace in (False, True):
        write_zip(data)
        stream = opened(data, workers=num_workers)
        found = take(stream, 3)
        if replace:
            other = data.with_name("other.zip")
            write_zip(other).replace(data)
        else:
            data.unlink()
        assert same(found + take(stream, EPOCH), expected(3 + EPOCH))
        stream.close()


def test_a_zip_that_was_replaced_before_the_workers_opened_it_is_not_mixed_with_the_old_one(data: Path) -> None:
    dataset = ImageDataset(data)
    other = data.with_name("other.zip")
    with zipfile.ZipFile(other, "w") as archive:
        for name in NAMES:
            archive.writestr(name, png(PIXELS[0] ^ 255))
    other.replace(data)
    said: list[str] = []
    stream = BatchStream(dataset, BATCH, 0, workers=1, report=into(said))
    assert same(take(stream, EPOCH), expected(EPOCH))
    (line,) = said
    assert line.endswith(
        f"failed ({data}: has been replaced since it was opened; start again); "
        "images are now decoded by the training process itself"
    )
    stream.close()


@pytest.mark.usefixtures("quiet")
class TestWorkers:
    @pytest.mark.parametrize(
        ("number", "cause"),
        [
            (signal.SIGKILL, "was killed by SIGKILL (often: out of memory)"),
            (signal.SIGSEGV, "was killed by SIGSEGV"),
            (signal.SIGBUS, "was killed by SIGBUS"),
        ],
    )
    @pytest.mark.parametrize("mode", ["off", "ram", "disk"])
    def test_one_that_dies_is_reported_and_nothing_is_lost(
        self, data: Path, number: signal.Signals, cause: str, mode: str
    ) -> None:
        said: list[str] = []
        stream = opened(data, said, cache=mode)
        found = take(stream, 1)
        one, other = stream.worker_pids
        os.kill(one, number)
        found += take(stream, 6)  # some of them it had decoded
        assert said == [f"worker process {one} {cause}; the other 1 now does all the decoding"]
        assert stream.worker_pids == [other]
        assert alive([one]) == []
        os.kill(other, number)
        found += take(stream, 3 * EPOCH)
        line = f"worker process {other} {cause}; images are now decoded by the training process itself"
        assert said[1:] == [line]
        assert same(found, expected(7 + 3 * EPOCH))
        assert alive([other]) == []
        stream.close()
        caches = list(data.parent.glob("*.cache"))
        assert len(caches) == (mode == "disk")
        assert list(data.parent.glob(".*")) == []
        if caches:
            assert np.array_equal(ImageDataset(data).images(np.arange(N)), PIXELS.transpose(0, 3, 1, 2))
            again = opened(data, cache="disk")
            assert "nothing is decoded" in again.lines[0]
            assert same(take(again, EPOCH), expected(EPOCH))
            again.close()

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
    def test_a_death_does_not_disturb_the_step(self, data: Path, number: signal.Signals) -> None:
        """The DataLoader of PyTorch raises an error in the main thread then, wherever that is."""
        stream = opened(data)
        found = take(stream, 2)
        pids = stream.worker_pids
        x = torch.eye(64)
        for pid in pids:
            os.kill(pid, number)
            end = time.monotonic() + 0.2
            while time.monotonic() < end:
                x = x @ x
        assert torch.equal(x, torch.eye(64))
        assert same(found + take(stream, EPOCH), expected(2 + EPOCH))
        stream.close()
        assert alive(pids) == []

    def test_all_that_die_at_once_are_reported(self, data: Path) -> None:
        said: list[str] = []
        stream = opened(data, said, workers=3)
        pids = stream.worker_pids
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        assert same(take(stream, EPOCH), expected(EPOCH))
        assert len(said) == 3
        assert all(any(f"process {pid} was killed" in line for line in said) for pid in pids)
        stream.close()

    def test_an_error_that_no_image_has_is_reported_and_nothing_is_lost(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real, here = ImageDataset.unflipped, os.getpid()

        def unflipped(self: ImageDataset, row: int) -> np.ndarray:
            if os.getpid() != here and row == 3:
                raise MemoryError("Unable to allocate 9 GiB")
            return real(self, row)

        monkeypatch.setattr(ImageDataset, "unflipped", unflipped)
        said: list[str] = []
        stream = opened(data, said)
        assert same(take(stream, 2 * EPOCH), expected(2 * EPOCH))
        assert "failed (MemoryError: Unable to allocate 9 GiB); the other 1 now does all the decoding" in said[0]
        stream.close()

    def test_an_error_that_is_not_about_a_file_is_raised_as_it_is(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def unflipped(self: ImageDataset, row: int) -> np.ndarray:
            raise ZeroDivisionError("a mistake of ours")

        monkeypatch.setattr(ImageDataset, "unflipped", unflipped)
        for num_workers in (0, 2):
            with pytest.raises(ZeroDivisionError, match="a mistake of ours"):
                next(opened(data, workers=num_workers))

    def test_none_that_can_be_started_are_none_that_are_needed(
        self, data: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refuse() -> int:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(os, "fork", refuse)
        said: list[str] = []
        stream = opened(data, said)
        assert same(take(stream, EPOCH), expected(EPOCH))
        (line,) = said
        assert line.startswith("only 0 of 2 worker processes could be started ([Errno 11] Resource")
        assert line.endswith("; images are now decoded by the training process itself")
        stream.close()

    def test_one_that_hangs_is_given_up(self, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(decode_workers, "SILENCE", 1)
        said: list[str] = []
        stream = opened(data, said)
        hung = stream.worker_pids[0]
        os.kill(hung, signal.SIGSTOP)
        assert same(take(stream, 2 * EPOCH), expected(2 * EPOCH))
        assert said == [f"worker process {hung} did not answer for 1 s; the other 1 now does all the decoding"]
        assert alive([hung]) == []
        stream.close()

    @pytest.mark.parametrize("mode", ["off", "disk"])
    def test_closing_does_not_wait_for_one_that_hangs(self, data: Path, mode: str) -> None:
        said: list[str] = []
        stream = opened(data, said, cache=mode)
        next(stream)
        pids = stream.worker_pids
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        while concurrent.futures.wait([stream._next], 0.2).done:  # type: ignore[list-item]
            next(stream)  # had been decoded; then the thread waits
        begin = time.monotonic()
        stream.close()
        assert time.monotonic() - begin < 1
        assert alive(pids) == []
        assert said == []
        assert [p.name for p in data.parent.iterdir()] == [data.name]

    def test_none_outlives_a_training_process_that_is_killed(self, data: Path) -> None:
        """Of two streams: the processes of the second have also inherited what belongs to the first."""
        read, write = os.pipe()
        parent = os.fork()
        if parent == 0:
            try:
                streams = [opened(data), opened(data)]
                for stream in streams:
                    next(stream)
                os.write(write, json.dumps([pid for stream in streams for pid in stream.worker_pids]).encode())
                time.sleep(60)
            finally:
                os._exit(0)
        os.close(write)
        with open(read, "rb", buffering=0) as file:
            pids = json.loads(file.read(1000))
        assert len(alive(pids)) == 4
        os.kill(parent, signal.SIGKILL)
        os.waitpid(parent, 0)
        deadline = time.monotonic() + 5
        while alive(pids, zombies=False) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive(pids, zombies=False) == []

    def test_a_stream_that_nobody_closes_takes_its_workers_along(self, data: Path) -> None:
        stream = opened(data)
        next(stream)
        pids = stream.worker_pids
        assert len(alive(pids)) == 2
        stream._next.result()  # type: ignore[union-attr]
        del stream
        gc.collect()
        assert alive(pids) == []


@pytest.mark.parametrize("num_workers", [0, 1])
def test_what_takes_long_is_said(data: Path, monkeypatch: pytest.MonkeyPatch, num_workers: int) -> None:
    real = ImageDataset.unflipped

    def slow(self: ImageDataset, row: int) -> np.ndarray:
        time.sleep(0.35)
        return real(self, row)

    monkeypatch.setattr(ImageDataset, "unflipped", slow)
    monkeypatch.setattr(loader, "PATIENCE", 0.2)
    said: list[str] = []
    stream = opened(data, said, workers=num_workers)
    assert same(take(stream, 1), expected(1))
    assert said[:2] == [f"waiting for images from {data} since {seconds} s" for seconds in (0.2, 0.4)]
    stream.close()


def test_closing_does_not_wait_for_the_rest_of_a_batch(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, begun = ImageDataset.unflipped, list[int]()

    def slow(self: ImageDataset, row: int) -> np.ndarray:
        begun.append(row)
        time.sleep(0.2)
        return real(self, row)

    monkeypatch.setattr(ImageDataset, "unflipped", slow)
    stream = BatchStream(ImageDataset(data), N, seed=0, cache="disk", report=lambda topic, line: None)
    time.sleep(0.1)
    stream.close()
    assert len(begun) == 1
    assert [p.name for p in data.parent.iterdir()] == [data.name]


@pytest.mark.parametrize("when", ["complete", "in the making"])
def test_a_cache_file_that_can_no_longer_be_read_is_said_and_training_goes_on(
    data: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if when == "complete":
        made = opened(data, cache="disk")
        take(made, EPOCH + 1)
        made.close()
    said: list[str] = []
    stream = BatchStream(ImageDataset(data, cache_folder=data.parent), BATCH, 0, cache="disk", report=into(said))
    found = take(stream, 5)
    if when == "complete":
        (path,) = data.parent.glob("*.cache")
        os.truncate(path, 5000)
        message = f"{path}: the file has been cut off"
    else:

        def fail(self: Any, rows: np.ndarray, out: np.ndarray) -> None:
            raise OSError(errno.ESTALE, "Stale file handle")

        path = ImageDataset(data).content().file_in(data.parent)
        monkeypatch.setattr(cache_file._Pixels, "take", fail)
        message = f"{path}: Stale file handle"
    found += take(stream, 2 * EPOCH)
    monkeypatch.undo()
    assert said == [f"off, every image is decoded from now on: {message}"]
    assert same(found, expected(5 + 2 * EPOCH))
    assert np.array_equal(stream._dataset.images(np.arange(N)), PIXELS.transpose(0, 3, 1, 2))
    stream.close()
    again = opened(data, cache="disk")
    assert same(take(again, 2 * EPOCH), expected(2 * EPOCH))
    again.close()
