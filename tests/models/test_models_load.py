import collections
import copy
import gzip
import io
import math
import pickle
import random
import sys
import time
import types
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_networks import DISCRIMINATORS, GENERATORS, golden, golden_network

from gan import augment, models, networks
from gan.errors import GanError
from gan.models import rebuild
from gan.models.formats import safetensors_file
from torch_utils import persistence


class EasyDict(dict):
    pass


class Call:
    """Pickles into what the public generation writes for a module."""

    def __init__(self, class_name, state):
        self.meta = {"type": "class", "version": 6, "module_src": "raise 1", "class_name": class_name, "state": state}

    def __reduce__(self):
        return persistence._reconstruct_persistent_obj, (self.meta,)


@pytest.fixture(autouse=True)
def dnnlib(monkeypatch):
    """Lets EasyDict be pickled under the name that it has in public files."""
    monkeypatch.setattr(EasyDict, "__module__", "dnnlib.util")
    for name in ("dnnlib", "dnnlib.util"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["dnnlib.util"].EasyDict = EasyDict


def pair(generator="generator_cond16", discriminator="discriminator_cond16"):
    G, D = golden_network(generator)[0], golden_network(discriminator)[0]
    return {"G": G, "D": D, "G_ema": copy.deepcopy(G)}


def foreign_module(class_name, tensors, kwargs=None, args=()):
    """A module as another program would describe it: nested by dotted names, with attributes of its own."""
    children: dict = {}
    for name in tensors:
        if "." in name:
            children.setdefault(name.split(".")[0], {})[name.split(".", 1)[1]] = tensors[name]
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    buffers = {"resample_filter", "noise_const", "w_avg", "p"}
    return Call(
        class_name,
        {
            "_init_args": args,
            "_init_kwargs": EasyDict(kwargs or {}),
            "training": False,
            "_parameters": OrderedDict((k, torch.nn.Parameter(v)) for k, v in own.items() if k not in buffers),
            "_buffers": OrderedDict((k, v) for k, v in own.items() if k in buffers),
            "_modules": OrderedDict((name, foreign_module("Part", inner)) for name, inner in children.items()),
            "_non_persistent_buffers_set": set(),
            "gain": np.float64(1.5),
            "unheard_of": types.SimpleNamespace(a=1),
        },
    )


def foreign_file(path, **content):
    path.write_bytes(pickle.dumps({"augment_pipe": None, "training_set_kwargs": EasyDict(path="x"), **content}, 3))
    return path


def image(G, arrays):
    return G(arrays["z"], arrays["c"], noise_mode="const")


def assert_equal_tensors(a, b):
    a, b = (x.state_dict() if isinstance(x, torch.nn.Module) else x for x in (a, b))
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("name", GENERATORS)
def test_generators_round_trip(name, tmp_path):
    G, arrays = golden_network(name)
    file = tmp_path / "network-snapshot-000000.pkl"
    models.save(file, G=G, D=None, G_ema=G, training_set_kwargs={})
    snapshot = models.load(file)
    assert snapshot.D is None
    for opened in (snapshot.G, snapshot.G_ema):
        assert_equal_tensors(opened, G)
        assert torch.equal(image(opened, arrays), image(G.eval(), arrays))
        torch.testing.assert_close(image(opened, arrays), arrays["img_const"], rtol=1e-4, atol=1e-4)
        assert not opened.training
        assert not any(p.requires_grad for p in opened.parameters())


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_discriminators_round_trip(name, tmp_path):
    D, arrays = golden_network(name)
    models.save(tmp_path / "a.pkl", G=None, D=D, G_ema=None, training_set_kwargs={})
    opened = models.load(tmp_path / "a.pkl").D
    assert_equal_tensors(opened, D)
    assert torch.equal(opened(arrays["img"], arrays["c"]), D(arrays["img"], arrays["c"]))


def sized(size, channels=3, c_dim=0):
    """A pair of networks for images of a size (height, width), which may be an int."""
    torch.manual_seed(0)
    options = {"img_resolution": size, "img_channels": channels, "c_dim": c_dim}
    width = {"channel_base": 64, "channel_max": 8}
    G = networks.Generator(z_dim=6, w_dim=7, **options, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=width)
    return {"G": G, "D": networks.Discriminator(**options, **width), "G_ema": copy.deepcopy(G)}


@pytest.mark.parametrize("c_dim", [0, 3])
@pytest.mark.parametrize(("size", "channels"), [([64, 96], 4), ((40, 24), 1), ([48, 48], 3), ([16, 16], 4)], ids=str)
def test_all_sizes_and_channels_round_trip(size, channels, c_dim, tmp_path):
    live = sized(size, channels, c_dim)
    models.save(tmp_path / "a.pkl", **live, training_set_kwargs={})
    snapshot = models.load(tmp_path / "a.pkl")
    with open(tmp_path / "a.pkl", "rb") as file:
        plainly = pickle.load(file)
    z, c = torch.randn(4, 6), torch.randn(4, c_dim)
    img = live["G"].eval()(z, c, noise_mode="const")
    assert img.shape == (4, channels, *size)
    for G, D in ((snapshot.G, snapshot.D), (snapshot.G_ema, snapshot.D), (plainly["G"], plainly["D"])):
        assert_equal_tensors(G, live["G"])
        assert_equal_tensors(D, live["D"])
        assert G.img_size == D.img_size == tuple(size)
        assert G.img_resolution == live["G"].img_resolution
        assert torch.equal(G(z, c, noise_mode="const"), img)
        assert torch.equal(D(img, c), live["D"](img, c))


def test_what_comes_with_the_networks(tmp_path):
    file = tmp_path / "folder" / "a.pkl"
    pipe = augment.AugmentPipe(xflip=1)
    pipe.p.fill_(0.25)
    models.save(file, **pair(), augment_pipe=pipe, training_set_kwargs={"path": Path("data.zip"), "xflip": True})
    snapshot = models.load(file)
    assert snapshot.augment_p == 0.25
    assert snapshot.training_set_kwargs == {"path": "data.zip", "xflip": True}
    assert snapshot.source == str(file)
    with open(file, "rb") as opened:
        keys = list(persistence.load(opened))
    assert keys == ["G", "D", "G_ema", "augment_pipe", "training_set_kwargs"]
    assert models.load(str(file)).G is not None


def test_saving_leaves_the_live_networks_alone(tmp_path):
    live = pair()
    networks.set_half_dtype(live["G"], torch.bfloat16)
    before = {name: copy.deepcopy(net.state_dict()) for name, net in live.items()}
    models.save(tmp_path / "a.pkl", **live, training_set_kwargs={})
    for name, net in live.items():
        assert net.training
        assert all(p.requires_grad for p in net.parameters())
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in net.state_dict().items())
    assert models.load(tmp_path / "a.pkl").G.synthesis.b8.half_dtype is None


