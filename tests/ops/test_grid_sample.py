"""grid_sample against bilinear interpolation written as loops and PyTorch's own, and its second derivative."""

import numpy as np
import pytest
import torch
from op_checks import assert_at_most_twice_as_wrong, assert_close, derivatives, noise

from torch_utils.ops.grid_sample import grid_sample, grid_sample_ref

SIZES = [(1, 1), (2, 1), (1, 2), (2, 151), (129, 3)]  # height, width


def positions(n, height, width, seed=7):
    """Random, some of them outside of the image."""
    return noise(n, height, width, 2, seed=seed) * 0.8


def by_definition(x, grid):
    """One channel, one output pixel at a time: -1 and 1 are the outer edges, beyond them there are zeros."""
    height, width = x.shape
    out = np.zeros(grid.shape[:2])
    for index in np.ndindex(out.shape):
        u, v = ((grid[index] + 1) * [width, height] - 1) / 2
        for i in range(height):
            for j in range(width):
                out[index] += x[i, j] * max(0, 1 - abs(v - i)) * max(0, 1 - abs(u - j))
    return out


@pytest.mark.parametrize("function", [grid_sample, grid_sample_ref])
def test_equals_the_definition_written_as_loops(function):
    x, grid = noise(1, 1, 4, 5), positions(1, 6, 7)
    assert (grid.abs() > 1).any()
    expected = by_definition(x[0, 0].numpy(), grid[0].numpy())
    assert_close(function(x, grid)[0, 0], torch.from_numpy(expected))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("grid_size", [(1, 1), (3, 2), (2, 129)], ids=str)
def test_output_and_gradient_equal_those_of_ref(size, grid_size):
    x, grid = noise(2, 3, *size).requires_grad_(), positions(2, *grid_size)
    ours, plain = grid_sample(x, grid), grid_sample_ref(x, grid)
    dy = noise(*plain.shape, seed=1)
    assert_close(ours, plain)
    assert_close(torch.autograd.grad(ours, x, dy), torch.autograd.grad(plain, x, dy))


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_derivative_is_that_of_the_matrix_it_is(size):
    x, grid = noise(1, 1, *size), positions(1, 4, 5)
    pixels = x.numel()
    basis = torch.eye(pixels, dtype=x.dtype).reshape(pixels, 1, *size)
    matrix = grid_sample_ref(basis, grid.expand(pixels, -1, -1, -1)).reshape(pixels, -1).t()  # [out, in]
    expected = derivatives(lambda x: (matrix @ x.flatten()).reshape(1, 1, 4, 5), x)
    assert_close(derivatives(lambda x: grid_sample(x, grid), x), expected)


@pytest.mark.parametrize(
    "x",
    [noise(4, 6, 8, 9)[::2, 1::2, ::2, ::3], noise(2, 3, 4, 3).contiguous(memory_format=torch.channels_last)],
    ids=["strided", "channels_last"],
)
def test_the_layout_of_the_inputs_changes_nothing(x):
    grid = positions(2, 7, 5).transpose(1, 2)
    packed = torch.empty(x.shape, dtype=x.dtype).copy_(x)
    expected = derivatives(lambda x: grid_sample(x, grid.contiguous()), packed)
    assert_close(derivatives(lambda x: grid_sample(x, grid), x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_precision_is_at_most_twice_as_wrong_as_plain_pytorch(dtype):
    grid = positions(2, 17, 33).to(dtype)

    def at(function):
        return lambda x: function(x, grid.to(x.dtype))

    assert_at_most_twice_as_wrong(at(grid_sample), at(grid_sample_ref), [noise(2, 3, 19, 21)], dtype)


def test_first_and_second_derivatives_equal_finite_differences():
    x, grid = noise(2, 2, 3, 4).requires_grad_(), positions(2, 3, 2)
    assert torch.autograd.gradcheck(lambda x: grid_sample(x, grid), x)
    assert torch.autograd.gradgradcheck(lambda x: grid_sample(x, grid), x)


def test_the_third_derivative_exists_too():
    x, grid = noise(1, 1, 3, 3).requires_grad_(), positions(1, 2, 2)
    (first,) = torch.autograd.grad(grid_sample(x, grid).pow(4).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    assert third.abs().max() > 0


def test_the_gradient_is_the_adjoint():
    x, grid = noise(2, 3, 8, 9).requires_grad_(), positions(2, 5, 6)
    y = grid_sample(x, grid)
    cotangent = noise(*y.shape, seed=1)
    (adjoint,) = torch.autograd.grad(y, x, cotangent)
    torch.testing.assert_close((y * cotangent).sum(), (x * adjoint).sum(), rtol=1e-10, atol=0)


def test_the_grid_is_not_differentiated():
    x, grid = noise(1, 1, 3, 3).requires_grad_(), positions(1, 2, 2).requires_grad_()
    grid_sample(x, grid).sum().backward()
    assert x.grad is not None
    assert grid.grad is None


@pytest.mark.parametrize(
    ("x", "grid", "message"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 2, 2, 2), "grid"),
        (torch.zeros(1, 1, 3, 3), torch.zeros(2, 2, 2, 2), "batch size"),
        (torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 2, 3), "size 2 in last dimension"),
        (torch.zeros(1, 1, 3, 3), torch.zeros(1, 2, 2, 2, dtype=torch.float64), "type"),
    ],
)
def test_pytorch_says_what_does_not_fit(x, grid, message):
    with pytest.raises(RuntimeError, match=message):
        grid_sample(x, grid)
