"""The cache of decoded images: the same batches whatever it is, and training goes on whatever happens to it."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from tiny import TINY, write_dataset

from gan import memory
from gan.cli.train import train
from gan.config import TrainConfig
from gan.data import cache, cache_file
from gan.data.cache_file import FileStore
from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream
from gan.errors import GanError
from gan.train_options import check_cache

SHORT = [*TINY, "--batch", "500", "--batch-gpu", "500", "--aug", "noaug"]  # two steps
N, BATCH = 10, 4
EPOCH = -(-N // BATCH)  # batches


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    return write_dataset(folder / "pets.zip", N, size=8, classes=3)


def into(said: list[str]) -> Callable[[str, str], None]:
    """What takes the lines of a stream."""
    return lambda topic, line: said.append(line)


def batches(stream: BatchStream, number: int = 3 * EPOCH) -> list[tuple[np.ndarray, list[int]]]:
    return [(images.numpy().copy(), indices.tolist()) for images, indices in itertools.islice(stream, number)]


def same(one: list[tuple[np.ndarray, list[int]]], other: list[tuple[np.ndarray, list[int]]]) -> bool:
    return all(
        np.array_equal(a[0], b[0]) and a[1] == b[1] for a, b in zip(one, other, strict=True)
    )  # fmt: skip


def reference(dataset: ImageDataset, start: int = 0, number: int = 3 * EPOCH) -> list[tuple[np.ndarray, list[int]]]:
    """What comes without a cache."""
    stream = BatchStream(dataset, BATCH, 0, start)
    found = batches(stream, number)
    stream.close()
    return found


def run_through(dataset: ImageDataset, number: int = 6 * EPOCH, **options: Any) -> list[str]:
    """Until the cache is complete; what was said."""
    said: list[str] = []
    options = {"cache": "disk", **options}
    stream = BatchStream(dataset, BATCH, seed=0, report=into(said), **options)
    batches(stream, number)
    stream.close()
    return [*stream.lines, *said]


def caches_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "cache" in p.name)


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    from gan.data import dataset

    decoded: list[str] = []
    real = dataset.decode
    monkeypatch.setattr(dataset, "decode", lambda data, where: decoded.append(where) or real(data, where))  # type: ignore[func-returns-value]
    return decoded


@pytest.mark.parametrize(
    ("view", "start"),
    [
        ({}, 0),
        ({"mirror": True}, 6),
        ({"subset": 7, "seed": 3}, 3),
        ({"subset": 7, "mirror": True}, 5),
    ],
    ids=str,
)
def test_batches_are_the_same_in_every_mode(data: Path, view: dict[str, Any], start: int) -> None:
    def dataset() -> ImageDataset:
        return ImageDataset(data, use_labels=True, **view)

    everything = dataset().images(np.arange(len(dataset())))
    expected = [(everything[i], i) for _, i in reference(dataset(), start, 6 * EPOCH)]
    for mode, workers in [("off", 0), ("off", 2), ("ram", 2), ("disk", 0), ("device", 0), ("disk", 2)]:
        opened = dataset()
        stream = BatchStream(opened, BATCH, 0, start, workers=workers, cache=mode, report=lambda topic, line: None)
        assert same(batches(stream, 6 * EPOCH), expected), (mode, workers)
        assert len(stream.worker_pids) == (workers if mode == "off" else 0)
        stream.close()
        assert np.array_equal(opened.images(np.arange(len(opened))), everything)
    assert len(caches_in(data.parent)) == 1


@pytest.mark.parametrize("mode", ["ram", "disk"])
def test_each_image_is_decoded_once(data: Path, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = count_decodes(monkeypatch)
    run_through(ImageDataset(data, mirror=True), cache=mode)
    assert len(decoded) == len(set(decoded)) == N
    decoded.clear()
    run_through(ImageDataset(data, mirror=True), cache=mode)
    assert len(decoded) == (0 if mode == "disk" else N)


def test_the_file_is_there_when_every_image_was_shown_and_not_before(data: Path) -> None:
    stream = BatchStream(ImageDataset(data), BATCH, 0, cache="disk", report=lambda topic, line: None)
    assert "made as images are first shown" in stream.lines[0]
    for images, _ in itertools.islice(stream, EPOCH - 2):
        assert len(images) == BATCH
    (temporary,) = caches_in(data.parent)
    assert temporary.startswith(".pets.zip.")
    assert temporary.endswith(".tmp")
    batches(stream)
    stream.close()
    dataset = ImageDataset(data)
    (name,) = caches_in(data.parent)
    assert name == f"pets.zip.{dataset.fingerprint[:8]}.cache"
    assert (data.parent / name).stat().st_size == cache_file.HEADER_BYTES + N * 3 * 8 * 8
    assert (data.parent / name).stat().st_mode & 0o444 == 0o444 & ~_umask()
    assert "complete: nothing is decoded" in run_through(ImageDataset(data))[0]


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def test_a_stream_that_ends_early_leaves_nothing_behind(data: Path) -> None:
    run_through(ImageDataset(data), number=1)
    assert caches_in(data.parent) == []


def test_an_exit_in_the_first_epoch_leaves_nothing_behind(data: Path) -> None:
    code = """
