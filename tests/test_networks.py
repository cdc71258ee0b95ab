"""Generator and discriminator: golden numbers, names, sizes, precision, truncation, noise, Freeze-D, groups."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from golden_networks import DISCRIMINATORS, GENERATORS, golden
from torch.utils._python_dispatch import TorchDispatchMode

from gan import image_size, networks
from gan.models import embedded_networks
from gan.networks import Discriminator, Generator, MappingNetwork, MinibatchStdLayer, modulated_conv2d
from torch_utils.ops import kernels
from torch_utils.ops.conv2d_resample import conv2d_resample_ref
from torch_utils.ops.upfirdn2d import setup_filter

SMALL = {"channel_base": 64, "channel_max": 8}


def small_generator(resolution=16, c_dim=0, img_channels=3, **synthesis_kwargs):
    torch.manual_seed(0)
    return Generator(
        z_dim=6,
        c_dim=c_dim,
        w_dim=7,
        img_resolution=resolution,
        img_channels=img_channels,
        mapping_kwargs={"num_layers": 2},
        synthesis_kwargs={**SMALL, **synthesis_kwargs},
    ).eval()


def small_discriminator(resolution=16, c_dim=0, img_channels=3, **kwargs):
    torch.manual_seed(0)
    return Discriminator(c_dim=c_dim, img_resolution=resolution, img_channels=img_channels, **{**SMALL, **kwargs})


def with_noise(G):
    """The generator with noise that shows: strengths start at 0."""
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            torch.nn.init.constant_(parameter, 0.5)
    return G


def assert_close(actual, expected, tolerance):
    """Relative to the largest element."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


class TestGolden:
    @pytest.mark.parametrize("name", GENERATORS)
    def test_the_generator_equals_the_golden_one(self, name):
        kwargs, parameters, data = golden(name)
        G = Generator(**kwargs).eval()
        G.load_state_dict(parameters, strict=True)
        z, c = data.pop("z"), data.pop("c")
        outputs = {
            "ws": G.mapping(z, c),
            "ws_psi": G.mapping(z, c, truncation_psi=0.6),
            "ws_psi_cutoff": G.mapping(z, c, truncation_psi=0.6, truncation_cutoff=2),
            "img_const": G(z, c, noise_mode="const"),
            "img_none": G(z, c, noise_mode="none"),
            "img_psi": G(z, c, truncation_psi=0.6, noise_mode="const"),
        }
        assert outputs.keys() == data.keys()
        for key, actual in outputs.items():
            assert_close(actual, data[key], 1e-5)

    @pytest.mark.parametrize("name", DISCRIMINATORS)
    def test_the_discriminator_equals_the_golden_one(self, name):
        kwargs, parameters, data = golden(name)
        D = Discriminator(**kwargs)
        D.load_state_dict(parameters, strict=True)
        img = data["img"].requires_grad_()
        logits = D(img, data["c"])
        assert_close(logits, data["logits"], 1e-5)
        (gradient,) = torch.autograd.grad(logits.sum(), img, create_graph=True)
        assert_close(gradient, data["r1_grad"], 1e-5)
        assert_close(gradient.square().sum(dim=[1, 2, 3]), data["r1_penalty"], 1e-5)

    @pytest.mark.parametrize("i", range(5))
    def test_modulated_conv2d_equals_the_golden_one(self, i):
        cases, _, data = golden("modulated_conv2d")
        assert len(cases) == 5
        settings = {key: cases[i][key] for key in ("up", "down", "padding", "demodulate", "flip_weight")}
        x, weight, styles = (data[f"{i}.{name}"] for name in ("x", "weight", "styles"))
        y = modulated_conv2d(x, weight, styles, resample_filter=setup_filter(cases[i]["resample_filter"]), **settings)
        assert_close(y, data[f"{i}.y"], 1e-10)


def by_definition(x, weight, styles, noise=None, demodulate=True, resample_filter=None, **settings):
    """Every sample convolved with its own weights."""
    samples = []
    for i in range(len(x)):
        w = weight * styles[i][None, :, None, None]
        if demodulate:
            w = w * (w.square().sum(dim=[1, 2, 3], keepdim=True) + 1e-8).rsqrt()
        samples.append(conv2d_resample_ref(x[i : i + 1], w, f=resample_filter, **settings))
    y = torch.cat(samples)
    return y if noise is None else y + noise


