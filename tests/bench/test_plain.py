"""The peer of the benchmarks is honest only if it trains the same: the gradients of every phase are compared."""

from __future__ import annotations

import pytest
import torch

from gan import augment
from gan.bench import plain
from gan.config import DataInfo, TrainConfig
from gan.data.labels import LabelTable
from gan.loss import Latents
from gan.networks import set_half_dtype
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training.state import TrainingState
from gan.training.step import make_phases

IMAGES = 40
SMALL = {"cbase": 256, "cmax": 16, "map_depth": 2, "precision": "fp32", "batch": 16}


def config_of(label_dim: int = 0, shape: tuple[int, int, int] = (32, 32, 3), **options: object) -> TrainConfig:
    merged = TrainOptions(data="x", cond=label_dim > 0, **{**SMALL, **options})  # type: ignore[arg-type]
    return resolve(merged, DataInfo("x", "x", IMAGES, *shape, label_dim))


def state_of(config: TrainConfig, dtype: torch.dtype) -> TrainingState:
    state = TrainingState(config, torch.device("cpu"))
    generator = torch.Generator().manual_seed(5)
    for network in (state.G, state.D):
        network.to(dtype)
        for name, parameter in network.named_parameters():
            if name.endswith(("noise_strength", "bias")):  # zeros hide mistakes
                parameter += torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.1
    state.pl_mean = torch.full([], 0.1, dtype=dtype)
    if state.augment is not None:
        state.augment.to(dtype)
        state.augment.p.fill_(0.7)
    return state


def labels_of(config: TrainConfig) -> LabelTable:
    dim = config.data.label_dim
    return LabelTable(torch.eye(dim) if dim else torch.zeros([1, 0]), torch.arange(IMAGES) % max(dim, 1))


def images_of(config: TrainConfig, dtype: torch.dtype) -> torch.Tensor:
    generator, data = torch.Generator().manual_seed(1), config.data
    return torch.rand([16, data.channels, data.height, data.width], generator=generator, dtype=dtype) * 2 - 1


def gradients(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in network.named_parameters()}


def both_gradients(
    config: TrainConfig, name: str, dtype: torch.dtype, half_dtype: torch.dtype | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Gradients of one phase from the same weights, latents, noise and transforms: ours, plain."""
    labels = labels_of(config)
    real, indices = images_of(config, dtype), torch.arange(16)

    state = state_of(config, dtype)
    for network in (state.G, state.D):
        set_half_dtype(network, half_dtype)
    phase = next(p for p in make_phases(state, config) if p.name == name)
    n = 16 // phase.shrink
    torch.manual_seed(3)
    latents = Latents.draw(n, state.G.z_dim, state.G.num_ws, labels.draw(n), config.loss.style_mixing_prob)
    phase.network.zero_grad(set_to_none=True)
    phase.network.requires_grad_(True)
    (phase.compute(latents, real, labels.take(indices)).loss * phase.interval).backward()
    ours = gradients(phase.network)

    state = state_of(config, dtype)
    step = plain.PlainStep(state, config, labels)
    step._draws = augment.Draws  # so that the same numbers are drawn
    network = state.G if name.startswith("G") else state.D
    network.requires_grad_(True)
    torch.manual_seed(3)
    step._accumulate(name, phase.interval, real, labels.take(indices))
    return ours, gradients(network)


def relative_error(ours: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    a, b = (torch.cat([g.flatten().double() for g in grads.values()]) for grads in (ours, reference))
    return float((a - b).norm() / b.norm())


# Dmain draws its transforms for fakes and reals together or apart: no two seeds make them equal.
CASES = [
    ("Gmain", {}),
    ("Gmain", {"aug": "noaug"}),
    ("Greg", {}),
    ("Dmain", {"aug": "noaug"}),
    ("Dreg", {}),
    ("Dreg", {"cfg": "cifar"}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_every_phase_has_the_same_gradients_in_float64(name: str, options: dict[str, object]) -> None:
    ours, reference = both_gradients(config_of(**options), name, torch.float64)
    largest = max(float(g.abs().max()) for g in reference.values())
    assert largest > 0
    for key, gradient in ours.items():
        torch.testing.assert_close(gradient, reference[key], rtol=1e-5, atol=1e-7 * largest, msg=key)


@pytest.mark.parametrize(("name", "options"), CASES)
def test_float32_gradients_are_within_a_thousandth(name: str, options: dict[str, object]) -> None:
    ours, reference = both_gradients(config_of(**options), name, torch.float32)
    assert relative_error(ours, reference) < 1e-3


@pytest.mark.parametrize(("name", "options"), CASES)
@pytest.mark.parametrize("kernels", [False, True], ids=["operations", "kernel"])
def test_bfloat16_gradients_point_the_same_way(
    name: str, options: dict[str, object], kernels: bool, request: pytest.FixtureRequest
) -> None:
    if kernels:
        request.getfixturevalue("cpu_kernels")
    config = config_of(**{**options, "precision": "bf16", "cbase": 1024, "cmax": 64})  # rounding averages out in width
    ours, reference = both_gradients(config, name, torch.float32, torch.bfloat16)
    a, b = (torch.cat([g.flatten().double() for g in grads.values()]) for grads in (ours, reference))
    assert float(a @ b / a.norm() / b.norm()) > 0.998


@pytest.mark.parametrize("name", ["Gmain", "Dmain", "Dreg"])
def test_conditional_networks_have_the_same_gradients(name: str) -> None:
    ours, reference = both_gradients(config_of(label_dim=3, aug="noaug"), name, torch.float64)
    assert relative_error(ours, reference) < 1e-9


@pytest.mark.parametrize("name", ["Gmain", "Greg", "Dmain", "Dreg"])
def test_wide_networks_of_transparent_images_have_the_same_gradients(name: str) -> None:
    aug = "noaug" if name == "Dmain" else "ada"
    ours, reference = both_gradients(config_of(shape=(16, 24, 4), aug=aug), name, torch.float64)
    assert relative_error(ours, reference) < 1e-5


@pytest.mark.parametrize("shape", [(32, 32, 3), (16, 24, 4)])
def test_the_transforms_are_the_same(shape: tuple[int, int, int]) -> None:
    config = config_of(shape=shape, augpipe="bgcfnc")
    state = state_of(config, torch.float64)
    assert state.augment is not None
    state.augment.noise = 0  # one draw of n, then an image of them: the same order only without
    images = images_of(config, torch.float64)
    torch.manual_seed(2)
    ours = state.augment(images)
    torch.manual_seed(2)
    torch.testing.assert_close(plain.augment(state.augment, images, augment.Draws), ours, rtol=0, atol=2e-4)


def test_a_plain_run_of_steps_trains_both_networks() -> None:
    config = config_of(batch_gpu=8)
    state = TrainingState(config, torch.device("cpu"))
    before = [next(n.parameters()).clone() for n in (state.G, state.D, state.G_ema)]
    step = plain.PlainStep(state, config, labels_of(config))
    images = torch.randint(0, 256, [16, 3, 32, 32], dtype=torch.uint8)
    for _ in range(4):
        step(images, torch.arange(16))
    after = [next(n.parameters()) for n in (state.G, state.D, state.G_ema)]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert set(step.timer.flush()) == {"Gmain", "Greg", "Dmain", "Dreg"}
    assert state.progress.nimg == 64
