"""The three maps of a convolution against PyTorch's own, and what autograd is spared."""

import pytest
import torch
import torch.nn.functional as F
from op_checks import assert_close, derivatives, noise
from torch.utils._python_dispatch import TorchDispatchMode

from torch_utils.ops.conv2d import conv2d, conv_transpose2d

SHAPES = [  # x, w, stride, padding, groups
    ((2, 3, 9, 7), (4, 3, 3, 3), (1, 1), (1, 1), 1),
    ((2, 4, 9, 8), (6, 2, 3, 3), (2, 2), (0, 1), 2),
    ((1, 4, 8, 8), (4, 4, 1, 1), (1, 1), (0, 0), 1),
    ((3, 2, 11, 6), (5, 2, 4, 2), (3, 1), (2, 0), 1),
]


@pytest.mark.parametrize(("x", "w", "stride", "padding", "groups"), SHAPES)
def test_convolution_and_its_derivatives_equal_pytorchs(x, w, stride, padding, groups):
    settings = {"stride": stride, "padding": padding, "groups": groups}
    inputs = noise(*x), noise(*w, seed=1)
    ours, native = (derivatives(lambda x, w, f=f: f(x, w, **settings), *inputs) for f in (conv2d, F.conv2d))
    assert_close(ours, native)


@pytest.mark.parametrize(("x", "w", "stride", "padding", "groups"), SHAPES)
def test_the_transposed_one_too(x, w, stride, padding, groups):
    settings = {"stride": stride, "padding": padding, "groups": groups}
    x = (x[0], w[0], *x[2:])
    inputs = noise(*x), noise(*w, seed=1)
    functions = (conv_transpose2d, F.conv_transpose2d)
    ours, native = (derivatives(lambda x, w, f=f: f(x, w, **settings), *inputs) for f in functions)
    assert_close(ours, native)


def test_gradcheck_to_second_order():
    inputs = noise(1, 2, 5, 4).requires_grad_(), noise(2, 2, 3, 3, seed=1).requires_grad_()
    for function in (conv2d, conv_transpose2d):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


class Convolutions(TorchDispatchMode):
    """Counts the convolutions that PyTorch is asked for, and of which kind."""

    def __init__(self):
        super().__init__()
        self.forward, self.inputs, self.weights, self.kernels = 0, 0, 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name == "convolution":
            self.forward += 1
            self.kernels.append(tuple(args[1].shape[2:]))
        if name == "convolution_backward":
            self.inputs += bool(args[-1][0])
            self.weights += bool(args[-1][1])
        return func(*args, **(kwargs or {}))


def test_the_inner_gradient_of_a_penalty_computes_no_weight_gradient():
    x, w = noise(2, 3, 8, 8).requires_grad_(), noise(3, 3, 3, 3, seed=1).requires_grad_()
    y = conv2d(conv2d(x, w, padding=(1, 1)).square(), w, stride=(2, 2))
    with Convolutions() as inner:
        (gradient,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert (inner.inputs, inner.weights) == (2, 0)
    with Convolutions() as outer:
        gradient.square().sum().backward()
    assert outer.weights > 0
    assert set(outer.kernels) == {(3, 3)}  # none of the size of the image


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_keep_the_layout(layout):
    x = noise(2, 3, 8, 8).contiguous(memory_format=layout).requires_grad_()
    w = noise(5, 3, 3, 3, seed=1).contiguous(memory_format=layout).requires_grad_()
    dx, dw = torch.autograd.grad(conv2d(x, w, padding=(1, 1)).sum(), [x, w])
    assert dx.is_contiguous(memory_format=layout)
    assert dw.is_contiguous(memory_format=layout)


def test_without_gradients_it_is_one_native_call():
    x, w = noise(1, 2, 4, 4), noise(2, 2, 3, 3, seed=1).requires_grad_()
    with torch.no_grad(), Convolutions() as calls:
        y = conv2d(x, w)
    assert calls.forward == 1
    assert not y.requires_grad


@pytest.mark.parametrize("function", [conv2d, conv_transpose2d])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_gradient_has_the_layout_of_the_input_whatever_comes_in(function, layout):
    x = noise(2, 4, 8, 8).contiguous(memory_format=layout).requires_grad_()
    y = function(x, noise(4, 4, 3, 3, seed=1))
    other = torch.channels_last if layout == torch.contiguous_format else torch.contiguous_format
    (dx,) = torch.autograd.grad(y, x, noise(*y.shape, seed=2).contiguous(memory_format=other))
    assert dx.is_contiguous(memory_format=layout)
