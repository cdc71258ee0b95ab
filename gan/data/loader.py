"""Batches for training, made ready ahead of the step: decoded once, then gathered from a cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from gan.data import cache as caches
from gan.data.cache import Choice, FileStore, FoundStore, Store
from gan.data.dataset import ImageDataset
from gan.data.sampler import batches
from gan.data.workers import Decoded, Request, Workers

PATIENCE = 60  # seconds without a batch after which that is said; then after twice that, and so on


@dataclasses.dataclass(frozen=True)
class LabelTable:
    """The labels of a dataset on the training device: distinct rows `[K, c_dim]`, and each image's row `[images]`."""

    rows: torch.Tensor
    index: torch.Tensor

    @staticmethod
    def of(dataset: ImageDataset, device: torch.device) -> LabelTable:
        """The table of `dataset`."""
        rows, index = dataset.label_table()
        return LabelTable(torch.from_numpy(rows).to(device), torch.from_numpy(index).to(device))

    def take(self, indices: torch.Tensor) -> torch.Tensor:
        """Labels `[N, c_dim]` of images `[N]`."""
        return self.rows[self.index[indices]]

    def draw(self, n: int) -> torch.Tensor:
        """Labels `[n, c_dim]` of images taken at random."""
        return self.take(torch.randint(len(self.index), [n], device=self.index.device))


