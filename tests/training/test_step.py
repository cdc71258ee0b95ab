from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from gan.config import DataInfo, TrainConfig
from gan.data.labels import LabelTable
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.gradients import FlatGradients
from gan.training.graphs import PhaseGraphs
from gan.training.state import TrainingState
from gan.training.step import TrainStep, make_phases
from torch_utils.distributed import Place
from torch_utils.world import World

IMAGES = 40
SMALL = {"cbase": 128, "cmax": 8, "map_depth": 2, "precision": "fp32", "batch": 16}


def tiny_config(**options: object) -> TrainConfig:
    merged = TrainOptions(data="x", **{**SMALL, **options})  # type: ignore[arg-type]
    return resolve(merged, DataInfo("x", "x", IMAGES, 16, 16, 3))


def make_step(config: TrainConfig) -> TrainStep:
    state = TrainingState(config, torch.device("cpu"))
    labels = LabelTable(torch.zeros([1, 0]), torch.zeros([IMAGES], dtype=torch.long))
    return TrainStep(state, config, labels)


def batch_of(config: TrainConfig) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, [config.batch_size, 3, 16, 16], dtype=torch.uint8, generator=generator)
    return images, torch.arange(config.batch_size) % IMAGES


def phase_gradients(config: TrainConfig, name: str) -> torch.Tensor:
    """The flat gradient that a phase of the first batch hands to its optimiser."""
    step = make_step(config)
    for network in (step.state.G, step.state.D):
        network.double()
    phase = next(p for p in make_phases(step.state, config) if p.name == name)
    room = {key: len(view) for key, view in phase.gradients.room.items()}
    flat = FlatGradients(phase.network.parameters(), room)
    idle = torch.optim.SGD(phase.network.parameters(), lr=0.0)
    phase = dataclasses.replace(phase, gradients=flat, optimizer=idle)
    images, indices = batch_of(config)
    torch.manual_seed(3)
    step._run(phase, images.double() / 127.5 - 1, step.labels.take(indices))
    for parameter_name, parameter in phase.network.named_parameters():
        if parameter_name.endswith("noise_strength"):  # summed in float32, as noise is
            parameter.grad.zero_()  # type: ignore[union-attr]
    return flat.flat.clone()


@pytest.mark.parametrize("name", ["Gmain", "Dmain", "Dreg"])
@pytest.mark.parametrize("batch_gpu", [8, 4])
def test_accumulated_micro_batches_equal_the_big_batch(name: str, batch_gpu: int) -> None:
    options = {"aug": "noaug", "mbstd_group": 4}
    whole = phase_gradients(tiny_config(**options), name)
    parts = phase_gradients(tiny_config(**options, batch_gpu=batch_gpu), name)
    assert whole.abs().max() > 0
    torch.testing.assert_close(parts, whole, rtol=1e-10, atol=1e-12 * float(whole.abs().max()))


def test_path_length_micro_batches_share_the_mean_up_to_its_one_percent() -> None:
    # Each round's penalty is taken about the mean moved by its own lengths, which weigh 1 % in it.
    state = make_step(tiny_config(aug="noaug")).state
    assert float(state.pl_mean) == 0
    means = []
    for batch_gpu in (16, 4):
        step = make_step(tiny_config(aug="noaug", batch_gpu=batch_gpu))
        step(*batch_of(step.config))
        means.append(float(step.state.pl_mean))
    assert means[0] > 0
    assert means[1] == pytest.approx(means[0], rel=0.01)  # after G's own step: the same but for rounding


def test_nonfinite_gradients_are_replaced_and_reported() -> None:
    parameter = torch.nn.Parameter(torch.zeros(5))
    grads = FlatGradients([parameter])
    assert parameter.grad is not None
    parameter.grad.copy_(torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), -2.0]))
    assert float(grads.guard()) == 1
    assert parameter.grad.tolist() == [1.0, 0.0, 1e5, -1e5, -2.0]
    assert float(grads.guard()) == 0


def test_room_behind_the_gradients_is_reduced_with_them_and_not_guarded() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(2, 3)), torch.nn.Parameter(torch.zeros(4))]
    grads = FlatGradients(parameters, {"w_mean": 5, "pl_mean": 1})
    grads.whole.copy_(torch.arange(16.0))
    assert parameters[1].grad.tolist() == [6, 7, 8, 9]  # type: ignore[union-attr]
    assert {name: view.tolist() for name, view in grads.room.items()} == {
        "w_mean": [10, 11, 12, 13, 14],
        "pl_mean": [15],
    }
    grads.room["pl_mean"].fill_(float("nan"))
    assert float(grads.guard()) == 0
    grads.zero()
    assert grads.whole[:15].tolist() == [0] * 10 + [10, 11, 12, 13, 14]


