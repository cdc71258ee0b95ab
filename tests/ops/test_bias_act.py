"""bias_act against golden numbers of first and second order, and against `_ref` in every derivative."""

import contextlib
import functools

import pytest
import torch
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, golden, noise

from torch_utils.ops import kernels
from torch_utils.ops.bias_act import activations, bias_act, bias_act_ref

GOLDEN, GOLDEN_CASES = golden("bias_act")
SETTINGS = {
    "defaults": {},
    "gain": {"gain": 1.3},
    "clamp": {"gain": 0.7, "clamp": 0.5},
    "no gain": {"gain": 1},
    "gain of zero": {"gain": 0},
    "negative gain": {"gain": -2, "clamp": 3},
    "alpha": {"alpha": 0.37},
    "alpha above one": {"alpha": 1.5, "gain": 0.1},
}


def both(**kwargs):
    """The op and its reference, as functions of x and, if given, b."""
    return functools.partial(bias_act, **kwargs), functools.partial(bias_act_ref, **kwargs)


@pytest.mark.parametrize("function", [bias_act, bias_act_ref])
@pytest.mark.parametrize("i", range(len(GOLDEN_CASES)))
def test_equals_the_golden_values_to_second_order(i, function):
    case = GOLDEN_CASES[i]
    x, b, dy = (GOLDEN[f"{i}.{name}"].requires_grad_() for name in ("x", "b", "dy"))
    y = function(x, b, act=case["act"], gain=case["gain"], clamp=case["clamp"])
    dx, db = torch.autograd.grad(y, [x, b], dy, create_graph=True)
    d2x, d2dy = torch.autograd.grad(dx, [x, dy], GOLDEN[f"{i}.v"], allow_unused=True, materialize_grads=True)
    for name, actual in {"y": y, "dx": dx, "db": db, "d2x": d2x, "d2dy": d2dy}.items():
        assert_close(actual, GOLDEN[f"{i}.{name}"])


def test_the_golden_defaults_are_ours():
    for case in GOLDEN_CASES:
        spec = activations[case["act"]]
        assert (spec.default_alpha, spec.default_gain) == (case["def_alpha"], case["def_gain"])
    assert {case["act"] for case in GOLDEN_CASES} == set(activations)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("act", activations)
def test_output_and_every_gradient_equal_those_of_ref(act, settings):
    op, ref = both(act=act, **SETTINGS[settings])
    inputs = noise(2, 5, 3, 4), noise(5, seed=1)
    assert_close(derivatives(op, *inputs), derivatives(ref, *inputs))
    assert_close(derivatives(op, inputs[0]), derivatives(ref, inputs[0]))  # without a bias


@pytest.mark.parametrize("act", ["linear", "lrelu", "swish"])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((1,), 0), ((2, 1), 1), ((129, 151), 0), ((129, 151), 1), ((1, 2, 151), 2), ((2, 3, 1, 2, 3), 1), ((0, 3), 1)],
    ids=str,
)
def test_the_bias_runs_along_any_dimension(act, shape, dim):
    op, ref = both(act=act, dim=dim, clamp=1.2)
    inputs = noise(*shape), noise(shape[dim], seed=1)
    assert_close(derivatives(op, *inputs), derivatives(ref, *inputs))
    assert_close(op(*inputs), op((inputs[0].movedim(dim, -1) + inputs[1]).movedim(-1, dim)))


@pytest.mark.parametrize("act", activations)
@pytest.mark.parametrize(
    "x",
    [noise(4, 10, 9, 8)[::2, ::2, 1::3, ::4], noise(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)],
    ids=["strided", "channels_last"],
)
def test_the_layout_of_the_input_changes_nothing(act, x):
    op, ref = both(act=act, clamp=0.9)
    packed, b = torch.empty(x.shape, dtype=x.dtype).copy_(x), noise(5, seed=1)
    assert x.stride() != packed.stride()
    assert_close(derivatives(op, x, b), derivatives(ref, packed, b))


