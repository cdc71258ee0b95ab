"""Starting from the weights of a file: what is taken over, what is said of it, and what the file decides."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

from gan.config import DataInfo, TrainConfig
from gan.errors import GanError, UsageError
from gan.models.rebuild import ShapesOnly
from gan.models.snapshot import Snapshot
from gan.models.transfer import frozen_but_new, plan_transfer, source_info, transfer
from gan.networks import Discriminator, Generator
from gan.resolve import resolve
from gan.train_options import TrainOptions

ALL = ("G", "D", "G_ema")


def networks(
    size: Any = 16, channels: int = 3, c_dim: int = 0, G: dict[str, Any] | None = None, D: dict[str, Any] | None = None
) -> dict[str, Any]:
    """G, D and G_ema."""
    widths = {"channel_base": 64, "channel_max": 8}
    given = {"mapping_kwargs": {"num_layers": 2}, "synthesis_kwargs": widths, **(G or {})}
    made = Generator(6, c_dim, 7, size, channels, **given)
    return {
        "G": made,
        "D": Discriminator(c_dim, size, channels, **{**widths, **(D or {})}),
        "G_ema": copy.deepcopy(made),
    }


def snapshot(networks: dict[str, Any], classes: list[str] | None = None) -> Snapshot:
    held = {name: networks.get(name) for name in ALL}
    return Snapshot(**held, augment_p=None, training_set_kwargs={"class_names": classes}, source="a.pkl", kind="a kind")


def state(networks: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {f"{name}.{key}": t.clone() for name in ALL for key, t in networks[name].state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_everything_is_copied_and_one_line_says_so() -> None:
    there, here = networks(), networks(D={"block_kwargs": {"freeze_layers": 2}})  # buffers in place of parameters
    flat = torch.zeros(here["G"].mapping.fc0.weight.numel())
    here["G"].mapping.fc0.weight.data = flat.view(here["G"].mapping.fc0.weight.shape)
    report = transfer(snapshot(there), **here)
    assert same(state(there), state(here))
    assert torch.equal(flat, there["G"].mapping.fc0.weight.flatten())  # in place
    assert all(p.requires_grad for p in here["G"].parameters())
    assert report.whole
    assert report.lines() == [f"from a.pkl, a kind: all {len(state(here))} tensors loaded"]
    assert report.listing()[0].split() == ["G.synthesis.b4.const", "loaded"]


@pytest.mark.parametrize(
    ("here", "advice"),
    [
        ({"c_dim": 2}, "it was trained without labels: use --cond=0"),
        ({"size": 8}, "its images are 16x16, the dataset's 8x8: use a dataset of --width=16 --height=16"),
        ({"size": [32, 24]}, "its images are 16x16, the dataset's 24x32: use a dataset of --width=16 --height=16"),
        ({"channels": 1}, "its images have 3 channels, the dataset 1: use a dataset of --channels=rgb"),
        ({"G": {"mapping_kwargs": {"num_layers": 3}}}, "use --map-depth=2"),
        ({"G": {"synthesis_kwargs": {"channel_base": 128, "channel_max": 8}}}, "use --cbase=64"),
        ({"D": {"channel_max": 16}}, "use --cmax=8"),
        ({"D": {"architecture": "orig"}}, "its architecture is resnet"),
    ],
)
def test_a_part_is_refused_with_what_to_change_and_nothing_is_copied(here: dict[str, Any], advice: str) -> None:
    ours = networks(**here)
    before = state(ours)
    with pytest.raises(GanError) as caught:
        transfer(snapshot(networks()), **ours)
    text = str(caught.value)
    assert text.startswith("a.pkl: fits only in part (")
    assert text.endswith(f" left out): {advice}; or start from what fits: --allow-partial")
    assert same(state(ours), before)
    report = transfer(snapshot(networks()), **ours, allow_partial=True)
    assert not report.whole
    assert report.refusal == text
    assert not same(state(ours), before)


def test_the_table_shows_the_parts_that_are_not_simply_loaded() -> None:
    report = plan_transfer(snapshot(networks()), **networks(size=32, c_dim=2), class_names=["ant", "bee"])
    assert report.lines()[1:] == TABLE.strip("\n").splitlines()
    names = [line.split()[0] for line in report.listing()]
    assert len(names) == len(set(names)) == sum(report.counts.values())
    assert any(line.split() == ["G.mapping.fc0.weight", "adapted", "inputs"] for line in report.listing())


TABLE = """
       part     loaded  adapted  new  left out
