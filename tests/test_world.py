import json
import multiprocessing
import os
import queue
import re
import signal
import socket
import tempfile
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

import torch_utils.notes
import torch_utils.world
from torch_utils.distributed import JOB_FOLDER, DistributedError, Job, Place
from torch_utils.notes import Notes
from torch_utils.watch import Watch
from torch_utils.world import ALONE, DifferentError, World, join


@pytest.fixture(scope="module")
def processes():
    """Runs function(world) in several processes, which meet at one store, as torchrun's; what they return, by rank.

    Processes are forked from one that has imported torch and done nothing. None: one was killed, or is `silent`.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch_utils.world"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def run(function, size, timeout_s=20.0, silent=(), port=None):
        pipes = [context.Pipe(duplex=False) for _ in range(size)]
        workers = [
            context.Process(target=work, args=(function, rank, size, port or store.port, timeout_s, pipes[rank][1]))
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
    try:
        world = join(Place(rank, size, rank, size, "127.0.0.1", port), timeout_s)
        sending.send(function(world))
    except DistributedError as error:
        sending.send(error)
    os._exit(0)


def change_bits(tensors):
    tensors["half"][1] = 1 + 2**-7
    tensors["w"][0, 0, 0, 0] += 1e-6


def change_order(tensors):
    tensors["order"] = tensors["order"].flip(0)


def do_everything(world):
    rank = world.rank
    torch_utils.world._CHUNK = 100  # of which the shared value fills several
    world.use(torch.device("cpu"))
    world.meet("somewhere")
    flat = torch.tensor([1.0, 2.0], dtype=torch.float64) * (rank + 1)
    world.average(flat, "gradients")
    shared = {"a": torch.arange(3), "b": [1, "x"], "c": torch.ones(2, 2, dtype=torch.bfloat16)} if rank == 0 else None
    shared = world.share(shared, "the state")
    collected = world.collect(torch.full((2, 2), rank, dtype=torch.uint8).T, "pictures")
    parts = torch.Generator().manual_seed(1)
    same = {
        "order": torch.arange(3.0),
        "w": torch.randn(2, 3, 4, 4, generator=parts).to(memory_format=torch.channels_last),
        "nan": torch.tensor(torch.nan, dtype=torch.float64),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True]),
    }
    world.require_same(same, "after the first step")
    different = []
    for change in (change_bits, change_order):
        if rank == 2:
            change(same)
        with pytest.raises(DifferentError) as caught:
            world.require_same(same, "after the first step")
        different.append(str(caught.value))
    result = {
        "average": flat.tolist(),
        "agree": [world.agree(bits, "the start of a step") for bits in (0, 1 << rank, 4 if rank == 1 else 0)],
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
        assert result["agree"] == [0, 7, 4]
        assert result["gather"] == [{"": [0, None]}, {"ä": [1, None]}, {"ää": [2, None]}]
        assert result["share"] == ([0, 1, 2], [1, "x"], True)
        for name, text in zip(("w", "order"), result["different"], strict=True):
            assert text.startswith(f"after the first step {name} of rank 2 differs from that of rank 0")
        assert result["about"] == (True, "gloo", 3, rank == 0)
    assert [result["collect"] for result in results] == [[[[r, r], [r, r]] for r in range(3)], None, None]
    assert sorted(result["first"] for result in results) == [False, False, True]


def test_alone_nothing_is_waited_for():
    flat = torch.ones(3)
    ALONE.average(flat, "gradients")
    assert flat.tolist() == [1, 1, 1]
    assert (ALONE.agree(5, ""), ALONE.gather("x", ""), ALONE.share("x", ""), ALONE.first("error")) == (
        5,
        ["x"],
        "x",
        True,
    )
    assert [part is flat for part in ALONE.collect(flat, "")] == [True]
    ALONE.require_same({"a": flat}, "")
    assert type(join(Place(0, 1), 1.0)) is World


def hang(world):
    folder = world.gather(tempfile.mkdtemp() if world.is_first else None, "a folder")[0]
    os.environ.update({"RANK": str(world.rank), JOB_FOLDER: folder})
    stopped = psutil.Process(world.gather(os.getpid(), "processes")[1])
    if world.rank == 1:
        world.doing("waiting for images")
        os.kill(os.getpid(), signal.SIGSTOP)
    begun = time.monotonic()
    try:
        world.average(torch.zeros(5), "the gradients of Gmain")
    except DistributedError as error:
        with pytest.raises(DistributedError, match=re.escape(str(error))):
            world.agree(0, "the start of a step")  # it stays as it is, and nobody waits again
        world.close()
        seconds = time.monotonic() - begun
        while stopped.is_running() and stopped.status() != psutil.STATUS_ZOMBIE:  # nothing else would end it
            assert time.monotonic() < begun + 10
            time.sleep(0.02)
        return str(error), seconds, Job(Path(folder))
    raise AssertionError


def test_whoever_does_not_come_is_named(processes):
    results = processes(hang, 3, timeout_s=0.8, silent=[1])
    for text, seconds, _ in (results[0], results[2]):
        assert text.startswith("rank 1 did not come to the gradients of Gmain within 0.8 s (--dist-timeout)")
        assert "it was last waiting for images" in text
        assert seconds < 4
    job = results[0][2]
    assert job.take_given_up() == {1}
    assert job.take_given_up() == set()
    job.folder.rmdir()


def die(world):
    world.agree(0, "the start of a step")
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.agree(0, "the start of a step")
    raise AssertionError


def test_whoever_is_lost_is_named(processes):
    killed, other = processes(die, 2)[::-1]
    assert killed is None
    assert re.match(r"rank 1 was lost at the start of a step: the process has ended, .* \(\w.*\)$", str(other))


def fail(world):
    real = dist.all_reduce
    last = "Last error:\nNo space left on device"
    error = dist.DistBackendError(f"NCCL error in: x.cpp:3356, system error\nncclSystemError\n{last}")

    def raises(tensor, *args, **kwargs):
        if tensor.is_floating_point():
            raise error
        return real(tensor, *args, **kwargs)

    if world.is_first:
        dist.all_reduce = raises
    world.average(torch.zeros(5), "the gradients of Gmain")


def test_what_fails_in_a_rank_is_no_loss_of_another(processes):
    text = "the gradients of Gmain failed on rank 0: NCCL error in: x.cpp:3356, system error: No space left on device"
    assert [str(error) for error in processes(fail, 2)] == [text] * 2


def connect_gpus(world):
    dist.is_nccl_available = lambda: True

    def set_device(device):
        if not world.is_first:
            time.sleep(60)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    torch.cuda.set_device = set_device
    world.use(torch.device("cuda", world.rank))


def test_gpus_that_cannot_be_connected_are_named_within_the_timeout(processes):
    text = "the connection of the GPUs over NCCL failed on rank 0: out of memory; try a smaller --batch-gpu"
    assert [str(error) for error in processes(connect_gpus, 2, timeout_s=0.5)] == [text] * 2


class Silent:
    """A store that never answers."""

    def __getattr__(self, name):
        return lambda *args: time.sleep(60)


def test_a_store_that_keeps_silent_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(torch_utils.notes, "_STORE_SECONDS", 0.05)
    notes = Notes(Silent(), Place(0, 2, 0, 2, "h", 5), ["a", "b"], 1.0)
    assert notes.first("error")
    assert notes.missed("the statistics", 3, 1.0).startswith("h:5, where the processes meet, does not answer")


class Event:
    def __init__(self, *answers):
        self.answers = list(answers)

    def query(self):
        return self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]


def test_what_does_not_end_on_a_gpu_is_told_once():
    told = queue.Queue()
    prepared = threading.Event()  # as the thread must be of the right device before it asks for anything

    def tell(pending, seconds):
        assert prepared.is_set()
        told.put((pending.what, pending.sequence, seconds))

    watch = Watch(0.3, tell, prepare=prepared.set, every_s=0.01)
    for sequence, event in enumerate([Event(False, False, True), Event(True), Event(False)]):
        watch.begin("the gradients", sequence).event = event
    what, sequence, seconds = told.get(timeout=20)
    assert (what, sequence) == ("the gradients", 2)
    assert seconds > 0.3
    watch = Watch(0.1, lambda pending, seconds: told.put(pending.what), every_s=0.01)
    watch.begin("what waits in NCCL itself", 0)
    assert told.get(timeout=20) == "what waits in NCCL itself"
    assert told.empty()


def test_ranks_that_never_start_are_named():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistributedError, match=r"ranks 1 and 2 of 3 did not start within 0.2 s \(--dist-timeout\)"):
        join(Place(0, 3, 0, 3, "127.0.0.1", store.port), 0.2)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistributedError, match=r"rank 0 of 2 did not start"):
        join(Place(1, 2, 1, 2, "127.0.0.1", store.port), 0.2)
    store.set("meeting", "old")  # of workers before these
    store.set("old/present", json.dumps([["x", "host"], ["y", "host"]]))
    with pytest.raises(DistributedError, match=r"rank 0 of 2 did not start"):
        join(Place(1, 2, 1, 2, "127.0.0.1", store.port), 0.2)


def test_an_address_at_which_nobody_is_is_named(capfd):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with pytest.raises(DistributedError, match=rf"cannot meet at 127.0.0.1:{store.port} .*MASTER_PORT"):
        join(Place(0, 2, 0, 2, "127.0.0.1", store.port, serves=True), 1.0)
    port = store.port
    del store
    with pytest.raises(DistributedError, match=rf"nobody answers at 127.0.0.1:{port} within 0.2 s .*refused"):
        join(Place(1, 2, 1, 2, "127.0.0.1", port), 0.2)
    assert capfd.readouterr() == ("", "")  # nothing of PyTorch's own words


def test_a_port_that_is_taken_by_something_silent_is_named(processes):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        text = f"the processes cannot meet: something else answers at 127.0.0.1:{port}; MASTER_PORT names another port"
        assert [str(error) for error in processes(World, 2, timeout_s=0.2, port=port)] == [text] * 2
