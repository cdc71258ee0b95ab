"""The CUDA kernel of bias_act, on a GPU or compiled for the host: every derivative against `_ref` in float64."""

import functools
import math
import random

import pytest
import torch
from checks import default_dtype
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, noise

from torch_utils.ops import activations, bias_act_cuda
from torch_utils.ops import bias_act as module
from torch_utils.ops.bias_act import bias_act, bias_act_ref
from torch_utils.ops.cuda_kernels import SUFFIXES

ACTS = list(activations.activations)
DTYPES = pytest.mark.parametrize("dtype", list(SUFFIXES), ids=str)
# Numbers that every dtype has: rounding must not decide on which side of a kink an output is.
SETTINGS = ({}, {"gain": 0.75, "clamp": 0.5}, {"alpha": 1.5, "gain": 0.125, "clamp": 3.0})
LAYOUTS = {
    "packs of a plane": ((2, 3, 4, 6), 1, None),
    "packs of a row": ((2, 24, 3, 5), 1, torch.channels_last),
    "packs of several rows": ((2, 3, 4, 4), 1, torch.channels_last),
    "more packs in a row than threads": ((2, 2104), 1, None),
    "odd plane": ((1, 129, 3, 7), 1, None),
    "odd row": ((1, 129, 3, 7), 1, torch.channels_last),
    "odd rows": ((151, 129), 1, None),
    "long odd row": ((3, 515), 1, None),
    "one pixel": ((2, 5, 1, 1), 1, None),
    "one channel": ((3, 1, 5, 8), 1, torch.channels_last),
    "one number": ((1, 1), 1, None),
    "two numbers": ((2,), 0, None),
    "batch": ((3, 2, 5, 4), 0, None),
    "batch, channels_last": ((3, 2, 5, 4), 0, torch.channels_last),
    "height, channels_last": ((2, 4, 3, 5), 2, torch.channels_last),
    "width": ((2, 3, 5, 8), 3, None),
    "last of five": ((2, 3, 1, 2, 8), -1, None),
    "several parts of a plane": ((2, 3, 67, 43), 1, None),
    "several parts of rows": ((1111, 16), 1, None),
}
# Every way of dealing a tensor to threads in one dtype, the common ones in all.
COMMON = ("packs of a plane", "packs of a row", "odd row")
CASES = [
    (layout, dtype)
    for i, layout in enumerate(LAYOUTS)
    for j, dtype in enumerate(SUFFIXES)
    if layout in COMMON or i % len(SUFFIXES) == j
]


def off_the_kinks(shape, dim, layout, dtype, device):
    """x and b whose sum is odd multiples of 1/8."""
    b = (noise(shape[dim], seed=1) * 16).round() / 16
    along = [-1 if i == dim % len(shape) else 1 for i in range(len(shape))]
    x = ((noise(*shape) * 4).floor() / 4 + 1 / 8 - b.reshape(along)).to(device, dtype)
    return [x if layout is None else x.contiguous(memory_format=layout), b.to(device, dtype)]


def made_by_the_kernel(y):
    return "gan_bias_act" in type(y.grad_fn).__name__


def assert_equals_ref(inputs, order=2, **settings):
    """Also without a bias."""
    op, ref = (functools.partial(f, **settings) for f in (bias_act, bias_act_ref))
    dtype = inputs[0].dtype
    for given in (inputs, inputs[:1]):
        actual = derivatives(op, *given, rounding=dtype, order=order)
        expected = derivatives(ref, *(t.cpu().double() for t in given), rounding=dtype, order=order)
        assert actual[0].stride() == given[0].stride()
        largest = max(e.abs().max() for e in expected)
        for a, e in zip(actual, expected, strict=True):
            assert a.dtype == dtype
            scale = e.abs().max() if e.shape == given[0].shape else largest  # sums cancel
            assert (a.cpu().double() - e).abs().max() <= max(4 * torch.finfo(dtype).eps, 2e-6) * scale