class TestModulatedConv:
    @staticmethod
    def inputs(kernel, dtype=torch.float64):
        generator = torch.Generator().manual_seed(0)
        shapes = ([2, 5, 6, 6], [4, 5, kernel, kernel], [2, 5])
        x, weight, styles = (torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes)
        return x.to(dtype), weight, styles

    @pytest.mark.parametrize("demodulate", [True, False])
    @pytest.mark.parametrize(("up", "down", "kernel"), [(1, 1, 3), (2, 1, 3), (1, 2, 3), (1, 1, 1), (2, 1, 1)])
    @pytest.mark.parametrize("noise_shape", [None, (1, 1), (2, 1, 1, 1)], ids=str)
    def test_equals_the_definition_with_weights_for_each_sample(self, up, down, kernel, demodulate, noise_shape):
        x, weight, styles = self.inputs(kernel)
        settings = {
            "up": up,
            "down": down,
            "padding": kernel // 2,
            "flip_weight": up == 1,
            "resample_filter": setup_filter([1, 3, 3, 1]),
            "demodulate": demodulate,
            "noise": None if noise_shape is None else torch.full(noise_shape, 3.0, dtype=torch.float64),
        }
        assert_close(
            modulated_conv2d(x, weight, styles, **settings), by_definition(x, weight, styles, **settings), 1e-10
        )

    def test_noise_is_not_scaled_by_the_demodulation(self):
        x, weight, styles = self.inputs(3)
        styles = styles * 1e4
        noise = torch.randn(2, 1, 6, 6, dtype=torch.float64)
        silent = modulated_conv2d(x, weight, styles, padding=1)
        assert_close(
            modulated_conv2d(x, weight, styles, noise=noise, padding=1) - silent, noise.expand_as(silent), 1e-10
        )

    @pytest.mark.parametrize(("weight_scale", "style_scale"), [(1e5, 1), (1, 1e5), (300, 300)])
    def test_float16_with_large_weights_or_styles_does_not_overflow(self, weight_scale, style_scale):
        x, weight, styles = self.inputs(3, torch.float16)
        weight, styles = weight * weight_scale, styles * style_scale
        assert not torch.isfinite(F.conv2d(x * styles.half()[:, :, None, None], weight.half())).all()
        y = modulated_conv2d(x, weight.float(), styles.float(), padding=1)
        assert_close(y, by_definition(x.double(), weight, styles, padding=1).half(), 2e-3)

    def test_float16_has_the_gradients_of_double_precision(self):
        x, weight, styles = self.inputs(3)
        results = []
        for dtype in (torch.float64, torch.float16):
            inputs = [tensor.detach().requires_grad_() for tensor in (x.to(dtype), weight, styles * 100)]
            y = modulated_conv2d(*inputs, padding=1)
            results.append(torch.autograd.grad(y, inputs, torch.linspace(-1, 1, y.numel()).view_as(y).to(dtype)))
        for exact, half in zip(*results, strict=True):
            assert_close(half.double(), exact, 1e-2)

    @pytest.mark.parametrize("scale", [1e-2, 1, 30])
    def test_what_float16_divides_styles_by_is_cancelled_in_the_first_two_derivatives(self, scale):
        x, weight, styles = self.inputs(3)
        results = []
        for divided in (False, True):
            inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, styles * scale)]
            s = networks._with_largest_of_1(inputs[2]) if divided else inputs[2]
            y = F.leaky_relu(modulated_conv2d(inputs[0], inputs[1], s, padding=1))
            first = torch.autograd.grad(
                (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), inputs, create_graph=True
            )
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            results.append([y.detach(), *(g.detach() for g in first), *second])
        for plain, divided in zip(*results, strict=True):
            assert_close(divided, plain, 1e-5)

    def test_second_derivatives_equal_finite_differences(self):
        x, weight, styles = (tensor[:, :2].requires_grad_() for tensor in self.inputs(3))
        x = x[:, :, :3, :3]

        def call(x, weight, styles):
            return modulated_conv2d(x, weight[:2], styles, up=2, padding=1, resample_filter=setup_filter([1, 3, 3, 1]))

        assert torch.autograd.gradgradcheck(call, (x, weight, styles))


class Operations(TorchDispatchMode):
    """Remembers which of PyTorch's operations were called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class TestKernels:
    """The networks compute the same with CUDA kernels, for training and for use."""

    @staticmethod
    def results(half, device, architecture="skip", dtype=torch.bfloat16):
        """Of a step's losses the gradients, and pictures."""
        G = with_noise(small_generator(16, c_dim=3, num_fp16_res=half, conv_clamp=256, architecture=architecture))
        D = small_discriminator(16, c_dim=3, num_fp16_res=half, conv_clamp=256)
        for network in (G, D):
            networks.set_half_dtype(network.to(device), dtype)
        random = torch.Generator().manual_seed(1)
        z, c = (torch.randn(4, n, generator=random).to(device) for n in (6, 3))
        with torch.no_grad():
            pictures = {mode: G(z, c, noise_mode=mode) for mode in ("const", "none")}
        return pictures | TestSizes.gradients(G, D, z, c)

    @pytest.mark.parametrize("architecture", ["skip", "resnet"])
    def test_gradients_of_path_length_and_r1_are_those_of_pytorch(self, architecture, kernel_device):
        actual = self.results(0, kernel_device, architecture)
        with kernels.disabled():
            expected = self.results(0, kernel_device, architecture)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert (actual[name] - value).abs().max() <= 2e-5 * max(value.abs().max(), 1e-3), name

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision_is_at_most_twice_as_wrong(self, dtype, kernel_device):
        ours = self.results(2, kernel_device, dtype=dtype)
        with kernels.disabled():
            plain, exact = self.results(2, kernel_device, dtype=dtype), self.results(0, kernel_device)

        def error(results):
            parts = [(results[name] - value).norm() / (value.norm() + 1e-3) for name, value in exact.items()]
            return torch.stack(parts).square().mean().sqrt()

        assert 0 < error(ours) <= 2 * error(plain) < 0.2

    @pytest.mark.parametrize(("up", "down", "entry"), [(1, 2, "down4"), (2, 1, "up4")])
    def test_the_gain_of_a_skip_connection_is_that_of_its_filter(self, up, down, entry, on_host):
        torch.manual_seed(0)
        layer, x = networks.Conv2dLayer(4, 8, 1, bias=False, up=up, down=down), torch.randn(2, 4, 12, 10)

        def values_and_gradients():
            inputs = [x.clone().requires_grad_(), layer.weight]
            y = layer(inputs[0], gain=0.5)
            gradients = torch.autograd.grad(y.square().sum(), inputs, create_graph=True)
            return [y, *gradients, *torch.autograd.grad(gradients[0].square().sum(), inputs)]

        networks.prepare_weights(layer)
        with torch.no_grad():
            layer(x)
            on_host["upfirdn2d"].launched.clear()
            with Operations() as operations:
                layer(x, gain=0.5)
        assert on_host["upfirdn2d"].launched == [f"upfirdn2d_{entry}_f32"]
        assert on_host["bias_act"].launched == []
        assert "mul" not in operations.names
        ours = values_and_gradients()
        with kernels.disabled():
            plain = values_and_gradients()
        for a, b in zip(ours, plain, strict=True):
            assert_close(a, b, 1e-5)

    def test_a_synthesis_layer_is_two_launches_around_its_convolution(self, on_host):
        layer = small_generator(16).synthesis.b16.conv1
        with torch.no_grad():
            layer(torch.randn(2, 4, 16, 16), torch.randn(2, 7))
        assert on_host["noise_bias_act"].launched == ["noise_bias_act_map_planes_f32"] * 2


# What the names and shapes of an 8x8 network are; 8 channels everywhere, z 6, w 7.
CONV = {"weight": (8, 8, 3, 3), "bias": (8,), "noise_strength": (), "affine.weight": (8, 7), "affine.bias": (8,)}
CONV_BUFFERS = ("resample_filter", "noise_const")
TORGB = {"weight": (3, 8, 1, 1), "bias": (3,), "affine.weight": (8, 7), "affine.bias": (8,)}
MAPPING = {
    "mapping.fc0.weight": (7, 6),
    "mapping.fc0.bias": (7,),
    "mapping.fc1.weight": (7, 7),
    "mapping.fc1.bias": (7,),
}


def under(prefix, names):
    return {f"{prefix}.{name}": shape for name, shape in names.items()}


