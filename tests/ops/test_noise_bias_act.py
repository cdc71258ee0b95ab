"""noise_bias_act against `_ref` in every derivative, by PyTorch's operations and by the kernel."""

import itertools
import math

import pytest
import torch
from checks import default_dtype
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, noise

from torch_utils.ops import cuda_kernels
from torch_utils.ops import noise_bias_act as module
from torch_utils.ops import noise_bias_act_cuda as operators
from torch_utils.ops.noise_bias_act import noise_bias_act, noise_bias_act_ref

KERNEL = module._kernel
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CURVES = {"lrelu": {"act": "lrelu", "gain": 1.25, "clamp": 1.5}, "linear": {}}
# Planes and rows that are a multiple of a pack, and that are not; of a warp, and of a block, and of several.
SHAPES = [(1, 1, 1, 1), (2, 1, 3, 5), (3, 2, 1, 129), (1, 129, 3, 7), (2, 151, 2, 2), (2, 24, 4, 4), (2, 3, 16, 8),
          (1, 3, 67, 43), (1, 2, 96, 96), (1, 8, 71, 67), (2, 264, 3, 2)]  # fmt: skip
LAYOUTS = [False, True]  # channels_last
# Every shape and layout in one dtype, one that is a multiple of a pack in all.
CASES = [
    (shape, last, dtype)
    for i, (shape, last) in enumerate(itertools.product(SHAPES, LAYOUTS))
    for j, dtype in enumerate(DTYPES)
    if shape == (2, 24, 4, 4) or i % len(DTYPES) == j
]
NAMES = ("x", "scale", "strength", "b")


def arguments(shape, dtype=torch.float64, device="cpu", shared_noise=False, channels_last=False):
    """x, scale, strength, b and noise such that rounding does not decide on which side of a kink a number is.

    x has the dtype; the others float32, or its if that is float64.
    """
    n, c, h, w = shape
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = 2 ** (noise(n, c, seed=1) > 0).double()
    x = (noise(*shape) * 4).round() / 4 / scale[:, :, None, None]
    b = (noise(c, seed=2) * 4).round() / 4 + 1 / 8
    plane = (noise(*((h, w) if shared_noise else (n, 1, h, w)), seed=3) * 2).round() / 2
    made = {"x": x.to(dtype), "scale": scale.to(wide), "strength": torch.tensor(0.5).to(wide), "b": b.to(wide)}
    if channels_last:
        made["x"] = made["x"].contiguous(memory_format=torch.channels_last)
    return {name: t.to(device) for name, t in made.items()}, plane.to(device, wide)


def short(entry):
    """The name of an entry point without those of the kernel and the dtype."""
    name = entry.removeprefix(f"{operators.NAME}_")
    return name if name == "totals" else name.rpartition("_")[0]


def of_tensors(function, names, **settings):
    """The function of the tensors of these names."""
    return lambda *tensors: function(**dict(zip(names, tensors, strict=True)), **settings)


def agree_in_every_derivative(inputs, plane, dtype=torch.float64, **settings):
    """Those of noise_bias_act and those of `_ref` in float64; returns the former."""
    # Sums of numbers of both signs lose some more of float32.
    tolerance = 1e-10 if dtype == torch.float64 else max(6 * torch.finfo(dtype).eps, 4e-6)
    names = tuple(inputs)
    wide = None if plane is None else plane.double()
    low = dtype if dtype != torch.float64 else None
    actual = derivatives(of_tensors(noise_bias_act, names, noise=plane, **settings), *inputs.values(), rounding=low)
    exact = [t.double() for t in inputs.values()]
    expected = derivatives(of_tensors(noise_bias_act_ref, names, noise=wide, **settings), *exact, rounding=low)
    assert_close([t.double() for t in actual], expected, tolerance)
    return actual


