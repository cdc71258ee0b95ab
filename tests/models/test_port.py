"""Checkpoints of the PyTorch port: golden networks written in its layout, from what is known of it, and ours in it."""

import argparse
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from golden_networks import golden, golden_network
from test_models_load import assert_equal_tensors

from gan import models, networks
from gan.errors import GanError
from gan.models.formats import port
from gan.models.snapshot import Snapshot
from torch_utils.ops.conv2d_resample import conv2d_resample

KERNEL = torch.tensor([[1, 3, 3, 1], [3, 9, 9, 3], [3, 9, 9, 3], [1, 3, 3, 1]]) / 64


class Parts(torch.nn.Module):
    """A real module with tensors of these names, as the port's program has it in memory."""

    def __init__(self, tensors):
        super().__init__()
        children = {}
        for name, tensor in tensors.items():
            first, _, rest = name.partition(".")
            if rest:
                children.setdefault(first, {})[rest] = tensor
            elif first in ("kernel",) or first.startswith("noise_"):
                self.register_buffer(first, tensor)
            else:
                self.register_parameter(first, torch.nn.Parameter(tensor))
        for name, inner in children.items():
            self.add_module(name, Parts(inner))


def generator(p, resolution):
    """Tensors of ours -> those of the port's generator."""
    t = {}
    for i in range(sum(name.startswith("mapping.fc") for name in p) // 2):
        t[f"style.{i + 1}.weight"] = p[f"mapping.fc{i}.weight"]
        t[f"style.{i + 1}.bias"] = p[f"mapping.fc{i}.bias"]
    t["input.input"] = p["synthesis.b4.const"][None]

    def styled(theirs, ours):
        t[f"{theirs}.conv.weight"] = p[f"{ours}.weight"][None]
        if ours.endswith("conv0"):
            t[f"{theirs}.conv.blur.kernel"] = KERNEL * 4
        t[f"{theirs}.conv.modulation.weight"] = p[f"{ours}.affine.weight"]
        t[f"{theirs}.conv.modulation.bias"] = p[f"{ours}.affine.bias"]
        t[f"{theirs}.noise.weight"] = p[f"{ours}.noise_strength"].reshape(1)
        t[f"{theirs}.activate.bias"] = p[f"{ours}.bias"]

    def rgb(theirs, ours):
        t[f"{theirs}.bias"] = p[f"{ours}.bias"].reshape(1, -1, 1, 1)
        if "to_rgbs" in theirs:
            t[f"{theirs}.upsample.kernel"] = KERNEL * 4
        t[f"{theirs}.conv.weight"] = p[f"{ours}.weight"][None]
        t[f"{theirs}.conv.modulation.weight"] = p[f"{ours}.affine.weight"]
        t[f"{theirs}.conv.modulation.bias"] = p[f"{ours}.affine.bias"]

    styled("conv1", "synthesis.b4.conv1")
    rgb("to_rgb1", "synthesis.b4.torgb")
    t["noises.noise_0"] = p["synthesis.b4.conv1.noise_const"][None, None]
    k = 0
    while 8 * 2**k <= resolution:
        block = f"synthesis.b{8 * 2**k}"
        styled(f"convs.{2 * k}", f"{block}.conv0")
        styled(f"convs.{2 * k + 1}", f"{block}.conv1")
        rgb(f"to_rgbs.{k}", f"{block}.torgb")
        t[f"noises.noise_{2 * k + 1}"] = p[f"{block}.conv0.noise_const"][None, None]
        t[f"noises.noise_{2 * k + 2}"] = p[f"{block}.conv1.noise_const"][None, None]
        k += 1
    return t


def discriminator(p, resolution):
    """Tensors of ours -> those of the port's discriminator."""
    t = {"convs.0.0.weight": p[f"b{resolution}.fromrgb.weight"], "convs.0.1.bias": p[f"b{resolution}.fromrgb.bias"]}
    j, size = 1, resolution
    while size > 4:
        t[f"convs.{j}.conv1.0.weight"] = p[f"b{size}.conv0.weight"]
        t[f"convs.{j}.conv1.1.bias"] = p[f"b{size}.conv0.bias"]
        t[f"convs.{j}.conv2.0.kernel"] = KERNEL
        t[f"convs.{j}.conv2.1.weight"] = p[f"b{size}.conv1.weight"]
        t[f"convs.{j}.conv2.2.bias"] = p[f"b{size}.conv1.bias"]
        t[f"convs.{j}.skip.0.kernel"] = KERNEL
        t[f"convs.{j}.skip.1.weight"] = p[f"b{size}.skip.weight"]
        j, size = j + 1, size // 2
    t["final_conv.0.weight"], t["final_conv.1.bias"] = p["b4.conv.weight"], p["b4.conv.bias"]
    t["final_linear.0.weight"], t["final_linear.0.bias"] = p["b4.fc.weight"], p["b4.fc.bias"]
    t["final_linear.1.weight"], t["final_linear.1.bias"] = p["b4.out.weight"], p["b4.out.bias"]
    return t


def golden_tensors():
    return (
        generator(golden("generator_uncond32")[1], 32),
        discriminator(golden("discriminator_uncond32")[1], 32),
        golden("generator_uncond32")[1]["mapping.w_avg"],
    )


def adam(tensors):
    module = Parts({name: tensor.clone() for name, tensor in tensors.items()})
    optimizer = torch.optim.Adam(module.parameters())
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer.state_dict()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_golden_networks_are_read(zipped, wrapped, tmp_path):
    """With all that comes along: optimisers, arguments, another program's wrapper around the networks."""
    g, d, latent_avg = golden_tensors()
    prefix = "module." if wrapped else ""
    content = {
        "g": OrderedDict((prefix + name, tensor) for name, tensor in Parts(g).state_dict().items()),
        "d": OrderedDict((prefix + name, tensor) for name, tensor in Parts(d).state_dict().items()),
        "g_ema": Parts(g).state_dict(),
        "g_optim": adam(g),
        "d_optim": adam(d),
        "args": argparse.Namespace(path="lmdb", size=32, device=torch.device("cpu")),
        "ada_aug_p": 0.25,
        "latent_avg": latent_avg,
    }
    torch.save(content, tmp_path / "550000.pt", _use_new_zipfile_serialization=zipped)
    snapshot = models.load(tmp_path / "550000.pt")
    assert snapshot.kind == "checkpoint of the PyTorch port"
    assert (snapshot.augment_p, snapshot.notes) == (0.25, ())
    live, arrays = golden_network("generator_uncond32")
    for G in (snapshot.G, snapshot.G_ema):
        assert_equal_tensors(G, live)
        img = G(arrays["z"], None, noise_mode="const")
        torch.testing.assert_close(img, arrays["img_const"], rtol=1e-4, atol=1e-4)
        assert (G.mapping.num_layers, G.mapping.fc0.bias_gain) == (2, 0.01)
    live, arrays = golden_network("discriminator_uncond32")
    assert_equal_tensors(snapshot.D, live)
    torch.testing.assert_close(snapshot.D(arrays["img"], None), arrays["logits"], rtol=1e-4, atol=1e-4)


def test_a_generator_alone_is_read(tmp_path):
    g, _, _ = golden_tensors()
    for number, content in enumerate(({"g_ema": g}, g, {f"module.{name}": tensor for name, tensor in g.items()})):
        torch.save(content, tmp_path / f"{number}.pt")
        snapshot = models.load(tmp_path / f"{number}.pt")
        assert (snapshot.G, snapshot.D) == (None, None)
        _, arrays = golden_network("generator_uncond32")
        img = snapshot.G_ema(arrays["z"], None, noise_mode="const")
        torch.testing.assert_close(img, arrays["img_const"], rtol=1e-4, atol=1e-4)
        assert "mean latent was not stored" in snapshot.notes[0]


def test_a_mean_latent_that_was_not_stored_is_estimated(tmp_path):
    torch.save({"g_ema": golden_tensors()[0]}, tmp_path / "a.pt")
    state = torch.get_rng_state()
    first, second = (models.load(tmp_path / "a.pt").G_ema.mapping for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.w_avg, second.w_avg)
    w = first(torch.randn([20_000, 24]), None)[:, 0]
    assert (first.w_avg - w.mean(dim=0)).norm() < 0.05 * w.std(dim=0).norm()


def test_noise_that_was_not_stored_is_drawn(tmp_path):
    g, _, latent_avg = golden_tensors()
    g = {name: tensor for name, tensor in g.items() if not name.startswith("noises.")}
    torch.save({"g_ema": g, "latent_avg": latent_avg}, tmp_path / "a.pt")
    first, second = (models.load(tmp_path / "a.pt") for _ in range(2))
    assert "noise inputs were not stored" in first.notes[0]
    assert_equal_tensors(first.G_ema, second.G_ema)
    assert first.G_ema.synthesis.b32.conv1.noise_const.std() > 0.9


def test_noise_is_drawn_for_images_of_a_bounded_size():
    with pytest.raises(ValueError, match="noise inputs were not stored, and are not drawn for 4096x4096 pixels"):
        port._noises({}, 4096)


@pytest.mark.parametrize("p", [torch.tensor(1), torch.tensor([0.5]), 0])
def test_single_numbers_may_have_any_shape_and_type(p, tmp_path):
    g, _, latent_avg = golden_tensors()
    usual = {"g_ema": g, "latent_avg": latent_avg}
    torch.save(usual, tmp_path / "a.pt")
    bare = {name: tensor.reshape(()) if name.endswith("noise.weight") else tensor for name, tensor in g.items()}
    torch.save({**usual, "g_ema": bare, "ada_aug_p": p}, tmp_path / "b.pt")
    first, second = models.load(tmp_path / "a.pt"), models.load(tmp_path / "b.pt")
    assert_equal_tensors(second.G_ema, first.G_ema)
    assert (first.augment_p, second.augment_p) == (None, float(p))


def test_other_blur_kernels_become_our_filter(tmp_path):
    g, _, latent_avg = golden_tensors()
    taps = torch.tensor([1.0, 2.0, 2.0, 1.0])
    g = {name: torch.outer(taps, taps) / 9 if name.endswith("kernel") else tensor for name, tensor in g.items()}
    torch.save({"g_ema": g, "latent_avg": latent_avg}, tmp_path / "a.pt")
    G = models.load(tmp_path / "a.pt").G_ema
    torch.testing.assert_close(G.synthesis.b8.conv0.resample_filter, torch.outer(taps, taps) / 36)


def changed(**changes):
    g, _, latent_avg = golden_tensors()
    g.update({name.replace("__", "."): tensor for name, tensor in changes.items()})
    return {"g_ema": {name: tensor for name, tensor in g.items() if tensor is not None}, "latent_avg": latent_avg}


UNEVEN = torch.tensor([[1.0, 2.0], [3.0, 4.0]])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda: changed(convs__1__activate__bias=None), r"'convs\.1\.activate\.bias' is missing"),
        (lambda: changed(extra__weight=torch.zeros(2)), r"'extra\.weight' has no place"),
        (lambda: changed(convs__9__conv__blur__kernel=KERNEL), r"'convs\.9\.conv\.blur\.kernel' has no place"),
        (lambda: changed(input__input=torch.zeros(2, 24, 4, 4)), r"'input\.input' has shape \[2, 24, 4, 4\]"),
        (lambda: changed(conv1__conv__weight=torch.zeros(24, 24, 3, 3)), r"'conv1\.conv\.weight' has shape"),
        (lambda: changed(convs__1__conv__weight=torch.zeros(1, 99, 24, 3, 3)), "widths cannot be built"),
        (lambda: changed(convs__0__conv__blur__kernel=UNEVEN), "not separable"),
        (lambda: changed(convs__0__conv__blur__kernel=torch.ones(4, 4)), "different blur kernels"),
        (lambda: changed(convs__0__conv__blur__kernel=torch.zeros(4, 4)), "not separable"),
        (lambda: changed(convs__0__conv__blur__kernel=torch.ones(4)), r"kernels are of shape \[4\]"),
        (lambda: changed(conv1__noise__weight="text"), "is not a tensor"),
        (lambda: {**changed(), "latent_avg": torch.zeros(5)}, r"'mapping\.w_avg' has shape \[5\], not \[32\]"),
        (lambda: {**changed(), "ada_aug_p": "much"}, "augmentation probability is 'much', not a number from 0 to 1"),
        (lambda: {**changed(), "ada_aug_p": torch.tensor(7)}, "augmentation probability is 7"),
        (lambda: {"g_ema": Parts(golden_tensors()[0])}, r"g_ema: it is a whole 'test_port\.Parts'"),
        (lambda: {"g_ema": {"weight": torch.zeros(2)}}, "not named like those of a StyleGAN2 generator"),
        (lambda: {"d": {"weight": torch.zeros(2)}}, "not named like those of a StyleGAN2 discriminator"),
    ],
)  # fmt: skip
def test_other_tensors_are_refused(content, words, tmp_path):
    torch.save(content(), tmp_path / "a.pt")
    with pytest.raises(GanError, match=rf"a\.pt: .*{words}") as caught:
        models.load(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


def pair(seed=0, G_options=None, D_options=None, synthesis=None, mapping=None):
    """Networks that the layout can carry, until they are changed; D is wider."""
    torch.manual_seed(seed)
    both = {"c_dim": 0, "img_resolution": 16, "img_channels": 3}
    G = networks.Generator(
        **{**both, "z_dim": 12, "w_dim": 12, **(G_options or {})},
        mapping_kwargs={"num_layers": 2, **(mapping or {})},
        synthesis_kwargs={"channel_base": 128, "channel_max": 12, **(synthesis or {})},
    )
    D = networks.Discriminator(**{**both, "channel_base": 256, "channel_max": 20, **(D_options or {})})
    for net in (G, D):
        for name, tensor in net.state_dict(keep_vars=True).items():
            if not name.endswith("resample_filter"):
                torch.nn.init.normal_(tensor.data)
        net.eval().requires_grad_(False)
    return G, D


def snapshot_of(G, D=None, G_ema=None, p=None):
    return Snapshot(G, D, G_ema, p, {}, "ours.pkl")


GENERATOR_NAMES = [
    "style.1.weight", "style.1.bias", "style.2.weight", "style.2.bias", "input.input", "conv1.conv.weight",
    "conv1.conv.modulation.weight", "conv1.conv.modulation.bias", "conv1.noise.weight", "conv1.activate.bias",
    "to_rgb1.bias", "to_rgb1.conv.weight", "to_rgb1.conv.modulation.weight", "to_rgb1.conv.modulation.bias",
    "convs.0.conv.weight", "convs.0.conv.blur.kernel", "convs.0.conv.modulation.weight",
    "convs.0.conv.modulation.bias", "convs.0.noise.weight", "convs.0.activate.bias", "convs.1.conv.weight",
    "convs.1.conv.modulation.weight", "convs.1.conv.modulation.bias", "convs.1.noise.weight",
    "convs.1.activate.bias", "convs.2.conv.weight", "convs.2.conv.blur.kernel", "convs.2.conv.modulation.weight",
    "convs.2.conv.modulation.bias", "convs.2.noise.weight", "convs.2.activate.bias", "convs.3.conv.weight",
    "convs.3.conv.modulation.weight", "convs.3.conv.modulation.bias", "convs.3.noise.weight",
    "convs.3.activate.bias", "to_rgbs.0.bias", "to_rgbs.0.upsample.kernel", "to_rgbs.0.conv.weight",
    "to_rgbs.0.conv.modulation.weight", "to_rgbs.0.conv.modulation.bias", "to_rgbs.1.bias",
    "to_rgbs.1.upsample.kernel", "to_rgbs.1.conv.weight", "to_rgbs.1.conv.modulation.weight",
    "to_rgbs.1.conv.modulation.bias", "noises.noise_0", "noises.noise_1", "noises.noise_2", "noises.noise_3",
    "noises.noise_4",
]  # fmt: skip

DISCRIMINATOR_NAMES = [
    "convs.0.0.weight", "convs.0.1.bias", "convs.1.conv1.0.weight", "convs.1.conv1.1.bias",
    "convs.1.conv2.0.kernel", "convs.1.conv2.1.weight", "convs.1.conv2.2.bias", "convs.1.skip.0.kernel",
    "convs.1.skip.1.weight", "convs.2.conv1.0.weight", "convs.2.conv1.1.bias", "convs.2.conv2.0.kernel",
    "convs.2.conv2.1.weight", "convs.2.conv2.2.bias", "convs.2.skip.0.kernel", "convs.2.skip.1.weight",
    "final_conv.0.weight", "final_conv.1.bias", "final_linear.0.weight", "final_linear.0.bias",
    "final_linear.1.weight", "final_linear.1.bias",
]  # fmt: skip


def test_what_is_written_loads_strictly_in_its_program(tmp_path):
    G, D = pair()
    port.write(tmp_path / "a.pt", snapshot_of(G, D, pair(1)[0], p=0.5))
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert list(content) == ["g", "d", "g_ema", "latent_avg", "ada_aug_p"]
    assert list(content["g"]) == list(content["g_ema"]) == GENERATOR_NAMES
    assert list(content["d"]) == DISCRIMINATOR_NAMES
    for mine, built in (
        (content["g"], generator(G.state_dict(), 16)),
        (content["d"], discriminator(D.state_dict(), 16)),
    ):
        Parts(built).load_state_dict(mine, strict=True)
        assert all(torch.equal(mine[name], built[name]) for name in built)
    assert content["ada_aug_p"] == 0.5
    assert content["latent_avg"].shape == (12,)
    assert not any(tensor.requires_grad for tensor in content["g"].values())


def test_kernels_have_the_gain_that_its_program_needs(tmp_path):
    """It enlarges by a transposed convolution and blurs behind it, and blurs before it takes every other pixel."""
    G, D = pair()
    port.write(tmp_path / "a.pt", snapshot_of(G, D))
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    g, d = content["g_ema"], content["d"]

    def blurred(x, kernel, padding):
        kernel = kernel.flip(0, 1).expand(x.shape[1], 1, -1, -1)
        return F.conv2d(F.pad(x, [padding] * 4), kernel, groups=x.shape[1])

    x = torch.randn(2, 12, 8, 8)
    weight = g["convs.2.conv.weight"][0]
    larger = blurred(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), g["convs.2.conv.blur.kernel"], 1)
    layer = G.synthesis.b16.conv0
    ours = conv2d_resample(x, layer.weight, layer.resample_filter, up=2, padding=1, flip_weight=False)
    torch.testing.assert_close(larger, ours, rtol=1e-4, atol=1e-4)
    flat = torch.ones(1, 3, 8, 8)
    spread = torch.zeros(1, 3, 16, 16)
    spread[:, :, ::2, ::2] = flat
    assert torch.equal(blurred(spread, g["to_rgbs.1.upsample.kernel"], 1)[..., 2:-2, 2:-2], torch.ones(1, 3, 11, 11))

    x = torch.randn(2, 16, 16, 16)
    smaller = F.conv2d(blurred(x, d["convs.1.conv2.0.kernel"], 2), d["convs.1.conv2.1.weight"], stride=2)
    layer = D.b16.conv1
    ours = conv2d_resample(x, layer.weight, layer.resample_filter, down=2, padding=1)
    torch.testing.assert_close(smaller, ours, rtol=1e-4, atol=1e-4)


