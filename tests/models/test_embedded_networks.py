"""The text that snapshots embed: the numbers of gan.networks, alone and in the hands of other programs."""

import copy
import inspect
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from golden_networks import DISCRIMINATORS, GENERATORS, class_name, golden, golden_network

from gan import augment, models, networks
from gan.models import embedded_networks

NAMES = GENERATORS + DISCRIMINATORS
CLASSES = [name for name, cls in inspect.getmembers(networks, inspect.isclass) if hasattr(embedded_networks, name)]
CLASSES = [name for name in CLASSES if issubclass(getattr(networks, name), torch.nn.Module)]


def live(name):
    return golden_network(name)[0].eval()


def both(cls, kwargs, dtype=torch.float64):
    """The network of gan.networks and its double of the text, with every parameter at work."""
    torch.manual_seed(0)
    ours = getattr(networks, cls)(**kwargs).to(dtype).eval()
    with torch.no_grad():
        for name, tensor in ours.state_dict(keep_vars=True).items():
            if name.endswith(("bias", "noise_strength", "w_avg")):
                tensor.copy_(torch.randn(tensor.shape, dtype=dtype) * 0.3)
    text = getattr(embedded_networks, cls)(**kwargs).to(dtype).eval()
    text.load_state_dict(ours.state_dict())
    return ours, text


def inputs(network, n=4, dtype=torch.float64):
    random = torch.Generator().manual_seed(1)
    c = torch.eye(network.c_dim, dtype=dtype)[torch.arange(n) % max(network.c_dim, 1)] if network.c_dim else None
    shape = [n, network.img_channels, *networks.height_width(network.img_resolution)]
    if hasattr(network, "synthesis"):
        shape = [n, network.z_dim]
    return torch.randn(shape, generator=random, dtype=dtype), c


def run(network, x, c):
    if hasattr(network, "synthesis"):
        return network(x, c, truncation_psi=0.7, truncation_cutoff=2, noise_mode="const")
    return network(x, c)


def assert_same(actual, expected, tolerance):
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