@pytest.mark.parametrize("curve", [*CURVES.values(), {"act": "swish", "clamp": 2}, {"act": "relu"}], ids=str)
def test_output_and_every_gradient_equal_those_of_ref(curve):
    for shared, left_out in itertools.product([False, True], [(), ("scale",), ("strength", "b"), ("scale", "b")]):
        inputs, plane = arguments((2, 5, 3, 4), shared_noise=shared)
        inputs = {name: t for name, t in inputs.items() if name not in left_out}
        agree_in_every_derivative(inputs, plane, **curve)
        inputs.pop("strength", None)
        agree_in_every_derivative(inputs, None, **curve)


def test_first_and_second_derivatives_equal_finite_differences():
    inputs, plane = arguments((2, 2, 1, 2))
    call = of_tensors(noise_bias_act, NAMES, noise=plane, act="lrelu", clamp=1.5)
    leaves = [t.requires_grad_() for t in inputs.values()]
    assert torch.autograd.gradcheck(call, leaves)
    assert torch.autograd.gradgradcheck(call, leaves)


@pytest.mark.parametrize(("shape", "channels_last", "dtype"), CASES, ids=str)
def test_the_kernel_equals_ref_in_every_derivative(shape, channels_last, dtype, kernel_device):
    for (name, curve), shared in zip(CURVES.items(), [False, True], strict=True):
        inputs, plane = arguments(shape, dtype, kernel_device, shared, channels_last)
        actual = agree_in_every_derivative(inputs, plane, dtype, **curve)
        assert actual[0].stride() == inputs["x"].stride(), name
        assert [t.dtype for t in actual] == [dtype, dtype, *[torch.float32] * 3, dtype, dtype, *[torch.float32] * 3]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("curve", CURVES)
def test_the_kernel_is_at_most_twice_as_wrong_as_plain_pytorch(curve, channels_last, dtype, kernel_device):
    inputs, plane = arguments((3, 5, 17, 24), torch.float64, kernel_device, channels_last=channels_last)
    strength = inputs.pop("strength")  # a gradient of one number: which is nearer is a matter of luck

    def op(x, scale, b):
        numbers = {"scale": scale.float(), "noise": plane.float(), "strength": strength.float(), "b": b.float()}
        return noise_bias_act(x, **numbers, **CURVES[curve])

    def ref(x, scale, b):
        return noise_bias_act_ref(x, scale, plane, strength, b, **CURVES[curve])

    assert_at_most_twice_as_wrong(op, ref, inputs.values(), dtype)


@pytest.mark.parametrize(("channels_last", "dtype"), [(False, DTYPES[1]), (True, DTYPES[2])], ids=str)
def test_sums_of_many_numbers_stay_exact(channels_last, dtype, kernel_device):
    """Blocks share a plane, or the rows of a sample, and all of a sum's terms have the same sign."""
    inputs, plane = arguments((2, 2, 301, 257), dtype, kernel_device, channels_last=channels_last)
    leaves = {name: t.abs().requires_grad_() for name, t in inputs.items()}
    y = noise_bias_act(**leaves, noise=plane.abs() + 0.1, gain=1.25)
    actual = torch.autograd.grad(y, list(leaves.values())[1:], torch.full_like(y, 1.5))
    rows = {name: t.detach().double().requires_grad_() for name, t in leaves.items()}
    exact = torch.autograd.grad(
        noise_bias_act_ref(**rows, noise=(plane.abs() + 0.1).double(), gain=1.25).sum() * 1.5, list(rows.values())[1:]
    )
    assert_close([t.double() for t in actual], exact, 1e-6)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
@pytest.mark.parametrize("curve", CURVES)
def test_any_argument_may_be_left_out(curve, channels_last, kernel_device):
    inputs, plane = arguments((2, 8, 3, 4), torch.float32, kernel_device, channels_last=channels_last)
    for with_scale, with_noise, with_b in itertools.product([False, True], repeat=3):
        if not with_scale and not with_noise:
            continue  # bias_act
        names = {"x": True, "scale": with_scale, "strength": False, "b": with_b}
        for with_strength in {False, with_noise}:
            given = {name: inputs[name] for name, is_in in {**names, "strength": with_strength}.items() if is_in}
            agree_in_every_derivative(given, plane if with_noise else None, torch.float32, **CURVES[curve])