@pytest.mark.parametrize(("layout", "dtype"), CASES, ids=str)
def test_the_kernel_equals_ref_in_every_derivative(layout, dtype, kernel_device):
    shape, dim, order = LAYOUTS[layout]
    inputs = off_the_kinks(shape, dim, order, dtype, kernel_device)
    pick = random.Random(f"{layout} {dtype}")
    assert_equals_ref(inputs, dim=dim, act="linear", gain=0.5)  # keeps nothing
    for act in ("lrelu", pick.choice(ACTS)):
        assert_equals_ref(inputs, dim=dim, act=act, **pick.choice(SETTINGS))


@DTYPES
@pytest.mark.parametrize("act", ACTS)
def test_every_activation_with_every_setting(act, dtype, kernel_device):
    for settings in SETTINGS:
        assert_equals_ref(off_the_kinks((2, 8, 3, 8), 1, None, dtype, kernel_device), act=act, **settings)


@DTYPES
@pytest.mark.parametrize("layout", COMMON)
@pytest.mark.parametrize("act", ACTS)
def test_it_is_at_most_twice_as_wrong_as_plain_pytorch(act, layout, dtype, kernel_device):
    op, ref = (functools.partial(f, act=act, gain=1.25, clamp=1.5) for f in (bias_act, bias_act_ref))
    shape, dim, order = LAYOUTS[layout]
    assert_at_most_twice_as_wrong(op, ref, off_the_kinks(shape, dim, order, dtype, kernel_device), dtype)


@pytest.mark.parametrize("act", ["lrelu", "swish"])
def test_a_single_number_without_dimensions(act, kernel_device):
    x = torch.tensor(-0.75, device=kernel_device)
    actual = derivatives(functools.partial(bias_act, act=act), x)
    expected = derivatives(functools.partial(bias_act_ref, act=act), x.cpu().double())
    assert_close([t.cpu().double() for t in actual], expected, 1e-6)


@pytest.mark.parametrize("act", ["lrelu", "linear", "tanh", "swish", "elu"])
def test_the_third_order_is_right(act, kernel_device):
    """The derivative of a second derivative, of which the kernel itself has none unless the slope is constant."""

    def third(call, x, b, dy):
        x, b, dy = (t.requires_grad_() for t in (x, b, dy))
        y = call(x, b, act=act, gain=1.5, clamp=2.0)
        dx, db = torch.autograd.grad(y, [x, b], dy, create_graph=True)
        second = torch.autograd.grad(
            dx.square().sum() + db.square().sum(), [x, b, dy], create_graph=True, materialize_grads=True
        )
        total = sum(t.square().sum() for t in second)
        return torch.autograd.grad(total, [x, b, dy], materialize_grads=True)

    inputs = [*off_the_kinks((2, 3, 4, 4), 1, None, torch.float32, kernel_device), noise(2, 3, 4, 4, seed=3).float()]
    inputs[2] = inputs[2].to(kernel_device)
    expected = third(bias_act_ref, *(t.detach().cpu().double() for t in inputs))
    actual = third(bias_act, *inputs)
    assert_close([t.cpu().double() for t in actual], list(expected), 1e-5)


@pytest.mark.parametrize("act", ["lrelu", "softplus"])
def test_a_gradient_of_the_bias_alone_can_be_differentiated(act, kernel_device):
    inputs = off_the_kinks((4, 5, 3), 1, None, torch.float32, kernel_device)
    results = []
    for call, given in ((bias_act, inputs), (bias_act_ref, [t.cpu().double() for t in inputs])):
        x, b = (t.clone().requires_grad_() for t in given)
        y = call(x, b, act=act, clamp=1.25)
        dy = noise(*y.shape, seed=2).to(y).requires_grad_()
        (db,) = torch.autograd.grad(y, b, dy, create_graph=True)
        results.append(torch.autograd.grad(db.square().sum(), [dy, b, x], materialize_grads=True))
    assert_close([t.cpu().double() for t in results[0]], list(results[1]), 1e-5)


