"""conv2d_resample against its definition: upsample, convolve, downsample. Its golden numbers are modulated_conv2d's."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, noise

from torch_utils.ops.conv2d_resample import conv2d_resample, conv2d_resample_ref
from torch_utils.ops.upfirdn2d import downsample2d, setup_filter, upsample2d

FILTERS = {
    "none": None,
    "short": setup_filter([1, 3, 3, 1]),
    "lopsided": setup_filter([[1, 2, 5], [0.5, -1, 3], [2, 0, 1], [1, 1, 4]]).double(),
    "separable": setup_filter([1, 2, 3, 4, 5, 6, 5, 2]).double(),
}
FACTORS = [(1, 1), (2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (2, 3)]  # up, down
PADDINGS = {0: 0, 1: 1, "2 in x, 1 in y": [2, 1], "each side": [1, 3, 2, 0], "crop": [-1, 1, 0, -1], "crop all": -1}


def both(**kwargs):
    """The op and its reference, as functions of x and w."""
    return functools.partial(conv2d_resample, **kwargs), functools.partial(conv2d_resample_ref, **kwargs)


@pytest.mark.parametrize("kernel", [1, 2, 3, 4, (1, 3), (3, 1), (2, 5)], ids=str)
@pytest.mark.parametrize(("up", "down"), FACTORS)
@pytest.mark.parametrize(("groups", "flip_weight"), [(1, True), (1, False), (2, True), (2, False)])
def test_output_and_every_gradient_equal_those_of_ref(kernel, up, down, groups, flip_weight):
    kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
    op, ref = both(
        f=FILTERS["lopsided"], up=up, down=down, padding=[kw // 2, kh // 2], groups=groups, flip_weight=flip_weight
    )
    inputs = noise(2, 4, 8, 7), noise(6, 4 // groups, kh, kw, seed=1)
    assert_close(derivatives(op, *inputs), derivatives(ref, *inputs))


@pytest.mark.parametrize("f", FILTERS)
@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("kernel", "flip_weight"), [(1, True), (3, True), (3, False)])
def test_any_padding_and_filter_give_what_ref_gives(f, padding, kernel, flip_weight):
    for (up, down), flip_filter in itertools.product(FACTORS, [False, True]):
        settings = {"up": up, "down": down, "padding": PADDINGS[padding], "flip_filter": flip_filter}
        op, ref = both(f=FILTERS[f], flip_weight=flip_weight, **settings)
        inputs = noise(1, 2, 12, 11), noise(3, 2, kernel, kernel, seed=1)
        assert_close(derivatives(op, *inputs), derivatives(ref, *inputs))


@pytest.mark.parametrize("size", [(1, 1), (2, 1), (1, 129), (151, 2)], ids=str)
@pytest.mark.parametrize(("up", "down"), FACTORS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_awkward_sizes_give_what_ref_gives(size, up, down, kernel):
    op, ref = both(f=FILTERS["short"], up=up, down=down, padding=2, flip_weight=False, gain=0.5)
    inputs = noise(2, 3, *size), noise(1, 3, kernel, kernel, seed=1)
    assert_close(derivatives(op, *inputs), derivatives(ref, *inputs))


@pytest.mark.parametrize(
    "x",
    [noise(4, 9, 8, 14)[::2, ::3, 1:, ::2], noise(2, 3, 7, 7).contiguous(memory_format=torch.channels_last)],
    ids=["strided", "channels_last"],
)
@pytest.mark.parametrize(("up", "down"), FACTORS)
def test_the_layout_of_the_input_changes_nothing(x, up, down):
    op, ref = both(f=FILTERS["short"], up=up, down=down, padding=1)
    packed, w = torch.empty(x.shape, dtype=x.dtype).copy_(x), noise(2, 3, 3, 3, seed=1)
    assert x.stride() != packed.stride()
    assert_close(derivatives(op, x, w), derivatives(ref, packed, w))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("up", "down"), FACTORS[:3])  # those of the networks
@pytest.mark.parametrize("kernel", [1, 3])
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(kernel, up, down, dtype):
    op, ref = both(f=FILTERS["short"], up=up, down=down, padding=kernel // 2, flip_weight=up == 1)
    assert_at_most_twice_as_wrong(op, ref, [noise(2, 8, 17, 33), noise(6, 8, kernel, kernel, seed=1)], dtype)


@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("kernel", [1, 3])
def test_first_and_second_derivatives_equal_finite_differences(kernel, up, down):
    op, _ = both(f=FILTERS["lopsided"], up=up, down=down, padding=1)
    inputs = noise(1, 1, 4, 3).requires_grad_(), noise(1, 1, kernel, kernel, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


@pytest.mark.parametrize(("up", "down"), FACTORS)
@pytest.mark.parametrize("kernel", [1, 3])
def test_the_gradient_is_the_adjoint(kernel, up, down):
    op, _ = both(f=FILTERS["lopsided"], up=up, down=down, padding=1, flip_weight=False)
    x, w = noise(2, 3, 8, 9).requires_grad_(), noise(2, 3, kernel, kernel, seed=1)
    y = op(x, w)
    cotangent = noise(*y.shape, seed=2)
    (adjoint,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close((y * cotangent).sum(), (x * adjoint).sum(), rtol=1e-10, atol=0)


@pytest.mark.parametrize("function", [conv2d_resample, conv2d_resample_ref])
class TestDefinition:
    """The reference, too, is held to what PyTorch and the filter helpers say."""

    f = FILTERS["lopsided"]

    @pytest.mark.parametrize("groups", [1, 2])
    def test_without_resampling_it_is_a_correlation(self, function, groups):
        x, w = noise(2, 4, 6, 7), noise(6, 4 // groups, 3, 3, seed=1)
        assert_close(function(x, w, self.f, padding=1, groups=groups), F.conv2d(x, w, padding=1, groups=groups))

    @pytest.mark.parametrize(("up", "down"), FACTORS)
    def test_the_gain_multiplies_the_output(self, function, up, down):
        x, w, settings = noise(2, 4, 6, 7), noise(6, 4, 3, 3, seed=1), {"up": up, "down": down, "padding": 1}
        assert_close(function(x, w, self.f, **settings, gain=3), 3 * function(x, w, self.f, **settings))

    def test_without_flip_weight_it_is_a_true_convolution(self, function):
        x, w = noise(2, 4, 6, 7), noise(6, 4, 3, 3, seed=1)
        assert_close(function(x, w, padding=1, flip_weight=False), F.conv2d(x, w.flip([2, 3]), padding=1))

    @pytest.mark.parametrize("factor", [2, 3])
    def test_a_1x1_convolution_commutes_with_upsampling(self, function, factor):
        x, w = noise(2, 3, 6, 7), noise(5, 3, 1, 1, seed=1)
        assert_close(function(x, w, self.f, up=factor), upsample2d(F.conv2d(x, w), self.f, up=factor))

    @pytest.mark.parametrize("factor", [2, 3])
    def test_a_1x1_convolution_commutes_with_downsampling(self, function, factor):
        x, w = noise(2, 3, 6, 9), noise(5, 3, 1, 1, seed=1)
        assert_close(function(x, w, self.f, down=factor), downsample2d(F.conv2d(x, w), self.f, down=factor))

    def test_upsampling_comes_before_the_convolution(self, function):
        x, w = noise(2, 3, 8, 8), noise(5, 3, 3, 3, seed=1)
        expected = F.conv2d(upsample2d(x, self.f), w)  # valid: away from the padding
        assert_close(function(x, w, self.f, up=2), expected)

    def test_downsampling_comes_after_the_convolution(self, function):
        x, w = noise(2, 3, 16, 16), noise(5, 3, 3, 3, seed=1)
        expected = downsample2d(F.conv2d(x, w, padding=1), self.f)
        assert_close(function(x, w, self.f, down=2, padding=1)[:, :, 2:-2, 2:-2], expected[:, :, 2:-2, 2:-2])

    def test_flip_filter_correlates_with_the_filter(self, function):
        x, w = noise(2, 3, 8, 8), noise(5, 3, 3, 3, seed=1)
        for settings in ({"up": 2}, {"down": 2}):
            flipped = function(x, w, self.f, flip_filter=True, **settings)
            assert_close(flipped, function(x, w, self.f.flip([0, 1]), **settings))
            assert not torch.allclose(flipped, function(x, w, self.f, **settings))

    @pytest.mark.parametrize(("up", "down"), [(0, 1), (1, 0), (-2, 1)])
    def test_factors_below_one_are_named(self, function, up, down):
        with pytest.raises(ValueError, match=f"a resampling factor is at least 1, not {min(up, down)}"):
            function(noise(1, 1, 4, 4), noise(1, 1, 3, 3), up=up, down=down)

    def test_bad_padding_is_named(self, function):
        with pytest.raises(ValueError, match=r"padding is an int, \[x, y\] or \[x0, x1, y0, y1\], not \[1, 2, 3\]"):
            function(noise(1, 1, 4, 4), noise(1, 1, 3, 3), padding=[1, 2, 3])
