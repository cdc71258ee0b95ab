"""A batch dealt over two processes, or over rounds, against the whole of it: gradients, running means, curves.

Two things depend on how a batch is dealt. The path-length mean that a part's penalty is taken about has the part's own
lengths in it, with a weight of 1 %: they are left out (`pl_decay=0`) where all else is to be exact. And how far an
image is from the next one (`Health/distance`) depends on which is next.
"""

from __future__ import annotations

import dataclasses
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checks import default_dtype

from gan.config import DataInfo, TrainConfig
from gan.data.labels import LabelTable
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.gradients import FlatGradients
from gan.training.state import EagerAdam, TrainingState
from gan.training.step import TrainStep
from torch_utils.distributed import Place
from torch_utils.world import ALONE, World, join

BATCH, IMAGES, CLASSES, STEPS, EVERY = 8, 24, 3, 20, 5
PHASES = ["Gmain", "Greg", "Dmain", "Dreg"]
# Images at a time of rank 0 and of rank 1, of four each.
DEALS = {"2 x 4": (4, 4), "4 and 2 + 2": (4, 2)}
OPTIONS: dict[str, Any] = {"cbase": 128, "cmax": 8, "map_depth": 2, "precision": "fp32", "batch": BATCH, "cond": True}
OPTIONS |= {"mbstd_group": 2, "augpipe": "bgcfnc", "gamma": 1, "data": "x"}


def config_of(ranks: int, batch_gpu: int, pl_decay: float = 0.01) -> TrainConfig:
    """Everything that draws random numbers or keeps a mean is on; p moves with every fourth batch."""
    data = DataInfo("x", "x", IMAGES, 16, 16, 3, label_dim=CLASSES)
    config = resolve(TrainOptions(**OPTIONS), data)
    return dataclasses.replace(
        config,
        gpus=ranks,
        batch_gpu=batch_gpu,
        loss=dataclasses.replace(config.loss, pl_decay=pl_decay),
        augment=dataclasses.replace(config.augment, ada_kimg=1),
    )


def step_of(config: TrainConfig, world: World) -> TrainStep:
    state = TrainingState(config, torch.device("cpu"))
    assert state.augment is not None
    state.augment.p.fill_(0.5)
    for name, parameter in state.G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.3)
    labels = LabelTable(torch.eye(CLASSES), torch.arange(IMAGES) % CLASSES)
    return TrainStep(state, config, labels, world=world)


