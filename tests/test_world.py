import multiprocessing
import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist

from torch_utils.distributed import DistributedError, Place
from torch_utils.world import ALONE, DifferentError, World, join


@pytest.fixture(scope="module")
def processes():
    """Runs function(world) in several processes, which meet at one store, as torchrun's; what they return, by rank.

    Processes are forked from one that has imported torch and done nothing. None: one was killed, or is `silent`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_utils.world"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(function, size, timeout_s=20.0, silent=()):
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        workers = [
            context.Process(target=work, args=(function, rank, size, store.port, timeout_s, pipes[rank][1]))
            for rank in range(size)
        ]
        results = []
        for worker, (_, sending) in zip(workers, pipes, strict=True):
            worker.start()
            sending.close()
        for rank, (receiving, _) in enumerate(pipes):
            if rank in silent:
                results.append(None)
                continue
            try:
                assert receiving.poll(40)
                results.append(receiving.recv())
            except EOFError:
                results.append(None)
        for worker in workers:
            worker.kill()
            worker.join()
        return results

    return run


def work(function, rank, size, port, timeout_s, sending):
    torch.set_num_threads(1)
    world = join(Place(rank, size, rank, size, "127.0.0.1", port), "cpu", timeout_s)
    try:
        sending.send(function(world))
    except DistributedError as error:
        sending.send(error)
    os._exit(0)


def do_everything(world):
    rank = world.rank
    flat = torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1)
    world.average(flat, "gradients")
    shared = {"a": torch.arange(3), "b": [1, "x"], "c": torch.ones(2, 2, dtype=torch.bfloat16)} if rank == 0 else None
    shared = world.share(shared, "the state")
    values = torch.tensor([rank + 0.5])
    collected = world.collect(torch.full((2, 2), rank, dtype=torch.uint8).T, "pictures")
    parts = torch.Generator().manual_seed(1)
    same = {
        "w": torch.randn(2, 3, 4, 4, generator=parts).to(memory_format=torch.channels_last),
        "nan": torch.tensor(torch.nan, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True]),
    }
    world.require_same(same, "after the first step")
    if rank == 2:
        same["half"][1] = 1 + 2**-7
        same["w"][0, 0, 0, 0] += 1e-6
    try:
        world.require_same(same, "after the first step")
        different = ""
    except DifferentError as error:
        different = str(error)
    result = {
        "average": flat.tolist(),
        "total": (world.total(values, "sums").tolist(), values.tolist()),
        "agree": [world.agree(bits) for bits in (0, 1 << rank, 4 if rank == 1 else 0)],
        "gather": world.gather({"ä" * rank: [rank, None]}, "facts"),
        "share": (shared["a"].tolist(), shared["b"], shared["c"].dtype == torch.bfloat16),
        "collect": collected and [part.tolist() for part in collected],
        "different": different,
        "first": world.first("error"),
        "about": (world.hosts == [world.hosts[0]] * 3, world.backend, world.size, world.is_first),
    }
    world.close()
    return result


def test_three_processes_do_together_what_one_does(processes):
    results = processes(do_everything, 3)
    for rank, result in enumerate(results):
        assert result["average"] == [2.0, 4.0]
        assert result["total"] == ([4.5], [rank + 0.5])
        assert result["agree"] == [0, 7, 4]
        assert result["gather"] == [{"": [0, None]}, {"ä": [1, None]}, {"ää": [2, None]}]
        assert result["share"] == ([0, 1, 2], [1, "x"], True)
        assert re.match(r"after the first step w of rank 2 differs from that of rank 0", result["different"])
        assert result["about"] == (True, "gloo", 3, rank == 0)
    assert [result["collect"] for result in results] == [[[[r, r], [r, r]] for r in range(3)], None, None]
    assert sorted(result["first"] for result in results) == [False, False, True]


def test_alone_nothing_is_waited_for():
    flat = torch.ones(3)
    ALONE.average(flat, "gradients")
    assert flat.tolist() == [1, 1, 1]
    assert (ALONE.agree(5), ALONE.gather("x", ""), ALONE.share("x", ""), ALONE.first("error")) == (5, ["x"], "x", True)
    assert [part is flat for part in ALONE.collect(flat, "")] == [True]
    ALONE.require_same({"a": flat}, "")
    assert type(join(Place(0, 1), "cpu", 1.0)) is World


def hang(world):
    world.agree(0)
    if world.rank == 1:
        world.doing("waiting for images")
        os.kill(os.getpid(), signal.SIGSTOP)
    begun = time.monotonic()
    try:
        world.average(torch.zeros(5), "the gradients of Gmain")
    except DistributedError as error:
        with pytest.raises(DistributedError, match=re.escape(str(error))):
            world.agree(0)  # it stays as it is, and nobody waits again
        world.close()
        return str(error), time.monotonic() - begun
    raise AssertionError


def test_whoever_does_not_come_is_named(processes):
    results = processes(hang, 3, timeout_s=0.8, silent=[1])
    for text, seconds in (results[0], results[2]):
        assert text.startswith("rank 1 did not come to the gradients of Gmain within 0.8 s (--dist-timeout)")
        assert "it was last waiting for images" in text
        assert seconds < 4


def die(world):
    world.agree(0)
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.agree(0)
    raise AssertionError


def test_whoever_is_lost_is_named(processes):
    killed, other = processes(die, 2)[::-1]
    assert killed is None
    assert str(other).startswith("rank 1 was lost at the start of a step")


def test_ranks_that_never_start_are_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistributedError, match=r"ranks 1 and 2 of 3 did not start within 0.2 s \(--dist-timeout\)"):
        join(Place(0, 3, 0, 3, "127.0.0.1", store.port), "cpu", 0.2)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistributedError, match=r"rank 0 of 2 did not start"):
        join(Place(1, 2, 1, 2, "127.0.0.1", store.port), "cpu", 0.2)


def test_an_address_at_which_nobody_is_is_named(capfd):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistributedError, match=rf"cannot meet at 127.0.0.1:{store.port} .*MASTER_PORT"):
        join(Place(0, 2, 0, 2, "127.0.0.1", store.port, serves=True), "cpu", 1.0)
    port = store.port
    del store
    with pytest.raises(DistributedError, match=rf"nobody answers at 127.0.0.1:{port} within 0.2 s .*refused"):
        join(Place(1, 2, 1, 2, "127.0.0.1", port), "cpu", 0.2)
    assert capfd.readouterr() == ("", "")  # nothing of PyTorch's own words