def test_a_failed_save_leaves_no_file(tmp_path):
    with pytest.raises(ValueError, match="plain value"):
        models.save(tmp_path / "a.pkl", **pair(), training_set_kwargs={"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_loading_draws_no_random_numbers(tmp_path):
    models.save(tmp_path / "a.pkl", **pair(), training_set_kwargs={})
    before = torch.get_rng_state()
    models.load(tmp_path / "a.pkl")
    assert torch.equal(torch.get_rng_state(), before)


def test_the_three_networks_share_no_memory(tmp_path):
    G = golden_network("generator_cond16")[0]
    models.save(tmp_path / "a.pkl", G=G, D=None, G_ema=G, training_set_kwargs={})
    snapshot = models.load(tmp_path / "a.pkl")
    snapshot.G.mapping.w_avg.add_(1)
    assert not torch.equal(snapshot.G.mapping.w_avg, snapshot.G_ema.mapping.w_avg)


@pytest.mark.parametrize("name", GENERATORS)
def test_files_of_the_public_generation(name, tmp_path):
    kwargs, parameters, _ = golden(name)
    G, arrays = golden_network(name)
    kwargs["synthesis_kwargs"] = EasyDict(kwargs["synthesis_kwargs"], fp16_channels_last=False)
    args = tuple(kwargs.pop(key) for key in ("z_dim", "c_dim"))
    file = foreign_file(
        tmp_path / "public.pkl",
        G_ema=foreign_module("Generator", parameters, kwargs, args),
        augment_pipe=foreign_module("AugmentPipe", {"p": torch.tensor(0.5)}),
        training_set_kwargs=EasyDict(path="x.zip", labels=np.arange(3), odd=types.SimpleNamespace()),
    )
    snapshot = models.load(file)
    assert torch.equal(image(snapshot.G_ema, arrays), image(G.eval(), arrays))
    assert snapshot.G is None
    assert snapshot.augment_p == 0.5
    assert snapshot.training_set_kwargs.keys() == {"path"}


def test_files_of_the_successor(tmp_path):
    kwargs, parameters, _ = golden("generator_uncond32")
    synthesis = kwargs.pop("synthesis_kwargs")
    G = foreign_module("Generator", parameters, {**kwargs, **synthesis, "fused_modconv_default": "inference_only"})
    kwargs, judge, _ = golden("discriminator_uncond32")
    file = foreign_file(tmp_path / "a.pkl", G=G, D=foreign_module("Discriminator", judge, kwargs))
    snapshot = models.load(file)
    for network, stored in ((snapshot.G, parameters), (snapshot.D, judge)):
        assert_equal_tensors(network, stored)
    assert snapshot.G.mapping.w_avg_beta == 0.998
    half = {res: getattr(snapshot.G.synthesis, f"b{res}").use_fp16 for res in (4, 8, 16, 32)}
    assert half == {4: False, 8: True, 16: True, 32: True}
    assert snapshot.G.synthesis.b32.conv1.conv_clamp == 256
    assert snapshot.D.b32.use_fp16
    assert snapshot.D.b32.conv0.conv_clamp == 256


def test_alias_free_generators_are_refused_by_name(tmp_path):
    G = foreign_module("Generator", {"synthesis.input.weight": torch.zeros(2)}, {"z_dim": 8, "magnitude_ema_beta": 0.9})
    G.meta["state"]["_modules"]["synthesis"].meta["state"]["_modules"]["input"].meta["class_name"] = "SynthesisInput"
    with pytest.raises(GanError, match=r"a\.pkl: G_ema: .*alias-free"):
        models.load(foreign_file(tmp_path / "a.pkl", G_ema=G))


def test_every_misfit_is_named(tmp_path):
    kwargs, parameters, _ = golden("generator_orig16")
    parameters["mapping.w_avg"] = torch.zeros(31)
    parameters["mapping.fc7.bias"] = parameters.pop("mapping.fc0.bias")
    with pytest.raises(GanError) as caught:
        models.load(foreign_file(tmp_path / "a.pkl", G=foreign_module("Generator", parameters, kwargs)))
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.pkl'}: G: its tensors do not fit: ")
    assert "'mapping.fc0.bias' is missing" in text
    assert "'mapping.fc7.bias' has no place" in text
    assert "'mapping.w_avg' has shape [31], not [32]" in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigma": 1}, "sigma"),
        ({"synthesis_kwargs": {"sigma": 1}}, "sigma"),
        ({"synthesis_kwargs": {"activation": "cos"}}, "cos"),
        ({"synthesis_kwargs": 3}, "synthesis_kwargs"),
        ({"img_resolution": 24}, "power of two"),
        ({"img_resolution": 2**40}, "too large"),
        ({"img_resolution": 2**20}, "cannot be built"),
        ({"img_resolution": [2**40, 2**40]}, "too large"),
        ({"img_resolution": (3 * 2**24, 2**24)}, "too large"),
        ({"img_resolution": [3 * 2**20, 2**22]}, "cannot be built"),
        ({"img_resolution": [3 * 2**20, 2**22], "synthesis_kwargs": {"channel_base": 2**24, "channel_max": 2**20}},
         "4194304x3145728 are too large: more than 16777216 pixels"),
        ({"img_resolution": [24, 40]}, r"do not fit: .*'synthesis.b4.const' has shape \[24, 4, 4\], not \[24, 6, 10\]"),
        ({"img_resolution": [16, 17]}, r"no network can be built for img_resolution \[16, 17\]"),
        ({"img_resolution": [-64, 96]}, r"no network can be built for img_resolution \[-64, 96\]"),
        ({"img_resolution": -16}, "power of two"),
        ({"img_resolution": "16"}, r"must be an int or \[height, width\] in pixels, not '16'"),
        ({"img_resolution": ["16", "24"]}, "must be an int or"),
        ({"img_resolution": [16, 24, 3]}, "must be an int or"),
        ({"img_resolution": [[16], [24]]}, "must be an int or"),
        ({"img_resolution": [1e300, float("nan")]}, "too large"),
        ({"img_resolution": [16.0, 24.0]}, "must be an int or"),
        ({"img_resolution": 2**20, "synthesis_kwargs": {"channel_base": 2**24, "channel_max": 2**20}}, "too large"),
        ({"img_resolution": 2**13, "synthesis_kwargs": {"channel_base": 2**13, "use_noise": False}}, "16777216 pixels"),
        ({"img_resolution": 4}, "power of two of at least 8"),
        ({"img_resolution": 2**20, "synthesis_kwargs": {"channel_base": 2**20, "architecture": "orig"}}, "too large"),
        ({"w_dim": 2**23}, "do not fit"),
        ({"mapping_kwargs": {"num_layers": 10**6}}, "num_layers"),
        ({"z_dim": "x"}, "its option z_dim is 'x', not a whole number from 0 on"),
        ({"z_dim": True}, "z_dim is True"),
        ({"c_dim": True}, "c_dim is True"),
        ({"c_dim": -1}, "c_dim is -1"),
        ({"w_dim": 0}, "w_dim is 0"),
        ({"img_channels": 7}, "img_channels is 7, not 1, 3 or 4: grey, RGB, RGBA"),
        ({"mapping_kwargs": {"activation": "foo"}}, "activation 'foo' is not one of linear, relu"),
        ({"mapping_kwargs": {"activation": ["lrelu"]}}, "activation .* is not one of"),
        ({"mapping_kwargs": {"num_layers": 0}}, "num_layers=0 needs labels"),
        ({"mapping_kwargs": {"lr_multiplier": float("nan")}}, "lr_multiplier is nan"),
        ({"mapping_kwargs": {"w_avg_beta": 2}}, "w_avg_beta is 2, not a number from 0 to 1"),
        ({"mapping_kwargs": {"w_avg_beta": None}}, "w_avg_beta is None"),
        *(({"synthesis_kwargs": {"conv_clamp": value}}, "conv_clamp")
          for value in ("x", [1, 2], -5, float("nan"), float("inf"), {"a": 1}, True, np.arange(2))),
        *(({"synthesis_kwargs": {"kernel_size": value}}, "kernel_size is .*, not an odd") for value in (0, 2, -1, 3.0)),
        ({"synthesis_kwargs": {"use_noise": 1}}, "use_noise is 1, not True or False"),
        ({"synthesis_kwargs": {"num_fp16_res": 1.5}}, "num_fp16_res is 1.5"),
        ({"synthesis_kwargs": {"channel_base": 8}}, "layers without channels|cannot be built"),
        *(({"synthesis_kwargs": {"resample_filter": value}}, "resample_filter")
          for value in ([], [0, 0], [1] * 65, [[1, 2], [3]], "1331", [float("nan")])),
        ({7: 1}, "badly described"),
    ],
)  # fmt: skip
def test_odd_options_are_refused(change, words, tmp_path):
    kwargs, parameters, _ = golden("generator_orig16")
    file = foreign_file(tmp_path / "a.pkl", G=foreign_module("Generator", parameters, {**kwargs, **change}))
    with pytest.raises(GanError, match=words) as caught:
        models.load(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"conv_clamp": "x"}, "conv_clamp is 'x'"),
        ({"cmap_dim": -1}, "cmap_dim"),
        ({"block_kwargs": {"freeze_layers": "x"}}, "freeze_layers"),
        ({"block_kwargs": {"fp16_channels_last": "x"}}, "fp16_channels_last"),
        ({"mapping_kwargs": {"activation": "foo"}}, "activation 'foo' is not one of"),
        *(({"epilogue_kwargs": {"mbstd_group_size": value}}, "mbstd_group_size") for value in (0, -1, "a", 2.0, [2])),
        ({"epilogue_kwargs": {"mbstd_num_channels": 5}}, "mbstd_num_channels=5 does not divide the 24 channels"),
    ],
    ids=str,
)  # fmt: skip
def test_odd_options_of_discriminators_are_refused(change, words, tmp_path):
    kwargs, parameters, _ = golden("discriminator_cond16")
    file = foreign_file(tmp_path / "a.pkl", D=foreign_module("Discriminator", parameters, {**kwargs, **change}))
    with pytest.raises(GanError, match=words):
        models.load(file)