@DTYPES
@pytest.mark.parametrize("clamp", [None, 3.0])
@pytest.mark.parametrize("act", ACTS)
def test_nan_and_infinity_pass_as_through_pytorch(act, clamp, dtype, kernel_device):
    nan, inf = math.nan, math.inf
    x = torch.tensor([nan, inf, -inf, 0.0, 1.0, -1.0]).repeat(8).to(kernel_device, dtype)[None]
    y = bias_act(x, torch.zeros(1, device=x.device, dtype=dtype), dim=0, act=act, gain=2, clamp=clamp)
    ref = bias_act_ref(x.cpu().double(), act=act, gain=2, clamp=clamp)
    assert torch.equal(y.isnan().cpu(), ref.isnan())
    assert_close(y.cpu().double().nan_to_num(), ref.to(dtype).double().nan_to_num(), 2 * torch.finfo(dtype).eps)


@DTYPES
def test_relu_stops_infinite_gradients(dtype, kernel_device):
    x = torch.tensor([-1.0, 0.0, 1.0, math.nan] * 4, device=kernel_device, dtype=dtype)[None].requires_grad_()
    (dx,) = torch.autograd.grad(bias_act(x, act="relu", gain=1), x, torch.full_like(x, math.inf))
    assert dx.tolist() == [[0.0, 0.0, math.inf, math.inf] * 4]


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x[::2, ::2, 1::3, ::4],
        lambda x: x.transpose(2, 3),
        lambda x: x.permute(3, 1, 0, 2),
        lambda x: x.flatten()[1 : 1 + 2 * 10 * 8].view(2, 10, 8, 1),  # not at a multiple of 16 bytes
        lambda x: x[:1, :1, :1, :1].expand(3, 10, 2, 4),
    ],
    ids=["strided", "transposed", "permuted", "shifted", "expanded"],
)
@pytest.mark.parametrize("act", ["lrelu", "sigmoid"])
def test_tensors_may_lie_in_any_order(act, make, kernel_device):
    x = make(noise(4, 10, 9, 8).half().to(kernel_device))
    b = noise(2 * x.shape[1], seed=1).half().to(kernel_device)[::2]
    dy = make(noise(4, 10, 9, 8, seed=2).half().to(kernel_device))
    results = []
    for call, given in ((bias_act, (x, b, dy)), (bias_act_ref, (t.cpu().double() for t in (x, b, dy)))):
        x, b, dy = (t.detach().requires_grad_() for t in given)
        y = call(x, b, act=act)
        first = torch.autograd.grad(y, [x, b], dy, create_graph=True)
        second = torch.autograd.grad(first, [x, b, dy], [dy, b], materialize_grads=True)
        results.append([t.detach().cpu().double() for t in (y, *first, *second)])
    assert_close(*results, 4e-3)


@DTYPES
@pytest.mark.parametrize("clamp", [0.3, 256 * 0.5**0.5])
def test_a_limit_that_the_dtype_lacks_stops_gradients_too(clamp, dtype, kernel_device):
    x = torch.full([1, 8, 2, 2], 1000.0, device=kernel_device, dtype=dtype).requires_grad_()
    y = bias_act(x, act="lrelu", clamp=clamp)
    assert made_by_the_kernel(y)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert (dx == 0).all()


@DTYPES
@pytest.mark.parametrize("act", sorted(set(ACTS) - set(activations.HOMOGENEOUS)))
def test_large_numbers_have_finite_derivatives(act, dtype, kernel_device):
    sizes = [19.0, 20.0, 21.0, 88.0, 100.0, 200.0, 3e4]
    x = torch.tensor([*(-size for size in sizes), *sizes], device=kernel_device, dtype=dtype)[None]
    actual = derivatives(functools.partial(bias_act, act=act), x, rounding=dtype)
    expected = derivatives(functools.partial(bias_act_ref, act=act), x.cpu().double(), rounding=dtype)
    atol = 1e-5 if dtype == torch.float32 else 1e-3
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a.cpu().double(), e, rtol=4 * torch.finfo(dtype).eps, atol=atol)


