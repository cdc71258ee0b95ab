"""upfirdn2d against golden numbers, against its definition written as loops, and against `_ref` in every derivative."""

import functools

import numpy as np
import pytest
import torch
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, golden, noise

from torch_utils.ops.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upfirdn2d_ref, upsample2d

GOLDEN, GOLDEN_CASES = golden("upfirdn2d")
LONG = [0.1, -0.3, 0.2, 0.9, 1.1, -0.4, 0.3, 0.05, 0.7]  # separable: nine taps, no symmetry
WIDE = [[1, 2, 3, -1], [4, 5, 6, 0.5]]  # two-dimensional, and not square
# Each takes images from 1x1 on.
CASES = {
    "no filter": {"f": None, "up": 2, "padding": [0, 1, 1, 0]},
    "up": {"f": [1, 3, 3, 1], "up": 2, "padding": [2, 1, 2, 1], "gain": 4},
    "down": {"f": [1, 3, 3, 1], "down": 2, "padding": [2, 1, 3, 3]},
    "filter": {"f": [1, 2, 5], "padding": 1, "flip_filter": True},
    "up and down": {"f": WIDE, "up": [2, 3], "down": [3, 2], "padding": [3, 2, 1, 4], "gain": 1.7},
    "flipped": {"f": WIDE, "up": [1, 2], "padding": [3, 0, 2, 1], "flip_filter": True, "gain": 0.5},
    "separable": {"f": LONG, "up": [3, 1], "down": [2, 1], "padding": [7, 8, 4, 5], "gain": 2.5},
    "separable, flipped": {"f": LONG, "up": [1, 2], "down": [1, 3], "padding": [9, 3, 8, 6], "flip_filter": True},
}
LAYOUTS = {
    "strided": lambda: noise(2, 6, 14, 15)[:, ::2, 1::2, ::3],
    "channels_last": lambda: noise(2, 3, 7, 5).contiguous(memory_format=torch.channels_last),
    "transposed": lambda: noise(2, 3, 5, 7).transpose(2, 3),
    "expanded": lambda: noise(1, 3, 1, 1).expand(2, 3, 7, 5),
}


def both(f, **kwargs):
    """The op and its reference, with a filter in double: then a separable one and its outer product are the same."""
    taps = None if f is None else setup_filter(f).double()
    return functools.partial(upfirdn2d, f=taps, **kwargs), functools.partial(upfirdn2d_ref, f=taps, **kwargs)


@pytest.mark.parametrize("function", [upfirdn2d, upfirdn2d_ref])
@pytest.mark.parametrize("i", range(len(GOLDEN_CASES)))
def test_equals_the_golden_output_and_gradient(i, function):
    case = dict(GOLDEN_CASES[i])
    x = GOLDEN[f"{i}.x"].requires_grad_()
    y = function(x, setup_filter(case.pop("f")), **case)
    (dx,) = torch.autograd.grad(y, x, GOLDEN[f"{i}.dy"])
    assert_close([y, dx], [GOLDEN[f"{i}.y"], GOLDEN[f"{i}.dx"]])


