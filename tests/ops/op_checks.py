"""What the tests of the ops share: all derivatives of a call, and how close two results must be."""

import json
from pathlib import Path

import numpy as np
import torch

QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")
"""of torch.library.opcheck, all but dynamic shapes, which take long and depend on less"""


def golden(name):
    """Arrays of a golden file as tensors, and its meta."""
    with np.load(Path(__file__).parents[1] / "golden" / f"{name}.npz") as file:
        arrays = dict(file)
    meta = json.loads(str(arrays.pop("meta")))
    return {key: torch.from_numpy(value) for key, value in arrays.items()}, meta


def noise(*shape, seed=0):
    """Standard normal, float64."""
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def derivatives(call, *inputs, order=2, rounding=None):
    """y = call(*inputs), dx = J'(x) dy for each input, and to second order the gradients of <dx, v> for dy and inputs.

    `rounding`: a dtype whose values all cotangents take, so that calls in different dtypes are asked the same.
    """

    def cotangent(like, seed):
        values = noise(*like.shape, seed=seed).to(like.device)
        return values.to(like.dtype) if rounding is None else values.to(rounding).to(like.dtype)

    inputs = [x.detach().requires_grad_() for x in inputs]
    y = call(*inputs)
    dy = cotangent(y, 101).requires_grad_()
    first = torch.autograd.grad(y, inputs, dy, create_graph=order == 2)
    if order == 1:
        return [tensor.detach() for tensor in (y, *first)]
    v = [cotangent(dx, 201 + i) for i, dx in enumerate(first)]
    second = torch.autograd.grad(first, [dy, *inputs], v, allow_unused=True, materialize_grads=True)
    return [tensor.detach() for tensor in (y, *first, *second)]


def assert_close(actual, expected, tolerance=1e-10):
    """Relative to the largest element. Takes tensors, or lists of them."""
    if isinstance(expected, torch.Tensor):
        actual, expected = [actual], [expected]
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        assert a.dtype == e.dtype
        assert torch.isfinite(a).all()
        if e.numel() > 0:
            assert (a - e).abs().max() <= tolerance * e.abs().max()


def assert_at_most_twice_as_wrong(call, ref, inputs, dtype):
    """The law: against float64, the op errs at most twice as much as plain PyTorch does in the same dtype.

    It holds for the output and the first derivatives. Errors are root mean squares (the largest of a few is too much
    a matter of luck), and one rounding is forgiven.
    """

    def rms(x):
        return x.double().square().mean().sqrt()

    low = [x.to(dtype) for x in inputs]
    exact = derivatives(ref, *(x.double() for x in low), order=1, rounding=dtype)
    ours, plain = (derivatives(function, *low, order=1, rounding=dtype) for function in (call, ref))
    for actual, reference, truth in zip(ours, plain, exact, strict=True):
        assert actual.dtype == reference.dtype == dtype
        assert rms(actual - truth) <= 2 * rms(reference - truth) + torch.finfo(dtype).eps / 2 * rms(truth)