VALUES = [
    None,
    False,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    0.5,
    2.5,
    float("nan"),
    float("inf"),
    10**9,
    10**60,
    "x",
    "lrelu",
    "tanh",
]
VALUES += ["orig", "skip", "resnet", b"x", (), [], (1,), [1, 2, 3], [1, -1], [0] * 4, [1] * 9, [1] * 40, [[1, 2], [3]]]
VALUES += [
    [[1, 2], [3, 4]],
    [[1, 2, 3]],
    ["a"],
    [None],
    [8, 12],
    {},
    {"a": 1},
    {"activation": "x"},
    {1},
    [float("nan")],
]
TINY = {"img_resolution": 8, "img_channels": 3, "c_dim": 2}
NARROW = {"channel_base": 32, "channel_max": 4}
PLACES = {
    "Generator": {
        "": ("z_dim", "c_dim", "w_dim", "img_resolution", "img_channels", "mapping_kwargs", "synthesis_kwargs"),
        "mapping_kwargs": (
            "num_layers", "embed_features", "layer_features", "activation", "lr_multiplier", "w_avg_beta", "num_ws"),
        "synthesis_kwargs": (
            "channel_base", "channel_max", "num_fp16_res", "architecture", "resample_filter", "conv_clamp",
            "fp16_channels_last", "kernel_size", "use_noise", "activation", "up"),
    },
    "Discriminator": {
        "": (
            "c_dim", "img_resolution", "img_channels", "architecture", "channel_base", "channel_max", "num_fp16_res",
            "conv_clamp", "cmap_dim", "block_kwargs", "mapping_kwargs", "epilogue_kwargs"),
        "block_kwargs": ("activation", "resample_filter", "freeze_layers", "fp16_channels_last"),
        "mapping_kwargs": ("num_layers", "embed_features", "layer_features", "activation", "lr_multiplier"),
        "epilogue_kwargs": ("mbstd_group_size", "mbstd_num_channels", "activation"),
    },
}  # fmt: skip


