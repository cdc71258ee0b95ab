"""Networks of another shape compute what those of the file did, as far as that is possible. In float64."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from gan.models.snapshot import Snapshot
from gan.models.surgery import ADAPTED, LEFT_OUT, LOADED, NEW, Fate
from gan.models.transfer import TransferReport, transfer
from gan.networks import Discriminator, Generator
from torch_utils.ops import upfirdn2d

SMALL: dict[str, Any] = {"size": 16, "channels": 3, "c_dim": 0, "base": 128, "most": 12}
N = 4


def pair(
    size: int | list[int],
    channels: int,
    c_dim: int,
    base: int,
    most: int,
    synthesis: dict[str, Any] | None = None,
    **discriminator: Any,
) -> tuple[Generator, Discriminator]:
    widths = {"channel_base": base, "channel_max": most}
    mapping = {"num_layers": 2}
    G = Generator(8, c_dim, 9, size, channels, mapping_kwargs=mapping, synthesis_kwargs={**widths, **(synthesis or {})})
    D = Discriminator(c_dim, size, channels, **{**widths, "mapping_kwargs": mapping, **discriminator})
    for network in (G, D):
        network.double().eval().requires_grad_(False)
    for name, tensor in G.state_dict().items():
        if "noise_strength" in name or name.endswith("bias"):
            tensor.add_(torch.randn_like(tensor) / 10)
    for name, tensor in D.state_dict().items():
        if name.endswith("bias"):
            tensor.add_(torch.randn_like(tensor) / 10)
    G.mapping.w_avg.normal_()
    return G, D


class Moved:
    """Networks before and after a transfer."""

    def __init__(
        self, before: dict[str, Any], after: dict[str, Any], names: Sequence[Sequence[str]] = ((), ())
    ) -> None:
        torch.manual_seed(0)
        self.old_G, self.old_D = pair(**{**SMALL, **before})
        self.G, self.D = pair(**{**SMALL, **before, **after})
        old_ema, self.G_ema = copy.deepcopy(self.old_G), copy.deepcopy(self.G)
        kwargs = {"class_names": list(names[0])} if names[0] else {}
        source = Snapshot(self.old_G, self.old_D, old_ema, None, kwargs, "a.pkl")
        self.report: TransferReport = transfer(source, self.G, self.D, self.G_ema, True, list(names[1]) or None)
        for name, tensor in self.G.state_dict().items():
            assert torch.equal(tensor, self.G_ema.state_dict()[name])

    def label(self, network: Generator | Discriminator, column: int = 0) -> torch.Tensor:
        c = torch.zeros([N, network.c_dim], dtype=torch.float64)
        if network.c_dim:
            c[:, column] = 1
        return c

    def fakes(self, column: int = 0, old_column: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the old and of the new generator."""
        z = torch.randn([N, 8], dtype=torch.float64)
        images = [
            G(z, self.label(G, c), noise_mode="const", truncation_psi=0.7)
            for G, c in ((self.old_G, old_column), (self.G, column))
        ]
        return images[0], images[1]

    def logits(self, old: torch.Tensor, new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the old and of the new discriminator."""
        return self.old_D(old, self.label(self.old_D)), self.D(new, self.label(self.D))

    def kinds(self, network: str) -> dict[str, str]:
        return {fate.name: fate.kind for fate in self.report.fates[network]}


def near(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def pictures(channels: int, size: int = 16) -> torch.Tensor:
    return torch.randn([N, channels, size, size], dtype=torch.float64).clamp(-1, 1)


def test_equal_networks_are_loaded_whole() -> None:
    moved = Moved({"c_dim": 3}, {})
    assert moved.report.whole
    old, new = moved.fakes()
    assert torch.equal(old, new)
    old, new = moved.logits(old, old)
    assert torch.equal(old, new)


@pytest.mark.parametrize(("size", "base_filter"), [(32, 1), (64, 2)])
def test_higher_resolutions_begin_with_the_pictures_made_larger(size: int, base_filter: int) -> None:
    moved = Moved({}, {"size": size})
    old, new = moved.fakes()
    for _ in range(base_filter):
        old = upfirdn2d.upsample2d(old, moved.G.synthesis.b4.resample_filter)
    near(old, new)
    assert not moved.report.whole
    assert moved.kinds("G")["synthesis.b32.torgb.weight"] == NEW


def test_a_new_level_of_the_generator_can_learn() -> None:
    moved = Moved({}, {"size": 32})
    moved.G.requires_grad_(True)
    moved.G(torch.randn([N, 8], dtype=torch.float64)).square().sum().backward()
    weight = moved.G.synthesis.b32.torgb.weight
    assert weight.grad is not None
    assert weight.grad.abs().min() > 0


def test_lower_resolutions_show_what_was_shown_there() -> None:
    moved = Moved({"size": 32, "most": 4}, {"size": 16})
    z = torch.randn([N, 8], dtype=torch.float64)
    top = moved.old_G.synthesis.b32
    top.torgb.weight.zero_()
    top.torgb.bias.zero_()
    larger = upfirdn2d.upsample2d(moved.G(z, noise_mode="const"), moved.G.synthesis.b4.resample_filter)
    near(moved.old_G(z, noise_mode="const"), larger)
    assert moved.kinds("G")["synthesis.b32.conv0.weight"] == LEFT_OUT
    assert moved.kinds("D")["b16.fromrgb.weight"] == ADAPTED  # moved: as many channels at both
    assert torch.equal(moved.D.b16.fromrgb.weight, moved.old_D.b32.fromrgb.weight)


def test_sizes_that_are_no_squares_of_a_power_of_two() -> None:
    moved = Moved({"size": [16, 24]}, {"size": [32, 48]})
    old, new = moved.fakes()
    near(upfirdn2d.upsample2d(old, moved.G.synthesis.b4.resample_filter), new)
    other = Moved({"size": [16, 24]}, {"size": 16})
    assert other.kinds("G")["synthesis.b4.const"] == NEW
    assert other.kinds("D")["b4.fc.weight"] == NEW
    assert other.kinds("G")["synthesis.b8.conv0.noise_const"] == NEW
    assert other.kinds("G")["synthesis.b8.conv0.weight"] == LOADED


def large_and_small(D: Discriminator) -> tuple[torch.Tensor, torch.Tensor]:
    large = torch.randn([N, 3, 32, 32], dtype=torch.float64)
    return large, upfirdn2d.downsample2d(large, D.b8.resample_filter)


@pytest.mark.parametrize("most", [8, 4])  # the level on top is narrower, or as wide as the last
def test_a_larger_discriminator_judges_the_picture_made_smaller(most: int) -> None:
    moved = Moved({"most": most, "architecture": "skip"}, {"size": 32})
    large, small = large_and_small(moved.D)
    near(*moved.logits(small, large))
    kinds = moved.kinds("D")
    assert (kinds["b32.conv0.weight"], kinds["b32.fromrgb.weight"]) == (NEW, NEW)
    assert kinds["b16.fromrgb.weight"] == LOADED


@pytest.mark.parametrize("architecture", ["resnet", "orig"])
@pytest.mark.parametrize(
    "after", [{"size": 32}, {"size": 64, "base": 512}, {"size": 32, "channels": 1}, {"size": 32, "most": 20}], ids=str
)
def test_new_levels_of_other_widths_hand_on_the_picture(architecture: str, after: dict[str, Any]) -> None:
    before = {"base": 256, "most": 16, "architecture": architecture}
    moved = Moved(before, after)
    assert moved.kinds("D")["b32.conv1.weight"] == ADAPTED
    assert "b16.fromrgb.weight" not in moved.kinds("D")
    large = torch.randn([N, moved.D.img_channels, *moved.D.img_size], dtype=torch.float64)
    small = large
    while small.shape[2] > 16:
        small = upfirdn2d.downsample2d(small, moved.D.b8.resample_filter)
    near(*moved.logits(recoloured(small, 3), large), 2e-3 if "most" in after else 1e-9)


def test_new_levels_of_the_same_width_hand_on_the_picture_where_nothing_else_does() -> None:
    moved = Moved({"most": 8, "base": 256, "architecture": "orig"}, {"size": 32})
    large, small = large_and_small(moved.D)
    near(*moved.logits(small, large))
    assert moved.kinds("D")["b32.conv1.weight"] == ADAPTED


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"most": 16, "base": 256}, {"block_kwargs": {"activation": "relu"}}),
        ({"most": 16, "base": 256, "block_kwargs": {"activation": "relu"}}, {"block_kwargs": {}}),
        ({"most": 16, "base": 128}, {}),  # fewer channels than x and -x need
    ],
    ids=str,
)
def test_new_levels_that_cannot_hand_on_the_picture_are_new(before: dict[str, Any], after: dict[str, Any]) -> None:
    moved = Moved({"architecture": "orig", **before}, {"size": 32, **after})
    assert moved.kinds("D")["b32.conv1.weight"] == NEW
    assert moved.kinds("D")["b16.fromrgb.weight"] == LEFT_OUT


def test_the_new_level_of_a_residual_discriminator_hands_on_half_the_size() -> None:
    """Exactly where the first layer's leaky ReLU is linear, and away from borders: the order is another one."""
    moved = Moved({"most": 4}, {"size": 32})
    assert moved.kinds("D")["b32.fromrgb.weight"] == ADAPTED
    moved.old_D.b16.fromrgb.bias += 10
    moved.D.b32.fromrgb.bias += 10
    large, small = large_and_small(moved.D)
    x, _ = moved.D.b32(None, large)
    near(x[:, :, 2:-2, 2:-2], moved.old_D.b16.fromrgb(small)[:, :, 2:-2, 2:-2])
    assert "b16.fromrgb.weight" not in moved.kinds("D")


def test_without_labels_to_with_them() -> None:
    moved = Moved({}, {"c_dim": 3})
    for column in range(3):
        near(*moved.fakes(column))
    kinds = moved.kinds("D")
    assert kinds["b4.out.weight"] == NEW
    assert kinds["b4.fc.weight"] == LOADED


def test_with_labels_to_without_them() -> None:
    moved = Moved({"c_dim": 3}, {"c_dim": 0})
    ratio = (8 / 17) ** 0.5
    near(moved.G.mapping.fc0.weight, moved.old_G.mapping.fc0.weight[:, :8] * ratio)
    assert moved.kinds("G")["mapping.embed.weight"] == LEFT_OUT
    assert moved.kinds("G")["mapping.fc1.weight"] == LOADED
    assert moved.fakes()[1].isfinite().all()


def test_classes_keep_what_was_learned_under_their_name() -> None:
    moved = Moved({"c_dim": 3}, {"c_dim": 4}, (["ant", "bee", "cat"], ["cow", "cat", "dog", "ant"]))
    for column, old_column in ((1, 2), (3, 0)):
        near(*moved.fakes(column, old_column))
    assert "2 of 4 classes are in it" in {fate.why for fate in moved.report.fates["D"]}
    order = Moved({"c_dim": 2}, {}, (["ant", "bee"], ["bee", "ant"]))
    near(*order.fakes(0, 1))
    assert not order.report.whole


def why(names: Sequence[Sequence[str]], num_stored: int = 2, num_here: int = 2) -> Fate:
    moved = Moved({"c_dim": num_stored}, {"c_dim": num_here}, names)
    return next(fate for fate in moved.report.fates["D"] if fate.name == "mapping.embed.weight")


def test_classes_without_a_name_in_common_are_taken_by_position_and_that_is_told() -> None:
    moved = Moved({"c_dim": 2}, {}, (["ant", "bee"], ["one", "two"]))
    near(*moved.fakes(1, 1))
    assert moved.kinds("G")["mapping.embed.weight"] == ADAPTED
    assert why((["ant", "bee"], ["one", "two"])).why == "by position: ant -> one, bee -> two"
    assert why(("abcd", "efgh"), 4, 4).why == "by position: a -> e, b -> f, c -> g, ..."
    for names in ((["ant", "bee"], ()), ((), ["one", "two"]), ((), ())):
        assert why(names).kind == LOADED


def test_classes_that_are_not_found_are_new_with_the_reason() -> None:
    assert why((["ant", "bee"], "xyz"), 2, 3) == Fate(
        "mapping.embed.weight", NEW, "none of its classes is one of the dataset"
    )
    assert why(((), "xyz"), 2, 3).why == "the file does not name its 2 classes"
    assert why(("xy", ()), 2, 3).why == "the dataset does not name its 3 classes"
    assert why(((), ()), 2, 3).kind == NEW


LUMA = torch.tensor([0.299, 0.587, 0.114], dtype=torch.float64)


def recoloured(images: torch.Tensor, channels: int) -> torch.Tensor:
    """What the same picture looks like in other channels."""
    colours, alpha = images[:, :3], images[:, 3:]
    if channels == 1 and colours.shape[1] == 3:
        colours = torch.einsum("c,nchw->nhw", LUMA, colours)[:, None]
    elif channels >= 3:
        colours = colours.expand(-1, 3, -1, -1)
    if channels < 4:
        return colours
    return torch.cat([colours, alpha if alpha.shape[1] else torch.ones_like(colours[:, :1])], dim=1)


@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
@pytest.mark.parametrize(("before", "after"), [(3, 4), (4, 3), (1, 3), (3, 1), (1, 4), (4, 1)])
def test_other_channels_show_the_same_picture(before: int, after: int, architecture: str) -> None:
    moved = Moved({"channels": before, "synthesis": {"architecture": architecture}}, {"channels": after})
    old, new = moved.fakes()
    near(recoloured(old, after), new)
    if after >= before or before == 4:
        images = pictures(before)
        if before == 4:
            images[:, 3] = 1  # what the dataset without alpha stands for
        if after == 1:  # the discriminator sees grey as a colour picture without colours
            images[:, :3] = images[:, :1]
        near(*moved.logits(images, recoloured(images, after)))


WIDTHS = [
    ({"base": 256}, 1e-9),  # wider above the base
    ({"most": 16}, 2e-3),  # the base too: the deviation of silent channels is not quite 0
    ({"base": 256, "most": 20}, 2e-3),
]


@pytest.mark.parametrize("architecture", ["skip", "orig", "resnet"])
@pytest.mark.parametrize(("after", "tolerance"), WIDTHS)
def test_wider_networks_compute_the_same(after: dict[str, int], tolerance: float, architecture: str) -> None:
    moved = Moved({"synthesis": {"architecture": architecture}, "architecture": architecture}, after)
    near(*moved.fakes())
    images = pictures(3)
    near(*moved.logits(images, images), tolerance)
    assert moved.report.counts[ADAPTED] > 0
    assert set(moved.report.counts) <= {LOADED, ADAPTED}


@pytest.mark.parametrize("mapping", [{"num_layers": 2}, {"num_layers": 2, "layer_features": 8}], ids=str)  # of D
def test_all_channels_of_wider_networks_can_learn(mapping: dict[str, int]) -> None:
    """In the second step at the latest, when what reads them has moved away from 0."""
    moved = Moved({"c_dim": 2, "mapping_kwargs": mapping}, {"most": 16, "base": 256})
    labels = torch.eye(2, dtype=torch.float64)[[0, 1, 0, 1]]
    for network in (moved.G, moved.D):
        network.requires_grad_(True)
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
        for _ in range(2):
            optimiser.zero_grad()
            z = torch.randn([N, 8], dtype=torch.float64)
            output = network(z, labels) if isinstance(network, Generator) else network(pictures(3), labels)
            output.square().sum().backward()
            optimiser.step()
        for name, parameter in network.named_parameters():
            if parameter.ndim == 4 or (name.startswith("mapping") and parameter.ndim == 2):
                assert parameter.grad is not None
                assert (parameter.grad.flatten(1).abs().amax(dim=1) > 0).all(), name


def test_narrower_networks_keep_the_first_channels() -> None:
    moved = Moved({"most": 16}, {"most": 8})
    near(moved.G.synthesis.b8.conv0.weight, moved.old_G.synthesis.b8.conv0.weight[:8, :8])
    near(moved.D.b8.conv1.weight, moved.old_D.b8.conv1.weight[:8, :8] / 2**0.5)
    fc = moved.old_D.b4.fc.weight.view(16, 16, 16)[:8, :8].reshape(8, -1)
    near(moved.D.b4.fc.weight, fc / 2**0.5)
    conv = moved.old_D.b4.conv.weight  # what minibatch-stddev adds stays the last input
    near(moved.D.b4.conv.weight[:, -1] * 17**0.5, conv[:8, -1] * 9**0.5)
    assert moved.fakes()[1].isfinite().all()
    assert moved.logits(pictures(3), pictures(3))[1].isfinite().all()


@pytest.mark.parametrize("most", [16, 48])
def test_wider_conditional_discriminators_judge_the_same(most: int) -> None:
    before = {"c_dim": 2, "base": 512, "epilogue_kwargs": {"mbstd_num_channels": 0}}  # which is not quite the same
    moved = Moved(before, {"most": most})
    near(*moved.fakes())
    images = pictures(3)
    near(*moved.logits(images, images), 1e-6)  # the normalisation adds 1e-8 to a mean square
    assert moved.report.counts[NEW] == 0


def test_filters_of_another_length_and_other_numbers_of_deviations_are_new() -> None:
    shorter = Moved({}, {"most": 16, "block_kwargs": {"resample_filter": [1, 2, 1]}})
    assert shorter.kinds("D")["b16.conv1.resample_filter"] == NEW
    deviations = Moved({}, {"most": 16, "epilogue_kwargs": {"mbstd_num_channels": 2}})
    assert deviations.kinds("D")["b4.conv.weight"] == NEW


def test_freeze_d_and_other_gains() -> None:
    frozen = Moved({}, {"block_kwargs": {"freeze_layers": 2}})
    assert frozen.report.whole
    torch.manual_seed(0)
    source, _ = pair(**SMALL)
    target = Generator(8, 0, 9, 16, 3, {"num_layers": 2, "lr_multiplier": 1}, {"channel_base": 128, "channel_max": 12})
    target.double().eval().requires_grad_(False)
    D = pair(**SMALL)[1]
    transfer(Snapshot(source, D, source, None, {}, "a.pkl"), target, D, target, allow_partial=True)
    z = torch.randn([N, 8], dtype=torch.float64)
    near(source(z, noise_mode="const"), target(z, noise_mode="const"))


def test_everything_at_once() -> None:
    """16x16 RGB without labels to 32x32 RGBA with labels, wider."""
    moved = Moved({}, {"size": 32, "channels": 4, "base": 512, "most": 20, "c_dim": 2})
    old, new = moved.fakes(1)
    near(upfirdn2d.upsample2d(old, moved.G.synthesis.b4.resample_filter), new[:, :3])
    near(new[:, 3], torch.ones_like(new[:, 3]))
    assert all(isinstance(fate, Fate) for network in moved.report.fates.values() for fate in network)
    assert set(moved.kinds("D").values()) == {LOADED, ADAPTED, NEW, LEFT_OUT}
    assert moved.kinds("D")["b32.conv1.bias"] == ADAPTED