G      b32           0        0   19         0  not in the file; begins so that nothing changes
G      mapping       4        1    2         0  not in the file; inputs
D      b32           0        0   12         0  not in the file
D      b16           9        0    0         3  no place for it here
D      mapping       0        0   18         0  not in the file
D      b4            5        0    2         0  [1, 8] in the file, [8, 8] here; [1] in the file, [8] here
G_ema  b32           0        0   19         0  not in the file; begins so that nothing changes
G_ema  mapping       4        1    2         0  not in the file; inputs
"""


def test_shapes_are_enough_to_tell() -> None:
    with ShapesOnly():
        planned = plan_transfer(snapshot(networks()), **networks(size=32, channels=4, c_dim=2))
    here = networks(size=32, channels=4, c_dim=2)
    assert transfer(snapshot(networks()), **here, allow_partial=True).listing() == planned.listing()


def test_a_file_with_one_generator_alone() -> None:
    there, here = networks(), networks()
    before = state(here)
    source = snapshot({"G_ema": there["G_ema"]})
    report = transfer(source, **here, allow_partial=True)
    for name in ("G", "G_ema"):
        assert all(torch.equal(t, here[name].state_dict()[key]) for key, t in there["G_ema"].state_dict().items())
    assert all(torch.equal(before[f"D.{key}"], t) for key, t in here["D"].state_dict().items())
    assert [line.split() for line in report.lines()[2:]] == [
        ["G", "all", "0", "56", "0", "0", "that", "of", "G_ema"],
        ["D", "all", "0", "0", "28", "0", "the", "file", "has", "no", "D"],
    ]
    assert "it holds no G; it holds no discriminator" in report.refusal
    with pytest.raises(GanError, match=r"a\.pkl: holds no generator"):
        transfer(snapshot({"D": there["D"]}), **here)
    with pytest.raises(GanError, match="holds no generator"):
        source_info(snapshot({"D": there["D"]}))


def test_classes_of_other_names_are_told() -> None:
    source, here = snapshot(networks(c_dim=2), ["ant", "bee"]), networks(c_dim=2)
    with pytest.raises(GanError, match="its classes are ant, bee; or"):
        transfer(source, **here, class_names=["bee", "cat"])
    with pytest.raises(GanError, match="its classes are ant, bee; or"):
        transfer(source, **here, class_names=["one", "two"])
    for odd in ([1, 2], "ab", {"ant": 1}, ["ant"]):  # whatever strangers write
        assert plan_transfer(snapshot(networks(c_dim=2), odd), **here, class_names=["bee", "cat"]).whole  # type: ignore[arg-type]


def test_other_numbers_of_classes_are_told_without_advising_what_is_the_case() -> None:
    refusal = plan_transfer(snapshot(networks(c_dim=5)), **networks(c_dim=2)).refusal
    assert "): it was trained on labels of 5 numbers, the dataset's have 2; or" in refusal
    assert "use --cond=1" in plan_transfer(snapshot(networks(c_dim=5)), **networks()).refusal


def test_what_a_stranger_named_does_not_reach_the_terminal_as_it_is() -> None:
    names = ["\x1b[31mred", "b\ne"]
    report = plan_transfer(snapshot(networks(c_dim=2), names), **networks(c_dim=2), class_names=["one", "two"])
    lines = [*report.lines(), *report.listing()]
    assert any("by position: ?[31mred -> one, b?e -> two" in line for line in lines)
    assert all(line.isprintable() for line in lines)


def test_frozen_layers_of_which_the_file_has_none_are_named() -> None:
    frozen = {"block_kwargs": {"freeze_layers": 3}}
    here = networks(D=frozen)
    assert frozen_but_new(plan_transfer(snapshot(networks()), **here), here["D"]) == ""
    here = networks(size=32, D=frozen)
    new = frozen_but_new(plan_transfer(snapshot(networks()), **here), here["D"])
    assert new == "b32.fromrgb, b32.conv0, b32.conv1"


DATA = DataInfo("x.zip", "x", 100, 16, 16, 3)
UNUSUAL = networks(
    G={
        "mapping_kwargs": {"num_layers": 3, "layer_features": 9, "lr_multiplier": 0.1, "activation": "relu"},
        "synthesis_kwargs": {
            "channel_base": 96,
            "channel_max": 10,
            "num_fp16_res": 2,
            "conv_clamp": 100,
            "architecture": "resnet",
            "resample_filter": (1, 2, 1),
            "use_noise": False,
            "activation": "swish",
        },
    },
    D={
        "channel_max": 12,
        "architecture": "skip",
        "num_fp16_res": 1,
        "block_kwargs": {"freeze_layers": 3, "resample_filter": [1, 1], "activation": "relu"},
        "epilogue_kwargs": {"mbstd_group_size": 2, "mbstd_num_channels": 2},
    },
)  # fmt: skip


def resolved(source: Snapshot, **options: Any) -> TrainConfig:
    return resolve(TrainOptions(data="x.zip", resume="a.pkl", **options), DATA, source_info(source))


def made(config: TrainConfig) -> dict[str, Any]:
    G = Generator(**config.network.generator_kwargs(config.data))
    return {"G": G, "D": Discriminator(**config.network.discriminator_kwargs(config.data)), "G_ema": copy.deepcopy(G)}


@pytest.mark.parametrize("there", [networks(), UNUSUAL], ids=["usual", "unusual"])
def test_what_was_not_typed_is_as_in_the_file(there: dict[str, Any]) -> None:
    config = resolved(snapshot(there), batch=8)
    here = made(config)
    assert transfer(snapshot(there), **here).whole
    z = torch.randn(4, 6)
    images = [G.eval()(z, noise_mode="const", force_fp32=True) for G in (there["G"], here["G"])]
    assert torch.equal(*images)
    group = here["D"].b4.mbstd.group_size
    assert group == 4  # of the run, not of the file
    there["D"].b4.mbstd.group_size = group
    assert torch.equal(there["D"](images[0], force_fp32=True), here["D"](images[0], force_fp32=True))
    again = TrainConfig.from_json(config.to_json(), "here")
    assert again == config
    assert json.loads(config.to_json())["network"]["freeze_layers"] == 0


def test_what_was_typed_wins() -> None:
    network = resolved(snapshot(UNUSUAL), cbase=128, cmax=20, map_depth=1, freezed=1).network
    assert (network.channel_base, network.channel_max, network.mapping_layers) == (128, 20, 1)
    assert network.discriminator_kwargs(resolved(snapshot(UNUSUAL)).data)["channel_max"] == 20
    assert (network.d_architecture, network.use_noise, network.freeze_layers) == ("skip", False, 1)
    assert resolved(snapshot(UNUSUAL)).network.inherited["discriminator"]["channel_max"] == 12


def test_without_a_discriminator_the_preset_has_one_of_the_generator_s_widths() -> None:
    config = resolved(snapshot({"G_ema": UNUSUAL["G_ema"]}), cfg="cifar")
    kwargs = config.network.discriminator_kwargs(config.data)
    assert (kwargs["architecture"], kwargs["channel_base"], kwargs["channel_max"]) == ("orig", 96, 10)


def test_a_file_too_narrow_for_the_dataset_is_refused() -> None:
    data = DataInfo("x.zip", "x", 100, 128, 128, 3)
    with pytest.raises(UsageError, match="--cbase 64: leaves no channels at 128x128; give at least 128"):
        resolve(TrainOptions(data="x.zip", resume="a.pkl"), data, source_info(snapshot(networks())))