def test_ours_return_from_the_layout(tmp_path):
    (G, D), (G_ema, _) = pair(), pair(1)
    G.mapping.w_avg.copy_(G_ema.mapping.w_avg)  # there is one mean latent in a file
    notes = port.write(tmp_path / "a.pt", snapshot_of(G, D, G_ema, p=0.5))
    assert [note[:10] for note in notes] == ["its widths"]
    snapshot = models.load(tmp_path / "a.pt")
    z = torch.randn(4, 12)
    for mine, opened in ((G, snapshot.G), (G_ema, snapshot.G_ema)):
        assert_equal_tensors(mine, opened)
        for options in ({}, {"truncation_psi": 0.5}):
            assert torch.equal(
                opened(z, None, noise_mode="const", **options), mine(z, None, noise_mode="const", **options)
            )
    img = torch.randn(4, 3, 16, 16)
    assert torch.equal(snapshot.D(img), D(img))
    assert snapshot.augment_p == 0.5


def test_half_precision_is_a_way_of_storing(tmp_path):
    G, D = pair()
    port.write(tmp_path / "full.pt", snapshot_of(G, D, G))
    port.write(tmp_path / "half.pt", snapshot_of(G, D, G), half=True)
    content = torch.load(tmp_path / "half.pt", weights_only=True)
    assert content["g"]["conv1.conv.weight"].dtype == torch.float16
    assert content["latent_avg"].dtype == torch.float32
    opened = models.load(tmp_path / "half.pt").G_ema
    assert {tensor.dtype for tensor in opened.state_dict().values()} == {torch.float32}
    z = torch.randn(4, 12)
    torch.testing.assert_close(opened(z, None, noise_mode="const"), G(z, None, noise_mode="const"), rtol=0.1, atol=0.1)