def assert_equal_in_everything(ours, text, dtype=torch.float64):
    """Names, attributes, output, gradients of the input and of all parameters, and a second derivative."""
    for (name, a), (other, b) in zip(ours.named_modules(), text.named_modules(), strict=True):
        assert (name, type(a).__name__) == (other, type(b).__name__)
        assert attributes(a) == attributes(b)
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in text.state_dict().items()}
    found = []
    for network in (ours, text):
        x, c = inputs(network, dtype=dtype)
        y = run(network, x.requires_grad_(), c)
        weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
        parameters = dict(network.named_parameters())
        (slope,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        grads = torch.autograd.grad((y * weights).sum() + slope.square().sum(), parameters.values(), allow_unused=True)
        found.append((y, slope, dict(zip(parameters, grads, strict=True))))
    (y, slope, grads), (text_y, text_slope, text_grads) = found
    assert_same(text_y, y, 1e-10)
    assert_same(text_slope, slope, 1e-10)
    for name, gradient in grads.items():
        assert (gradient is None) == (text_grads[name] is None), name
        if gradient is not None:
            assert_same(text_grads[name], gradient, 1e-10)


def attributes(module):
    hidden = ("_parameters", "_buffers", "_modules", "_init_args", "_init_kwargs", "half_dtype", "prepared")
    hooks = torch.nn.Module().__dict__.keys() - {"training"}
    return {name: value for name, value in module.__dict__.items() if name not in hooks and name not in hidden}


def test_it_has_all_classes_with_the_same_arguments():
    assert len(CLASSES) >= 12
    for name in CLASSES:
        theirs = inspect.signature(getattr(embedded_networks, name).__init__).parameters
        ours = inspect.signature(getattr(networks, name).__init__).parameters
        assert [(p.name, p.kind, p.default) for p in theirs.values()] == [
            (p.name, p.kind, p.default) for p in ours.values()
        ]


@pytest.mark.parametrize("name", NAMES)
def test_golden_networks(name):
    kwargs, parameters, data = golden(name)
    cls = class_name(name)
    text = getattr(embedded_networks, cls)(**kwargs).eval()
    text.load_state_dict(parameters)
    with torch.no_grad():
        if cls == "Discriminator":
            assert_same(text(data["img"], data["c"]), data["logits"], 1e-5)
        else:
            psi = {"truncation_psi": 0.6, "truncation_cutoff": 2}
            assert_same(text.mapping(data["z"], data["c"]), data["ws"], 1e-5)
            assert_same(text.mapping(data["z"], data["c"], **psi), data["ws_psi_cutoff"], 1e-5)
            assert_same(text(data["z"], data["c"], noise_mode="const"), data["img_const"], 1e-5)
            assert_same(text(data["z"], data["c"], noise_mode="none"), data["img_none"], 1e-5)
            image = text(data["z"], data["c"], truncation_psi=0.6, noise_mode="const")
            assert_same(image, data["img_psi"], 1e-5)
    ours = live(name).double()
    assert_equal_in_everything(ours, text.double())


SMALL = {"channel_base": 64, "channel_max": 8}
COMMON = {"z_dim": 5, "w_dim": 6, "mapping_kwargs": {"num_layers": 2}}
TINY = {"c_dim": 0, "img_resolution": 8, "img_channels": 3, **COMMON, "synthesis_kwargs": SMALL}
WIDE_FILTER = [1, 2, 3, 4, 5, 4, 3, 2, 1]
VARIANTS = [  # architecture, size, channels, c_dim, more options of both
    ("skip", 16, 3, 0, {}),
    ("resnet", [24, 40], 4, 3, {}),
    ("orig", [10, 8], 1, 0, {"activation": "swish"}),
    ("skip", [16, 24], 2, 2, {"conv_clamp": 0.5, "num_fp16_res": 2}),
    ("resnet", 8, 1, 0, {"resample_filter": WIDE_FILTER, "conv_clamp": 0.7}),
    ("orig", 16, 3, 0, {"resample_filter": [1, 2, 1], "activation": "relu"}),
    ("skip", 8, 3, 0, {"resample_filter": [1, 2, 1]}),
    *(("resnet", 8, 3, 0, {"activation": name}) for name in ("linear", "tanh", "sigmoid", "elu", "selu", "softplus")),
]


@pytest.mark.parametrize(("architecture", "size", "channels", "c_dim", "more"), VARIANTS, ids=str)
def test_every_kind_of_network(architecture, size, channels, c_dim, more):
    options = {"img_resolution": size, "img_channels": channels, "c_dim": c_dim}
    synthesis = {"architecture": architecture, **SMALL, **more}
    ours, text = both("Generator", {**options, **COMMON, "synthesis_kwargs": synthesis})
    networks.set_half_dtype(ours, torch.float64)  # on CPUs the text knows no half precision
    assert_equal_in_everything(ours, text)
    block = {name: more[name] for name in ("activation", "resample_filter") if name in more}
    rest = {name: more[name] for name in more.keys() - block.keys()}
    kwargs = {**options, "architecture": architecture, **SMALL, **rest, "block_kwargs": {**block, "freeze_layers": 2}}
    kwargs["epilogue_kwargs"] = {"mbstd_num_channels": 0 if size == 16 else 1}
    ours, text = both("Discriminator", kwargs)
    networks.set_half_dtype(ours, torch.float64)
    assert_equal_in_everything(ours, text)


def test_the_noise_can_be_left_out_for_good():
    kwargs = {**TINY, "synthesis_kwargs": {**SMALL, "use_noise": False}}
    assert_equal_in_everything(*both("Generator", kwargs))


def test_random_noise_is_fresh():
    ours, text = both("Generator", TINY, torch.float32)
    z, _ = inputs(text, dtype=torch.float32)
    torch.manual_seed(3)
    first, second = text(z), text(z)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert_same(first, ours(z), 1e-5)
    with pytest.raises(ValueError, match="noise_mode"):
        text(z, noise_mode="Const")


def test_the_mean_of_w_follows_as_each_generation_asks_for():
    text = embedded_networks.Generator(**TINY)
    z, _ = inputs(text, dtype=torch.float32)

    def moved(call):
        before = text.mapping.w_avg.clone()
        call()
        return not torch.equal(before, text.mapping.w_avg)

    assert moved(lambda: text(z))
    assert not moved(lambda: text(z, update_emas=False))
    assert not moved(lambda: text.mapping(z, skip_w_avg_update=True))
    text.eval()
    assert not moved(lambda: text(z))
    ours, text = both("Generator", TINY)
    z, _ = inputs(text)
    ours.train().mapping(z)
    text.train().mapping(z)
    assert_same(text.mapping.w_avg, ours.mapping.w_avg, 1e-10)


def test_sizes_that_no_network_has_are_refused():
    for size in ([16, 17], [4, 400], 2, 4):
        for module in (networks, embedded_networks):
            with pytest.raises(ValueError, match="img_resolution"):
                module.SynthesisNetwork(4, size, 3, **SMALL)


def half_precision_equals_ours(architecture, device):
    options = {"img_resolution": 32, "img_channels": 3, "c_dim": 0}
    half = {"num_fp16_res": 3, "conv_clamp": 256, "architecture": architecture}
    synthesis = {**half, "channel_base": 512, "channel_max": 32, "fp16_channels_last": True}
    G, text_G = both("Generator", {**options, **COMMON, "synthesis_kwargs": synthesis}, torch.float32)
    D, text_D = both("Discriminator", {**options, **half, **SMALL}, torch.float32)
    z = inputs(G, dtype=torch.float32)[0].to(device)
    for network in (G, text_G, D, text_D):
        network.to(device)
        networks.set_half_dtype(network, torch.float16)
    dtypes = []
    text_G.synthesis.b32.conv1.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    text_D.b32.conv1.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    with torch.no_grad():
        full = text_G(z, noise_mode="const", force_fp32=True)
        scores = text_D(full, force_fp32=True)
        image = text_G(z, noise_mode="const")
        assert_same(image, G(z, noise_mode="const"), 5e-3)
        assert_same(image, full, 1e-2)
        assert_same(text_D(full), D(full), 5e-3)
        assert_same(text_D(full), scores, 1e-2)
        text_G.synthesis.b32.conv1.weight *= 1e4  # demodulation cancels it, before it is too much for float16
        assert_same(text_G(z, noise_mode="const"), image, 1e-2)
    assert dtypes == [torch.float32] * 2 + [torch.float16] * 4
    assert image.dtype == scores.dtype == torch.float32


@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_half_precision_where_it_is_used(architecture, monkeypatch):
    monkeypatch.setattr(embedded_networks, "_HALF_DEVICES", ("cpu",))
    half_precision_equals_ours(architecture, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["skip", "resnet"])
def test_half_precision_on_a_gpu(architecture):
    half_precision_equals_ours(architecture, "cuda")


def test_there_is_no_half_precision_on_cpus():
    ours, text = both("Generator", {**TINY, "synthesis_kwargs": {**SMALL, "num_fp16_res": 1}}, torch.float32)
    z, _ = inputs(text, dtype=torch.float32)
    image = text(z, noise_mode="const")
    assert torch.equal(image, text(z, noise_mode="const", force_fp32=True))
    assert_same(image, ours(z, noise_mode="const", force_fp32=True), 1e-5)


# What a program is that knows nothing of this one: it executes the text of a file, and has a place for each name.
PERSISTENCE = """
import sys, types

SETSTATE = True
_modules = {}


def _reconstruct_persistent_obj(meta):
    assert meta["type"] == "class" and meta["version"] == 6
    source = meta["module_src"]
    if source not in _modules:
        _modules[source] = types.ModuleType(f"imported_{len(_modules)}")
        sys.modules[_modules[source].__name__] = _modules[source]
        exec(source, _modules[source].__dict__)
    made = _recording(getattr(_modules[source], meta["class_name"]), source)
    made = made.__new__(made)
    if SETSTATE:
        made.__setstate__(meta["state"])
    else:
        made.__dict__.update(meta["state"])
    return made


def _recording(cls, source):
    class Recording(cls):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self._init_args, self._init_kwargs = args, kwargs

        def __reduce__(self):
            meta = {"type": "class", "version": 6, "module_src": source, "class_name": cls.__name__}
            return _reconstruct_persistent_obj, ({**meta, "state": self.__dict__},)

    Recording.__name__ = cls.__name__
    return Recording
"""
VIEWER = """
import copy, pickle, sys
import numpy as np
import torch
from torch_utils import persistence

sys.modules["gan"] = None  # not to be had
torch.set_num_threads(1)
results = {}


def judge(key, D, img, c):
    results[f"{key} logits"] = D(img, c, force_fp32=True)
    img = img.double().requires_grad_()
    logits = copy.deepcopy(D).double()(img, c, force_fp32=True)
    (slope,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
    slope.square().sum().backward()  # R1
    results[f"{key} slope"] = slope
    results[f"{key} r1"] = img.grad


def copied(network):
    new = type(network)(*network._init_args, **network._init_kwargs).eval().requires_grad_(False)
    tensors = dict([*network.named_parameters(), *network.named_buffers()])
    with torch.no_grad():
        for name, tensor in [*new.named_parameters(), *new.named_buffers()]:
            tensor.copy_(tensors.pop(name))
    assert not tensors
    return new


def render(key, G, z, c):
    results[f"{key} image"] = G(z, c, noise_mode="const", force_fp32=True)
    results[f"{key} none"] = G(z, c, truncation_psi=0.7, truncation_cutoff=3, noise_mode="none", fused_modconv=True)
    ws = G.mapping(z, c, truncation_psi=0.5, skip_w_avg_update=True)
    assert torch.equal(ws, G.mapping(z, c, truncation_psi=0.5, update_emas=False))
    assert ws.shape == (len(z), G.num_ws, G.w_dim) and G.mapping.w_avg.shape == (G.w_dim,)
    results[f"{key} psi"] = G.synthesis(ws, noise_mode="const", force_fp32=True, fused_modconv=False)
    channels = [getattr(G.synthesis, f"b{res}").conv1.weight.shape[0] for res in G.synthesis.block_resolutions]
    assert len(channels) > 1 and G.img_channels == results[f"{key} image"].shape[1]
    G = copy.deepcopy(G).double()
    ws = G.mapping(z, c, truncation_psi=0.5).requires_grad_()
    G.synthesis(ws, noise_mode="const", update_emas=False).square().sum().backward()
    results[f"{key} slope"] = ws.grad


for path in sys.argv[1:]:
    inputs = {key: torch.as_tensor(value) for key, value in np.load(path + ".npz").items()}
    for persistence.SETSTATE in (True, False):
        with open(path, "rb") as file:
            content = pickle.load(file)
        key = f"{path} {persistence.SETSTATE}"
        if content["D"] is not None:
            D = content["D"]
            judge(key, D, inputs["x"], inputs["c"])
            judge(key + " new", copied(D), inputs["x"], inputs["c"])
            continue
        G = content["G_ema"]
        assert not G.training and not any(p.requires_grad for p in G.parameters())
        z, c = inputs["x"], inputs["c"]
        render(key, G, z, c)
        render(key + " new", copied(G), z, c)
        twin = copy.deepcopy(G)
        render(key + " copy", twin, z, c)
        again = pickle.loads(pickle.dumps(twin))
        render(key + " again", again, z, c)
        noise = [buffer for name, buffer in twin.named_buffers() if name.endswith("noise_const")]
        for buffer in noise:  # as projectors do
            buffer[:] = torch.randn_like(buffer)
            buffer.requires_grad = True
        image = twin(z, c, noise_mode="const")
        assert not torch.equal(image, G(z, c, noise_mode="const"))
        image.square().sum().backward()
        assert all(buffer.grad.abs().max() > 0 for buffer in noise) and len(noise) > 2
        render(key + " after", G, z, c)
        twin = copy.deepcopy(G)
        twin.train().requires_grad_(True)
        twin(z, c).sum().backward()
        assert all(p.grad is not None for p in twin.parameters())
        if persistence.SETSTATE:
            assert {p.dtype for p in G.parameters()} == {torch.float32}
    pipe = content["augment_pipe"]
    if pipe is not None:
        assert float(pipe.p) == 0.25 and pipe.xflip == 1
        try:
            pipe(torch.zeros(1, 3, 8, 8))
            raise SystemExit("an augmentation that does nothing")
        except NotImplementedError as error:
            assert "stylegan2-ada-trainer" in str(error)
np.savez("results.npz", **{key: value.detach().numpy() for key, value in results.items()})
"""


@pytest.fixture(scope="module")
def viewed(tmp_path_factory):
    """{file: network}, and what a program of others found in the files: it has torch, numpy, and not us."""
    folder = tmp_path_factory.mktemp("viewer")
    for package, module, text in [("torch_utils", "persistence", PERSISTENCE), ("dnnlib", "util", "")]:
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("")
        (folder / package / f"{module}.py").write_text(text)
    (folder / "viewer.py").write_text(textwrap.dedent(VIEWER))
    nets = {f"{name}.pkl": live(name) for name in NAMES}
    torch.manual_seed(0)
    options = {"img_resolution": [12, 20], "img_channels": 4, "c_dim": 2}
    nets["oblong.pkl"] = networks.Generator(**options, **COMMON, synthesis_kwargs={"num_fp16_res": 1, **SMALL})
    for name, parameter in nets["oblong.pkl"].named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.5)
    nets["half.pkl"] = copy.deepcopy(nets["oblong.pkl"])
    nets["oblong_D.pkl"] = networks.Discriminator(**options, **SMALL, block_kwargs={"freeze_layers": 3})
    pipe = augment.AugmentPipe(xflip=1)
    pipe.p.fill_(0.25)
    for name, network in nets.items():
        kind = "D" if isinstance(network, networks.Discriminator) else "G_ema"
        content = {**dict.fromkeys(["G", "D", "G_ema"]), kind: network.train()}
        half = name == "half.pkl"
        models.save(folder / name, **content, augment_pipe=pipe, training_set_kwargs={"path": "x.zip"}, half=half)
        network.eval()
        x, c = inputs(network, dtype=torch.float32)
        np.savez(folder / f"{name}.npz", x=x, c=torch.zeros([len(x), 0]) if c is None else c)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    command = [sys.executable, "viewer.py", *nets]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    with np.load(folder / "results.npz") as results:
        return nets, {key: torch.as_tensor(results[key]) for key in results.files}