class TestNames:
    """Names are the file format."""

    @pytest.mark.parametrize(
        ("architecture", "extra"),
        [
            ("orig", under("synthesis.b8.torgb", TORGB)),
            ("skip", under("synthesis.b4.torgb", TORGB) | under("synthesis.b8.torgb", TORGB)),
            ("resnet", under("synthesis.b8.torgb", TORGB) | {"synthesis.b8.skip.weight": (8, 8, 1, 1)}),
        ],
    )
    def test_of_the_generator(self, architecture, extra):
        G = small_generator(8, architecture=architecture)
        convs = [under(f"synthesis.{name}", CONV) for name in ("b4.conv1", "b8.conv0", "b8.conv1")]
        expected = {"synthesis.b4.const": (8, 4, 4), **convs[0], **convs[1], **convs[2], **MAPPING, **extra}
        assert {name: tuple(p.shape) for name, p in G.named_parameters()} == expected
        buffers = {"synthesis.b4.resample_filter", "synthesis.b8.resample_filter", "mapping.w_avg"}
        buffers |= {f"synthesis.{name}.{b}" for name in ("b4.conv1", "b8.conv0", "b8.conv1") for b in CONV_BUFFERS}
        buffers |= {"synthesis.b8.skip.resample_filter"} if architecture == "resnet" else set()
        assert {name for name, _ in G.named_buffers()} == buffers
        assert G.synthesis.b8.conv0.noise_const.shape == (8, 8)
        assert G.num_ws == 4

    def test_labels_add_an_embedding_in_front_of_the_mapping(self):
        shapes = {name: tuple(p.shape) for name, p in small_generator(8, c_dim=5).mapping.named_parameters()}
        assert shapes["embed.weight"] == (7, 5)
        assert shapes["embed.bias"] == (7,)
        assert shapes["fc0.weight"] == (7, 6 + 7)

    @pytest.mark.parametrize(
        ("architecture", "extra"),
        [
            ("orig", {}),
            ("skip", {"b8.fromrgb.weight": (4, 3, 1, 1), "b8.fromrgb.bias": (4,), "b4.fromrgb.weight": (8, 3, 1, 1),
                      "b4.fromrgb.bias": (8,)}),
            ("resnet", {"b16.skip.weight": (4, 2, 1, 1), "b8.skip.weight": (8, 4, 1, 1)}),
        ],
    )  # fmt: skip
    def test_of_the_discriminator(self, architecture, extra):
        D = small_discriminator(16, architecture=architecture, channel_base=32)  # 2, 4 and 8 channels
        expected = {
            **{"b16.fromrgb.weight": (2, 3, 1, 1), "b16.fromrgb.bias": (2,)},
            **{"b16.conv0.weight": (2, 2, 3, 3), "b16.conv0.bias": (2,)},
            **{"b16.conv1.weight": (4, 2, 3, 3), "b16.conv1.bias": (4,)},
            **{"b8.conv0.weight": (4, 4, 3, 3), "b8.conv0.bias": (4,)},
            **{"b8.conv1.weight": (8, 4, 3, 3), "b8.conv1.bias": (8,)},
            **{"b4.conv.weight": (8, 9, 3, 3), "b4.conv.bias": (8,)},
            **{"b4.fc.weight": (8, 128), "b4.fc.bias": (8,), "b4.out.weight": (1, 8), "b4.out.bias": (1,)},
            **extra,
        }
        assert {name: tuple(p.shape) for name, p in D.named_parameters()} == expected
        convs = {name.rsplit(".", 1)[0] for name in expected if not name.startswith(("b4.fc", "b4.out"))}
        buffers = {f"{name}.resample_filter" for name in {"b16", "b8"} | convs}
        assert {name for name, _ in D.named_buffers()} == buffers

    def test_labels_give_the_discriminator_a_mapping(self):
        D = small_discriminator(8, c_dim=5, cmap_dim=6, mapping_kwargs={"num_layers": 1})
        shapes = {name: tuple(p.shape) for name, p in D.named_parameters()}
        assert shapes["mapping.embed.weight"] == (6, 5)
        assert shapes["mapping.fc0.weight"] == (6, 6)
        assert shapes["b4.out.weight"] == (6, 8)
        assert not any("w_avg" in name for name, _ in D.named_buffers())
        assert (
            len([name for name in dict(small_discriminator(8, c_dim=5).mapping.named_children()) if "fc" in name]) == 8
        )

    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_image_channels_shape_input_and_output(self, channels):
        G = Generator(6, 0, 7, 8, channels, synthesis_kwargs=SMALL)
        D = Discriminator(0, 8, channels, **SMALL)
        img = G(torch.randn(2, 6))
        assert img.shape == (2, channels, 8, 8)
        assert D(img).shape == (2, 1)

    def test_the_number_of_channels_is_bounded(self):
        G = Generator(6, 0, 7, 32, 3, synthesis_kwargs={"channel_base": 256, "channel_max": 24})
        assert [getattr(G.synthesis, f"b{r}").conv1.weight.shape[0] for r in (4, 8, 16, 32)] == [24, 24, 16, 8]


def transposed(network, twin):
    """The network's tensors, height and width exchanged, in a network made for images of the exchanged size."""
    height, width = networks.height_width(
        (network.synthesis if isinstance(network, Generator) else network).b4.resolution
    )
    tensors = {}
    for name, tensor in network.state_dict().items():
        if tensor.ndim == 4:
            tensor = tensor.transpose(2, 3)
        elif name.endswith("const"):
            tensor = tensor.transpose(-1, -2)
        elif name == "b4.fc.weight":
            tensor = tensor.unflatten(1, (-1, height, width)).transpose(2, 3).flatten(1)
        tensors[name] = tensor
    twin.load_state_dict(tensors)
    return twin.double()