class BatchStream:
    """Endless (images uint8 `[batch, C, H, W]`, indices int64 `[batch]`), on the device; `close` it in the end.

    A thread prepares the next batch while the last one is trained on. An image is decoded when it is first due and kept
    in the cache; when all are there, batches are only gathered. What comes is a function of the seed alone, whatever
    the cache. An error, such as GanError for a damaged image, is raised when its batch is due, and ends the stream.
    A worker process can be lost: a line says so, and what it was to decode is decoded all the same.

    Args:
        dataset: the images, for which the stream may find a cache that is complete.
        batch: images at a time.
        seed: of the order.
        start: the first image, counted from the beginning of training.
        device: where the batches go.
        workers: processes that decode, as long as there is something to decode; 0: the thread does it.
        cache: auto, device, disk, ram or off.
        cache_dir: folder of the cache file; by default that of the dataset.
        report: takes a line on the cache for people, in the thread that asks for batches.
        notice: the same for lines on the reading of images; by default `report`.
    """

    lines: list[str]
    """what became of the cache, and why"""

    def __init__(
        self,
        dataset: ImageDataset,
        batch: int,
        seed: int,
        start: int = 0,
        *,
        device: torch.device | None = None,
        workers: int = 0,
        cache: str = "off",
        cache_dir: str | None = None,
        report: Callable[[str], None] = print,
        notice: Callable[[str], None] | None = None,
    ) -> None:
        self._dataset, self._batch, self._seed, self._position = dataset, batch, seed, start
        self._device = device or torch.device("cpu")
        self._report, self._notice = report, notice or report
        self._unsaid = list[tuple[Callable[[str], None], str]]()
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        choice = caches.choose(dataset, cache, cache_dir, self._free_memory())
        self.lines = choice.lines
        self._store = self._open_store(choice)
        self._missing = dataset.num_unflipped if self._store is not None and not self._store.complete else 0
        self._asked_for = np.zeros(dataset.num_unflipped, dtype=bool)
        self._flushing: Future[None] | None = None
        self._decoder = _Decoder(dataset)
        self._decoded: Iterator[Decoded] | None = None
        if self._store is None or self._missing:
            self._decoded = self._decode(workers)  # here, so that processes are forked off the main thread
        else:
            self._order = batches(len(dataset), batch, seed, start)
            self._serve_dataset()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="data")  # one for batches, one to flush
        self._next: Future[_HostBatch] | None = self._prepare_next()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._next is None:
            raise StopIteration
        try:
            host = self._wait_for(self._next)
            self._next = self._prepare_next()
            self._say()
            return self._to_device(host)
        except BaseException:
            self.close()
            raise

    @property
    def worker_pids(self) -> list[int]:
        """The processes that decode at the moment."""
        return self._decoded.pids if isinstance(self._decoded, Workers) else []

    def close(self) -> None:
        """End the thread and the processes; remove a cache that is not complete."""
        self._next = None
        self._decoder.stopped = True  # in the middle of a batch
        self._end_workers()  # the thread may be waiting for one
        self._threads.shutdown(cancel_futures=True)
        self._decoded = None
        if self._store is not None:
            if self._flushing is not None and not self._flushing.cancelled():
                self._finish_file()
            if self._store is not None:
                self._store.close()
        self._say()

    # The rest of the main thread's part.

    def _say(self) -> None:
        while self._unsaid:
            say, line = self._unsaid.pop(0)
            say(line)

    def _wait_for(self, batch: Future[_HostBatch]) -> _HostBatch:
        """What hangs, such as a disk of another machine, is named."""
        patience, waited = PATIENCE, 0
        while not concurrent.futures.wait([batch], patience - waited).done:
            waited, patience = patience, 2 * patience
            self._notice(f"waiting for images from {self._dataset.path} since {waited} s")
        return batch.result()

    def _free_memory(self) -> int | None:
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None

    def _open_store(self, choice: Choice) -> Store | _DeviceStore | None:
        try:
            if choice.mode == "device":
                with self._beside_training():
                    return _DeviceStore(choice, self._device)
            return caches.open_store(choice)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            self.lines = [caches.gave_up(error, choice.path), *choice.lines[1:]]
            return None

    def _prepare_next(self) -> Future[_HostBatch]:
        pinned = self._side is not None
        gathered_there = isinstance(self._store, _DeviceStore) and not self._missing
        shape = [0 if gathered_there else self._batch, *self._dataset.image_shape]
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        indices = torch.empty([self._batch], dtype=torch.int64, pin_memory=pinned)
        return self._threads.submit(self._prepare, _HostBatch(images, indices))

    def _to_device(self, host: _HostBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Copied beside the step that is still running there; mirror images are flipped there."""
        with self._beside_training():
            indices = host.indices.to(self._device, non_blocking=True)
            if isinstance(self._store, _DeviceStore):
                images = self._store.exchange(host, indices % self._dataset.num_unflipped)
            else:
                images = host.images.to(self._device, non_blocking=True)
            if self._dataset.mirror:
                flipped = (indices >= self._dataset.num_unflipped)[:, None, None, None]
                images = torch.where(flipped, images.flip(3), images)
        if self._side is not None:
            training = torch.cuda.current_stream(self._device)
            training.wait_stream(self._side)
            for tensor in (images, indices):
                tensor.record_stream(training)
        return images, indices

    def _beside_training(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext() if self._side is None else torch.cuda.stream(self._side)

    # What runs in the thread. It uses no device, and the main thread touches nothing of this while it runs.

    def _prepare(self, host: _HostBatch) -> _HostBatch:
        if self._decoded is None:
            indices, rows, images = next(self._order), np.empty(0, dtype=np.int64), host.images.numpy()[:0]
        else:
            indices, rows, images = next(self._decoded)
        self._position += self._batch
        host.indices.numpy()[:] = indices
        if isinstance(self._store, _DeviceStore):
            host.new_rows = torch.from_numpy(rows)
            host.images.numpy()[: len(rows)] = images
        else:
            self._assemble(indices % self._dataset.num_unflipped, rows, images, host.images.numpy())
        self._count(len(rows))
        return host

    def _assemble(self, wanted: np.ndarray, rows: np.ndarray, images: np.ndarray, out: np.ndarray) -> None:
        """Keep the images that were decoded, and put the batch together."""
        assert not isinstance(self._store, _DeviceStore)
        if self._store is not None and len(rows):
            try:
                self._store.put(rows, images)
            except OSError as error:
                self._give_up(error)
        if self._flushing is not None and self._flushing.done():
            self._finish_file()
        if self._store is not None:
            try:
                self._store.take(wanted, out)
                return
            except OSError as error:
                self._give_up(error)
        place = {row: i for i, row in enumerate(rows.tolist())}
        for i, row in enumerate(wanted.tolist()):  # what is not there was kept in a cache that has failed
            out[i] = images[place[row]] if row in place else self._dataset.unflipped(row)

    def _count(self, num_new: int) -> None:
        """When every image has been seen, nothing is decoded any more."""
        if self._missing:
            self._missing -= num_new
            if not self._missing:
                assert self._store is not None
                self._end_workers()
                self._decoded = None
                self._order = batches(len(self._dataset), self._batch, self._seed, self._position)
                self._flushing = self._threads.submit(self._store.flush)

    def _finish_file(self) -> None:
        """The last step of a cache that was flushed. There is nothing to say of one in memory."""
        assert self._flushing is not None
        assert self._store is not None
        flushing, self._flushing = self._flushing, None
        try:
            flushing.result()
            self._store.publish()
        except OSError as error:
            self._give_up(error)
            return
        if isinstance(self._store, FileStore):
            self._unsaid.append((self._report, f"complete in {self._store.path}"))
        self._serve_dataset()

    def _give_up(self, error: OSError) -> None:
        assert isinstance(self._store, (FileStore, FoundStore))
        if self._flushing is not None:
            concurrent.futures.wait([self._flushing])
            self._flushing = None
        self._unsaid.append((self._report, caches.gave_up(error, self._store.path)))
        self._store.close()
        self._store, self._missing = None, 0
        if self._decoded is None:
            self._decoded = self._decode(workers=0)  # a process forked now might inherit a lock of another thread

    def _serve_dataset(self) -> None:
        if isinstance(self._store, Store):
            self._dataset.serve_from(self._store)

    def _decode(self, workers: int) -> Iterator[Decoded]:
        """What has to be decoded, batch by batch from here on."""
        if workers == 0:
            return map(self._decoder.decoded, self._requests())
        shape = (self._batch, *self._dataset.image_shape)
        return Workers(workers, self._decoder, self._requests(), shape, self._say_later)

    def _say_later(self, line: str) -> None:
        self._unsaid.append((self._notice, line))

    def _end_workers(self) -> None:
        if isinstance(self._decoded, Workers):
            self._decoded.close()

    def _requests(self) -> Iterator[Request]:
        """Indices of the images of a batch, and the unflipped ones among them that nobody was asked for before."""
        for indices in batches(len(self._dataset), self._batch, self._seed, self._position):
            rows = np.unique(indices % self._dataset.num_unflipped)
            if self._store is not None:
                rows = rows[~self._asked_for[rows]]
                self._asked_for[rows] = True
            yield indices, rows


@dataclasses.dataclass
class _HostBatch:
    """A batch on its way to the device, page-locked if that is a GPU."""

    images: torch.Tensor
    """unflipped, uint8 `[batch, C, H, W]`; for a store on the device: those it lacks come first"""
    indices: torch.Tensor
    """int64 `[batch]`"""
    new_rows: torch.Tensor | None = None
    """which ones the store lacks, int64 `[new]`"""


class _DeviceStore:
    """The whole set on the device; filled and read on one stream."""

    def __init__(self, choice: Choice, device: torch.device) -> None:
        self.complete = choice.found
        self._images = torch.empty(choice.content.shape, dtype=torch.uint8, device=device)
        if choice.found:
            source = caches.found_store(choice)
            for rows in np.array_split(np.arange(len(self._images)), -(-self._images.nbytes // 2**28)):
                part = np.empty((len(rows), *self._images.shape[1:]), dtype=np.uint8)
                source.take(rows, part)
                self._images[rows[0] : rows[-1] + 1] = torch.from_numpy(part).to(device)

    def exchange(self, host: _HostBatch, rows: torch.Tensor) -> torch.Tensor:
        """Put in what is new, and take the batch out."""
        if host.new_rows is not None and len(host.new_rows):
            new = host.images[: len(host.new_rows)].to(self._images.device, non_blocking=True)
            self._images.index_copy_(0, host.new_rows.to(self._images.device), new)
        return self._images.index_select(0, rows)

    def flush(self) -> None:
        """Nothing is held back."""

    def publish(self) -> None:
        """Nothing is to be published."""

    def close(self) -> None:
        """Nothing is left behind."""


class _Decoder:
    """Decodes what a batch asks for: that much is the work of one worker at a time."""

    def __init__(self, dataset: ImageDataset) -> None:
        self._dataset, self.stopped = dataset, False

    def __call__(self, rows: np.ndarray, images: np.ndarray) -> None:
        """Write images into an array uint8 `[rows, C, H, W]`."""
        for image, row in zip(images, rows.tolist(), strict=True):
            if self.stopped:
                raise concurrent.futures.CancelledError
            image[:] = self._dataset.unflipped(row)

    def decoded(self, request: Request) -> Decoded:
        """What was requested."""
        images = np.empty((len(request[1]), *self._dataset.image_shape), dtype=np.uint8)
        self(request[1], images)
        return (*request, images)