def test_the_operators_are_what_pytorch_expects(kernel_device):
    """opcheck: schema, fake tensors, autograd, and dynamic shapes."""
    shapes = (2, 3, 4, 4), (3,), (2, 3, 4, 4)
    x, b, t = (noise(*shape).float().to(kernel_device).requires_grad_() for shape in shapes)
    lrelu, swish = (1, "lrelu", 0.2, 1.5, 1.0), (-3, "swish", 0.0, 1.5, None)
    calls = [
        (torch.ops.gan.bias_act, (x, b, *lrelu)),
        (torch.ops.gan.bias_act_grad, (t, None, None, None, False, 1, "linear", 0.0, 2.0, None)),
        (torch.ops.gan.bias_act_grad, (t, None, x, b, True, *swish)),
        (torch.ops.gan.bias_act_grad2, (*(v.detach() for v in (t, b, x, t, b)), True, *swish)),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("b", torch.zeros(4)),
        ("b", torch.zeros(3).half()),
        ("t", torch.zeros(1, 3, 4)),
        ("t", torch.zeros(2, 3, 4).half()),
    ],
    ids=str,
)
def test_operators_read_nothing_that_is_not_there(name, wrong, on_host):
    given = {"b": torch.zeros(3), "t": torch.zeros(2, 3, 4), name: wrong}
    with pytest.raises(AssertionError):
        torch.ops.gan.bias_act_grad(given["t"], None, torch.zeros(2, 3, 4), given["b"], False, 1, "swish", 0, 1, None)
    assert not on_host["bias_act"].launched


def test_each_way_is_one_pass(on_host):
    x, b = off_the_kinks((2, 8, 4, 4), 1, torch.channels_last, torch.float16, torch.device("cpu"))
    y = bias_act(x.requires_grad_(), b.requires_grad_(), act="lrelu", clamp=1)
    y.sum().backward()
    expected = ["bias_act_lines_rows_8_f16", "bias_act_slopes_rows_8_f16", "bias_act_totals"]
    assert on_host["bias_act"].launched == expected
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_a_gradient_penalty_passes_once_more_each_way(on_host):
    """As in R1: weights behind the activation, a gradient of the image, and then of its length."""
    x, b = off_the_kinks((2, 8, 4, 4), 1, torch.channels_last, torch.float16, torch.device("cpu"))
    weights = noise(*x.shape).to(x).requires_grad_()
    y = bias_act(x.requires_grad_(), b.requires_grad_(), act="lrelu")
    on_host["bias_act"].launched.clear()
    (dx,) = torch.autograd.grad((y * weights).sum(), x, create_graph=True)
    assert on_host["bias_act"].launched == ["bias_act_slopes_rows_8_f16", "bias_act_totals"]
    on_host["bias_act"].launched.clear()
    dx.square().sum().backward()
    assert on_host["bias_act"].launched == ["bias_act_slopes_planes_8_f16"]  # no zeros through the forward graph
    assert x.grad is None


@pytest.mark.parametrize("act", ["lrelu", "swish", "linear"])
def test_only_what_the_gradient_reads_is_kept(act, on_host):
    kept = []
    x, b = off_the_kinks((2, 5, 6, 8), 1, None, torch.float32, torch.device("cpu"))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        y = bias_act(x.requires_grad_(), b.requires_grad_(), act=act, gain=2, clamp=1 if act == "lrelu" else None)
    assert made_by_the_kernel(y)
    assert kept == {"lrelu": [y.data_ptr()], "swish": [x.data_ptr(), b.data_ptr()], "linear": []}[act]