class TestSizes:
    """Sizes are (height, width)."""

    def test_levels_are_a_base_doubled_and_channels_go_by_the_nearest_square(self):
        G = small_generator([64, 96], channel_base=128, channel_max=16)
        D = small_discriminator([64, 96], channel_base=128, channel_max=16)
        assert G.synthesis.block_resolutions == [4, 8, 16, 32, 64]
        assert D.block_resolutions == [64, 32, 16, 8]
        blocks = [getattr(G.synthesis, f"b{level}") for level in (4, 8, 16, 32, 64)]
        assert blocks[0].const.shape == (16, 4, 6)
        assert [tuple(block.conv1.noise_const.shape) for block in blocks] == [
            (4, 6), (8, 12), (16, 24), (32, 48), (64, 96)
        ]  # fmt: skip
        assert [block.conv1.weight.shape[0] for block in blocks] == [16, 16, 8, 4, 2]
        assert [getattr(D, f"b{level}").conv0.weight.shape[0] for level in (64, 32, 16, 8)] == [2, 4, 8, 16]
        assert D.b4.fc.weight.shape == (16, 16 * 4 * 6)
        for network in (G, D):
            assert network.img_resolution == [64, 96]
            assert network.img_size == (64, 96)

    def test_channels_halve_at_every_level_of_pictures_between_two_squares(self):
        G = small_generator([32, 64], channel_base=64, channel_max=64)
        assert [getattr(G.synthesis, f"b{level}").conv1.weight.shape[0] for level in (4, 8, 16, 32)] == [16, 8, 4, 2]

    @pytest.mark.parametrize("make", [small_generator, small_discriminator])
    @pytest.mark.parametrize("pair", [[16, 16], (16, 16)], ids=str)
    def test_a_square_of_a_power_of_two_may_be_given_as_a_pair(self, make, pair):
        one, other = make(16), make(pair)
        assert other.img_resolution == 16
        assert other.img_size == one.img_size == (16, 16)
        assert [(name, tensor.tolist()) for name, tensor in other.state_dict().items()] == [
            (name, tensor.tolist()) for name, tensor in one.state_dict().items()
        ]

    def test_other_squares_have_other_bases(self):
        G = small_generator((24, 24))
        assert G.synthesis.b4.const.shape == (8, 6, 6)
        assert G.img_resolution == [24, 24]
        assert small_discriminator([24, 24])(G(torch.randn(4, 6))).shape == (4, 1)

    @pytest.mark.parametrize("c_dim", [0, 3])
    @pytest.mark.parametrize("channels", [1, 3, 4])
    @pytest.mark.parametrize("size", [(64, 96), (40, 24)], ids=str)
    def test_networks_of_the_exchanged_size_and_weights_make_and_judge_the_turned_pictures(self, size, channels, c_dim):
        kwargs = {"c_dim": c_dim, "img_channels": channels}
        G, D = with_noise(small_generator(size, **kwargs)).double(), small_discriminator(size, **kwargs).double()
        G_twin, D_twin = (
            transposed(network, make(size[::-1], **kwargs))
            for network, make in ((G, small_generator), (D, small_discriminator))
        )
        z, c = torch.randn(2, 6), torch.randn(2, c_dim)
        img = G(z, c, noise_mode="const").detach().requires_grad_()
        turned = img.detach().transpose(2, 3).requires_grad_()
        assert img.shape == (2, channels, *size)
        assert_close(G_twin(z, c, noise_mode="const"), turned, 1e-12)
        logits, logits_twin = D(img, c), D_twin(turned, c)
        assert logits.shape == (2, 1)
        assert_close(logits_twin, logits, 1e-12)
        gradients = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((logits, img), (logits_twin, turned))]
        assert_close(gradients[1].transpose(2, 3), gradients[0], 1e-12)

    def test_random_noise_has_the_size_of_the_layer(self):
        G = with_noise(small_generator([24, 40]))
        z = torch.randn(1, 6).expand(2, -1)
        img = G(z)
        assert img.shape == (2, 3, 24, 40)
        assert not torch.equal(img[0], img[1])

    @staticmethod
    def gradients(G, D, z, c):
        """Of the losses of a step: adversarial, path length and R1."""
        ws = G.mapping(z, c)
        img = G.synthesis(ws, noise_mode="const")
        noise = torch.randn(img.shape, generator=torch.Generator().manual_seed(1)).to(img.device)
        (slope,) = torch.autograd.grad((img * noise).sum(), ws, create_graph=True)
        (F.softplus(-D(img, c)).sum() + slope.square().sum()).backward()
        real = noise.requires_grad_()
        (slope,) = torch.autograd.grad(D(real, c).sum(), real, create_graph=True)
        slope.square().sum().backward()
        return {f"{type(net).__name__}.{name}": p.grad for net in (G, D) for name, p in net.named_parameters()}

    @pytest.mark.parametrize("half", [0, 2])
    @pytest.mark.parametrize(("size", "channels"), [((64, 96), 4), ((40, 24), 1)], ids=str)
    def test_all_gradients_are_finite_and_those_of_prepared_weights(self, size, channels, half):
        z, c = torch.randn(4, 6), torch.randn(4, 3)
        results = []
        for prepared in (False, True):
            G = with_noise(small_generator(size, c_dim=3, img_channels=channels, num_fp16_res=half))
            D = small_discriminator(size, c_dim=3, img_channels=channels, num_fp16_res=half)
            for network in (G, D):
                networks.set_half_dtype(network, torch.bfloat16)
                if prepared:
                    networks.prepare_weights(network)
            results.append(self.gradients(G, D, z, c))
        for name, gradient in results[0].items():
            assert gradient.isfinite().all(), name
            limit = (3e-2 if half else 1e-5) * max(gradient.abs().max(), 1e-3)
            assert (results[1][name] - gradient).abs().max() <= limit, name

    @pytest.mark.parametrize("size", [(64, 96), (40, 24)], ids=str)
    def test_half_precision_counts_levels_from_the_top_and_is_close_to_full(self, size):
        z = torch.randn(4, 6)
        G, half_G = (with_noise(small_generator(size, num_fp16_res=n)) for n in (0, 2))
        D, half_D = (small_discriminator(size, num_fp16_res=n) for n in (0, 2))
        for network in (half_G, half_D):
            networks.set_half_dtype(network, torch.bfloat16)
        levels = half_G.synthesis.block_resolutions
        assert [getattr(half_G.synthesis, f"b{n}").use_fp16 for n in levels] == [n in levels[-2:] for n in levels]
        assert [getattr(half_D, f"b{n}").use_fp16 for n in levels[:0:-1]] == [n in levels[-2:] for n in levels[:0:-1]]
        img = G(z, noise_mode="const")
        assert not torch.equal(half_G(z, noise_mode="const"), img)
        assert_close(half_G(z, noise_mode="const"), img, 0.03)
        assert_close(half_D(img), D(img), 0.03)

    @pytest.mark.parametrize("networks", [networks, embedded_networks], ids=["networks", "embedded_networks"])
    def test_the_rule_is_that_of_image_size(self, networks):
        """It is written twice, as what snapshots embed may import nothing of ours."""
        trainable = 0
        large = [(1080, 1920), (720, 1280), (512, 1024), (1536, 2048), (8192, 4096), (3 * 2**20, 2**22)]
        for height, width in [*itertools.product(range(1, 140), repeat=2), *large]:
            try:
                base = networks.height_width(networks._levels([height, width])[4])
            except ValueError:
                base = None
            if not image_size.is_trainable((width, height)):
                assert base is None or (height, width) == (4, 4), (width, height)
                continue
            trainable += 1
            assert base == image_size.base_size((width, height))[::-1]
            assert networks._nominal_resolution([height, width]) == image_size.nominal_resolution((width, height))
        assert trainable > 1000

    def test_levels_end_at_the_image_whatever_its_size(self):
        for size in ([64, 96], [40, 24], [96, 96], [144, 256], [32, 64], [30, 34]):
            levels = networks._levels(size)
            assert levels[max(levels)] == size
            assert list(levels) == [4 * 2**i for i in range(len(levels))]
            nominal = [networks._nominal_resolution(resolution) for resolution in levels.values()]
            assert nominal == [nominal[0] * 2**i for i in range(len(levels))]