import sys, pathlib
from gan.data.cache_file import FileStore
from gan.data.dataset import ImageDataset
dataset = ImageDataset(sys.argv[1])
path = dataset.content().file_in(pathlib.Path(sys.argv[1]).parent)
store = FileStore(dataset.content(), path)
print(*path.parent.glob(".*"))
raise KeyboardInterrupt
"""
    command = [sys.executable, "-c", code, str(data)]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip().endswith(".tmp")
    assert "KeyboardInterrupt" in result.stderr
    assert caches_in(data.parent) == []


def test_what_killed_runs_left_is_removed_after_a_day(data: Path) -> None:
    path = ImageDataset(data).content().file_in(data.parent)
    old, new = (path.with_name(f".{path.name}.{x}.tmp") for x in ("old", "new"))
    for leftover in (old, new):
        leftover.write_bytes(b"pixels")
    os.utime(old, (time.time() - 90_000,) * 2)
    run_through(ImageDataset(data), number=1)
    assert caches_in(data.parent) == [new.name]


def test_two_runs_at_once_do_not_disturb_each_other(data: Path) -> None:
    expected = reference(ImageDataset(data))
    streams = [
        BatchStream(ImageDataset(data), BATCH, 0, cache="disk", report=lambda topic, line: None) for _ in range(2)
    ]
    seen: list[list[Any]] = [[], []]
    for _ in range(3 * EPOCH):
        for stream, mine in zip(streams, seen, strict=True):
            mine += batches(stream, 1)
    for stream, mine in zip(streams, seen, strict=True):
        stream.close()
        assert same(mine, expected)
    assert len(caches_in(data.parent)) == 1


@pytest.mark.parametrize("kind", ["zip", "folder"])
def test_other_images_are_another_cache_and_the_stale_one_goes(data: Path, tmp_path: Path, kind: str) -> None:
    path = data
    if kind == "folder":
        path = tmp_path / "data" / "pets"
        with zipfile.ZipFile(data) as archive:
            archive.extractall(path)
        data.unlink()
    run_through(ImageDataset(path))
    run_through(ImageDataset(path, subset=5))
    first = caches_in(path.parent)
    foreign = path.parent / f"{path.name}.00000000.cache"
    foreign.write_bytes(b"somebody else's file of that name")
    assert len(first) == 1  # which serves the subset too
    if kind == "zip":
        write_dataset(path, N + 1, size=8)
    else:
        image = next(path.rglob("*.png"))
        os.utime(image, ns=(1, 1))
    lines = run_through(ImageDataset(path))
    assert "made as images are first shown" in lines[0]
    assert foreign.name in caches_in(path.parent)
    assert len(caches_in(path.parent)) == 2
    assert first[0] not in caches_in(path.parent)


def test_datasets_of_one_name_share_a_folder(data: Path, tmp_path: Path) -> None:
    other = tmp_path / "pets.zip"
    write_dataset(other, N + 2, size=8)
    shared = tmp_path / "shared"
    for path in (data, other, data, other):
        said = run_through(ImageDataset(path), cache_dir=str(shared))
    assert len(caches_in(shared)) == 2
    assert "complete: nothing is decoded" in said[0]
    assert caches_in(data.parent) == []


def test_a_subset_has_a_cache_of_its_own_or_uses_that_of_all(data: Path) -> None:
    said = run_through(ImageDataset(data, subset=6, seed=1))
    assert "made" in said[0]
    assert "complete: nothing" in run_through(ImageDataset(data, subset=6, seed=1))[0]
    assert "made" in run_through(ImageDataset(data, subset=6, seed=2))[0]
    run_through(ImageDataset(data))
    assert len(caches_in(data.parent)) == 3
    whole = ImageDataset(data, subset=8, seed=9)
    said = run_through(whole)
    assert "complete: nothing" in said[0]
    assert len(caches_in(data.parent)) == 3
    assert np.array_equal(whole.images(np.arange(8)), ImageDataset(data, subset=8, seed=9).images(np.arange(8)))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda b: b[:-1], "bytes instead of"),
        (lambda b: b[:100], "its header is damaged"),
        (lambda b: b"", "it is no cache"),
        (lambda b: bytes(len(b)), "it is no cache"),
        (lambda b: b[:8] + b"[1]".ljust(4088) + b[4096:], "its header is damaged"),
        (lambda b: b.replace(b'"format": 1', b'"format": 9'), "it was made by another version"),
        (lambda b: b.replace(b'"shape": [10,', b'"shape": [11,'), "it holds other images"),
    ],
)
def test_a_damaged_cache_is_named_and_made_again(data: Path, spoil: Any, said: str) -> None:
    expected = reference(ImageDataset(data))
    run_through(ImageDataset(data))
    (name,) = caches_in(data.parent)
    path = data.parent / name
    good = path.read_bytes()
    path.write_bytes(spoil(good))
    dataset = ImageDataset(data, cache_folder=data.parent)
    stream = BatchStream(dataset, BATCH, 0, cache="disk", report=lambda topic, line: None)
    assert stream.lines[1].startswith(f"{path} is ignored: ")
    assert said in stream.lines[1]
    assert same(batches(stream), expected)
    stream.close()
    assert path.read_bytes() == good


def test_with_a_cache_no_image_is_looked_at_when_the_dataset_is_opened(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_through(ImageDataset(data))
    from gan.data import decode

    monkeypatch.setattr(decode, "shape_of", lambda file: pytest.fail("looked"))
    opened = ImageDataset(data, cache_folder=data.parent)
    assert opened.image_shape == (3, 8, 8)
    assert len(opened.view(subset=4, mirror=True)) == 8


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_is_said_and_training_goes_on(data: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    expected = reference(ImageDataset(data))
    real, room = FileStore._write, [1 + 6]

    def write(self: FileStore, content: Any) -> None:
        room[0] -= 1
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, content)

    monkeypatch.setattr(FileStore, "_write", write)
    said: list[tuple[str, str]] = []
    stream = BatchStream(
        ImageDataset(data), BATCH, 0, workers=workers, cache="disk", report=lambda *about: said.append(about)
    )
    assert same(batches(stream), expected)
    ((topic, line),) = said
    assert topic == "Cache"
    assert line.startswith("off, every image is decoded from now on: ")
    assert "no space left on the device; free some" in line
    assert caches_in(data.parent) == []
    stream.close()


def test_a_disk_that_turns_out_full_at_the_end_is_said_too(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(ImageDataset(data))

    def flush(self: FileStore) -> None:
        raise OSError(errno.EDQUOT, "Quota exceeded")

    monkeypatch.setattr(FileStore, "flush", flush)
    said: list[str] = []
    stream = BatchStream(ImageDataset(data), BATCH, 0, workers=2, cache="disk", report=into(said))
    assert same(batches(stream), expected)
    stream.close()
    assert ["no space left" in line for line in said] == [True]
    assert caches_in(data.parent) == []


def test_a_folder_that_cannot_be_written_to_is_said(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = reference(ImageDataset(data))
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda *args: False)
        assert cache.choose(ImageDataset(data), "auto").mode == "ram"
        choice = cache.choose(ImageDataset(data), "disk")
    assert choice.mode == "off"
    assert "cannot be written to; --cache-dir names another folder" in choice.lines[0]

    def refuse(dest: Path) -> Path:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache_file, "temporary_beside", refuse)
    stream = BatchStream(ImageDataset(data), BATCH, 0, cache="auto")
    assert "permission denied" in stream.lines[0]
    assert same(batches(stream), expected)
    stream.close()


def test_auto_takes_what_has_room(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageDataset(data)
    size = dataset.content().num_bytes
    room = {"disk": 2 * size, "memory": 4 * size}
    monkeypatch.setattr(cache, "free_bytes", lambda folder: room["disk"])
    monkeypatch.setattr(cache, "available_bytes", lambda: room["memory"])

    def mode(kind: str = "auto", gpu: int | None = None) -> str:
        return cache.choose(dataset, kind, gpu_free=gpu).mode

    assert mode(gpu=4 * size) == "device"
    assert mode(gpu=4 * size - 1) == "disk"
    assert (mode(), mode("disk"), mode("ram"), mode("device")) == ("disk", "disk", "ram", "ram")
    assert (mode("device", gpu=2 * size), mode("device", gpu=size)) == ("device", "ram")
    room["disk"] -= 1
    assert (mode(), mode("disk")) == ("ram", "disk")
    room["disk"] = size - 1
    assert mode("disk") == "off"
    room["memory"] -= 1
    assert (mode(), mode("ram")) == ("off", "ram")
    line = cache.choose(dataset, "auto", gpu_free=size).lines[0]
    assert line.startswith("off, every image is decoded each time it is shown (")
    assert all(word in line for word in ("free on the GPU", "free in", "of free memory"))


def test_a_disk_that_does_not_say_what_is_free_is_not_used(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(folder: Path) -> Any:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(shutil, "disk_usage", gone)
    assert cache.choose(ImageDataset(data), "auto").mode == "ram"
    choice = cache.choose(ImageDataset(data), "disk")
    assert choice.mode == "off"
    assert f"{data.parent}: {os.strerror(errno.ESTALE)}" in choice.lines[0]


def test_what_a_container_may_not_take_is_not_free(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = ImageDataset(data)
    size = dataset.content().num_bytes
    monkeypatch.setattr(cache, "free_bytes", lambda folder: 0)
    monkeypatch.setattr(memory, "_left_in_cgroups", lambda: [4 * size])
    assert cache.choose(dataset, "auto").mode == "ram"
    monkeypatch.setattr(memory, "_left_in_cgroups", lambda: [4 * size - 1])
    assert cache.choose(dataset, "auto").mode == "off"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_nothing_stays(data: Path, workers: int) -> None:
    bad = data.with_name("bad.zip")
    with zipfile.ZipFile(data) as source, zipfile.ZipFile(bad, "w") as target:
        for name in source.namelist():
            content = source.read(name)
            target.writestr(name, content[:60] + b"\xff" * 9 + content[69:] if name.endswith("3.png") else content)
    stream = BatchStream(ImageDataset(bad), BATCH, 0, cache="disk", workers=workers)
    with pytest.raises(GanError, match=r"bad\.zip: 00000/img00000003\.png is damaged"):
        batches(stream)
    assert caches_in(data.parent) == []
    assert not [t for t in threading.enumerate() if t.name.startswith("data")]
    with pytest.raises(StopIteration):
        next(stream)


def test_the_next_batch_is_ready_before_it_is_asked_for(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = ImageDataset.unflipped

    def slow(self: ImageDataset, row: int) -> np.ndarray:
        time.sleep(0.2 / BATCH)
        return real(self, row)

    monkeypatch.setattr(ImageDataset, "unflipped", slow)
    stream = BatchStream(ImageDataset(data), BATCH, 0)
    next(stream)
    time.sleep(0.3)
    begin = time.perf_counter()
    next(stream)
    assert time.perf_counter() - begin < 0.15
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_images_kept_on_the_device_are_the_same(data: Path, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the CPU here."""
    dataset = ImageDataset(data, mirror=True)
    expected = reference(dataset, number=6 * EPOCH)
    monkeypatch.setattr(BatchStream, "_free_memory", lambda self: 10**9)
    for found in (False, True):
        if found:
            run_through(ImageDataset(data))
        stream = BatchStream(dataset.view(mirror=True), BATCH, 0, workers=workers, cache="device")
        assert stream.lines[0].startswith("device, ")
        assert ("read from" in stream.lines[0]) == found
        assert same(batches(stream, 6 * EPOCH), expected)
        stream.close()


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["device", "disk", "ram", "off"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_on_a_gpu_are_those_of_the_cpu(data: Path, mode: str, workers: int) -> None:
    """Also while the device is busy, which is when a missing wait between streams shows."""
    device = torch.device("cuda")
    dataset = ImageDataset(data, mirror=True)
    expected = reference(dataset, number=8 * EPOCH)
    stream = BatchStream(dataset.view(mirror=True), BATCH, 0, device=device, workers=workers, cache=mode)
    assert stream.lines[0].startswith(mode)
    busy = torch.randn([2048, 2048], device=device)
    found = []
    for images, indices in itertools.islice(stream, 8 * EPOCH):
        for _ in range(20):
            busy = busy @ busy / 2048
        found.append((images.clone(), indices.clone()))
    stream.close()
    assert same([(images.cpu().numpy(), indices.tolist()) for images, indices in found], expected)
    if mode == "disk":
        again = BatchStream(dataset.view(mirror=True), BATCH, 0, device=device, cache="device")
        assert "read from" in again.lines[0]
        assert same([(i.cpu().numpy(), j.tolist()) for i, j in itertools.islice(again, 8 * EPOCH)], expected)
        again.close()


class TestCommandLine:
    @pytest.fixture
    def outdir(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        monkeypatch.setitem(sys.modules, "mlflow", None)  # it takes longer than all the rest
        monkeypatch.chdir(tmp_path)
        return tmp_path / "training-runs"

    def run(self, *arguments: object) -> str:
        result = CliRunner().invoke(train, [str(a) for a in arguments])
        assert "Traceback" not in result.output
        return result.output

    def test_the_second_run_uses_the_cache_of_the_first(
        self, tmp_path: Path, outdir: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        data = write_dataset(tmp_path / "pets.zip")
        command = ["--data", data, *SHORT, "--mirror"]
        first = self.run(*command)
        (name,) = caches_in(tmp_path)
        path = tmp_path / name
        assert f"Cache:     disk, {path}, 0.0 MB, made as images are first shown" in first
        assert f"Cache:     complete in {path}" in first
        decoded, opened = count_decodes(monkeypatch), []
        monkeypatch.setattr(ImageDataset, "_check_images", lambda self: pytest.fail("looked at every image"))
        real = ImageDataset.__init__
        monkeypatch.setattr(ImageDataset, "__init__", lambda *a, **k: opened.append(a) or real(*a, **k))  # type: ignore[func-returns-value]
        second = self.run(*command)
        assert len(opened) == 1
        assert f"Cache:     disk, {path}, 0.0 MB, complete: nothing is decoded" in second
        assert decoded == []
        one, other = sorted(outdir.glob("0*"))
        assert (one / "fakes000001.png").read_bytes() == (other / "fakes000001.png").read_bytes()
        assert (one / "reals.png").read_bytes() == (other / "reals.png").read_bytes()

    def test_a_run_of_before_there_was_a_cache_continues_with_one(self, tmp_path: Path, outdir: Path) -> None:
        data = write_dataset(tmp_path / "pets.zip")
        self.run("--data", data, *SHORT, "--cache", "off")
        assert caches_in(tmp_path) == []
        (options,) = outdir.glob("0*/training_options.json")
        content = json.loads(options.read_text())
        assert content.pop("cache") == "off"
        assert content.pop("cache_dir") is None
        options.write_text(json.dumps(content))
        assert TrainConfig.from_json(options.read_text(), "x").cache == "auto"
        output = self.run("--resume", "--kimg", 2, "--cache-dir", tmp_path / "fast" / "disk")
        assert f"Cache:     disk, {tmp_path / 'fast' / 'disk'}" in output
        assert len(caches_in(tmp_path / "fast" / "disk")) == 1
        assert json.loads(options.read_text())["cache_dir"] == str(tmp_path / "fast" / "disk")
        output = self.run("--resume", "--kimg", 3, "--cache", "ram", "--dry-run")
        assert '"cache": "ram"' in output
        options.write_text(options.read_text().replace('"cache": "auto"', '"cache": "ram"'))
        output = self.run("--resume", "--kimg", 3, "--cache-dir", tmp_path)
        assert f"--cache-dir {tmp_path}: with --cache ram there is no file" in output

    @pytest.mark.parametrize("mode", ["ram", "off"])
    def test_a_folder_without_a_file_to_put_there_is_refused(self, tmp_path: Path, mode: str) -> None:
        data = write_dataset(tmp_path / "pets.zip")
        output = self.run("--data", data, "--cache", mode, "--cache-dir", "x")
        assert (
            f"error: --cache-dir x: with --cache {mode} there is no file; leave it out, or use --cache disk" in output
        )
        assert check_cache(mode, None) == check_cache("auto", "x") == check_cache("disk", "x") == []
        assert check_cache("disk", str(data)) == [f"--cache-dir {data}: is a file; name a folder"]

    def test_the_cache_is_no_hyperparameter(self) -> None:
        from gan.config import DataInfo
        from gan.resolve import resolve
        from gan.train_options import TrainOptions

        config = resolve(TrainOptions(data="x"), DataInfo("x", "x", 10, 16, 16, 3))
        other = dataclasses.replace(config, cache="off", cache_dir="y")
        assert config.reference_options() == other.reference_options()
        assert config.desc == resolve(TrainOptions(data="x", cache="ram"), DataInfo("x", "x", 10, 16, 16, 3)).desc