def test_channels_last_stays_channels_last():
    x = noise(2, 5, 3, 4).contiguous(memory_format=torch.channels_last)
    assert bias_act(x, noise(5), act="lrelu", clamp=1).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", ["defaults", "clamp", "alpha above one"])
@pytest.mark.parametrize("act", activations)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(act, settings, dtype):
    op, ref = both(act=act, **SETTINGS[settings])
    # Odd multiples of 1/8: at the kinks of activation and clamp it is rounding that decides what the slope is.
    total = (noise(3, 5, 17, 129) * 4).floor() / 4 + 1 / 8
    b = (noise(5, seed=1) * 16).round() / 16
    x = total - b[:, None, None]
    assert_at_most_twice_as_wrong(op, ref, [x, b], dtype)


@pytest.mark.parametrize("settings", ["defaults", "clamp"])
@pytest.mark.parametrize("act", activations)
def test_first_and_second_derivatives_equal_finite_differences(act, settings):
    op, _ = both(act=act, **SETTINGS[settings])
    inputs = noise(2, 3, 2).requires_grad_(), noise(3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize("act", activations)
def test_the_gradient_is_zero_where_the_output_is_clamped(act):
    op, _ = both(act=act, gain=5, clamp=1.5)
    x = noise(200).mul(3).requires_grad_()
    y = op(x[None])[0]
    (dx,) = torch.autograd.grad(y.sum(), x)
    clamped = bias_act(x[None], act=act, gain=5)[0].abs() > 1.5
    assert 20 < clamped.sum() < 200
    assert (y[clamped].abs() == 1.5).all()
    assert (dx[clamped] == 0).all()
    assert (dx[~clamped] != 0).any()


@pytest.mark.parametrize("function", [bias_act, bias_act_ref])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"act": "gelu"}, "activation 'gelu' is not one of linear, relu, lrelu"),
        ({"b": torch.zeros(4)}, r"a bias of shape \[4\] does not fit dimension 1 of \[2, 3\]"),
        ({"b": torch.zeros(2), "dim": 1}, r"a bias of shape \[2\] does not fit dimension 1 of \[2, 3\]"),
        ({"b": torch.zeros(3, 1)}, r"a bias of shape \[3, 1\] does not fit dimension 1 of \[2, 3\]"),
        ({"clamp": -1}, "clamp must be at least 0, not -1"),
    ],
)
def test_bad_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(2, 3), **arguments)


KERNEL_SETTINGS = {
    "defaults": {"act": "lrelu"},
    "clamp": {"act": "lrelu", "gain": 0.7, "clamp": 0.5},
    "alpha above one": {"act": "lrelu", "alpha": 1.5, "gain": 0.1},
    "relu": {"act": "relu", "clamp": 1.2},
    "linear with gain": {"act": "linear", "gain": 1.3},
    "linear with clamp": {"act": "linear", "clamp": 0.9},
}
KERNEL_SHAPES = [
    (2, 1, 3, 5),
    (1, 129, 3, 7),
    (3, 151, 9, 1),
    (2, 5, 1, 1),
    (2, 3, 67, 43),
    (1, 1, 1, 1),
    (129, 151),
    (1, 1),
    (151, 1),
]


def made_by_the_kernel(y):
    return type(y.grad_fn).__name__ == "_BiasActBackward"


