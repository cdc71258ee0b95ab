"""Batches for training, made ready ahead of the step: decoded once, then gathered from a cache."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from gan.data import cache as caches
from gan.data.cache import Choice
from gan.data.cache_file import FileStore, FoundStore
from gan.data.dataset import ImageDataset
from gan.data.decode_workers import Request, Workers
from gan.data.device_store import DeviceStore
from gan.data.sampler import batches
from gan.data.shared_store import SharedStore
from gan.data.store import Store
from torch_utils.distributed import Place

PATIENCE = 60  # seconds without a batch after which that is said; then after twice that, and so on
_HUNG_SECONDS = 5  # that closing waits for a batch in the making


class BatchStream:
    """Endless (images uint8 `[N, C, H, W]`, indices int64 `[N]`), on the device; `close` it in the end.

    N is the batch, or with several processes the share of this one, as `sampler.batches` deals it.

    A thread prepares the next batch while the last one is trained on. An image is decoded when it is first due and kept
    in the cache; when all are there, batches are only gathered. What comes is a function of the seed alone, whatever
    the cache. An error, such as GanError for a damaged image, is raised when its batch is due, and ends the stream.
    A worker process can be lost: a line says so, and what it was to decode is decoded all the same. The processes of
    a machine fill one cache, where it is a file or memory: what one of them has decoded, the others read.

    Args:
        dataset: the images, for which the stream may find a cache that is complete.
        batch: images at a time, of all processes together.
        seed: of the order.
        start: the first image, counted from the beginning of training.
        device: where the batches go.
        workers: processes that decode, as long as there is something to decode; 0: the thread does it.
        cache: auto, device, disk, ram or off.
        cache_dir: folder of the cache file; by default that of the dataset.
        report: takes what a line for people is about, "Cache" or "Data", and the line, in the thread that asks for
            batches.
        place: this process among those that train together.
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
        report: Callable[[str, str], None] = print,
        place: Place | None = None,
    ) -> None:
        self._dataset, self._batch, self._seed, self._position = dataset, batch, seed, start
        self._place = place or Place()
        assert batch % self._place.size == 0
        self._share = batch // self._place.size
        self._device = device or torch.device("cpu")
        self._report, self._unsaid = report, list[tuple[str, str]]()
        self._side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        choice = caches.choose(dataset, cache, cache_dir, self._free_memory(), self._place)
        self.lines = choice.lines
        self._store = self._open_store(choice)
        self._missing = dataset.num_unflipped if self._store is not None and not self._store.complete else 0
        self._asked_for = np.zeros(dataset.num_unflipped, dtype=bool)
        self._flushing: Future[None] | None = None
        self._decoded: Workers | None = None
        if self._store is None or self._missing:
            self._decoded = self._decode(workers)  # here, so that processes are forked off the main thread
        else:
            self._order = self._indices()
            self._serve_dataset()
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="data")  # one for batches, one to flush
        self._next: Future[_HostBatch] | None = self._prepare_next()

    def __iter__(self) -> BatchStream:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self._next is None:
            raise StopIteration
        try:
            while not self.wait(PATIENCE):
                pass
            host = self._next.result()
            self._next = self._prepare_next()
            self._say()
            return self._to_device(host)
        except BaseException:
            self.close()
            raise

    def wait(self, seconds: float) -> bool:
        """Wait for the next batch, so long at most; whether it is there. A line says so when that takes its time."""
        if self._next is None:
            return True
        now = time.monotonic()
        if concurrent.futures.wait([self._next], min(seconds, self._waiting_since + self._patience - now)).done:
            return True
        if time.monotonic() >= self._waiting_since + self._patience:  # such as for a disk of another machine
            self._report("Data", f"waiting for images from {self._dataset.path} since {self._patience} s")
            self._patience *= 2
        return False

    @property
    def worker_pids(self) -> list[int]:
        """The processes that decode at the moment."""
        return [] if (decoded := self._decoded) is None else decoded.pids

    def close(self) -> None:
        """End the thread and the processes; remove a cache that is not complete."""
        preparing, self._next = self._next, None
        self._end_decoding()  # the thread may be in the middle of a batch
        if preparing is not None:
            concurrent.futures.wait([preparing], _HUNG_SECONDS)  # what hangs, hangs: nothing here can end it
        self._threads.shutdown(wait=preparing is None or preparing.done(), cancel_futures=True)
        if preparing is not None and not preparing.done():
            self._report("Data", f"{self._dataset.path} does not answer; not waiting for it any more")
            return
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
            self._report(*self._unsaid.pop(0))

    def _free_memory(self) -> int | None:
        return torch.cuda.mem_get_info(self._device)[0] if self._device.type == "cuda" else None

    def _open_store(self, choice: Choice) -> Store | DeviceStore | None:
        try:
            if choice.mode == "device":
                with self._beside_training():
                    return DeviceStore(choice, self._device)
            return caches.open_store(choice)
        except (OSError, MemoryError, torch.OutOfMemoryError) as error:
            self.lines = [caches.gave_up(error, choice.path), *choice.lines[1:]]
            return None

    def _prepare_next(self) -> Future[_HostBatch]:
        self._waiting_since, self._patience = time.monotonic(), PATIENCE
        pinned = self._side is not None
        gathered_there = isinstance(self._store, DeviceStore) and not self._missing
        shape = [0 if gathered_there else self._share, *self._dataset.image_shape]
        images = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        indices = torch.empty([self._share], dtype=torch.int64, pin_memory=pinned)
        return self._threads.submit(self._prepare, _HostBatch(images, indices))

    def _to_device(self, host: _HostBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Copied beside the step that is still running there; mirror images are flipped there."""
        with self._beside_training():
            indices = host.indices.to(self._device, non_blocking=True)
            if isinstance(self._store, DeviceStore):
                if host.new_rows is not None and len(host.new_rows):
                    self._store.put(host.new_rows, host.images[: len(host.new_rows)])
                images = self._store.take(indices % self._dataset.num_unflipped)
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
        if isinstance(self._store, DeviceStore):
            host.new_rows = torch.from_numpy(rows)
            host.images.numpy()[: len(rows)] = images
        else:
            self._assemble(indices % self._dataset.num_unflipped, rows, images, host.images.numpy())
        self._count(len(rows))
        return host

    def _assemble(self, wanted: np.ndarray, rows: np.ndarray, images: np.ndarray, out: np.ndarray) -> None:
        """Keep the images that were decoded, and put the batch together."""
        assert not isinstance(self._store, DeviceStore)
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
            if isinstance(self._store, SharedStore):
                self._look_for_the_rest(self._store)
            else:
                self._missing -= num_new
            if self._store is not None and not self._missing:
                self._end_decoding()
                self._decoded = None
                self._order = self._indices()
                self._flushing = self._threads.submit(self._store.flush)

    def _look_for_the_rest(self, store: SharedStore) -> None:
        """It may have been decoded by other processes."""
        try:
            self._missing = 0 if store.is_full() else 1
        except OSError as error:
            self._give_up(error)

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
        if isinstance(self._store, FileStore) or (isinstance(self._store, SharedStore) and self._store.kept):
            self._unsaid.append(("Cache", f"complete in {self._store.path}"))
        self._serve_dataset()

    def _give_up(self, error: OSError) -> None:
        assert isinstance(self._store, (FileStore, FoundStore, SharedStore))
        if self._flushing is not None:
            concurrent.futures.wait([self._flushing])
            self._flushing = None
        self._unsaid.append(("Cache", caches.gave_up(error, self._store.path)))
        self._store.close()
        self._store, self._missing = None, 0
        if self._decoded is None:
            self._decoded = self._decode(workers=0)  # a process forked now might inherit a lock of another thread

    def _serve_dataset(self) -> None:
        if isinstance(self._store, Store):
            self._dataset.serve_from(self._store)

    def _decode(self, workers: int) -> Workers:
        """What has to be decoded, batch by batch from here on."""
        shape = (self._share, *self._dataset.image_shape)
        return Workers(workers, self._dataset.unflipped, self._requests(), shape, self._say_of_data)

    def _say_of_data(self, line: str) -> None:
        self._unsaid.append(("Data", line))

    def _end_decoding(self) -> None:
        if (decoded := self._decoded) is not None:  # the other thread may just be setting it to None
            decoded.close()

    def _indices(self) -> Iterator[np.ndarray]:
        """Of this process, from here on."""
        place = self._place
        return batches(len(self._dataset), self._batch, self._seed, self._position, place.rank, place.size)

    def _requests(self) -> Iterator[Request]:
        """Indices of the images of a batch, and the unflipped ones among them that nobody was asked for before."""
        for indices in self._indices():
            rows = np.unique(indices % self._dataset.num_unflipped)
            if self._store is not None:
                rows = rows[~self._asked_for[rows]]
                if isinstance(self._store, SharedStore):
                    with contextlib.suppress(OSError):  # taking them will tell
                        rows = rows[~self._store.has(rows)]
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