class TestInitialisation:
    def test_equalised_layers_start_with_unit_variance_and_scale_at_run_time(self):
        torch.manual_seed(0)
        layer = networks.FullyConnectedLayer(400, 300, lr_multiplier=0.01, bias_init=0)
        assert layer.weight.std().item() == pytest.approx(100, rel=0.02)
        assert layer(torch.randn(50, 400)).std().item() == pytest.approx(1, rel=0.05)
        conv = networks.Conv2dLayer(40, 300, kernel_size=3)
        assert conv.weight.std().item() == pytest.approx(1, rel=0.02)
        inner = conv(torch.randn(2, 40, 8, 8))[:, :, 1:-1, 1:-1]
        assert inner.std().item() == pytest.approx(1, rel=0.05)

    def test_styles_start_at_one_and_noise_and_biases_at_zero(self):
        state = small_generator().state_dict()
        for name, tensor in state.items():
            if name.endswith("affine.bias"):
                assert (tensor == 1).all()
            elif name.endswith((".bias", "noise_strength", "w_avg")):
                assert (tensor == 0).all()


class TestMapping:
    z = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

    def mapping(self, **kwargs):
        torch.manual_seed(0)
        mapping = MappingNetwork(6, 0, 7, num_ws=4, num_layers=2, **kwargs)
        mapping.w_avg.normal_()
        return mapping.eval()

    def test_w_is_the_same_for_all_layers(self):
        ws = self.mapping()(self.z)
        assert ws.shape == (5, 4, 7)
        assert (ws == ws[:, :1]).all()

    def test_without_num_ws_there_is_no_broadcast(self):
        assert MappingNetwork(6, 0, 7, num_ws=None)(self.z).shape == (5, 7)

    def test_only_the_direction_of_z_matters(self):
        mapping = self.mapping()
        assert_close(mapping(self.z * 1000), mapping(self.z), 1e-5)

    def test_only_the_direction_of_an_embedded_label_matters(self):
        torch.manual_seed(0)
        mapping = MappingNetwork(6, 3, 7, num_ws=1)
        c = torch.randn(5, 3)
        assert_close(mapping(self.z, c * 1000), mapping(self.z, c), 1e-5)
        assert not torch.allclose(mapping(self.z, -c), mapping(self.z, c))

    def test_training_moves_the_mean_of_w_towards_that_of_the_batch(self):
        mapping = self.mapping(w_avg_beta=0.9).train()
        before = mapping.w_avg.clone()
        ws = mapping(self.z)
        assert_close(mapping.w_avg, 0.9 * before + 0.1 * ws[:, 0].mean(dim=0), 1e-6)

    def test_a_given_batch_mean_moves_it_the_same_way(self):
        one, other = self.mapping(w_avg_beta=0.9).train(), self.mapping(w_avg_beta=0.9).train()
        ws = one(self.z)
        other.track_w_avg(ws[:, 0].mean(dim=0))
        assert_close(other.w_avg, one.w_avg, 1e-6)

    def test_the_mean_stays_in_evaluation_or_when_told_to(self):
        mapping = self.mapping()
        before = mapping.w_avg.clone()
        mapping(self.z)
        mapping.train()(self.z, skip_w_avg_update=True)
        assert (mapping.w_avg == before).all()

    @pytest.mark.parametrize("psi", [0, 0.3, 1, 1.5])
    @pytest.mark.parametrize("cutoff", [None, 0, 1, 3, 4])
    def test_truncation_moves_the_first_layers_towards_the_mean(self, psi, cutoff):
        mapping = self.mapping()
        ws = mapping(self.z)
        actual = mapping(self.z, truncation_psi=psi, truncation_cutoff=cutoff)
        expected = ws.clone()
        expected[:, :cutoff] = mapping.w_avg + psi * (ws[:, :cutoff] - mapping.w_avg)
        assert_close(actual, expected, 1e-6)

    def test_truncation_without_a_mean_is_an_error(self):
        mapping = MappingNetwork(6, 0, 7, num_ws=4, w_avg_beta=None)
        assert not list(mapping.buffers())
        with pytest.raises(ValueError, match="truncation needs the mean of w"):
            mapping(self.z, truncation_psi=0.5)

    def test_the_generator_passes_truncation_on(self):
        G = small_generator()
        ws = G.mapping(self.z, truncation_psi=0.5, truncation_cutoff=2)
        expected = G.synthesis(ws, noise_mode="const")
        assert (G(self.z, truncation_psi=0.5, truncation_cutoff=2, noise_mode="const") == expected).all()
        assert not torch.equal(G(self.z, truncation_psi=0.5, noise_mode="const"), expected)