class NoHostCopies(TorchFunctionMode):
    """Fails on what copies values to the host without an operation of its own."""

    FORBIDDEN = (torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__, torch.Tensor.cpu)

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func not in self.FORBIDDEN, f"the step reads from the device: {func}"
        return func(*args, **(kwargs or {}))


class NoHostReads(TorchDispatchMode):
    """Fails on whatever would wait for a GPU: reading a value, and shapes that depend on values."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")

    def __enter__(self):  # type: ignore[no-untyped-def]
        self._copies = NoHostCopies()
        self._copies.__enter__()
        return super().__enter__()

    def __exit__(self, *error):  # type: ignore[no-untyped-def]
        super().__exit__(*error)
        self._copies.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.split(".")[0]
        assert name not in self.FORBIDDEN, f"the step reads from the device: {func}"
        return func(*args, **(kwargs or {}))


def test_the_step_reads_nothing_from_the_device() -> None:
    config = tiny_config(augpipe="bgcfnc")
    step = make_step(config)
    for _ in range(4):  # all phases and an adjustment of p
        with NoHostReads():
            step(*batch_of(config))
    assert step.state.progress.nimg == 4 * config.batch_size


@pytest.mark.parametrize("read", [torch.Tensor.item, bool, int, float, torch.Tensor.tolist, torch.Tensor.nonzero])
def test_the_guard_of_that_test_works(read: Callable[[torch.Tensor], object]) -> None:
    with pytest.raises(AssertionError, match="reads from the device"), NoHostReads():
        read(torch.ones([]))


def test_phases_without_weight_are_left_out() -> None:
    step = make_step(tiny_config(gamma=0))
    assert [phase.name for phase in step.phases] == ["Gmain", "Greg", "Dmain"]


def test_only_the_phase_s_network_changes() -> None:
    config = tiny_config()
    step = make_step(config)
    before = {name: p.clone() for name, p in step.state.D.named_parameters()}
    images, indices = batch_of(config)
    step._run(step.phases[0], images.float() / 127.5 - 1, step.labels.take(indices))
    assert all(torch.equal(before[name], p) for name, p in step.state.D.named_parameters())
    assert not any(p.requires_grad for net in (step.state.G, step.state.D) for p in net.parameters())


def test_p_follows_the_signs_and_stays_within_its_bound() -> None:
    config = tiny_config(p_max=0.5)
    step = make_step(config)
    assert step.state.augment is not None
    step.state.augment.p.fill_(0.499)
    step.state.ada_signs.copy_(torch.tensor([50.0, 50.0]))  # D is sure of all reals: r_t = 1 > target
    config = dataclasses.replace(config, augment=dataclasses.replace(config.augment, ada_kimg=1))
    step.config = config
    step._adjust_augment()
    assert float(step.state.augment.p) == pytest.approx(0.5)
    assert step.state.ada_signs.tolist() == [0, 0]
    step.state.ada_signs.copy_(torch.tensor([-50.0, 50.0]))
    step._adjust_augment()
    assert float(step.state.augment.p) == pytest.approx(0.5 - 16 * 4 / 1000)


def test_frozen_layers_of_d_stay_as_they_were() -> None:
    config = tiny_config(freezed=2)
    step = make_step(config)
    frozen = step.state.D.b16.conv0.weight.clone()
    free = step.state.D.b16.conv1.weight.clone()
    step(*batch_of(config))
    assert torch.equal(step.state.D.b16.conv0.weight, frozen)
    assert not torch.equal(step.state.D.b16.conv1.weight, free)


def test_the_moving_average_follows_g() -> None:
    config = tiny_config()
    step = make_step(config)
    ema_before = step.state.G_ema.synthesis.b8.conv0.weight.clone()
    g_before = step.state.G.synthesis.b8.conv0.weight.clone()
    step(*batch_of(config))
    g, ema = step.state.G.synthesis.b8.conv0.weight, step.state.G_ema.synthesis.b8.conv0.weight
    beta = 0.5 ** (16 / (16 * 0.05))  # half-life limited by the ramp-up
    torch.testing.assert_close(ema, g + (ema_before - g) * beta)
    assert not torch.equal(g, g_before)
    assert torch.equal(step.state.G.mapping.w_avg, step.state.G_ema.mapping.w_avg)


class Unrecorded:
    """Stands in for PhaseGraphs on a machine without CUDA: prepares as for recording, and runs."""

    def __init__(self) -> None:
        self.kept: tuple[torch.Tensor, ...] = ()
        self.names: list[str] = []

    def inputs(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.kept = self.kept or tuple(tensor.clone() for tensor in tensors)
        for own, tensor in zip(self.kept, tensors, strict=True):
            own.copy_(tensor)
        return self.kept

    def run(self, name: str, phase: Callable[[], None]) -> None:
        self.names.append(name)
        phase()


def memory_of(step: TrainStep) -> dict[str, int]:
    """Where everything is that a recorded phase shares with the outside."""
    state = step.state
    tensors = {"pl_mean": state.pl_mean, "signs": state.ada_signs, "p": state.p}
    tensors |= {f"stats {name}": moments for name, moments in state.stats._moments.items()}
    for name, network, optimizer in (("G", state.G, state.G_opt), ("D", state.D, state.D_opt)):
        tensors |= {f"{name} {key}": value for key, value in network.state_dict(keep_vars=True).items()}
        for key, parameter in network.named_parameters():
            tensors[f"{name} {key} gradient"] = parameter.grad  # type: ignore[assignment]
            tensors |= {f"{name} {key} {k}": v for k, v in optimizer.state[parameter].items()}
        for key, module in network.named_modules():
            if "prepared" in module.__dict__:
                tensors[f"{name} {key} prepared"] = module.__dict__["prepared"].value
    return {name: tensor.data_ptr() for name, tensor in tensors.items()}


def test_what_a_recorded_phase_would_read_and_write_stays_where_it_is() -> None:
    config = tiny_config()
    recorded, usual = make_step(config), make_step(config)
    recorded.graphs = Unrecorded()  # type: ignore[assignment]
    batch = batch_of(config)
    for step in (recorded, usual):
        step(*batch)  # all phases
    before = memory_of(recorded)
    recorded.state.stats.flush()
    usual.state.stats.flush()
    for _ in range(16):
        recorded(*batch)
        usual(*batch)
    assert memory_of(recorded) == before
    assert any("prepared" in name for name in before)
    for a, b in zip(recorded.state.G.parameters(), usual.state.G.parameters(), strict=True):
        assert torch.equal(a, b)
    assert recorded.state.stats.flush() == usual.state.stats.flush()


class TwoAlike(World):
    """Stands in for two processes, the other of which has what this one has."""

    def __init__(self, recorded: Unrecorded) -> None:
        super().__init__(Place(rank=0, size=2))
        self.recorded = recorded

    def average(self, flat: torch.Tensor, what: str) -> None:
        self.recorded.names.append(what)


def test_with_several_processes_the_reduction_is_not_recorded() -> None:
    config = tiny_config(batch_gpu=8)
    graphs = Unrecorded()
    world = TwoAlike(graphs)
    alone = make_step(config)
    step = TrainStep(alone.state, config, alone.labels, world=world)
    step.graphs = graphs  # type: ignore[assignment]
    images, indices = batch_of(config)
    step(images[::2], indices[::2])
    expected = []
    for name in ("Gmain", "Greg", "Dmain", "Dreg"):
        expected += [name, f"the gradients of {name}", f"{name} update"]
    assert graphs.names == expected
    before = memory_of(step)
    for _ in range(4):
        step(images[::2], indices[::2])
    assert memory_of(step) == before
    assert step.state.progress.nimg == 5 * config.batch_size
    assert step.state.ada_signs[1] == 16  # of both, since p was adjusted after the 4th
    assert set(step.timer.flush()) == {"Gmain", "Greg", "Dmain", "Dreg", "reduce"}


def test_weights_that_were_prepared_are_never_stale() -> None:
    config = tiny_config(precision="bf16")
    step = make_step(config)
    for _ in range(5):
        step(*batch_of(config))
    for network in (step.state.G, step.state.D):
        layers = [module for module in network.modules() if "prepared" in module.__dict__]
        assert layers
        for layer in layers:
            x = torch.zeros([1, layer.weight.shape[1], 4, 4], dtype=torch.bfloat16)
            x = x.contiguous(memory_format=torch.channels_last)
            value, energy = layer.convolution_weight(x)  # type: ignore[operator]
            del layer.__dict__["prepared"]
            assert torch.equal(value, layer.convolution_weight(x)[0])  # type: ignore[operator]
            if energy is not None:
                torch.testing.assert_close(energy, layer.convolution_weight(x)[1])  # type: ignore[operator]


def test_loading_a_state_makes_the_moments_those_of_this_device() -> None:
    config = tiny_config()
    step, other = make_step(config), make_step(config)
    step(*batch_of(config))
    saved = copy.deepcopy(step.state.state_dict())
    for optimizer in ("G_opt", "D_opt"):  # as another device would have written it
        for moments in saved[optimizer]["state"].values():
            for key, value in moments.items():
                moments[key] = value.clone(memory_format=torch.contiguous_format)
        saved[optimizer]["param_groups"][0]["capturable"] = True
    other.state.load_state_dict(saved)
    for _ in range(2):
        step(*batch_of(config))
        other(*batch_of(config))
    for a, b in zip(step.state.G.parameters(), other.state.G.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"precision": "auto", "augpipe": "bgcfnc"}], ids=["fp32", "half"])
def test_recorded_phases_train_as_unrecorded_ones(options: dict[str, object]) -> None:
    device = torch.device("cuda")
    after = []
    for setting in ("off", "on"):
        config = tiny_config(cuda_graphs=setting, gamma=1, **options)
        labels = LabelTable(torch.zeros([1, 0], device=device), torch.zeros([IMAGES], dtype=torch.long, device=device))
        step = TrainStep(TrainingState(config, device), config, labels)
        images, indices = (t.cuda() for t in batch_of(config))
        for _ in range(32):  # D's R1, every 16th, is recorded in its 2nd
            step(images, indices)
        if setting == "on":
            assert set(step.graphs._graphs) == {"Gmain", "Greg", "Dmain", "Dreg"}  # type: ignore[union-attr]
            for network in (step.state.G, step.state.D):  # replays keep the prepared weights up to date
                for layer in (m for m in network.modules() if m.__dict__.get("prepared") is not None):
                    kept = layer.__dict__["prepared"]
                    assert torch.equal(kept.value, layer._prepare(kept.dtype, kept.layout).value)  # type: ignore[operator]
        stats = step.state.stats.flush()
        after.append([stats[name]["mean"] for name in sorted(stats)])
    assert after[1] == pytest.approx(after[0], rel=0.05, abs=0.02)  # sums in another order, 32 steps on


@pytest.mark.gpu
def test_phases_of_several_processes_are_recorded_in_two_parts() -> None:
    device = torch.device("cuda")
    after = []
    for setting in ("off", "on"):
        config = tiny_config(cuda_graphs=setting, gamma=1, batch_gpu=8)
        labels = LabelTable(torch.zeros([1, 0], device=device), torch.zeros([IMAGES], dtype=torch.long, device=device))
        step = TrainStep(TrainingState(config, device), config, labels, world=World(Place(rank=0, size=2)))
        images, indices = (t[::2].cuda() for t in batch_of(config))
        for _ in range(32):
            step(images, indices)
        if setting == "on":
            phases = ("Gmain", "Greg", "Dmain", "Dreg")
            assert set(step.graphs._graphs) == {*phases, *(f"{name} update" for name in phases)}  # type: ignore[union-attr]
        stats = step.state.stats.flush()
        after.append([stats[name]["mean"] for name in sorted(stats)])
    assert after[1] == pytest.approx(after[0], rel=0.05, abs=0.02)


@pytest.mark.gpu
def test_a_recorded_phase_follows_p() -> None:
    device = torch.device("cuda")
    config = tiny_config(cuda_graphs="on", aug="fixed", p=0.0)
    labels = LabelTable(torch.zeros([1, 0], device=device), torch.zeros([IMAGES], dtype=torch.long, device=device))
    step = TrainStep(TrainingState(config, device), config, labels)
    images, indices = (t.cuda() for t in batch_of(config))
    for _ in range(6):
        step(images, indices)
    means = []
    for p in (0.0, 1.0):
        assert step.state.augment is not None
        step.state.augment.p.fill_(p)
        step.state.progress.nimg = 64  # the same random numbers
        step.state.stats.flush()
        step(images, indices)
        means.append(step.state.stats.flush()["Loss/scores/real"]["mean"])
    assert means[0] != means[1]


@pytest.mark.gpu
def test_what_cannot_be_recorded_runs_as_it_did() -> None:
    lines: list[str] = []
    graphs = PhaseGraphs(torch.device("cuda"), lines.append)
    total = torch.zeros([], device="cuda")

    def phase() -> None:
        total.add_(1)
        total.item()  # a read, which a recording cannot hold

    for _ in range(5):
        graphs.run("Gmain", phase)
    assert float(total) == 5
    assert len(lines) == 1
    assert lines[0].startswith("CUDA graphs are off, because Gmain could not be recorded")


@pytest.mark.gpu
def test_the_step_never_synchronises_on_cuda() -> None:
    config = tiny_config()
    state = TrainingState(config, torch.device("cuda"))
    labels = LabelTable(torch.zeros([1, 0], device="cuda"), torch.zeros([IMAGES], dtype=torch.long, device="cuda"))
    step = TrainStep(state, config, labels)
    images, indices = (t.cuda() for t in batch_of(config))
    step(images, indices)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            step(images, indices)
    finally:
        torch.cuda.set_sync_debug_mode("default")
