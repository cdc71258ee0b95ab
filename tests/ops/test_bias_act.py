"""bias_act against golden numbers of first and second order, and against `_ref` in every derivative."""

import functools

import pytest
import torch
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, golden, noise

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
