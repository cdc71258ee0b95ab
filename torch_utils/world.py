"""The processes that train together, and what they do together."""

from __future__ import annotations

import datetime
import functools
import io
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from torch_utils.distributed import LOST_EXIT_CODE, DistributedError, Place
from torch_utils.meeting import in_words, meet, named, within
from torch_utils.notes import Notes
from torch_utils.watch import Pending, Watch

_LOOK_SECONDS = 1.0  # a waiting process looks this often whether it has got a signal
_CHUNK = 64 * 2**20  # bytes: each has the timeout for itself


class DifferentError(DistributedError):
    """The processes do not train the same networks."""


class World:
    """The processes of a run. By itself a world of one, in which nothing is waited for.

    Everything but `average` passes over the CPU (gloo), and is called by all ranks in the same order. A rank that does
    not come within the timeout is named.
    """

    backend = ""
    """what the gradients pass over: "nccl" or "gloo"; "" for a world of one"""

    def __init__(self, place: Place | None = None) -> None:
        self.place = place or Place()
        self.hosts = [socket.gethostname()]
        """names of machines, by rank"""
        self.on_hang: Callable[[str], None] = lambda text: print(f"error: {text}", file=sys.stderr, flush=True)
        """told, in a thread of its own, why this process is about to end: a GPU waits for a rank that hangs"""

    @property
    def rank(self) -> int:
        """0 to size - 1."""
        return self.place.rank

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.place.size

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks to people."""
        return self.place.is_first

    def average(self, flat: torch.Tensor, what: str) -> None:
        """Replace a tensor, on any device, by its mean over the ranks; `what` it is, for whoever has to wait for it."""

    def use(self, device: torch.device) -> None:
        """From now on `average` is for tensors on this device, of the same kind on all ranks, each its own."""

    def agree(self, bits: int, what: str) -> int:
        """The bits that any rank has set."""
        return bits

    def meet(self, what: str) -> None:
        """Wait until all ranks have come here: to be called before a device is waited for."""

    def gather(self, value: Any, what: str) -> list[Any]:
        """The plain values (JSON) of all ranks, by rank, on every rank."""
        return [value]

    def share(self, value: Any, what: str) -> Any:
        """What rank 0 gives, plain values and tensors, on every rank (tensors then on the CPU)."""
        return value

    def collect(self, part: torch.Tensor, what: str) -> list[torch.Tensor] | None:
        """On rank 0 the tensors (CPU, of one shape) of all ranks, by rank; None elsewhere."""
        return [part]

    def require_same(self, tensors: Mapping[str, torch.Tensor], when: str) -> None:
        """Raises DistributedError, naming the first tensor, if one is not the same to the bit on all ranks."""

    def doing(self, what: str) -> None:
        """Note what this process does now, for the others if it does not come to the next thing they do together."""

    def leave(self, text: str) -> None:
        """Note why this process ends: the others say it in place of that it was lost."""

    def first(self, key: str) -> bool:
        """Whether no other process has asked this before."""
        return True

    def close(self) -> None:
        """Part, when everything is done; after an error that the others do not have a process just ends."""


ALONE = World()


def join(place: Place, timeout_s: float) -> World:
    """Meet the other processes; from then on rank 0's timeout is that of all.

    Raises DistributedError, naming those that do not come within the timeout.
    """
    if place.size == 1:
        return World(place)
    try:
        store, hosts, timeout_s = meet(place, timeout_s)
        dist.init_process_group(
            "gloo",
            store=dist.PrefixStore("group", store),
            rank=place.rank,
            world_size=place.size,
            timeout=datetime.timedelta(seconds=timeout_s),
        )
    except DistributedError:
        raise
    except RuntimeError as error:
        raise DistributedError(
            f"the {place.size} processes cannot be connected ({in_words(error)}): is one of them gone, or a "
            "firewall between them? GLOO_SOCKET_IFNAME names the network interface to use"
        ) from error
    return _Group(place, hosts, Notes(store, place, hosts, timeout_s), timeout_s)


class _Group(World):
    """Several processes, over PyTorch's default group."""

    backend = "gloo"

    def __init__(self, place: Place, hosts: list[str], notes: Notes, timeout_s: float) -> None:
        super().__init__(place)
        self.hosts = hosts
        self._notes = notes
        self._nccl: dist.ProcessGroup | None = None
        self._watch: Watch | None = None
        self._timeout_s = timeout_s
        self._sequence = 0
        """how many things it has come to that all do together"""
        self._error: DistributedError | None = None

    def use(self, device: torch.device) -> None:
        if device.type != "cuda" or not dist.is_nccl_available():
            return

        def connect() -> dist.ProcessGroup:
            torch.cuda.set_device(device)  # of this thread
            # Its timeout ends the process without a word, so others have to speak before.
            group = dist.new_group(backend="nccl", timeout=2 * datetime.timedelta(seconds=self._timeout_s))
            # It connects, and takes its memory, with the first reduction, which waits for all ranks without end.
            dist.all_reduce(torch.zeros(1, device=device), group=group)
            torch.cuda.synchronize(device)
            return group

        groups: list[dist.ProcessGroup] = []
        self._together(lambda: groups.append(within(self._timeout_s, connect)), "the connection of the GPUs over NCCL")
        (self._nccl,) = groups
        self._watch = Watch(self._timeout_s, self._hangs, prepare=functools.partial(torch.cuda.set_device, device))
        self.backend = "nccl"

    def average(self, flat: torch.Tensor, what: str) -> None:
        if self._nccl is not None and flat.is_cuda:
            self._together(lambda: self._put_into_queue(flat, what), what)
        else:
            self._together(lambda: dist.all_reduce(flat, async_op=True), what)
        flat.div_(self.size)

    def _put_into_queue(self, flat: torch.Tensor, what: str) -> None:
        assert self._watch is not None
        pending = self._watch.begin(what, self._sequence)
        dist.all_reduce(flat, group=self._nccl)
        event = torch.cuda.Event()
        event.record()
        pending.event = event

    def _hangs(self, pending: Pending, seconds: float) -> None:
        """Called by the watch."""
        try:
            self.on_hang(self._notes.missed(pending.what, pending.sequence, seconds))
        finally:
            os._exit(LOST_EXIT_CODE)  # nothing else ends what waits for the device

    def agree(self, bits: int, what: str) -> int:
        flags = torch.tensor([bits], dtype=torch.int64)
        self._together(lambda: dist.all_reduce(flags, dist.ReduceOp.BOR, async_op=True), what)
        return int(flags.item())

    def meet(self, what: str) -> None:
        self.agree(0, what)

    def gather(self, value: Any, what: str) -> list[Any]:
        own = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        length = torch.tensor([len(own)])
        lengths = [torch.empty_like(length) for _ in range(self.size)]
        self._together(lambda: dist.all_gather(lengths, length, async_op=True), what)
        longest = max(int(n) for n in lengths)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(own)] = own
        texts = [torch.empty_like(padded) for _ in range(self.size)]
        self._together(lambda: dist.all_gather(texts, padded, async_op=True), what)
        return [json.loads(bytes(t[: int(n)].numpy())) for t, n in zip(texts, lengths, strict=True)]

    def share(self, value: Any, what: str) -> Any:
        content = bytearray()
        if self.is_first:
            buffer = io.BytesIO()
            torch.save(value, buffer)
            content = bytearray(buffer.getbuffer())
        length = torch.tensor([len(content)])
        self._together(lambda: dist.broadcast(length, 0, async_op=True), what)
        if not self.is_first:
            content = bytearray(int(length))
        for chunk in torch.frombuffer(content, dtype=torch.uint8).split(_CHUNK):
            self._together(functools.partial(dist.broadcast, chunk, 0, async_op=True), what)
        return value if self.is_first else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def collect(self, part: torch.Tensor, what: str) -> list[torch.Tensor] | None:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.is_first else None
        self._together(lambda: dist.gather(part, parts, 0, async_op=True), what)
        return parts

    def require_same(self, tensors: Mapping[str, torch.Tensor], when: str) -> None:
        what = f"the comparison {when}"
        self.meet(what)  # before the device is read, which may wait for a rank that hangs
        device = max(tensors.values(), key=torch.Tensor.numel).device  # of all sums, so that there is one read
        sums = torch.stack([_checksum(tensor).to(device) for tensor in tensors.values()]).tolist()
        first, *others = self.gather(dict(zip(tensors, sums, strict=True)), what)
        for name in first:
            different = [rank for rank, other in enumerate(others, 1) if other.get(name) != first[name]]
            if different:
                raise DifferentError(
                    f"{when} {name} of {named(different)} differs from that of rank 0: the processes do not train "
                    "the same networks"
                )

    def doing(self, what: str) -> None:
        self._note(what, False)

    def leave(self, text: str) -> None:
        self._notes.leave(text)

    def first(self, key: str) -> bool:
        return self._notes.first(key)

    def close(self) -> None:
        if self._error is None:
            self.meet("the end")
            if self._watch is not None:
                self._watch.close()
            dist.destroy_process_group()

    def _together(self, start: Callable[[], Any], what: str) -> None:
        """Do something that all ranks do, and wait for it."""
        if self._error is not None:
            raise self._error
        self._sequence += 1
        self._note(what, True)
        begun = time.monotonic()
        try:
            work = start()
        except TimeoutError as error:
            self._fail(self._notes.missed(what, self._sequence, time.monotonic() - begun), error)
        except RuntimeError as error:
            self._fail(self._notes.failed(what, error), error)
        try:
            while work is not None and not _wait(work):
                pass
        except RuntimeError as error:
            seconds = time.monotonic() - begun
            self._fail(self._notes.missed(what, self._sequence, seconds, in_words(error)), error)

    def _note(self, what: str, together: bool) -> None:
        try:
            self._notes.write(self._sequence, together, what)
        except DistributedError as error:
            self._error = error
            raise

    def _fail(self, text: str, error: Exception) -> NoReturn:
        self._error = DistributedError(text)
        raise self._error from error


def _wait(work: Any) -> bool:
    """Wait a moment for a collective; False: it is still on its way. In between Python handles signals."""
    try:
        work.wait(datetime.timedelta(seconds=_LOOK_SECONDS))
    except RuntimeError:
        if not work.is_completed():
            return False
        work.wait()  # it has failed, or has come to its end just now
    return True


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _checksum(tensor: torch.Tensor) -> torch.Tensor:
    """Of a tensor's bits: int64, on its device."""
    bits = tensor.detach().contiguous().view(-1).view(_INTEGERS[tensor.element_size()]).long()
    weights = torch.arange(1, 2 * len(bits), 2, device=bits.device)  # odd, so that no bit of a product is lost
    return (bits * weights).sum()