@pytest.mark.parametrize("curve", CURVES)
def test_anything_may_be_a_constant(curve, kernel_device):
    """Any set of arguments requires gradients, and so does what they are multiplied with, or not."""
    inputs, plane = arguments((2, 8, 3, 4), torch.float32, kernel_device)
    sets = [s for size in range(1, 5) for s in itertools.combinations(NAMES, size)]
    for wanted, constant_dy in itertools.product(sets, [False, True]):
        results = []
        for function, dtype in ((noise_bias_act, torch.float32), (noise_bias_act_ref, torch.float64)):
            leaves = {name: t.to(dtype, copy=True).requires_grad_(name in wanted) for name, t in inputs.items()}
            y = function(**leaves, noise=plane.to(dtype), **CURVES[curve])
            dy = noise(*y.shape, seed=7).to(y).requires_grad_(not constant_dy)
            first = torch.autograd.grad(y, [leaves[name] for name in wanted], dy, create_graph=True)
            total = sum((d * noise(*d.shape, seed=8).to(d)).sum() for d in first)
            asked = [leaves[name] for name in wanted] + ([] if constant_dy else [dy])
            if not total.requires_grad:
                assert constant_dy
                second = [torch.zeros_like(t) for t in asked]
            else:
                second = torch.autograd.grad(total, asked, allow_unused=True, materialize_grads=True)
            results.append([t.detach().double() for t in (y, *first, *second)])
        assert_close(*results, 1e-6)


