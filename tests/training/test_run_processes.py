"""A run of two processes: the same run, with one set of files, and whatever happens to one of them happens to both."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import multiprocessing
import re
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from runs import after_step, assert_same, make_light, measure_again, untimed

from gan.config import DataInfo, TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream
from gan.errors import FailedRunError, GanError, LostProcessError
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import run, run_folder, ticks, trainer
from gan.training.grid import FakesSheet
from gan.training.health import Health
from gan.training.outputs import Output, Outputs
from gan.training.signals import Signals
from gan.training.state import TrainingState
from gan.training.state_files import NEWEST, read_state
from gan.training.turns import Asked, Turns
from torch_utils.distributed import Place
from torch_utils.world import World, join

BATCH, STEPS = 8, 5


during_run = pytest.MonkeyPatch()  # of what is broken in a run, in this process


class Pair:
    """This process, which is rank 0, and one beside it, which is told what to do."""

    def __init__(self, world: World, other: Connection) -> None:
        self._world, self._other = world, other

    def both(self, do: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """What `do(world, ...)` returns, or raises, in each process."""
        self._other.send((do, args, kwargs))
        own = outcome(do, self._world, *args, **kwargs)
        assert self._other.poll(60), "rank 1 does not end"
        return own, self._other.recv()


def outcome(do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return do(*args, **kwargs)
    except Exception as error:
        return error


def be_rank_1(port: int, orders: Connection) -> None:
    torch.set_num_threads(1)
    make_light(pytest.MonkeyPatch())
    world = join(Place(1, 2, 1, 2, "127.0.0.1", port), 20)
    with contextlib.suppress(EOFError):
        while True:
            do, args, kwargs = orders.recv()
            orders.send(outcome(do, world, *args, **kwargs))


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    orders, other = spawn.Pipe()
    process = spawn.Process(target=be_rank_1, args=(port, other), daemon=True)
    process.start()
    other.close()
    yield Pair(join(Place(0, 2, 0, 2, "127.0.0.1", port, serves=True), 20), orders)
    process.kill()
    torch.distributed.destroy_process_group()


pytestmark = pytest.mark.usefixtures("light_runs")


def config_of(data: Path, processes: int, **options: Any) -> tuple[TrainConfig, ImageDataset]:
    """5 steps; ticks end after 1, 3 and 5, snapshots and states are due then."""
    dataset = ImageDataset(str(data))
    info = DataInfo(str(data), dataset.name, len(dataset), dataset.height, dataset.width, dataset.channels)
    tiny: dict[str, Any] = {"data": str(data), "cbase": 64, "cmax": 8, "map_depth": 1, "precision": "fp32"}
    tiny |= {"batch": BATCH, "mbstd_group": 2, "gpus": processes, "device": "cpu", "workers": 0}
    tiny |= {"snap": 1, "keep_states": 9}
    short: dict[str, Any] = {"total_kimg": BATCH * STEPS / 1000, "tick_kimg": 2 * BATCH / 1000}
    return dataclasses.replace(resolve(TrainOptions(**{**tiny, **options}), info), **short), dataset


def trained(
    world: World, folder: Path, data: Path, disturbed: str = "", continued: bool = False, **options: Any
) -> bool:
    """Train in a folder that is there for rank 0 alone.

    `disturbed`: "RANK STEP WHAT", what happens to a rank after a step, by the name of a function in this module.
    """
    config, dataset = config_of(data, world.size, **options)
    run_dir = folder if world.is_first else Path("no folder")
    if world.is_first:
        run_dir.mkdir(exist_ok=True)
        run_folder.write_options(run_dir, config)
    if "metrics" in options:
        measure_again(during_run)
        during_run.setenv("XDG_CACHE_HOME", str(folder.parent))
    rank, step, what = disturbed.split() if disturbed else ("-1", "0", "")
    happens = contextlib.nullcontext()
    if int(rank) == world.rank:
        happens = after_step(int(step), globals()[what])
    try:
        with happens:
            return run.train(config, run_dir, dataset, continued=continued, world=world)
    finally:
        during_run.undo()


def asked_to_stop() -> None:
    signal.raise_signal(signal.SIGTERM)


def images_damaged() -> None:
    def damaged(stream: BatchStream) -> None:
        raise GanError("x.zip: image 7 is damaged")

    during_run.setattr(BatchStream, "__next__", damaged)


def failing() -> None:
    failed = Health("D has won", failing=True, failed=True, healthy=False)
    during_run.setattr(ticks, "assess", lambda vitals, p_max: failed)


def networks_touched() -> None:
    """As by a fault of the memory."""
    save = trainer.TrainingState.tensors

    def touched(state: TrainingState) -> dict[str, torch.Tensor]:
        tensors = save(state)
        tensors["G_ema.mapping.fc0.weight"] += 1
        return tensors

    during_run.setattr(trainer.TrainingState, "tensors", touched)


def asked_to_save_and_short_of_memory() -> None:
    """In the next step, with four images at a time."""
    signal.raise_signal(signal.SIGUSR1)
    accumulate = trainer.TrainStep._accumulate

    def short(step: trainer.TrainStep, phase: Any, real: torch.Tensor, real_c: torch.Tensor, batch_gpu: int) -> Any:
        if batch_gpu > 2:
            raise torch.OutOfMemoryError
        return accumulate(step, phase, real, real_c, batch_gpu)

    during_run.setattr(trainer.TrainStep, "_accumulate", short)


def broken() -> None:
    raise RuntimeError("a bug")


@pytest.fixture(scope="module")
def undisturbed(pair: Pair, tiny_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of both processes."""
    folder = tmp_path_factory.mktemp("runs") / "two"
    with pytest.MonkeyPatch.context() as patch:
        make_light(patch)
        assert pair.both(trained, folder, tiny_dataset) == (True, True)
    return folder