def fuzzed(cls, rng):
    """A tiny network with an odd option: one that was built with it, else one that only says so."""
    kwargs = {**TINY, **NARROW, "mapping_kwargs": {"num_layers": 1}}
    if cls == "Generator":
        kwargs = {"z_dim": 4, "w_dim": 4, **TINY, "mapping_kwargs": {"num_layers": 1}, "synthesis_kwargs": NARROW}
    sound = getattr(networks, cls)(**kwargs)
    folder = rng.choice(list(PLACES[cls]))
    change = {rng.choice(PLACES[cls][folder]): rng.choice(VALUES)}
    odd = {**kwargs, **({folder: {**kwargs.get(folder, {}), **change}} if folder else change)}
    try:
        if 10**9 not in change.values():
            return getattr(networks, cls)(**odd), change
    except Exception:
        pass
    sound._init_kwargs = odd
    return sound, change


def test_whatever_opens_runs(tmp_path):
    """Whatever the type and value of an option."""
    rng = random.Random(0)
    opened = collections.Counter()
    for _ in range(500):
        cls = rng.choice(list(PLACES))
        network, change = fuzzed(cls, rng)
        name = "G" if cls == "Generator" else "D"
        persistence.dump({name: network, "training_set_kwargs": {}}, tmp_path / "a.pkl", source_of=lambda cls: "")
        try:
            snapshot = models.load(tmp_path / "a.pkl")
        except GanError:
            continue
        opened[name] += 1
        network = snapshot.networks[name]
        label = torch.eye(max(network.c_dim, 2))[:2, : network.c_dim]
        try:
            if name == "G":
                images = network(torch.randn(2, network.z_dim), label, truncation_psi=0.7, noise_mode="const")
                assert images.shape == (2, network.img_channels, *network.img_size)
            else:
                assert network(torch.zeros(2, network.img_channels, *network.img_size), label).shape == (2, 1)
            models.save(
                tmp_path / "b.pkl", **{"G": None, "D": None, "G_ema": None, name: network}, training_set_kwargs={}
            )
        except Exception as error:
            raise AssertionError(f"{cls} with {change} opened") from error
    assert min(opened.values()) > 20