def test_other_programs_open_and_use_all_files(viewed):
    nets, results = viewed
    checked = set()
    for name, network in nets.items():
        if name == "half.pkl":
            network.load_state_dict({k: v.half() if v.ndim > 1 else v for k, v in network.state_dict().items()})
        x, c = inputs(network, dtype=torch.float32)
        expected = {}
        if isinstance(network, networks.Discriminator):
            expected["logits"] = network(x, c, force_fp32=True)
            x = x.double().requires_grad_()
            logits = network.double()(x, c, force_fp32=True)
            (expected["slope"],) = torch.autograd.grad(logits.sum(), x, create_graph=True)
            (expected["r1"],) = torch.autograd.grad(expected["slope"].square().sum(), x)
            ways = ["", " new"]
        else:
            full = {"force_fp32": True}
            expected["image"] = network(x, c, noise_mode="const", **full)
            expected["none"] = network(x, c, truncation_psi=0.7, truncation_cutoff=3, noise_mode="none", **full)
            ws = network.mapping(x, c, truncation_psi=0.5)
            expected["psi"] = network.synthesis(ws, noise_mode="const", **full)
            ws = network.double().mapping(x, c, truncation_psi=0.5).detach().requires_grad_()
            images = network.synthesis(ws, noise_mode="const", **full)
            (expected["slope"],) = torch.autograd.grad(images.square().sum(), ws)
            ways = ["", " new", " copy", " again", " after"]
        for way in [f"{name} {setstate}{way}" for setstate in (True, False) for way in ways]:
            for what, tensor in expected.items():
                assert_same(results[f"{way} {what}"], tensor.detach(), 1e-5)
                checked.add(f"{way} {what}")
    assert checked == set(results)