@pytest.mark.parametrize(
    "settings",
    [
        {"act": "lrelu", "gain": -1},
        {"act": "relu", "gain": 0},
        {"act": "lrelu", "alpha": -0.1},
        {"act": "linear", "gain": 1},
        {"act": "linear", "b": None},
        {"dtype": torch.float64},
        {"b": torch.zeros(5, dtype=torch.float16)},
        {"x": torch.zeros(0, 5)},
    ],
    ids=str,
)
def test_the_rest_is_left_to_pytorch(settings, on_host):
    dtype = settings.pop("dtype", torch.float32)
    x = settings.pop("x", noise(4, 5).to(dtype)).requires_grad_()
    b = settings.pop("b", noise(5, seed=1).to(dtype))
    y = bias_act(x, b, **{"act": "swish", **settings})
    assert not made_by_the_kernel(y)
    assert not on_host["bias_act"].launched
    assert_close(y, bias_act_ref(x, b, **{"act": "swish", **settings}), 1e-6)


@pytest.mark.parametrize("settings", [{"act": "lrelu", "clamp": 1}, {"act": "relu"}, {"act": "swish"}], ids=str)
def test_a_constant_gradient_can_be_differentiated_as_that_of_ref(settings, kernel_device):
    results = []
    for function, dtype in ((bias_act, torch.float32), (bias_act_ref, torch.float64)):
        x = noise(4, 5).float().to(kernel_device, dtype).requires_grad_()
        (dx,) = torch.autograd.grad(function(x, **settings).sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(dx.sum(), x)
        results.append([dx.detach().double(), second.double()])
    assert_close(*results, 1e-5)


@pytest.mark.parametrize("layout", ["several parts of a plane", "several parts of rows"])
def test_two_calls_agree_in_every_bit(layout, kernel_device):
    shape, dim, order = LAYOUTS[layout]
    inputs = off_the_kinks(shape, dim, order, torch.float32, kernel_device)
    first, second = (derivatives(functools.partial(bias_act, act="swish"), *inputs) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


class TestCheck:
    """What the kernel has to pass on every machine before it is used."""

    @pytest.mark.parametrize("default", [torch.float32, torch.float64], ids=str)
    def test_it_passes(self, default, kernel_device):
        with default_dtype(default):
            assert module._check_cuda_kernel(kernel_device) is None

    def test_it_runs_every_entry_point(self, on_host):
        module._check_cuda_kernel(torch.device("cpu"))
        launched = set(on_host["bias_act"].launched)
        wide = {
            f"bias_act_{task}_{layout}_{pack}_{suffix}"
            for task in ("lines", "slopes")
            for layout in ("rows", "planes")
            for suffix, pack in (("f32", 4), ("f16", 8), ("bf16", 8))
        }
        narrow = {"rows_1_f32", "rows_2_f16", "rows_2_bf16", *(f"planes_1_{suffix}" for suffix in SUFFIXES.values())}
        assert launched == wide | {f"bias_act_any_{name}" for name in narrow} | {"bias_act_totals"}

    @pytest.mark.parametrize(
        ("spoil", "found"),
        [
            (lambda tensors, sums: tensors.t is None and tensors.y.mul_(1.01), "lrelu in f32: y is off by"),
            (lambda tensors, sums: tensors.t is not None and tensors.y.mul_(1.01), "lrelu in f32: dx is off by"),
            (lambda tensors, sums: sums.mul_(1.01), "lrelu in f32: db is off by"),
            (lambda tensors, sums: tensors.z is not None and tensors.z.mul_(1.01), "tanh in f32: d2x is off by"),
            (lambda tensors, sums: tensors.z is not None and sums.mul_(math.nan), "tanh in f32: d2b is off by nan"),
            (lambda tensors, sums: tensors.y.nan_to_num_(0), "NaN and infinity in f32"),
        ],
    )
    def test_it_says_what_is_wrong(self, spoil, found, on_host, monkeypatch):
        real = bias_act_cuda._launch

        def launch(tensors, *args):
            sums = real(tensors, *args)
            spoil(tensors, sums)
            return sums

        monkeypatch.setattr(bias_act_cuda, "_launch", launch)
        assert module._check_cuda_kernel(torch.device("cpu")).startswith(found)