def test_networks_that_do_not_fit_together_are_refused(tmp_path):
    G = sized(16, 3, 2)["G"]
    for other, words in (((32, 3, 2), "32x32 RGB and labels of 2"), ((16, 1, 2), "grey"), ((16, 3, 0), "no labels")):
        models.save(tmp_path / "a.pkl", G=G, D=sized(*other)["D"], G_ema=G, training_set_kwargs={})
        with pytest.raises(
            GanError, match=f"a.pkl: its networks do not fit together: D is for .*{words}.*, G for 16x16"
        ):
            models.load(tmp_path / "a.pkl")


@pytest.mark.parametrize("p", [float("nan"), float("inf"), -1.0, 7.0])
def test_an_augmentation_probability_is_one(p, tmp_path):
    G = sized(8)["G"]
    pipe = augment.AugmentPipe(xflip=1)
    pipe.p.fill_(p)
    models.save(tmp_path / "a.pkl", G=G, D=None, G_ema=None, augment_pipe=pipe, training_set_kwargs={})
    if math.isfinite(p):
        safetensors_file.write(tmp_path / "a.safetensors", models.Snapshot(G, None, None, p))
    for file in tmp_path.iterdir():
        with pytest.raises(GanError, match=rf"{file.name}: its augmentation probability is {p:g}.*, not a number from"):
            models.load(file)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")], ids=str)
