"""The processes that train together, and what they do together."""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from torch_utils.distributed import DistributedError, Place

_LOOK_SECONDS = 1.0  # a waiting process looks this often whether it has got a signal
_CHUNK = 64 * 2**20  # bytes: each has the timeout for itself
_STORE_SECONDS = 5.0  # for asking the store what became of the others: it may be gone itself


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

    def total(self, values: torch.Tensor, what: str) -> torch.Tensor:
        """The sum over the ranks of a tensor on the CPU."""
        return values

    def agree(self, bits: int) -> int:
        """The bits that any rank has set."""
        return bits

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

    def first(self, key: str) -> bool:
        """Whether no other process has asked this before."""
        return True

    def close(self) -> None:
        """Part, when everything is done; after an error that the others do not have a process just ends."""


ALONE = World()


def join(place: Place, device_type: str, timeout_s: float) -> World:
    """Meet the other processes. Raises DistributedError, naming those that do not come within the timeout."""
    if place.size == 1:
        return World(place)
    timeout = datetime.timedelta(seconds=timeout_s)
    gradients = None
    try:
        store, hosts = _meet(_store(place, timeout), place, timeout_s)
        group = dist.PrefixStore("group", store)
        dist.init_process_group("gloo", store=group, rank=place.rank, world_size=place.size, timeout=timeout)
        if device_type == "cuda" and dist.is_nccl_available():
            # When its timeout is over NCCL ends the process without a word, so others have to speak before.
            gradients = dist.new_group(backend="nccl", timeout=2 * timeout)
    except DistributedError:
        raise
    except RuntimeError as error:
        raise DistributedError(
            f"the {place.size} processes cannot be connected ({_first_line(error)}): is one of them gone, or a "
            "firewall between them? GLOO_SOCKET_IFNAME names the network interface to use"
        ) from error
    return _Group(place, store, hosts, gradients, timeout_s)


def _store(place: Place, timeout: datetime.timedelta) -> dist.Store:
    """Where all processes meet: made by rank 0, or by an agent."""
    assert place.address is not None
    assert place.port is not None
    where = f"{place.address}:{place.port}"
    if not place.serves:
        _wait_for_answer((place.address, place.port), timeout.total_seconds())
    try:
        return dist.TCPStore(
            place.address,
            place.port,
            is_master=place.serves,
            timeout=timeout,
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=os.name != "nt",  # not every build for Windows has it
        )
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the processes cannot meet at {where} ({_first_line(error)}): MASTER_PORT names another port"
        ) from error