def off_the_kinks(shape, dtype, channels_last=False):
    """x and b whose sum is an odd multiple of 1/8, so that rounding does not decide on a slope."""
    b = (noise(shape[1], seed=1) * 16).round() / 16
    x = (noise(*shape) * 4).floor() / 4 + 1 / 8 - b.reshape(1, -1, *[1] * (len(shape) - 2))
    x = x.to(dtype)
    return [x.contiguous(memory_format=torch.channels_last) if channels_last else x, b.to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [(shape, False) for shape in KERNEL_SHAPES] + [(shape, True) for shape in KERNEL_SHAPES if len(shape) == 4],
    ids=str,
)
def test_the_kernel_equals_ref_in_every_derivative(shape, channels_last, dtype, cpu_kernels):
    tolerance = 4 * torch.finfo(dtype).eps
    x, b = off_the_kinks(shape, dtype, channels_last)
    for settings in KERNEL_SETTINGS.values():
        op, ref = both(**settings)
        assert made_by_the_kernel(op(x.clone().requires_grad_(), b))
        for inputs in ([x, b], [x]):
            actual = derivatives(op, *inputs, rounding=dtype)
            expected = derivatives(ref, *(t.double() for t in inputs), rounding=dtype)
            assert all(t.dtype == dtype for t in actual)
            assert_close([t.double() for t in actual], expected, tolerance)
            assert actual[0].stride() == inputs[0].stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("settings", KERNEL_SETTINGS)
def test_the_kernel_is_at_most_twice_as_wrong_as_plain_pytorch(settings, channels_last, dtype, cpu_kernels):
    op, ref = both(**KERNEL_SETTINGS[settings])
    inputs = off_the_kinks((3, 5, 17, 129), dtype, channels_last)
    assert_at_most_twice_as_wrong(op, ref, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_sums_of_many_numbers_stay_exact(channels_last, dtype, cpu_kernels):
    """More than one part, more than one run of float32 sums, and a remainder of each."""
    op, ref = both(act="lrelu")
    inputs = off_the_kinks((3, 7, 301, 257), dtype, channels_last)
    assert_at_most_twice_as_wrong(op, ref, inputs, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("clamp", [None, 3.0])
@pytest.mark.parametrize("act", ["linear", "relu", "lrelu"])
def test_nan_and_infinity_pass_through_the_kernel_as_through_pytorch(act, clamp, dtype, cpu_kernels):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([nan, inf, -inf, 0.0, 1.0, -1.0]).repeat(1, 50).t().contiguous().to(dtype)  # [300, 1]
    dy = torch.tensor([1.0, inf, nan, -inf, 1.0]).repeat(60)[:, None].to(dtype)
    results = []
    for enabled in (True, False):
        leaf = x.clone().requires_grad_()
        with contextlib.nullcontext() if enabled else kernels.disabled():
            y = bias_act(leaf, torch.zeros(1, dtype=dtype), act=act, gain=2, clamp=clamp)
            assert made_by_the_kernel(y) == enabled
            results.append((y.detach(), *torch.autograd.grad(y, leaf, dy)))
    (y, dx), (native_y, native_dx) = results
    assert torch.equal(y.nan_to_num(nan=77), native_y.nan_to_num(nan=77))
    known = ~(x.isnan() | ((x == 0) & dy.isinf()))  # PyTorch itself does not agree with itself about the others
    assert torch.equal(dx[known].nan_to_num(nan=77), native_dx[known].nan_to_num(nan=77))


def test_the_kernel_rounds_to_the_nearest_even(cpu_kernels):
    bits = torch.randint(-(2**31), 2**31, [1 << 16], dtype=torch.int64, generator=torch.Generator().manual_seed(0))
    half = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.3895314e38, 3.4e38, 1e-40])
    wide = torch.cat([bits.to(torch.int32).view(torch.float32), half])
    wide = wide[wide.abs() < 1e38]
    x = wide.to(torch.bfloat16)[:, None]
    y = bias_act(x, act="linear", gain=1.7)
    assert torch.equal(y, (x.float() * torch.tensor(1.7)).to(torch.bfloat16))