def test_too_little_memory_is_told(error, tmp_path, monkeypatch):
    models.save(tmp_path / "a.pkl", **sized(8), training_set_kwargs={})

    def build(description):
        raise error

    monkeypatch.setattr(rebuild, "build", build)
    with pytest.raises(GanError, match=r"a\.pkl: opening it takes more memory than there is"):
        models.load(tmp_path / "a.pkl")


def test_odd_places_are_refused(tmp_path):
    G = foreign_module("Generator", golden("generator_orig16")[1], golden("generator_orig16")[0])
    G.meta["state"]["_modules"]["self"] = G
    D = foreign_module("Discriminator", {})
    for content, said in [
        ({"G": G}, "a module is badly described"),
        ({"G": D}, "G: it is not a Generator, but a 'Discriminator'"),
        ({"D": 5}, "D: it is not a Discriminator, but 'int'"),
        ({"G_ema": EasyDict()}, "G_ema: it is not a Generator, but 'dict'"),
        ({"x": 1}, "it is not a network snapshot"),
        ({"G": None}, "it is not a network snapshot"),
    ]:
        with pytest.raises(GanError, match=rf"a\.pkl: {said}"):
            models.load(foreign_file(tmp_path / "a.pkl", **content))


def torch_saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def zipped(**files):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(name.replace("__", "/").replace("_", "."), content)
    return file.getvalue()


def arrays_saved():
    file = io.BytesIO()
    np.savez(file, a=np.zeros(3), b=np.ones(2))
    return file.getvalue()


def program_saved():
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), file)
    return file.getvalue()