def share(world: World, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a batch that is the same everywhere."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, [BATCH, 3, 16, 16], dtype=torch.uint8, generator=generator)
    indices = torch.randperm(IMAGES, generator=generator)[:BATCH]
    return images[world.rank :: world.size], indices[world.rank :: world.size]


@default_dtype(torch.float64)  # of noise too: the gradient of its strength is summed in its precision
def exact_phases(world: World, batch_gpu: int, pl_decay: float) -> dict[str, Any]:
    """Each phase once, in float64, with weights that stay as they are: gradients, and all that a phase moves."""
    step = step_of(config_of(world.size, batch_gpu, pl_decay), world)
    state, found = step.state, {}
    state.pl_mean = state.pl_mean.double() + 0.1
    images, indices = share(world, 1)
    for name, network in (("G", state.G), ("D", state.D)):
        network.double()
        room = {key: len(view) for key, view in state.G_grads.room.items()}
        gradients = FlatGradients(network.parameters(), room)
        idle = EagerAdam(network.parameters(), lr=0.0)
        for i, phase in enumerate(step.phases):
            if phase.network is network:
                step.phases[i] = dataclasses.replace(phase, gradients=gradients, optimizer=idle)
        found[name] = gradients
    result: dict[str, Any] = {}
    torch.manual_seed(3)
    for phase in step.phases:
        step._train(phase, images.double() / 127.5 - 1, step.labels.take(indices).double())
        result[phase.name] = found[phase.name[0]].flat.clone()
    result["w_avg"], result["pl_mean"] = state.G.mapping.w_avg.clone(), state.pl_mean.clone()
    result["ada_signs"], result["random"] = state.ada_signs.clone(), torch.rand(3)
    result["stats"] = state.stats.flush(world)
    return result


def curves(world: World, batch_gpu: int, pl_decay: float) -> dict[str, Any]:
    """Twenty whole steps in float32: statistics every five, and what comes out."""
    step = step_of(config_of(world.size, batch_gpu, pl_decay), world)
    state, stats = step.state, []
    for i in range(STEPS):
        step(*share(world, i))
        if (i + 1) % EVERY == 0:
            stats.append(state.stats.flush(world))
    tensors = {f"G_ema {name}": value for name, value in state.G_ema.state_dict().items()}
    tensors |= {f"D {name}": value for name, value in state.D.state_dict().items()} | {"p": state.p}
    world.require_same(tensors, "after 20 steps")
    return {"stats": stats, "tensors": tensors, "spans": set(step.timer.flush())}


def together(world: World) -> dict[str, Any]:
    """All that two processes do in this module."""
    found: dict[str, Any] = {}
    for deal, sizes in DEALS.items():
        found[deal] = exact_phases(world, sizes[world.rank], pl_decay=0)
    found["default"] = exact_phases(world, 4, pl_decay=0.01)
    found["curves"] = curves(world, 4, pl_decay=0)
    return found


def place(rank: int, port: int) -> Place:
    return Place(rank, 2, rank, 2, "127.0.0.1", port, serves=rank == 0)


RANK_1 = """
import sys
sys.path[:0] = [".", "tests", "tests/training"]
from test_step_processes import *
torch.set_num_threads(1)  # as in the tests
world = join(place(1, int(sys.argv[1])), 60)
together(world)
world.close()
"""


@pytest.fixture(scope="module")
def two() -> Iterator[dict[str, Any]]:
    """What rank 0 of two found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    other = subprocess.Popen([sys.executable, "-c", RANK_1, str(port)], cwd=Path(__file__).parents[2])
    try:
        world = join(place(0, port), 60)
        try:
            yield together(world)
        finally:
            world.close()
        assert other.wait(60) == 0
    finally:
        other.kill()


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """The same of one process in one round."""
    return exact_phases(ALONE, BATCH, pl_decay=0)


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name in PHASES:
        largest = float(expected[name].abs().max())
        assert largest > 0
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10 * largest, msg=name)
    torch.testing.assert_close(found["w_avg"], expected["w_avg"], rtol=1e-10, atol=1e-12)
    assert found["ada_signs"].tolist() == expected["ada_signs"].tolist()
    assert torch.equal(found["random"], expected["random"])  # the stream is where it is after one round
    names = comparable(expected["stats"])
    assert comparable(found["stats"]) == names
    for name in names:
        assert found["stats"][name] == pytest.approx(expected["stats"][name], rel=1e-9, abs=1e-9), name


def comparable(stats: dict[str, dict[str, float]]) -> list[str]:
    return [name for name in stats if not name.startswith("Health/distance")]


@pytest.fixture(scope="module")
def in_rounds() -> dict[str, Any]:
    return curves(ALONE, 4, pl_decay=0)


def test_two_processes_do_what_one_does(two: dict[str, Any], one: dict[str, Any], in_rounds: dict[str, Any]) -> None:
    """One test, because what two find takes long, and tests that run at the same time would each ask for it."""
    for deal in DEALS:
        assert_same(two[deal], one)
    assert_same_path_lengths(two["default"], exact_phases(ALONE, BATCH, pl_decay=0.01))
    assert_same_curves(two["curves"], in_rounds)
    assert two["curves"]["spans"] == {*PHASES, "reduce"}
    assert in_rounds["spans"] == set(PHASES)


def assert_same_path_lengths(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Up to the one percent of their mean."""
    torch.testing.assert_close(found["pl_mean"], expected["pl_mean"], rtol=1e-12, atol=0)
    apart = float((found["Greg"] - expected["Greg"]).norm() / expected["Greg"].norm())
    assert 1e-6 < apart < 0.005  # 0.0015
    for name in ("Gmain", "Dmain", "Dreg"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-10)


def assert_same_curves(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """To the bit: the same parts, and their two sums are added in either order."""
    for name, tensor in expected["tensors"].items():
        assert torch.equal(found["tensors"][name], tensor), name
    for own, other in zip(found["stats"], expected["stats"], strict=True):
        assert list(own) == list(other)
        for name, row in other.items():
            assert own[name] == pytest.approx(row, rel=1e-12, abs=1e-12), name


def test_four_rounds_give_the_gradients_of_one(one: dict[str, Any]) -> None:
    assert_same(exact_phases(ALONE, 2, pl_decay=0), one)


def test_twenty_steps_of_the_whole_batch_differ_by_rounding(in_rounds: dict[str, Any]) -> None:
    whole = curves(ALONE, BATCH, pl_decay=0)
    assert float(whole["tensors"]["p"]) != 0.5
    assert torch.equal(in_rounds["tensors"]["p"], whole["tensors"]["p"])
    for found, expected in zip(in_rounds["stats"], whole["stats"], strict=True):
        for name in comparable(expected):
            row = expected[name]
            assert found[name]["num"] == row["num"]
            assert found[name]["mean"] == pytest.approx(row["mean"], rel=1e-4, abs=1e-4 * row["std"]), name
