"""How the processes that train together find one another."""

from __future__ import annotations

import datetime
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError  # another one before Python 3.11
from typing import TypeVar

import torch.distributed as dist

from torch_utils.distributed import DistributedError, Place

T = TypeVar("T")


def meet(place: Place, timeout_s: float) -> tuple[dist.Store, list[str], float]:
    """A store that these processes alone have, the names of their machines, by rank, and the timeout of rank 0.

    Raises DistributedError, naming those that do not come within the timeout.
    """
    return _all_present(_store(place, timeout_s), place, timeout_s)


def within(seconds: float, do: Callable[[], T]) -> T:
    """What a call into a library gives that may wait for ever, without heed to signals. Raises TimeoutError."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(do())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    try:
        return outcome.result(seconds)
    except FutureTimeoutError as error:
        raise TimeoutError from error


def in_words(error: BaseException) -> str:
    """What matters of what a library says: its first line, and what it calls the last error."""
    lines = str(error).strip().split("\n")
    first = re.sub(r"^\[\S+:\d+\] *", "", lines[0])  # without the place in its source
    first = first.split(". This is")[0][:150]  # nor what gloo guesses
    last = lines[lines.index("Last error:") + 1 :] if "Last error:" in lines else []
    return ": ".join([first, *(line[:150] for line in last[:1])]) or type(error).__name__


def named(ranks: Sequence[int]) -> str:
    """`rank 1`, or `ranks 1, 2 and 5`."""
    names = [str(rank) for rank in ranks]
    if len(names) == 1:
        return f"rank {names[0]}"
    return f"ranks {', '.join(names[:-1])} and {names[-1]}"


def _store(place: Place, timeout_s: float) -> dist.Store:
    """Where all processes meet: made by rank 0, or by an agent."""
    assert place.address is not None
    assert place.port is not None
    host, port = place.address, place.port
    if not place.serves:
        _wait_for_answer((host, port), timeout_s)

    def connect() -> dist.Store:
        return dist.TCPStore(
            host,
            port,
            is_master=place.serves,
            timeout=datetime.timedelta(seconds=timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
            use_libuv=os.name != "nt",  # not every build for Windows has it
        )

    try:
        return within(timeout_s, connect)
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"the processes cannot meet at {host}:{port} ({in_words(error)}): MASTER_PORT names another port"
        ) from error
    except TimeoutError as error:  # what has the port keeps silent, for which TCPStore would wait without end
        raise DistributedError(
            f"the processes cannot meet: something else answers at {host}:{port}; MASTER_PORT names another port"
        ) from error


def _wait_for_answer(address: tuple[str, int], timeout_s: float) -> None:
    """Until somebody is at an address. TCPStore would take twice the time for it, and print traces of C++."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection(address, timeout=max(deadline - time.monotonic(), 1.0)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise DistributedError(
                    f"the processes cannot meet: nobody answers at {address[0]}:{address[1]} within {timeout_s:g} s "
                    f"(--dist-timeout; {in_words(error)}). Is rank 0 running there, and is the port open? "
                    "MASTER_ADDR and MASTER_PORT name another"
                ) from error
        time.sleep(0.1)


def _all_present(store: dist.Store, place: Place, timeout_s: float) -> tuple[dist.Store, list[str], float]:
    """Of a store a part that these processes alone have, and what `meet` gives besides."""
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
            store.set(f"{meeting}/{place.rank}", json.dumps([own, socket.gethostname(), timeout_s]))
            if place.is_first and store.check([f"{meeting}/{rank}" for rank in range(place.size)]):
                everybody = [json.loads(store.get(f"{meeting}/{rank}")) for rank in range(place.size)]
                store.set(f"{meeting}/present", json.dumps(everybody))
            if store.check([f"{meeting}/present"]):
                present = json.loads(store.get(f"{meeting}/present"))
                if len(present) == place.size and present[place.rank][0] == own:  # else it is that of others
                    hosts, first_timeout_s = [host for _, host, _ in present], present[0][2]
                    return dist.PrefixStore(meeting, store), hosts, first_timeout_s
        if time.monotonic() > deadline:
            known = store.check(["meeting"])
            missing = [rank for rank in range(place.size) if known and not store.check([f"{meeting}/{rank}"])]
            raise DistributedError(
                f"{named(missing or [0])} of {place.size} did not start within {timeout_s:g} s (--dist-timeout)"
            )
        time.sleep(0.02)