def _wait_for_answer(address: tuple[str, int], timeout_s: float) -> None:
    """Until somebody is at an address. TCPStore would take twice the time for it, and print traces of C++."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(address, timeout=max(deadline - time.monotonic(), _LOOK_SECONDS)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"the processes cannot meet: nobody answers at {address[0]}:{address[1]} within {timeout_s:g} s "
                    f"(--dist-timeout; {_first_line(error)}). Is rank 0 running there, and is the port open? "
                    "MASTER_ADDR and MASTER_PORT name another"
                ) from error
        time.sleep(0.1)


def _meet(store: dist.Store, place: Place, timeout_s: float) -> tuple[dist.Store, list[str]]:
    """Of a store a part that these processes alone have, and the names of their machines."""
    # torchrun's store outlives workers: what those before us left in it must not be taken for ours. So rank 0 names
    # a meeting, each rank enters itself there, and goes when the list of those present has just it in it.
    own = uuid.uuid4().hex
    if place.is_first:
        store.set("meeting", own)
    meeting = own
    deadline = time.monotonic() + timeout_s
    while True:
        if store.check(["meeting"]):
            meeting = store.get("meeting").decode()
            store.set(f"{meeting}/{place.rank}", json.dumps([own, socket.gethostname()]))
            if place.is_first and store.check([f"{meeting}/{rank}" for rank in range(place.size)]):
                everybody = [json.loads(store.get(f"{meeting}/{rank}")) for rank in range(place.size)]
                store.set(f"{meeting}/present", json.dumps(everybody))
            if store.check([f"{meeting}/present"]):
                present = json.loads(store.get(f"{meeting}/present"))
                if present[place.rank][0] == own:
                    return dist.PrefixStore(meeting, store), [host for _, host in present]
        if time.monotonic() > deadline:
            named = store.check(["meeting"])
            missing = [rank for rank in range(place.size) if named and not store.check([f"{meeting}/{rank}"])]
            raise DistributedError(
                f"{_ranks(missing or [0])} of {place.size} did not start within {timeout_s:g} s (--dist-timeout)"
            )
        time.sleep(0.02)


def _ranks(ranks: list[int]) -> str:
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:150]


class _Group(World):
    """Several processes, over PyTorch's default group."""

    def __init__(self, place: Place, store: dist.Store, hosts: list[str], gradients: Any, timeout_s: float) -> None:
        super().__init__(place)
        self.hosts = hosts
        self.backend = "nccl" if gradients else "gloo"
        self._store = store
        self._gradients = gradients
        """group of NCCL"""
        self._timeout_s = timeout_s
        self._sequence = 0
        """how many things it has come to that all do together"""
        self._error: DistributedError | None = None

    def average(self, flat: torch.Tensor, what: str) -> None:
        if self._gradients and flat.is_cuda:
            self._together(lambda: dist.all_reduce(flat, group=self._gradients), what)  # only put into its queue
        else:
            self._together(lambda: dist.all_reduce(flat, async_op=True), what)
        flat.div_(self.size)

    def total(self, values: torch.Tensor, what: str) -> torch.Tensor:
        result = values.clone()
        self._together(lambda: dist.all_reduce(result, async_op=True), what)
        return result

    def agree(self, bits: int) -> int:
        flags = torch.tensor([bits], dtype=torch.int64)
        self._together(lambda: dist.all_reduce(flags, dist.ReduceOp.BOR, async_op=True), "the start of a step")
        return int(flags.item())

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

            def send(chunk: torch.Tensor = chunk) -> Any:
                return dist.broadcast(chunk, 0, async_op=True)

            self._together(send, what)
        return value if self.is_first else torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)

    def collect(self, part: torch.Tensor, what: str) -> list[torch.Tensor] | None:
        part = part.contiguous()
        parts = [torch.empty_like(part) for _ in range(self.size)] if self.is_first else None
        self._together(lambda: dist.gather(part, parts, 0, async_op=True), what)
        return parts

    def require_same(self, tensors: Mapping[str, torch.Tensor], when: str) -> None:
        device = next(iter(tensors.values())).device  # of all sums, so that there is one read
        sums = torch.stack([_checksum(tensor).to(device) for tensor in tensors.values()]).tolist()
        first, *others = self.gather(dict(zip(tensors, sums, strict=True)), f"the comparison {when}")
        for name in first:
            different = [rank for rank, other in enumerate(others, 1) if other.get(name) != first[name]]
            if different:
                raise DifferentError(
                    f"{when} {name} of {_ranks(different)} differs from that of rank 0: the processes do not train "
                    "the same networks"
                )

    def doing(self, what: str) -> None:
        self._note(what, False)

    def first(self, key: str) -> bool:
        # A store that is gone is no reason for nobody to speak.
        return self._ask(lambda: self._store.add(f"first/{key}", 1) == 1, True)

    def close(self) -> None:
        if self._error is None:
            self.agree(0)
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
            while work is not None and not _wait(work):
                pass
        except RuntimeError as error:
            seconds = time.monotonic() - begun
            text = self._ask(lambda: self._what_happened(what, seconds), f"{self._store_gone()} ({what})")
            self._error = DistributedError(text)
            raise self._error from error

    def _note(self, what: str, together: bool) -> None:
        try:
            self._store.set(f"note/{self.rank}", json.dumps([self._sequence, together, what]))
        except RuntimeError as error:
            self._error = DistributedError(f"{self._store_gone()} ({what})")
            raise self._error from error

    def _store_gone(self) -> str:
        return (
            f"{self.place.address}:{self.place.port}, where the processes meet, does not answer: what started them, or "
            "rank 0, has ended or hangs, or its machine cannot be reached"
        )

    def _what_happened(self, what: str, seconds: float) -> str:
        """Why something that all do together has failed, as far as the notes of the others tell."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        # Whoever has found out before us is gone now, but not the cause.
        left = [rank for rank in others if self._store.check([f"left/{rank}"])]
        if left:
            text = self._store.get(f"left/{left[0]}").decode()
        else:
            notes = {rank: self._read_note(rank) for rank in others}
            behind = [rank for rank, (sequence, _, _) in notes.items() if sequence < self._sequence]
            if seconds < 0.9 * self._timeout_s:
                text = self._lost(behind or others, certain=bool(behind) or len(others) == 1, what=what)
            elif behind:
                text = self._late(behind, notes[behind[0]], what)
            else:
                text = (
                    f"{what} did not end within {self._timeout_s:g} s (--dist-timeout), though all ranks came to it: "
                    "the network between them stands still, or a rank was stopped within it"
                )
        self._store.set(f"left/{self.rank}", text)
        return text

    def _read_note(self, rank: int) -> tuple[int, bool, str]:
        if not self._store.check([f"note/{rank}"]):
            return 0, False, "starting"
        sequence, together, what = json.loads(self._store.get(f"note/{rank}"))
        return sequence, together, what

    def _late(self, ranks: list[int], note: tuple[int, bool, str], what: str) -> str:
        _, together, last = note
        it, stopped = ("it", "it is stopped, hangs, or is") if len(ranks) == 1 else ("the first of them", "they are")
        doing = f"the last that {it} came to was {last}" if together else f"{it} was last {last}"
        return (
            f"{self._named(ranks)} did not come to {what} within {self._timeout_s:g} s (--dist-timeout); {doing}: "
            f"{stopped} {'very slow' if len(ranks) == 1 else 'stopped, hang, or are very slow'}"
        )

    def _lost(self, ranks: list[int], certain: bool, what: str) -> str:
        named = self._named(ranks) if certain else f"one of {self._named(ranks)}"
        return f"{named} was lost at {what}: the process has ended, or its machine cannot be reached"

    def _named(self, ranks: list[int]) -> str:
        """Ranks and, if there are several, their machines."""
        if len(set(self.hosts)) == 1:
            return _ranks(ranks)
        return f"{_ranks(ranks)} ({', '.join(dict.fromkeys(self.hosts[rank] for rank in ranks))})"

    def _ask(self, question: Callable[[], Any], otherwise: Any) -> Any:
        """What the store answers to a question; `otherwise`: it does not."""
        answers = []

        def ask() -> None:
            with contextlib.suppress(RuntimeError):
                answers.append(question())

        thread = threading.Thread(target=ask, daemon=True)  # a store whose process is stopped never answers
        thread.start()
        thread.join(_STORE_SECONDS)
        return answers[0] if answers else otherwise


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