def test_large_numbers_are_not_halved(tmp_path):
    G, _ = pair()
    G.mapping.fc0.weight[0, 0] = 1e5
    port.write(tmp_path / "a.pt", snapshot_of(G), half=True)
    assert models.load(tmp_path / "a.pt").G.mapping.fc0.weight[0, 0] == 1e5


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"G_options": {"c_dim": 3}}, "labels of 3 numbers"),
        ({"D_options": {"c_dim": 3}}, "labels of 3 numbers"),
        ({"G_options": {"img_channels": 4}}, "4 channels, not 3"),
        ({"G_options": {"img_resolution": [16, 24]}}, "24x16, not a square"),
        ({"D_options": {"img_resolution": [24, 24]}}, "24x24, not a square"),
        ({"G_options": {"w_dim": 16}}, "not all of one width"),
        ({"mapping": {"layer_features": 16}}, "not all of one width"),
        ({"mapping": {"lr_multiplier": 0.1}}, r"lr_multiplier is 0\.1"),
        ({"mapping": {"activation": "relu"}}, "activations of its generator"),
        ({"synthesis": {"architecture": "resnet"}}, "generator has the architecture resnet"),
        ({"D_options": {"architecture": "skip"}}, "discriminator has the architecture skip"),
        ({"synthesis": {"use_noise": False}}, "no noise inputs"),
        ({"synthesis": {"resample_filter": [1, 2, 1]}}, r"filter is not \[1, 3, 3, 1\]"),
        ({"D_options": {"epilogue_kwargs": {"mbstd_num_channels": 2}}}, "minibatch-stddev channel"),
    ],
    ids=str,
)  # fmt: skip
def test_what_the_layout_cannot_carry_is_refused(options, words, tmp_path):
    G, D = pair(**options)
    with pytest.raises(GanError, match=rf"^ours\.pkl: .*{words}"):
        port.write(tmp_path / "a.pt", snapshot_of(G, D, G))
    assert not (tmp_path / "a.pt").exists()
    with pytest.raises(GanError, match="holds no generator"):
        port.write(tmp_path / "a.pt", snapshot_of(None, D))


def test_what_is_lost_is_told(tmp_path):
    assert "one mean latent" in port.write(tmp_path / "a.pt", snapshot_of(pair()[0], None, pair(1)[0]))[-1]
    options = {"num_fp16_res": 1, "conv_clamp": 256}
    G, D = pair(synthesis=options, D_options={**options, "epilogue_kwargs": {"mbstd_group_size": None}})
    notes = " | ".join(port.write(tmp_path / "a.pt", snapshot_of(G, D)))
    for words in (
        "half precision",
        "conv_clamp",
        "channel_multiplier",
        "group of the whole batch becomes 4",
        "g_ema is G",
    ):
        assert notes.count(words) == 1
    usual = {"channel_base": 16384, "channel_max": 512}
    G, _ = pair(G_options={"img_resolution": 8, "z_dim": 8, "w_dim": 8}, synthesis=usual)
    assert port.write(tmp_path / "a.pt", snapshot_of(G, None, G)) == []