OTHER_FILES = {
    "nothing": (lambda: b"", "it is empty; copy or download it again"),
    "text": (lambda: b"hello", "it is no model of a kind that is known"),
    "page": (lambda: b"\n<!DOCTYPE html><html>", "it is a web page"),
    "pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer.*git lfs pull"),
    "gzip": (lambda: gzip.compress(b"hello"), "it is a gzip file; unpack it first"),
    "tar": (lambda: b"a" * 257 + b"ustar\0", "it is a tar archive; unpack it first"),
    "picture": (lambda: b"\x89PNG\r\n\x1a\n", "it is a picture"),
    "onnx": (lambda: b"\x08\x0a\x12\x07pytorch", "it is an ONNX file"),
    "arrays": (arrays_saved, "npz file"),
    "array": (lambda: b"\x93NUMPY\x01\x00", "NumPy array"),
    "dataset": (lambda: zipped(**{"00000__img00000000_png": b"x", "dataset_json": b"{}"}), "zip of images.*--data"),
    "zip": (lambda: zipped(readme_txt=b"x"), "zip file without networks"),
    "half a zip": (lambda: zipped(readme_txt=b"x")[:-30], "cut short or damaged"),
    "program": (program_saved, "TorchScript"),
    "state": (lambda: torch_saved({"format": 1, "state": {}, "tracker": None}), "training state.*--resume"),
    "checkpoint": (lambda: torch_saved({"g_ema": {}}), "g_ema: its tensors are not named like those"),
    "weights": (lambda: torch_saved({"conv.weight": torch.zeros(2)}), "it is not a network snapshot"),
    "module": (lambda: torch_saved(torch.nn.Linear(2, 2)), "it is not a network snapshot"),
    "list": (lambda: pickle.dumps([1, 2]), "it is not a network snapshot"),
    "tuple": (lambda: pickle.dumps((types.SimpleNamespace(),) * 3, 3), "G: .*TensorFlow .*'types.SimpleNamespace'"),
    "half a pickle": (lambda: pickle.dumps({"G": list(range(99))})[:40], "cut short"),
}


@pytest.mark.parametrize("kind", OTHER_FILES)
def test_other_files_are_told_what_they_are(kind, tmp_path):
    """By what is in them, whatever they are called."""
    make, words = OTHER_FILES[kind]
    (tmp_path / "a.pkl").write_bytes(make())
    with pytest.raises(GanError, match=rf"a\.pkl: .*{words}") as caught:
        models.load(tmp_path / "a.pkl")
    assert "\n" not in str(caught.value)


def test_folders_and_absent_files(tmp_path):
    with pytest.raises(GanError, match="cannot be read"):
        models.load(tmp_path / "absent.pkl")
    with pytest.raises(GanError, match="it is a folder; give the file of a model"):
        models.load(tmp_path)
    for number in (0, 200):
        (tmp_path / f"network-snapshot-{number:06}.pkl").touch()
    with pytest.raises(GanError, match=r"a file in it, such as network-snapshot-000200\.pkl"):
        models.load(tmp_path)


def test_what_a_file_nests_does_not_delay_its_error(tmp_path):
    """The text of a list of lists of one list doubles with each level."""
    kwargs, parameters, _ = golden("generator_orig16")
    endless, deep = [], []
    endless.append(endless)
    for _ in range(40):
        deep = [deep, deep]
    start = time.monotonic()
    for value in (endless, deep, "x" * 10**6, 10**4000, "\n\x1b[2J"):
        for name in ("img_resolution", "channel_base", value if isinstance(value, str) else "other"):
            G = foreign_module("Generator", parameters, {**kwargs, name: value})
            with pytest.raises(GanError) as caught:
                models.load(foreign_file(tmp_path / "a.pkl", G=G))
            assert len(str(caught.value)) < 3000
            assert str(caught.value).isprintable()
    assert time.monotonic() - start < 20


def test_small_files_do_not_become_large_networks(tmp_path):
    """The weights of all mapping layers are one tensor."""
    kwargs, parameters, _ = golden("generator_orig16")
    parameters = {name: t for name, t in parameters.items() if not name.startswith("mapping.")}
    parameters.update({f"mapping.fc{i}.bias": torch.zeros(1024) for i in range(8)})
    parameters["mapping.w_avg"] = torch.zeros(1024)
    for name in [name for name in parameters if name.endswith("affine.weight")]:
        parameters[name] = torch.zeros(parameters[name].shape[0], 1024)
    kwargs.update(z_dim=1024, w_dim=1024, mapping_kwargs={"num_layers": 8})
    G = foreign_module("Generator", parameters, kwargs)
    shared = torch.nn.Parameter(torch.zeros(1024, 1024))
    for layer in G.meta["state"]["_modules"]["mapping"].meta["state"]["_modules"].values():
        layer.meta["state"]["_parameters"]["weight"] = shared
    file = foreign_file(tmp_path / "a.pkl", G=G)
    assert file.stat().st_size < 2 * 4 * 1024**2
    with pytest.raises(GanError, match=r"a\.pkl: its tensors are larger than what is stored of them"):
        models.load(file)