class TestNoise:
    z = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))

    def test_const_noise_is_the_same_every_time_and_is_the_buffer(self):
        G = with_noise(small_generator())
        img = G(self.z, noise_mode="const")
        assert (G(self.z, noise_mode="const") == img).all()
        G.synthesis.b8.conv0.noise_const.neg_()
        assert not torch.equal(G(self.z, noise_mode="const"), img)

    def test_random_noise_is_new_every_time_and_for_every_sample(self):
        G = with_noise(small_generator())
        same = self.z[:1].expand(2, -1)
        torch.manual_seed(0)
        img = G(same)
        assert not torch.equal(img[0], img[1])
        assert not torch.equal(G(same), img)
        torch.manual_seed(0)
        assert torch.equal(G(same), img)

    @pytest.mark.parametrize("mode", ["random", "const"])
    def test_none_is_noise_of_no_strength(self, mode):
        silent, noisy = small_generator(), with_noise(small_generator())
        img = noisy(self.z, noise_mode="none")
        assert not torch.equal(noisy(self.z, noise_mode=mode), img)
        assert_close(silent(self.z, noise_mode=mode), img, 1e-6)

    def test_a_network_without_noise_has_no_parameters_for_it(self):
        G = small_generator(use_noise=False)
        assert not any("noise" in name for name in G.state_dict())
        assert torch.equal(G(self.z, noise_mode="random"), G(self.z, noise_mode="none"))


class TestHalfPrecision:
    @staticmethod
    def computed_in(network, run):
        """{resolution: dtype of the convolutions} of one pass."""
        seen = {}
        hooks = [
            getattr(network, f"b{res}").conv1.register_forward_hook(
                lambda module, args, output, res=res: seen.update({res: output.dtype})
            )
            for res in network.block_resolutions
        ]
        run()
        for hook in hooks:
            hook.remove()
        return seen

    @pytest.mark.parametrize(
        ("num_fp16_res", "half"),
        [(0, []), (1, [64]), (2, [32, 64]), (3, [16, 32, 64]), (4, [8, 16, 32, 64]), (10, [8, 16, 32, 64])],
    )
    def test_the_highest_resolutions_are_half_but_never_4x4(self, num_fp16_res, half):
        kwargs = {"num_fp16_res": num_fp16_res, "channel_base": 64, "channel_max": 4}
        G = Generator(6, 0, 7, 64, 3, synthesis_kwargs=kwargs)
        D = Discriminator(0, 64, 3, **kwargs)
        for network in (G, D):
            networks.set_half_dtype(network, torch.bfloat16)
        expected = {res: torch.bfloat16 if res in half else torch.float32 for res in (4, 8, 16, 32, 64)}
        img = torch.zeros(1, 3, 64, 64)
        assert self.computed_in(G.synthesis, lambda: G(torch.randn(1, 6))) == expected
        assert self.computed_in(D, lambda: D(img)) == {res: expected[res] for res in (64, 32, 16, 8)}

    def test_images_and_logits_are_float32(self):
        G, D = small_generator(num_fp16_res=4), small_discriminator(num_fp16_res=4)
        img = G(torch.randn(4, 6))
        assert img.dtype == D(img).dtype == torch.float32

    @pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
    def test_half_is_close_to_and_force_fp32_exactly_the_full_precision(self, architecture):
        z = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
        full, half = (with_noise(small_generator(num_fp16_res=n, architecture=architecture)) for n in (0, 4))
        networks.set_half_dtype(half, torch.bfloat16)
        img = full(z, noise_mode="const")
        assert torch.equal(half(z, noise_mode="const", force_fp32=True), img)
        assert not torch.equal(half(z, noise_mode="const"), img)
        assert_close(half(z, noise_mode="const"), img, 0.03)
        full, half = (small_discriminator(num_fp16_res=n, architecture=architecture) for n in (0, 4))
        networks.set_half_dtype(half, torch.bfloat16)
        assert torch.equal(half(img, force_fp32=True), full(img))
        assert not torch.equal(half(img), full(img))
        assert_close(half(img), full(img), 0.03)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_set_half_dtype_chooses_and_restores(self, dtype):
        G, D = small_generator(num_fp16_res=1), small_discriminator(num_fp16_res=1)
        runs = [(G.synthesis, lambda: G(torch.randn(1, 6))), (D, lambda: D(torch.zeros(1, 3, 16, 16)))]
        for network, run in runs:
            networks.set_half_dtype(network, dtype)
            seen = self.computed_in(network, run)
            assert seen.pop(16) == dtype
            assert set(seen.values()) == {torch.float32}
            networks.set_half_dtype(network, None)
            assert self.computed_in(network, run)[16] == torch.float32  # on a CPU

    def test_the_clamp_bounds_what_half_precision_blocks_hand_on(self):
        G = small_generator(conv_clamp=0.1)
        outputs = []
        for res in G.synthesis.block_resolutions:
            getattr(G.synthesis, f"b{res}").conv1.register_forward_hook(lambda m, a, output: outputs.append(output))
        G(torch.randn(2, 6))
        assert len(outputs) == 3
        assert max(output.abs().max() for output in outputs).item() == pytest.approx(0.1)

    def test_a_gain_scales_activation_and_clamp(self):
        layer = networks.Conv2dLayer(3, 3, kernel_size=1, activation="lrelu", conv_clamp=0.5)
        x = torch.randn(2, 3, 4, 4)
        assert_close(layer(x, gain=0.25), layer(x) * 0.25, 1e-6)


class TestDoublePrecision:
    """Float64 networks are what other tests calculate with."""

    def test_networks_made_float64_compute_in_float64(self):
        G, D = with_noise(small_generator(num_fp16_res=4)).double(), small_discriminator(num_fp16_res=4).double()
        z = torch.randn(4, 6, dtype=torch.float64)
        assert G.mapping(z).dtype == torch.float64
        img = G(z, noise_mode="const", force_fp32=True)
        logits = D(img, force_fp32=True)
        assert img.dtype == logits.dtype == torch.float64
        single = with_noise(small_generator())(z.float(), noise_mode="const")
        assert 0 < (single - img).abs().max() < 1e-5 * img.abs().max()
        assert 0 < (small_discriminator()(img.float()) - logits).abs().max() < 1e-5 * logits.abs().max()