@pytest.mark.parametrize(
    "x",
    [
        noise(4, 10, 9, 8).float()[::2, ::2, 1::3, ::4],
        noise(2, 5, 4, 3).float().transpose(2, 3),
        noise(6, 5).float()[:, ::2],
        noise(2, 5, 3).float(),
        noise(2, 5, 3, 4),
        noise(2, 5, 3, 4).half(),
        torch.zeros(0, 5),
        torch.zeros(2, 5, 0, 3),
    ],
    ids=lambda x: f"{list(x.shape)} {x.stride()} {x.dtype}",
)
def test_what_the_kernel_does_not_do_is_left_to_pytorch(x, cpu_kernels):
    op, ref = both(act="lrelu", clamp=0.9)
    b = noise(x.shape[1], seed=1).to(x.dtype)
    y = op(x.detach().requires_grad_(), b)
    assert not made_by_the_kernel(y)
    assert_close(y, ref(x, b), 4 * torch.finfo(x.dtype).eps)


@pytest.mark.parametrize(
    "settings",
    [{"dim": 0}, {"gain": -1}, {"gain": 0}, {"alpha": -0.1}, {"act": "swish"}, {"act": "linear", "gain": 1}],
    ids=str,
)
def test_settings_that_the_kernel_does_not_do_are_left_to_pytorch(settings, cpu_kernels):
    settings = {"act": "lrelu", **settings}
    op, ref = both(**settings)
    inputs = [noise(5, 5).float(), noise(5, seed=1).float()]
    assert not made_by_the_kernel(op(inputs[0].clone().requires_grad_(), inputs[1]))
    assert_close(derivatives(op, *inputs), derivatives(ref, *inputs), 1e-5)


def test_a_bias_of_another_dtype_is_left_to_pytorch(cpu_kernels):
    x = noise(4, 5).to(torch.bfloat16).requires_grad_()
    assert not made_by_the_kernel(bias_act(x, noise(5).float(), act="lrelu"))


def test_the_gradient_may_come_in_any_layout(cpu_kernels):
    op, ref = both(act="lrelu", clamp=1)
    x = off_the_kinks((2, 5, 6, 8), torch.float32, channels_last=True)[0].requires_grad_()
    for dy in (
        torch.ones(1).expand(x.shape),
        noise(2, 5, 12, 8).float()[:, :, ::2],
        noise(8, 6, 5, 2).float().permute(3, 2, 1, 0),
    ):
        (actual,), (expected,) = (torch.autograd.grad(function(x), x, dy) for function in (op, ref))
        assert_close(actual, expected, 1e-6)


def test_only_what_needs_a_gradient_gets_one(cpu_kernels):
    x, b = off_the_kinks((4, 5), torch.float32)
    assert bias_act(x, b, act="lrelu").grad_fn is None
    with torch.no_grad():
        assert bias_act(x.requires_grad_(), b, act="lrelu").grad_fn is None
    x = x.detach()
    b.requires_grad_()
    (db,) = torch.autograd.grad(bias_act(x, b, act="relu", gain=1).sum(), b)
    assert_close(db, ((x + b) > 0).sum(dim=0).float())


def test_a_constant_gradient_can_be_differentiated_again(cpu_kernels):
    x = off_the_kinks((4, 5), torch.float32)[0].requires_grad_()
    (dx,) = torch.autograd.grad(bias_act(x, act="lrelu").sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(dx.square().sum(), x)
    assert (second == 0).all()


def test_only_the_output_is_kept_for_the_gradient(cpu_kernels):
    kept = []
    x, b = off_the_kinks((2, 5, 6, 8), torch.float32, channels_last=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = bias_act(x.requires_grad_(), b.requires_grad_(), act="lrelu", clamp=1)
    assert [t.data_ptr() for t in kept] == [y.data_ptr()]


@pytest.mark.parametrize("channels_last", [False, True])
def test_the_number_of_threads_changes_no_bit(channels_last, cpu_kernels):
    inputs = off_the_kinks((4, 67, 41, 43), torch.float32, channels_last)
    op, _ = both(act="lrelu", clamp=1.5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(derivatives(op, *inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
