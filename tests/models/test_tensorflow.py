"""Snapshots of the TensorFlow generation: golden networks in its layout, from what is known of it, read back."""

import pickle
import sys
import types

import numpy as np
import pytest
import torch
from golden_networks import DISCRIMINATORS, GENERATORS, golden, golden_network

from gan import models
from gan.errors import GanError

# What affine biases lose when 1 is taken from them and added again; everything else is the same to the bit.
ROUNDING = 2e-7


class Network:
    """Pickles into what that generation wrote for a network: its state."""

    def __init__(self, static_kwargs, variables, components=None, **changes):
        self.state = {
            "version": 4,
            "name": "N",
            "static_kwargs": static_kwargs,
            "components": components or {},
            "build_module_src": "raise SystemExit('executed')",
            "build_func_name": "G_main",
            "variables": variables,
            **changes,
        }

    def __getstate__(self):
        return self.state

    def __setstate__(self, state):
        raise AssertionError("brought to life")


@pytest.fixture(autouse=True)
def dnnlib(monkeypatch):
    """Lets Network be pickled under the name that it has in public files, which then leads nowhere."""
    monkeypatch.setattr(Network, "__module__", "dnnlib.tflib.network")
    for name in ("dnnlib", "dnnlib.tflib", "dnnlib.tflib.network"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["dnnlib.tflib.network"].Network = Network


def written(path, G=None, D=None, Gs=None, protocol=4):
    path.write_bytes(pickle.dumps((G, D, Gs), protocol))
    return path


def hwio(kernel):
    return np.ascontiguousarray(kernel.transpose(2, 3, 1, 0))


def powers(last):
    return [2**i for i in range(2, last.bit_length())]


def generator(name, **changes):
    """A golden generator as that generation kept it."""
    kwargs, parameters, _ = golden(name)
    p = {key: value.numpy() for key, value in parameters.items()}
    synthesis, R = kwargs["synthesis_kwargs"], kwargs["img_resolution"]
    options = {
        "latent_size": kwargs["z_dim"],
        "label_size": kwargs["c_dim"],
        "dlatent_size": kwargs["w_dim"],
        "resolution": R,
        "num_channels": kwargs["img_channels"],
        "mapping_layers": kwargs["mapping_kwargs"]["num_layers"],
        "fmap_base": synthesis["channel_base"] // 2,
        "fmap_max": synthesis["channel_max"],
        "conv_clamp": synthesis.get("conv_clamp"),
        "architecture": synthesis.get("architecture", "skip"),
        "truncation_psi": 0.5,
        "truncation_cutoff": None,
        "style_mixing_prob": 0.9,
        "structure": "auto",
        **changes,
    }
    mapping, pictures = [], [("4x4/Const/const", p["synthesis.b4.const"][None])]
    for i in range(options["mapping_layers"]):
        mapping.append((f"Dense{i}/weight", p[f"mapping.fc{i}.weight"].T))
        mapping.append((f"Dense{i}/bias", p[f"mapping.fc{i}.bias"]))
    if kwargs["c_dim"]:
        mapping.append(("LabelEmbed/weight", p["mapping.embed.weight"].T))
        mapping.append(("LabelEmbed/bias", p["mapping.embed.bias"]))

    def modulated(theirs, ours):
        pictures.append((f"{theirs}/mod_weight", p[f"{ours}.affine.weight"].T))
        pictures.append((f"{theirs}/mod_bias", p[f"{ours}.affine.bias"] - np.float32(1)))
        pictures.append((f"{theirs}/bias", p[f"{ours}.bias"]))

    def styled(theirs, ours, number, flip=False):
        kernel = p[f"{ours}.weight"]
        pictures.append((f"{theirs}/weight", hwio(kernel[:, :, ::-1, ::-1] if flip else kernel)))
        pictures.append((f"{theirs}/noise_strength", p[f"{ours}.noise_strength"]))
        pictures.append((f"noise{number}", p[f"{ours}.noise_const"][None, None]))
        modulated(theirs, ours)

    styled("4x4/Conv", "synthesis.b4.conv1", 0)
    for r, numbers in zip(powers(R)[1:], [(1, 2), (3, 4), (5, 6)], strict=False):
        styled(f"{r}x{r}/Conv0_up", f"synthesis.b{r}.conv0", numbers[0], flip=True)
        styled(f"{r}x{r}/Conv1", f"synthesis.b{r}.conv1", numbers[1])
        if options["architecture"] == "resnet":
            pictures.append((f"{r}x{r}/Skip/weight", hwio(p[f"synthesis.b{r}.skip.weight"][:, :, ::-1, ::-1])))
    for r in powers(R) if options["architecture"] == "skip" else [R]:
        rgb = "ToRGB_lod0" if options["architecture"] == "orig" else f"{r}x{r}/ToRGB"
        pictures.append((f"{rgb}/weight", hwio(p[f"synthesis.b{r}.torgb.weight"])))
        modulated(rgb, f"synthesis.b{r}.torgb")
    pictures.append(("lod", np.float32(0)))
    parts = {"mapping": Network({}, mapping), "synthesis": Network({}, pictures)}
    return Network(options, [("dlatent_avg", p["mapping.w_avg"])], parts)


def discriminator(name, **changes):
    """A golden discriminator as that generation kept it."""
    kwargs, parameters, _ = golden(name)
    p = {key: value.numpy() for key, value in parameters.items()}
    R = kwargs["img_resolution"]
    architecture = kwargs.get("architecture", "resnet")
    mbstd = kwargs.get("epilogue_kwargs", {})
    options = {
        "label_size": kwargs["c_dim"],
        "resolution": R,
        "num_channels": kwargs["img_channels"],
        "architecture": architecture,
        "fmap_base": kwargs["channel_base"] // 2,
        "fmap_max": kwargs["channel_max"],
        "conv_clamp": kwargs.get("conv_clamp"),
        "mbstd_group_size": mbstd.get("mbstd_group_size", 4),
        "mbstd_num_features": mbstd.get("mbstd_num_channels", 1),
        "structure": "fixed",
        **changes,
    }
    variables = []

    def conv(theirs, ours, bias=True):
        variables.append((f"{theirs}/weight", hwio(p[f"{ours}.weight"])))
        if bias:
            variables.append((f"{theirs}/bias", p[f"{ours}.bias"]))

    def dense(theirs, ours):
        variables.append((f"{theirs}/weight", p[f"{ours}.weight"].T))
        variables.append((f"{theirs}/bias", p[f"{ours}.bias"]))

    for r in powers(R)[:0:-1]:
        if r == R or architecture == "skip":
            conv("FromRGB_lod0" if architecture == "orig" else f"{r}x{r}/FromRGB", f"b{r}.fromrgb")
        conv(f"{r}x{r}/Conv0", f"b{r}.conv0")
        conv(f"{r}x{r}/Conv1_down", f"b{r}.conv1")
        if architecture == "resnet":
            conv(f"{r}x{r}/Skip", f"b{r}.skip", bias=False)
    if architecture == "skip":
        conv("4x4/FromRGB", "b4.fromrgb")
    conv("4x4/Conv", "b4.conv")
    dense("4x4/Dense0", "b4.fc")
    dense("Output", "b4.out")
    if kwargs["c_dim"]:
        dense("LabelEmbed", "mapping.embed")
        for i in range(options.get("mapping_layers", 0)):
            dense(f"Mapping{i}", f"mapping.fc{i}")
    return Network(options, variables, build_func_name="D_stylegan2")


def conditional(name):
    """Golden ones have mapping layers, as our own defaults are."""
    return {"mapping_layers": 8, "mapping_lrmul": 0.01} if "cond" in name and "uncond" not in name else {}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", GENERATORS)
def test_golden_generators_are_read(name, protocol, tmp_path):
    live, arrays = golden_network(name)
    stored = generator(name)
    snapshot = models.load(written(tmp_path / "a.pkl", G=stored, Gs=stored, protocol=protocol))
    assert snapshot.kind == "snapshot of the TensorFlow generation"
    assert snapshot.D is None
    assert snapshot.augment_p is None
    assert snapshot.notes == ()
    for G in (snapshot.G, snapshot.G_ema):
        opened, expected = G.state_dict(), live.state_dict()
        assert opened.keys() == expected.keys()
        for key in expected:
            tolerance = ROUNDING if key.endswith("affine.bias") else 0
            torch.testing.assert_close(opened[key], expected[key], rtol=0, atol=tolerance, msg=key)
        assert not any(p.requires_grad for p in G.parameters())
        img = G(arrays["z"], arrays["c"], noise_mode="const")
        torch.testing.assert_close(img, arrays["img_const"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_golden_discriminators_are_read(name, tmp_path):
    live, arrays = golden_network(name)
    snapshot = models.load(written(tmp_path / "a.pkl", D=discriminator(name, **conditional(name))))
    opened, expected = snapshot.D.state_dict(), live.state_dict()
    assert opened.keys() == expected.keys()
    assert all(torch.equal(opened[key], expected[key]) for key in expected)
    torch.testing.assert_close(snapshot.D(arrays["img"], arrays["c"]), arrays["logits"], rtol=1e-4, atol=1e-4)


def test_options_become_ours(tmp_path):
    changes = {"num_fp16_res": 1, "conv_clamp": 64, "w_avg_beta": None, "mapping_lrmul": 0.02, "nonlinearity": "relu"}
    G = generator("generator_orig16", **changes)
    D = discriminator("discriminator_orig16", num_fp16_res=2, conv_clamp=32, freeze_layers=1)
    snapshot = models.load(written(tmp_path / "a.pkl", G, D, None))
    assert snapshot.G_ema is None
    assert [snapshot.G.synthesis.b8.use_fp16, snapshot.G.synthesis.b16.use_fp16] == [False, True]
    assert snapshot.G.synthesis.b16.conv0.conv_clamp == 64
    assert snapshot.G.synthesis.b8.conv1.activation == "relu"
    assert snapshot.G.mapping.fc0.activation == "lrelu"
    assert snapshot.G.mapping.w_avg_beta == 1
    assert snapshot.G.mapping.fc0.bias_gain == 0.02
    assert [snapshot.D.b8.use_fp16, snapshot.D.b16.use_fp16] == [True, True]
    assert snapshot.D.b16.conv0.conv_clamp == snapshot.D.b4.conv.conv_clamp == 32
    assert "fromrgb.weight" in dict(snapshot.D.b16.named_buffers())
    assert "conv0.weight" in dict(snapshot.D.b16.named_parameters())


def test_defaults_are_those_of_that_time(tmp_path):
    """A file mentions only what was chosen. The widest layers are left small by fmap_max."""
    random = np.random.default_rng(0)

    def array(*shape):
        return random.standard_normal(shape, dtype=np.float32)

    def layer(name, *shape):
        return [(f"{name}/weight", array(*shape)), (f"{name}/bias", array(shape[-1]))]

    def styled(name, number, size):
        more = [(f"{name}/noise_strength", array()), (f"noise{number}", array(1, 1, size, size))]
        return [*layer(name, 3, 3, 2, 2), *more, *modulation(name)]

    def modulation(name):
        return [(f"{name}/mod_weight", array(512, 2)), (f"{name}/mod_bias", array(2))]

    def rgb(name):
        return [*layer(name, 1, 1, 2, 3), *modulation(name)]

    mapping = [variable for i in range(8) for variable in layer(f"Dense{i}", 512, 512)]
    pictures = [("4x4/Const/const", array(1, 2, 4, 4)), *styled("4x4/Conv", 0, 4), *rgb("4x4/ToRGB")]
    pictures += [*styled("8x8/Conv0_up", 1, 8), *styled("8x8/Conv1", 2, 8), *rgb("8x8/ToRGB")]
    parts = {"mapping": Network({}, mapping), "synthesis": Network({}, pictures)}
    G = Network({"resolution": 8, "fmap_max": 2}, [("dlatent_avg", array(512))], parts)
    judge = [*layer("8x8/FromRGB", 1, 1, 3, 2), *layer("8x8/Conv0", 3, 3, 2, 2), *layer("8x8/Conv1_down", 3, 3, 2, 2)]
    judge += [("8x8/Skip/weight", array(1, 1, 2, 2)), *layer("4x4/Conv", 3, 3, 3, 2), *layer("4x4/Dense0", 32, 2)]
    judge += [*layer("Output", 2, 2), *layer("LabelEmbed", 5, 2)]
    D = Network({"resolution": 8, "fmap_max": 2, "label_size": 5}, judge)
    G = models.load(written(tmp_path / "g.pkl", G)).G
    D = models.load(written(tmp_path / "d.pkl", D=D)).D
    assert (G.z_dim, G.c_dim, G.w_dim, G.mapping.num_layers, G.mapping.w_avg_beta) == (512, 0, 512, 8, 0.995)
    assert G.mapping.fc7.bias_gain == 0.01
    assert G._init_kwargs["synthesis_kwargs"]["channel_base"] == D._init_kwargs["channel_base"] == 32768
    assert {module.architecture for module in (G.synthesis.b4, G.synthesis.b8)} == {"skip"}
    assert D.b8.architecture == "resnet"
    assert D.mapping.num_layers == 0
    assert D(torch.zeros(2, 3, 8, 8), torch.eye(5)[:2]).shape == (2, 1)
    assert (D.b4.mbstd.group_size, D.b4.mbstd.num_channels) == (None, 1)
    for net in (G, D):
        assert {getattr(module, "conv_clamp", None) for module in net.modules()} == {None}
        assert not any(getattr(module, "use_fp16", False) for module in net.modules())
    three = Network({}, [("dlatent_avg", array(512))], parts)
    with pytest.raises(GanError, match=r"'synthesis/16x16/\S+' is missing.*and \d+ more"):
        models.load(written(tmp_path / "b.pkl", three))  # of 1024 pixels


def test_layers_of_progressive_growing_are_left_out(tmp_path):
    """And names tell the architecture."""
    G, D = generator("generator_orig16"), discriminator("discriminator_orig16")
    assert "ToRGB_lod0/weight" in dict(variables(G.state))
    variables(G.state)[:0] = [
        ("ToRGB_lod1/weight", np.zeros([1, 1, 24, 3], np.float32)),
        ("ToRGB_lod2/bias", np.zeros(3, np.float32)),
    ]
    G.state["static_kwargs"].pop("architecture")
    D.state["variables"].append(("FromRGB_lod1/bias", np.zeros(24, np.float32)))
    D.state["static_kwargs"].pop("architecture")
    snapshot = models.load(written(tmp_path / "a.pkl", G, D))
    assert snapshot.G.synthesis.b4.architecture == snapshot.D.b4.architecture == "orig"
    assert [note.split()[1] for note in snapshot.notes] == ["ToRGB", "FromRGB"]
    _, arrays = golden_network("generator_orig16")
    img = snapshot.G(arrays["z"], None, noise_mode="const")
    torch.testing.assert_close(img, arrays["img_const"], rtol=1e-4, atol=1e-4)


def broken(change):
    G = generator("generator_uncond32")
    change(G.state)
    return G


def variables(state, component="synthesis"):
    return state["components"][component].state["variables"]


def removed(name):
    def change(state):
        variables(state)[:] = [pair for pair in variables(state) if pair[0] != name]

    return change


REFUSED = {
    "missing": (removed("8x8/Conv1/mod_bias"), "'synthesis/8x8/Conv1/mod_bias' is missing"),
    "unknown": (lambda s: variables(s).append(("8x8/Odd", np.zeros(1))), "'synthesis/8x8/Odd' has no place"),
    "option": (lambda s: s["static_kwargs"].update(fused_modconv=True), "not known: fused_modconv=True"),
    "component": (lambda s: s["components"].update(odd=3), "component is badly described"),
    "variables": (lambda s: s.update(variables=[1, 2]), "variable is badly described"),
    "text": (lambda s: s["variables"].append(("x", "text")), "'x' is not an array of numbers"),
    "dimensions": (lambda s: variables(s).append(("8x8/ToRGB/weight", np.zeros(3))), r"ToRGB/weight' has shape \[3\]"),
    "shape": (
        lambda s: variables(s).append(("8x8/ToRGB/bias", np.zeros(4))),
        r"'synthesis.b8.torgb.bias' has shape \[4\], not \[3\]",
    ),
    "version": (lambda s: s.update(version=3), "version 3 of the format"),
    "resolution": (lambda s: s["static_kwargs"].update(resolution=24), "power of two"),
    "size": (lambda s: s["static_kwargs"].update(resolution=[16, 16]), "resolution is .*, not a whole number"),
    "huge": (lambda s: s["static_kwargs"].update(fmap_max=2**40), "too large"),
    "depth": (lambda s: s["static_kwargs"].update(mapping_layers=10**6), "num_layers is 1000000"),
    "StyleGAN1": (lambda s: s.update(build_func_name="G_style"), "StyleGAN1"),
    "AdaIN": (lambda s: variables(s).append(("4x4/Conv/StyleMod/bias", np.zeros(2))), "StyleGAN1"),
    "ProGAN": (lambda s: s["components"].clear(), "ProGAN"),
    "state": (lambda s: s.update(static_kwargs=[1]), "options .* badly described"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_others_are_refused_by_name(case, tmp_path):
    change, words = REFUSED[case]
    with pytest.raises(GanError, match=rf"a\.pkl: G: .*{words}") as caught:
        models.load(written(tmp_path / "a.pkl", broken(change)))
    assert "\n" not in str(caught.value)


def test_one_network_is_no_snapshot(tmp_path):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(generator("generator_uncond32"), 4))
    with pytest.raises(GanError, match=r"a\.pkl: it is one network of the TensorFlow generation"):
        models.load(tmp_path / "a.pkl")


def test_one_array_for_many_variables_is_refused(tmp_path):
    """Or a small file would become a large network."""
    shared = np.zeros([1024, 1024], np.float32)
    G = Network({"mapping_layers": 9}, [], {"mapping": Network({}, [(f"Dense{i}/weight", shared) for i in range(9)])})
    with pytest.raises(GanError, match=r"a\.pkl: G: its tensors are larger than what is stored"):
        models.load(written(tmp_path / "a.pkl", G))


def test_reading_executes_nothing_and_fills_no_class(tmp_path):
    """Network.__setstate__ raises, and build_module_src would end the process."""
    file = written(tmp_path / "a.pkl", generator("generator_uncond32"))
    with pytest.raises(AssertionError, match="brought to life"):
        pickle.loads(file.read_bytes())
    assert models.load(file).G is not None