class TestFreezeD:
    ORDER = ("b32.fromrgb", "b32.conv0", "b32.conv1", "b32.skip",
             "b16.conv0", "b16.conv1", "b16.skip", "b8.conv0", "b8.conv1", "b8.skip")  # fmt: skip

    def discriminator(self, freeze_layers, **kwargs):
        return small_discriminator(32, block_kwargs={"freeze_layers": freeze_layers}, **kwargs)

    @pytest.mark.parametrize("freeze_layers", [0, 1, 3, 4, 5, 10])
    def test_the_first_layers_hold_buffers_instead_of_parameters(self, freeze_layers):
        D = self.discriminator(freeze_layers)
        frozen, trained = self.ORDER[:freeze_layers], self.ORDER[freeze_layers:]
        buffers = {name for name, _ in D.named_buffers() if not name.endswith("resample_filter")}
        weights = {f"{layer}.weight" for layer in frozen}
        assert buffers == weights | {f"{layer}.bias" for layer in frozen if not layer.endswith("skip")}
        layers = {name.rsplit(".", 1)[0] for name, _ in D.named_parameters()}
        assert layers == {*trained, "b4.conv", "b4.fc", "b4.out"}

    def test_layers_are_counted_in_each_architecture(self):
        D = self.discriminator(4, architecture="orig")
        assert {name for name, _ in D.named_buffers() if name.endswith("bias")} == {
            "b32.fromrgb.bias", "b32.conv0.bias", "b32.conv1.bias", "b16.conv0.bias"
        }  # fmt: skip
        D = self.discriminator(4, architecture="skip")
        assert {name for name, _ in D.named_buffers() if name.endswith("bias")} == {
            "b32.fromrgb.bias", "b32.conv0.bias", "b32.conv1.bias", "b16.fromrgb.bias"
        }  # fmt: skip

    def test_freezing_changes_neither_files_nor_logits(self):
        D, frozen = self.discriminator(0), self.discriminator(7)
        assert frozen.state_dict().keys() == D.state_dict().keys()
        frozen.load_state_dict(D.state_dict())
        img = torch.randn(4, 3, 32, 32)
        assert torch.equal(frozen(img), D(img))