def test_two_processes_leave_what_one_does(undisturbed: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    alone = tmp_path / "alone"
    trained(World(), alone, tiny_dataset)
    assert {path.name for path in undisturbed.iterdir()} == {path.name for path in alone.iterdir()}
    assert not Path("no folder").exists()
    one, two = untimed(alone), untimed(undisturbed)
    assert [list(record) for record in one] == [list(record) for record in two]
    for a, b in zip(one, two, strict=True):
        for name, moments in a.items():
            # How far an image is from the next one depends on which is next, and a half has others than the whole.
            if name != "health" and not name.startswith("Health/distance"):
                assert moments["num"] == b[name]["num"], name
                assert moments["mean"] == pytest.approx(b[name]["mean"], rel=1e-3, abs=1e-4), name
    for sheet in alone.glob("*.png"):
        pictures = [np.asarray(PIL.Image.open(run / sheet.name)).astype(int) for run in (alone, undisturbed)]
        assert abs(pictures[0] - pictures[1]).max() <= 1, sheet.name
    states = [read_state(run / NEWEST).state for run in (alone, undisturbed)]
    for name, value in states[0]["G_ema"].items():
        assert float((states[1]["G_ema"][name] - value).abs().mean()) < 1e-4, name


def test_one_process_that_is_to_stop_stops_both_and_they_go_on_as_if_nothing_had_been(
    pair: Pair, undisturbed: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert pair.both(trained, folder, tiny_dataset, disturbed="1 2 asked_to_stop") == (False, False)
    assert read_state(folder / NEWEST).nimg in (2 * BATCH, 3 * BATCH)
    assert pair.both(trained, folder, tiny_dataset, continued=True) == (True, True)
    assert_same(undisturbed, folder)


def test_snapshots_are_measured_by_both_also_from_a_file_when_the_run_goes_on(
    pair: Pair, undisturbed: Path, tiny_dataset: Path, tmp_path: Path
) -> None:
    """Five steps in a thousand images: all snapshots have one name, and its last line counts."""
    metrics = {"metrics": "swd,diversity", "metrics_budget": 100.0}
    folder, alone = tmp_path / "run", tmp_path / "alone"
    late = {**metrics, "metrics_budget": 1e-9}  # nothing is measured before the end
    assert pair.both(trained, folder, tiny_dataset, **late) == (True, True)
    assert_same(undisturbed, folder)
    trained(World(), alone, tiny_dataset, **late)
    records = [json.loads((run / "metric-swd.jsonl").read_text().splitlines()[-1]) for run in (alone, folder)]
    assert [record["num_gpus"] for record in records] == [1, 2]
    assert records[1]["results"] == pytest.approx(records[0]["results"], rel=1e-2)  # the networks differ by rounding
    for path in folder.glob("metric-*"):
        path.unlink()
    assert pair.both(trained, folder, tiny_dataset, continued=True, **metrics) == (True, True)
    again = json.loads((folder / "metric-swd.jsonl").read_text())
    assert again["results"] == pytest.approx(records[1]["results"])
    assert (folder / "network-snapshot-best.pkl").exists()


def test_images_that_one_process_cannot_have_are_named_by_all_and_the_run_is_saved(
    pair: Pair, tiny_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    own, other = pair.both(trained, folder, tiny_dataset, disturbed="1 2 images_damaged")
    assert str(own).startswith("rank 1: x.zip: image 7 is damaged; the run is saved at 0.016 kimg: mend the dataset")
    assert str(other).startswith("x.zip: image 7 is damaged; the run is saved at 0.016 kimg")
    assert read_state(folder / NEWEST).nimg == 2 * BATCH
    assert "error: rank 1: x.zip" in (folder / "log.txt").read_text()


def test_when_training_has_failed_both_go_back_and_both_give_up(pair: Pair, tiny_dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own, other = pair.both(trained, folder, tiny_dataset, disturbed="0 2 failing", on_divergence="rollback")
    assert isinstance(own, FailedRunError)
    assert str(own) == str(other) == "training has failed at 0.008 kimg: D has won"
    log = (folder / "log.txt").read_text()
    assert log.count("gone back to 0.008 kimg") == 1
    assert "it had gone back once already" in log


def test_processes_with_different_networks_end_at_once(pair: Pair, tiny_dataset: Path, tmp_path: Path) -> None:
    own, other = pair.both(trained, tmp_path / "run", tiny_dataset, disturbed="1 1 networks_touched")
    assert "after the first step G_ema.mapping.fc0.weight of rank 1 differs from that of rank 0" in str(own)
    assert str(own) == str(other)
    assert type(own) is GanError
    assert not (tmp_path / "run" / NEWEST).exists()


def test_what_one_process_is_asked_for_or_runs_short_of_reaches_rank_0(
    pair: Pair, tiny_dataset: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    assert pair.both(trained, folder, tiny_dataset, disturbed="1 1 asked_to_save_and_short_of_memory") == (True, True)
    assert re.search("Saved at 0.0(08|16) kimg", (folder / "log.txt").read_text())
    assert run_folder.read_options(folder).batch_gpu == 2


def test_sheets_are_computed_by_both(pair: Pair) -> None:
    (own, expected), (none, _) = pair.both(sheet)
    assert none is None
    assert abs(own - expected).max() <= 1


def sheet(world: World) -> tuple[np.ndarray | None, np.ndarray]:
    """The pictures of 9 latents, 2 at a time, by all processes (None: they are elsewhere), and by this one."""
    config = resolve(TrainOptions(data="x", cbase=64, cmax=8, map_depth=1), DataInfo("x", "x", 10, 16, 16, 3))
    G = TrainingState(config, torch.device("cpu")).G_ema
    z = torch.randn([9, G.z_dim], generator=torch.Generator().manual_seed(0))
    pictures = []
    for processes in (world, World()):
        made = FakesSheet(G, z, torch.zeros(9, 0), 3, 2, processes)
        for portion in made.portions:
            portion()
        pictures.append(made._images.numpy().astype(int) if processes.is_first else None)
    return pictures[0], pictures[1]


def test_processes_compute_the_same_portions_though_one_has_more_files_and_a_slow_disk(pair: Pair) -> None:
    own, other = pair.both(with_a_slow_disk)
    assert own == other
    assert own[:2] == ["step 1", "a 0"]  # nothing of which there is one at a time is waited for yet
    assert [done for done in own if "step" not in done] == [f"{sheet} {i}" for sheet in "abc" for i in range(3)]


def with_a_slow_disk(world: World) -> list[str]:
    """Two snapshots; the order of steps and portions, each of which all processes are in together."""
    done: list[str] = []
    made = Outputs(
        torch.device("cpu"), print, lambda output, error: None, Turns(world, Signals(), lambda: Asked(0)).any_waits
    )

    def portion(name: str) -> None:
        assert world.gather(name, "a portion") == [name] * world.size
        done.append(name)

    def add_file(kind: str) -> None:
        if world.is_first:
            made.add(Output("file", kind, lambda: time.sleep(0.1)))

    def add_sheet(name: str) -> None:
        portions = deque(functools.partial(portion, f"{name} {i}") for i in range(3))
        made.add(Output(name, "sheet", (lambda: time.sleep(0.1)) if world.is_first else None, portions))

    add_file("reals")
    add_sheet("a")
    for step, sheet in ((1, "b"), (2, "c")):
        done.append(f"step {step}")
        made.make_room("snapshot")
        add_sheet(sheet)
        add_file("snapshot")
        made.make_room("state")
        add_file("state")
        made.advance()
    made.finish()
    made.close()
    return done


def test_a_process_that_breaks_is_lost_to_the_other(pair: Pair, tiny_dataset: Path, tmp_path: Path) -> None:
    """The last of these tests: what broke off between two processes cannot be taken up again."""
    folder = tmp_path / "run"
    own, other = pair.both(alone_from_here, trained, folder, tiny_dataset, disturbed="1 3 broken")
    assert isinstance(own, LostProcessError)
    assert "rank 1 was lost" in str(own)
    assert str(other) == "a bug"
    log = (folder / "log.txt").read_text()
    assert "rank 1 was lost" in log
    assert (folder / "reals.png").exists()
    assert not (folder / NEWEST).exists()  # which falls due after a sheet that takes both
    assert not [thread for thread in threading.enumerate() if thread.name == "outputs"]


def alone_from_here(world: World, do: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`do`, after which rank 1 parts, as if its process had ended."""
    try:
        return do(world, *args, **kwargs)
    finally:
        if not world.is_first:
            torch.distributed.destroy_process_group()