@pytest.mark.parametrize("wanted", NAMES)
def test_derivatives_of_third_order(wanted, kernel_device):
    """They differentiate the second of the operators' gradients too."""
    results = []
    for function, dtype in ((noise_bias_act, torch.float32), (noise_bias_act_ref, torch.float64)):
        inputs, plane = arguments((2, 8, 3, 4), torch.float32, kernel_device)
        leaves = {name: t.to(dtype).requires_grad_() for name, t in inputs.items()}
        y = function(**leaves, noise=plane.to(dtype), **CURVES["lrelu"])
        dy = noise(*y.shape, seed=7).to(y).requires_grad_()
        first = torch.autograd.grad(y, list(leaves.values()), dy, create_graph=True)
        second = torch.autograd.grad(
            sum(d.square().sum() for d in first), [dy, *leaves.values()], create_graph=True, allow_unused=True
        )
        total = sum(d.square().sum() for d in second if d is not None)
        third = torch.autograd.grad(total, [dy, leaves[wanted]], allow_unused=True, materialize_grads=True)
        results.append([t.detach().double() for t in third])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_pass_through_the_kernel_as_through_pytorch(dtype, kernel_device):
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 0.0, 1.0, -1.0, 9, -9], dtype=dtype, device=kernel_device).reshape(1, 1, 1, 8)
    scale = torch.ones(1, 1, device=kernel_device)
    for curve in ({"act": "lrelu", "gain": 2.0, "clamp": 3.0}, {"act": "lrelu", "gain": 2.0}):
        results = []
        for function in (noise_bias_act, noise_bias_act_ref):
            leaf = x.clone().requires_grad_()
            y = function(leaf, scale, **curve)
            results += [y.detach(), torch.autograd.grad(y.sum(), leaf)[0]]
        assert torch.equal(results[0].nan_to_num(nan=77), results[2].nan_to_num(nan=77))
        assert torch.equal(results[1][..., 1:], results[3][..., 1:])  # at NaN PyTorch does not agree with itself


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.repeat_interleave(2, dim=3)[..., ::2],
        lambda t: t.transpose(2, 3).contiguous().transpose(2, 3),
        lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),  # starts in the middle of a pack
        lambda t: t[:, :, :1, :1].expand(t.shape),
    ],
    ids=["strided", "transposed", "misaligned", "expanded"],
)
def test_the_layout_changes_nothing(change, kernel_device):
    for dtype in DTYPES:
        inputs, plane = arguments((2, 8, 4, 8), dtype, kernel_device)
        inputs["x"] = change(inputs["x"])
        plane = change(plane)
        agree_in_every_derivative(inputs, plane, dtype, **CURVES["lrelu"])


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_the_gradient_may_come_in_any_layout(channels_last, kernel_device):
    inputs, plane = arguments((2, 8, 4, 6), torch.float32, kernel_device, channels_last=channels_last)
    x = inputs.pop("x").requires_grad_()
    leaves = [x, *(t.requires_grad_() for t in inputs.values())]
    for dy in (
        torch.ones(1).expand(x.shape),
        noise(2, 8, 8, 6).float()[:, :, ::2],
        noise(6, 4, 8, 2).float().permute(3, 2, 1, 0),
        noise(2, 8, 4, 6).float().contiguous(memory_format=torch.channels_last),
    ):
        actual, expected = (
            torch.autograd.grad(f(x, noise=plane, **inputs, act="lrelu"), leaves, dy.to(kernel_device))
            for f in (noise_bias_act, noise_bias_act_ref)
        )
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("channels_last", [False, True], ids=["NCHW", "channels_last"])
def test_the_same_input_gives_the_same_bits(channels_last, kernel_device):
    inputs, plane = arguments((2, 3, 96, 96), torch.float32, kernel_device, channels_last=channels_last)
    call = of_tensors(noise_bias_act, NAMES, noise=plane * 1.1, **CURVES["lrelu"])
    values = [t * 1.3 for t in inputs.values()]
    first, again = (derivatives(call, *values) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("curve", CURVES)
def test_opcheck(curve, kernel_device):
    """Schema, fake implementation, registration, and all of them traced with unknown sizes."""
    numbers = (1.0, 1.5, math.nan) if curve == "linear" else (0.2, 1.5, 1.0)
    dtype = torch.bfloat16 if curve == "linear" else torch.float32
    inputs, plane = arguments((2, 8, 4, 4), dtype, kernel_device, channels_last=curve == "linear")
    x, scale, strength, b = (t.requires_grad_() for t in inputs.values())
    u = noise(*x.shape, seed=5).to(x).requires_grad_()
    y = None if curve == "linear" else noise(*x.shape, seed=6).to(x)
    calls = [
        (operators.noise_bias_act, (x, scale, plane, strength, b, *numbers)),
        (operators.noise_bias_act_grad, (u, y, x, scale, plane, *numbers, True, True)),
        (operators.noise_bias_act_grad, (u, y, None, None, None, *numbers, True, False)),
        (operators.noise_bias_act_tangent, (u, x, scale, scale, plane, strength, b, y, *numbers)),
    ]
    for operator, given in calls:
        torch.library.opcheck(operator.op, given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("clamp", [0.3, 256 * 0.5**0.5])
def test_a_limit_that_the_dtype_lacks_stops_gradients_too(clamp, dtype, kernel_device):
    x = torch.full([1, 8, 2, 2], 1000.0, device=kernel_device, dtype=dtype).requires_grad_()
    y = noise_bias_act(x, torch.ones(1, 8, device=kernel_device), act="lrelu", clamp=clamp)
    assert "gan_noise_bias_act" in type(y.grad_fn).__name__
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx == 0).all()


def test_a_constant_gradient_can_be_differentiated_as_that_of_ref(kernel_device):
    """Also where that gives zeros, because slopes do not change."""
    results = []
    for function, dtype in ((noise_bias_act, torch.float32), (noise_bias_act_ref, torch.float64)):
        inputs, plane = arguments((2, 8, 3, 4), torch.float32, kernel_device)
        x, scale, strength, b = (t.to(dtype).requires_grad_() for t in inputs.values())
        y = function(x, scale, plane.to(dtype), strength, b, **CURVES["lrelu"])
        first = torch.autograd.grad(y.sum(), [x, scale], create_graph=True)
        zeros, of_scale = torch.autograd.grad(first[0].sum(), [x, scale], retain_graph=True)
        (of_x,) = torch.autograd.grad(first[1].sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(of_x.sum(), x)
        results.append([t.detach().double() for t in (*first, zeros, of_scale, of_x, third)])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"b": torch.zeros(4)},
        {"b": torch.zeros(3).half()},
        {"scale": torch.zeros(3)},
        {"noise": torch.zeros(1, 4, 4)},
        {"strength": torch.zeros(1)},
    ],
    ids=str,
)
def test_operators_read_nothing_that_is_not_there(change, on_host):
    given = {"scale": torch.zeros(2, 3), "noise": torch.zeros(4, 4), "strength": None, "b": None, **change}
    with pytest.raises(AssertionError):
        torch.ops.gan.noise_bias_act(torch.zeros(2, 3, 4, 4), *given.values(), 0.2, 1.0, math.nan)
    x = torch.zeros(2, 3, 4, 4)
    with pytest.raises(AssertionError):
        torch.ops.gan.noise_bias_act_grad(x, x[:1], None, None, None, 0.2, 1.0, math.nan, True, True)
    assert not on_host[operators.NAME].launched