class TestMinibatchStd:
    @staticmethod
    def by_definition(x, group_size, num_channels):
        """Sample i belongs to group i mod (N / G)."""
        n, c, h, w = x.shape
        groups = n // group_size
        out = np.zeros([n, num_channels, h, w])
        for i in range(n):
            members = [j for j in range(n) if j % groups == i % groups]
            for f in range(num_channels):
                part = x[members, f * c // num_channels : (f + 1) * c // num_channels]
                out[i, f] = np.sqrt(part.var(axis=0) + 1e-8).mean()
        return np.concatenate([x, out], axis=1)

    @pytest.mark.parametrize(
        ("n", "group_size", "num_channels"),
        [(8, 4, 1), (8, 2, 1), (12, 3, 2), (8, 8, 4), (4, 1, 1), (2, 4, 1), (6, None, 2)],
    )
    def test_equals_the_definition(self, n, group_size, num_channels):
        x = torch.randn(n, 8, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        y = MinibatchStdLayer(group_size, num_channels)(x)
        expected = self.by_definition(x.numpy(), min(group_size or n, n), num_channels)
        assert_close(y, torch.from_numpy(expected), 1e-10)

    def test_several_batches_are_kept_apart(self):
        layer = MinibatchStdLayer(4)
        one, two = torch.randn(8, 3, 2, 2), torch.randn(8, 3, 2, 2) * 5
        assert_close(layer(torch.cat([one, two]), num_batches=2), torch.cat([layer(one), layer(two)]), 1e-6)

    @pytest.mark.parametrize("c_dim", [0, 3])
    def test_two_batches_judged_at_once_equal_two_calls(self, c_dim):
        D = small_discriminator(8, c_dim=c_dim)
        one, two = torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8) * 3
        c = torch.randn(8, c_dim)
        together = D(torch.cat([one, two]), c, num_batches=2)
        assert_close(together, torch.cat([D(one, c[:4]), D(two, c[4:])]), 1e-5)
        assert not torch.allclose(D(torch.cat([one, two]), c), together)

    def test_a_batch_that_does_not_divide_is_an_error(self):
        with pytest.raises(ValueError, match="a batch of 6 does not divide into minibatch-stddev groups of 4"):
            MinibatchStdLayer(4)(torch.zeros(6, 3, 2, 2))

    def test_without_channels_there_is_no_layer(self):
        D = small_discriminator(8, epilogue_kwargs={"mbstd_num_channels": 0})
        assert D.b4.mbstd is None
        assert D.b4.conv.weight.shape[1] == 8


class TestArguments:
    def test_they_are_told_by_name_with_defaults_on_demand(self):
        G = Generator(6, c_dim=0, w_dim=7, img_resolution=8, img_channels=3, synthesis_kwargs=SMALL)
        given = {"z_dim": 6, "c_dim": 0, "w_dim": 7, "img_resolution": 8, "img_channels": 3, "synthesis_kwargs": SMALL}
        assert G.arguments() == given
        assert G.arguments(defaults=True) == {**given, "mapping_kwargs": None}
        all_of_it = G.synthesis.arguments(defaults=True)
        assert all_of_it == {"w_dim": 7, "img_resolution": 8, "img_channels": 3, "num_fp16_res": 0, **SMALL}


class TestErrors:
    @pytest.mark.parametrize("shape", [[2, 5, 7], [2, 6, 8], [6, 7]], ids=str)
    def test_ws_of_another_shape(self, shape):
        with pytest.raises(ValueError, match=rf"ws must be \[N, 6, 7\], not \[{', '.join(map(str, shape))}\]"):
            small_generator().synthesis(torch.zeros(shape))

    def test_an_unknown_noise_mode(self):
        with pytest.raises(ValueError, match="noise_mode must be random, const or none, not 'loud'"):
            small_generator()(torch.zeros(1, 6), noise_mode="loud")

    def test_missing_labels(self):
        message = r"this network is conditional: give labels c of shape \[N, 5\]"
        with pytest.raises(ValueError, match=message):
            small_generator(c_dim=5)(torch.zeros(1, 6))
        with pytest.raises(ValueError, match=message):
            small_discriminator(c_dim=5)(torch.zeros(1, 3, 16, 16))

    @pytest.mark.parametrize("resolution", [0, 2, 4, 24, 100])
    @pytest.mark.parametrize("make", [small_generator, small_discriminator])
    def test_a_resolution_that_is_no_power_of_two(self, make, resolution):
        with pytest.raises(ValueError, match=f"img_resolution must be a power of two of at least 8, not {resolution}"):
            make(resolution)

    @pytest.mark.parametrize(
        "size", [[100, 76], [4, 6], [50, 98], [96, 2], [-64, 96], [0, 96], [0, 0], [6, 6]], ids=str
    )
    @pytest.mark.parametrize("make", [small_generator, small_discriminator])
    def test_a_size_without_a_small_base(self, make, size):
        with pytest.raises(
            ValueError, match=rf"no network can be built for img_resolution \[{size[0]}, {size[1]}\]: height"
        ):
            make(size)

    @pytest.mark.parametrize(
        "resolution", [None, "64", 64.0, [], [64], [64, 64, 3], ["64", "96"], [64.0, 96.0], {64, 96}]
    )
    @pytest.mark.parametrize("make", [small_generator, small_discriminator])
    def test_a_resolution_that_is_neither_a_number_nor_a_pair(self, make, resolution):
        with pytest.raises(ValueError, match=r"img_resolution must be an int or \[height, width\] in pixels, not "):
            make(resolution)

    @pytest.mark.parametrize("shape", [[1, 3, 24, 40], [1, 1, 40, 24], [1, 3, 40, 40], [3, 40, 24]], ids=str)
    def test_images_of_another_shape(self, shape):
        """Judged by the number of pixels alone, exchanged sides would pass."""
        with pytest.raises(ValueError, match=rf"images must be \[N, 3, 40, 24\], not \[{', '.join(map(str, shape))}\]"):
            small_discriminator([40, 24])(torch.zeros(shape))

    @pytest.mark.parametrize("make", [small_generator, small_discriminator])
    def test_an_unknown_architecture(self, make):
        with pytest.raises(ValueError, match="architecture must be orig, skip or resnet, not 'gothic'"):
            make(architecture="gothic")


@pytest.mark.parametrize("architecture", ["orig", "skip", "resnet"])
def test_path_length_and_r1_reach_every_weight(architecture):
    G = with_noise(small_generator(architecture=architecture))
    ws = G.mapping(torch.randn(2, 6))
    img = G.synthesis(ws)
    (gradient,) = torch.autograd.grad((img * torch.randn_like(img)).sum(), ws, create_graph=True)
    gradient.square().sum().backward()
    missed = {name for name, p in G.named_parameters() if p.grad is None or not p.grad.any()}
    assert missed <= {f"synthesis.b{res}.torgb.bias" for res in (4, 8, 16)}  # added last, it has no part in a slope
    D = small_discriminator(architecture=architecture)
    img = img.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(D(img).sum(), img, create_graph=True)
    gradient.square().sum().backward()
    missed = {name for name, p in D.named_parameters() if p.grad is None or not p.grad.any()}
    assert not {name for name in missed if name.endswith("weight")}


def test_networks_remember_their_constructor_arguments():
    G = Generator(6, 0, 7, img_resolution=8, img_channels=3, synthesis_kwargs=SMALL)
    assert G._init_args == (6, 0, 7)
    assert G._init_kwargs == {"img_resolution": 8, "img_channels": 3, "synthesis_kwargs": SMALL}


class TestPreparedWeights:
    """Weights kept scaled and cast give what weights used as they are give, gradients included."""

    @pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", ["generator", "discriminator"])
    def test_outputs_and_gradients_are_the_same(self, kind, dtype):
        network = small_generator(num_fp16_res=2) if kind == "generator" else small_discriminator(num_fp16_res=2)
        networks.set_half_dtype(network, dtype)
        x = torch.randn([4, 6]) if kind == "generator" else torch.randn([4, 3, 16, 16])
        results = []
        for prepared in (False, True):
            if prepared:
                networks.prepare_weights(network)
            network.zero_grad()
            y = network(x, noise_mode="const") if kind == "generator" else network(x)
            y.square().sum().backward()
            results.append((y.detach(), [p.grad.clone() for p in network.parameters()]))
        (y, gradients), (prepared_y, prepared_gradients) = results
        assert_close(prepared_y, y, 1e-5 if dtype is None else 1e-2)
        for a, b in zip(prepared_gradients, gradients, strict=True):
            assert (a - b).abs().max() <= (1e-5 if dtype is None else 3e-2) * max(b.abs().max(), 1e-3)

    def test_they_are_kept_until_they_are_prepared_again_or_forgotten(self):
        D, x = small_discriminator(), torch.randn([4, 3, 16, 16])
        networks.prepare_weights(D)
        with torch.no_grad():
            before = D(x)
            for parameter in D.parameters():
                parameter.mul_(2)
            kept = D.b16.conv0.__dict__["prepared"].value
            features = torch.zeros([1, 4, 8, 8]).contiguous(memory_format=torch.channels_last)
            assert torch.equal(D.b16.conv0.convolution_weight(features)[0], kept)
            networks.prepare_weights(D, in_place=True)
            assert D.b16.conv0.__dict__["prepared"].value is kept
            renewed = D(x)
            networks.forget_weights(D)
            assert_close(renewed, D(x), 1e-6)
        assert not torch.allclose(renewed, before)

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("kind", ["generator", "discriminator"])
    def test_renewed_in_place_they_are_what_they_would_be_anew_in_the_same_memory(self, kind, dtype, layout):
        network = small_generator(num_fp16_res=2) if kind == "generator" else small_discriminator(num_fp16_res=2)
        network.to(memory_format=layout)
        networks.set_half_dtype(network, dtype)
        networks.prepare_weights(network)
        with torch.no_grad():
            network(torch.randn([4, 6]) if kind == "generator" else torch.randn([4, 3, 16, 16]))
            for parameter in network.parameters():
                parameter.mul_(1.5).add_(0.1)
        layers = [module for module in network.modules() if isinstance(module, networks._Convolution)]
        versions = [layer.weight._version for layer in layers]
        before = [layer.__dict__["prepared"] for layer in layers]
        networks.prepare_weights(network, in_place=True)
        assert [layer.weight._version for layer in layers] == versions, "a weight was written to itself"
        for layer, old in zip(layers, before, strict=True):
            now, fresh = layer.__dict__["prepared"], layer._prepare(old.dtype, old.layout)
            assert now is old
            for a, b in zip(now, fresh, strict=True):
                same = torch.equal(a, b) and a.stride() == b.stride() if isinstance(a, torch.Tensor) else a == b
                assert same

    def test_they_are_no_part_of_a_state_dict_and_follow_a_change_of_dtype(self):
        D, x = small_discriminator(), torch.randn([4, 3, 16, 16])
        names = set(D.state_dict())
        networks.prepare_weights(D)
        D(x)
        assert set(D.state_dict()) == names
        expected = D(x).double()
        assert_close(D.double()(x.double()), expected, 1e-4)