def by_definition(x, f, up, down, padding, flip_filter, gain):
    """One channel, one pixel at a time; padding from 0 on."""
    (ux, uy), (dx, dy), (x0, x1, y0, y1), (fh, fw) = up, down, padding, f.shape
    padded = np.zeros([y0 + x.shape[0] * uy + y1, x0 + x.shape[1] * ux + x1])
    for i, j in np.ndindex(x.shape):
        padded[y0 + i * uy, x0 + j * ux] = x[i, j]
    out = np.zeros([(padded.shape[0] - fh) // dy + 1, (padded.shape[1] - fw) // dx + 1])
    for i, j in np.ndindex(out.shape):
        for a, b in np.ndindex(fh, fw):
            tap = f[a, b] if flip_filter else f[fh - 1 - a, fw - 1 - b]
            out[i, j] += gain * tap * padded[i * dy + a, j * dx + b]
    return out


@pytest.mark.parametrize("function", [upfirdn2d, upfirdn2d_ref])
@pytest.mark.parametrize("taps", [LONG, WIDE], ids=["separable", "2-D"])
@pytest.mark.parametrize("flip_filter", [False, True])
def test_equals_the_definition_written_as_loops(function, taps, flip_filter):
    settings = {"up": (2, 3), "down": (3, 2), "padding": (4, 9, 8, 7), "flip_filter": flip_filter, "gain": 1.7}
    f = torch.tensor(taps, dtype=torch.float64)
    x = noise(1, 2, 5, 4)
    f2d = (f if f.ndim == 2 else f.outer(f)).numpy()
    expected = np.stack([by_definition(channel, f2d, **settings) for channel in x[0].numpy()])
    assert_close(function(x, f, **settings)[0], torch.from_numpy(expected))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 2), (129, 3), (2, 151)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_output_and_every_gradient_equal_those_of_ref(case, size):
    op, ref = both(**CASES[case])
    x = noise(2, 3, *size)
    assert_close(derivatives(op, x), derivatives(ref, x))


@pytest.mark.parametrize("padding", [[-1, -2, -3, -1], [-1, 2, 3, -2], [4, -3, -2, 5]], ids=str)
@pytest.mark.parametrize("case", ["up", "down", "flipped", "separable"])
def test_negative_padding_crops_as_in_ref(case, padding):
    op, ref = both(**{**CASES[case], "padding": padding})
    x = noise(1, 2, 17, 19)
    assert_close(derivatives(op, x), derivatives(ref, x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES)
def test_the_layout_of_the_input_changes_nothing(case, layout):
    op, ref = both(**CASES[case])
    x = LAYOUTS[layout]()
    packed = torch.empty(x.shape, dtype=x.dtype).copy_(x)
    assert x.stride() != packed.stride()
    assert_close(derivatives(op, x), derivatives(ref, packed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(case, dtype):
    assert_at_most_twice_as_wrong(*both(**CASES[case]), [noise(2, 3, 17, 129)], dtype)


@pytest.mark.parametrize("case", CASES)
def test_first_and_second_derivatives_equal_finite_differences(case):
    op, _ = both(**CASES[case])
    x = noise(1, 2, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(op, x)
    assert torch.autograd.gradgradcheck(op, x)


@pytest.mark.parametrize("case", CASES)
def test_the_gradient_is_the_adjoint(case):
    op, _ = both(**CASES[case])
    x = noise(2, 3, 8, 9).requires_grad_()
    y = op(x)
    cotangent = noise(*y.shape, seed=1)
    (adjoint,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close((y * cotangent).sum(), (x * adjoint).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("case", ["up", "down", "up and down", "separable"])
def test_the_size_of_the_output_is_the_documented_one(case):
    kwargs = {"up": 1, "down": 1, **CASES[case]}
    op, _ = both(**CASES[case])
    f = setup_filter(kwargs["f"])
    ux, uy = np.broadcast_to(kwargs["up"], 2)
    dx, dy = np.broadcast_to(kwargs["down"], 2)
    x0, x1, y0, y1 = kwargs["padding"]
    for height, width in ((5, 6), (6, 5), (7, 7)):
        expected = ((height * uy + y0 + y1 - f.shape[0]) // dy + 1, (width * ux + x0 + x1 - f.shape[-1]) // dx + 1)
        assert op(noise(1, 1, height, width)).shape[2:] == expected


@pytest.mark.parametrize(
    "taps", [[1], [1, 1], [1, 2, 1], [1, 3, 3, 1], [1, 4, 6, 4, 1], [1, 2, 3, 4, 4, 3, 2, 1]], ids=len
)
class TestHelpers:
    """Constant pictures stay constant away from the border, and mirrored pictures give mirrored results."""

    @staticmethod
    def assert_keeps_brightness(y):
        inner = y[:, :, 12:-12, 12:-12]
        assert inner.numel() > 0
        torch.testing.assert_close(inner, torch.full_like(inner, 0.7))

    def test_filter2d_keeps_size_and_brightness(self, taps):
        y = filter2d(torch.full([1, 2, 32, 40], 0.7), setup_filter(taps))
        assert y.shape == (1, 2, 32, 40)
        self.assert_keeps_brightness(y)

    @pytest.mark.parametrize("up", [1, 2, 3, [2, 1]], ids=str)
    def test_upsample2d_multiplies_the_size_and_keeps_brightness(self, taps, up):
        ux, uy = np.broadcast_to(up, 2)
        # With a box as wide as the factor in it, every output pixel has the same share of the taps.
        f = setup_filter(np.outer(np.convolve(taps, np.ones(uy)), np.convolve(taps, np.ones(ux))))
        y = upsample2d(torch.full([1, 2, 32, 40], 0.7), f, up=up)
        assert y.shape == (1, 2, 32 * uy, 40 * ux)
        self.assert_keeps_brightness(y)

    @pytest.mark.parametrize("down", [1, 2, 4, [1, 2]], ids=str)
    def test_downsample2d_divides_the_size_and_keeps_brightness(self, taps, down):
        dx, dy = np.broadcast_to(down, 2)
        y = downsample2d(torch.full([1, 2, 128, 160], 0.7), setup_filter(taps), down=down)
        assert y.shape == (1, 2, 128 // dy, 160 // dx)
        self.assert_keeps_brightness(y)

    def test_results_are_centred_as_far_as_the_number_of_taps_allows(self, taps):
        f, x = setup_filter(taps), noise(1, 1, 8, 10)
        if len(taps) % 2 == 1:
            assert_close(filter2d(x.flip([2, 3]), f), filter2d(x, f).flip([2, 3]))
        else:
            assert_close(upsample2d(x.flip([2, 3]), f), upsample2d(x, f).flip([2, 3]))
            assert_close(downsample2d(x.flip([2, 3]), f), downsample2d(x, f).flip([2, 3]))

    def test_padding_comes_on_top(self, taps):
        f, x = setup_filter(taps), noise(1, 1, 8, 10)
        for helper in (filter2d, upsample2d, downsample2d):
            wider = helper(x, f, padding=[2, 4, 6, 0])
            assert wider.shape == (1, 1, helper(x, f).shape[2] + (3 if helper is downsample2d else 6), wider.shape[3])
            assert_close(helper(x, f, padding=0), helper(x, f))


@pytest.mark.parametrize("taps", [[1, 1], [1, 3, 3, 1], [1, 2, 3, 4, 5, 3, 2, 1]], ids=len)
def test_the_adjoint_of_upsample2d_is_downsample2d_with_the_filter_flipped(taps):
    f, x, y = setup_filter(taps).double(), noise(1, 1, 8, 10), noise(1, 1, 16, 20, seed=1)
    left = (upsample2d(x, f) * y).sum()
    right = (x * downsample2d(y, f, flip_filter=True, gain=4)).sum()
    torch.testing.assert_close(left, right, rtol=1e-10, atol=0)


@pytest.mark.parametrize(
    ("helper", "taps", "touched"),
    [(filter2d, [1, 1], [4, 5]), (upsample2d, [1, 2, 1], [8, 9, 10]), (downsample2d, [1, 2, 1], [2])],
)
def test_where_nothing_is_centred_results_lean_to_a_fixed_side(helper, taps, touched):
    x = torch.zeros(1, 1, 9, 9)
    x[:, :, 4, 4] = 1
    rows, columns = helper(x, setup_filter(taps))[0, 0].nonzero().unbind(dim=1)
    assert sorted(set(rows.tolist())) == sorted(set(columns.tolist())) == touched


def test_helpers_pass_gain_and_flip_on():
    f, x = setup_filter([1, 2, 5]), noise(1, 1, 8, 8)
    for helper in (filter2d, upsample2d, downsample2d):
        assert_close(helper(x, f, gain=3), helper(x, f) * 3)
        assert_close(helper(x, f, flip_filter=True), helper(x, f.flip([0, 1])))
        assert not torch.allclose(helper(x, f, flip_filter=True), helper(x, f))


def test_filters_sum_to_one_and_long_ones_stay_separable():
    short, long = setup_filter([1, 3, 3, 1]), setup_filter(range(1, 9))
    torch.testing.assert_close(short, torch.tensor([1.0, 3, 3, 1]).outer(torch.tensor([1.0, 3, 3, 1])) / 64)
    torch.testing.assert_close(long, torch.arange(1.0, 9) / 36)
    assert setup_filter(None).tolist() == [[1]]
    assert setup_filter([1, 2], normalize=False).tolist() == [[1, 2], [2, 4]]
    assert setup_filter([1, 2], normalize=False, separable=True).tolist() == [1, 2]
    assert setup_filter(range(8), separable=False).shape == (8, 8)


def test_the_gain_of_a_separable_filter_is_shared_by_its_two_passes():
    taps = np.arange(1.0, 9)
    torch.testing.assert_close(setup_filter(taps, gain=9), setup_filter(taps) * 3)
    torch.testing.assert_close(setup_filter([1, 2], gain=9), setup_filter([1, 2]) * 9)


def test_setup_filter_flips():
    assert setup_filter([1, 2], normalize=False, flip_filter=True).tolist() == [[4, 2], [2, 1]]
    assert setup_filter(range(8), normalize=False, flip_filter=True).tolist() == list(range(8))[::-1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"f": np.ones([1, 2, 3])}, r"one or two dimensions and at least one tap, not shape \[1, 2, 3\]"),
        ({"f": []}, r"one or two dimensions and at least one tap, not shape \[0\]"),
        ({"f": [[1, 2], [3, 4]], "separable": True}, "two-dimensional filter cannot be applied separably"),
    ],
)
def test_setup_filter_rejects_what_is_no_filter(arguments, message):
    with pytest.raises(ValueError, match=message):
        setup_filter(**arguments)


@pytest.mark.parametrize("function", [upfirdn2d, upfirdn2d_ref])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(1, 2, 3)}, r"takes \[N, C, H, W\] and a 1-D or 2-D filter, not \[1, 2, 3\]"),
        ({"f": torch.zeros(1, 1, 1)}, r"takes \[N, C, H, W\] and a 1-D or 2-D filter, not .*\[1, 1, 1\]"),
        ({"up": 0}, r"up is a positive int or \[x, y\], not 0"),
        ({"down": [1, 2, 3]}, r"down is a positive int or \[x, y\], not \[1, 2, 3\]"),
        ({"padding": [1, 2, 3]}, r"padding is an int, \[x, y\] or \[x0, x1, y0, y1\], not \[1, 2, 3\]"),
    ],
)
def test_bad_arguments_are_named(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**{"x": torch.zeros(1, 1, 4, 4), "f": None, **arguments})