class TestCost:
    """What is launched and kept, on the host."""

    @staticmethod
    def launched(on_host):
        names = [short(name) for name in on_host[operators.NAME].launched]
        on_host[operators.NAME].launched.clear()
        return names

    def test_one_launch_forwards_and_two_back(self, on_host):
        inputs, plane = arguments((2, 8, 4, 4), torch.float16)
        y = noise_bias_act(**{name: t.requires_grad_() for name, t in inputs.items()}, noise=plane, act="lrelu")
        assert self.launched(on_host) == ["map_planes"]
        torch.autograd.grad(y.float().sum(), list(inputs.values()))
        assert self.launched(on_host) == ["gradient_planes", "totals"]

    def test_a_gradient_penalty_passes_twice_more(self, on_host):
        """As in path length: weights behind the layer, a gradient in front of it, and then of its length."""
        inputs, plane = arguments((2, 8, 4, 4), torch.float16)
        x, scale, strength, b = (t.requires_grad_() for t in inputs.values())
        y = noise_bias_act(x, scale, plane, strength, b, act="lrelu")
        weights = noise(*y.shape).to(y).requires_grad_()
        (dx,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
        assert self.launched(on_host) == ["map_planes", "gradient_planes", "totals"]
        dx.float().square().sum().backward()
        assert self.launched(on_host) == ["map_planes", "gradient_planes"]  # no zeros through the forward graph
        assert [t.grad is None for t in (x, scale, strength, b, weights)] == [True, False, True, True, False]

    def test_the_modulation_of_small_planes_needs_no_second_stage(self, on_host):
        inputs, _ = arguments((2, 8, 4, 4), torch.float16, channels_last=True)
        x, scale = inputs["x"].requires_grad_(), inputs["scale"].requires_grad_()
        torch.autograd.grad(noise_bias_act(x, scale).float().sum(), [x, scale])
        assert self.launched(on_host) == ["map_rows", "gradient_rows"]

    @pytest.mark.parametrize(
        ("wanted", "settings", "kept"),
        [
            (NAMES, CURVES["lrelu"], {"y", "x", "scale", "noise"}),
            (("x", "scale"), {}, {"x", "scale"}),  # the modulation
            (("x",), {}, {"scale"}),
            (("scale",), {"act": "lrelu"}, {"y", "x"}),
            (("b",), {"act": "lrelu"}, {"y"}),
            (("strength",), {"act": "lrelu"}, {"y", "noise"}),
        ],
    )
    def test_what_is_kept_for_the_gradient(self, wanted, settings, kept, on_host):
        inputs, plane = arguments((2, 8, 4, 4), torch.float32)
        for name in wanted:
            inputs[name].requires_grad_()
        found = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: found.append(t.data_ptr()) or t, lambda t: t):
            y = noise_bias_act(**inputs, noise=plane, **settings)
        names = {t.data_ptr(): name for name, t in (*inputs.items(), ("y", y), ("noise", plane))}
        assert sorted(names[address] for address in found) == sorted(kept)
        gradients = torch.autograd.grad(y.sum(), [inputs[name] for name in wanted])
        assert [g.shape for g in gradients] == [inputs[name].shape for name in wanted]

    def test_nothing_is_kept_without_gradients(self, on_host):
        inputs, plane = arguments((2, 8, 4, 4), torch.float32)
        assert noise_bias_act(**inputs, noise=plane).grad_fn is None
        with torch.no_grad():
            assert noise_bias_act(inputs["x"].requires_grad_(), noise=plane).grad_fn is None

    def test_a_gradient_that_nobody_needs_is_not_written(self, on_host, monkeypatch):
        inputs, plane = arguments((2, 8, 4, 4), torch.float32)
        y = noise_bias_act(**{**inputs, "b": inputs["b"].requires_grad_()}, noise=plane, act="lrelu")
        sizes = []
        empty_like = torch.empty_like
        monkeypatch.setattr(torch, "empty_like", lambda t, **kwargs: sizes.append(t.shape) or empty_like(t, **kwargs))
        torch.autograd.grad(y, inputs["b"], torch.ones(y.shape))
        assert sizes == []

    @pytest.mark.parametrize(
        "change",
        [
            {"x": noise(2, 5, 3, 4)},
            {"x": torch.zeros(2, 5, 0, 4), "noise": torch.zeros(0, 4)},
            {"scale": torch.ones(2, 5, dtype=torch.bfloat16)},
            {"noise": torch.ones(3, 1)},
            {"noise": noise(3, 4).float().requires_grad_()},
            {"b": noise(5)},
            {"act": "swish"},
            {"gain": -1.0},
            {"alpha": -0.1},
            {"scale": None, "noise": None},
        ],
        ids=str,
    )
    def test_what_the_kernel_does_not_do_is_left_to_pytorch(self, change, on_host, monkeypatch):
        monkeypatch.setattr(cuda_kernels.kernels["bias_act"], "launch", None)
        inputs, plane = arguments((2, 5, 3, 4), torch.float32)
        call = {**inputs, "noise": plane, "act": "lrelu", **change}
        assert_close(noise_bias_act(**call), noise_bias_act_ref(**call), 1e-5)
        assert self.launched(on_host) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act": "gelu"}, "activation 'gelu' is not one of linear, relu, lrelu"),
        ({"b": torch.zeros(4)}, r"a bias of shape \[4\] does not fit dimension 1 of \[2, 3, 4, 4\]"),
        ({"clamp": -1}, "clamp must be at least 0, not -1"),
    ],
)
def test_bad_arguments_are_named(arguments, message, kernel_device):
    x, scale = torch.zeros(2, 3, 4, 4, device=kernel_device), torch.ones(2, 3, device=kernel_device)
    with pytest.raises(ValueError, match=message):
        noise_bias_act(x, scale, **arguments)


@pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
def test_the_kernel_passes_its_own_check(default, kernel_device):
    with default_dtype(default):
        assert module._check_kernel(kernel_device) is None


@pytest.mark.parametrize(
    ("entry", "at", "value"),
    [
        ("map", 6, 0),  # without a bias
        ("map_planes", 1, 0),  # without a factor
        ("map_rows", 4, 0),  # without noise
        ("gradient", 5, 0),  # dx is not written
        ("gradient_planes", 1, 0),  # without y
        ("gradient_rows", 2, 0),  # without x
        ("totals", 0, 0),
    ],
)
def test_the_check_finds_a_kernel_that_computes_something_else(entry, at, value, on_host, monkeypatch):
    right = on_host[operators.NAME]

    def wrong(name, grid, block, params, device):
        if short(name) == entry:
            if entry == "totals":
                return
            params = params[: 8 * at] + bytes(8) + params[8 * at + 8 :]
        right(name, grid, block, params, device)

    monkeypatch.setattr(KERNEL, "launch", wrong)
    assert module._check_kernel(torch.device("cpu"))
