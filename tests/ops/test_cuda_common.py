"""What the CUDA kernels share: how tensors and sums are dealt with around a launch, and the check before use."""

import random

import pytest
import torch
from checks import default_dtype
from host_kernels import HostLaunch
from op_checks import noise

from torch_utils.ops import cubins, cuda_kernels, kernel_checks


def test_divisions_by_multiplication_are_exact():
    generator = random.Random(0)
    divisors = [*range(1, 70), 2**16 - 1, 2**16 + 1, 2**30 - 1, 2**31 - 1]
    for d in divisors + [generator.randrange(1, 2**31) for _ in range(200)]:
        divisor, multiplier, shift = cuda_kernels.division(d)
        assert divisor == d
        assert multiplier < 2**32
        for q in (1, 2, generator.randrange(1, 2**31)):
            for n in (0, d * q - 1, d * q, generator.randrange(2**31), 2**31 - 1):
                if n < 2**31:
                    assert (((n * multiplier) >> 32) + n) >> shift == n // d


def test_both_layouts_stay_and_others_become_contiguous():
    x = noise(2, 3, 4, 5)
    last = x.contiguous(memory_format=torch.channels_last)
    column = noise(2, 3, 1, 1).contiguous(memory_format=torch.channels_last)  # both at once
    for kept in (x, last, column, x[0]):
        assert cuda_kernels.dense(kept) is kept
    assert cuda_kernels.layout(last) == torch.channels_last
    assert cuda_kernels.layout(column) == torch.contiguous_format
    for other in (x.transpose(2, 3), x[:, :, ::2], x[:1].expand(2, 3, 4, 5), x[0].mT):
        assert cuda_kernels.dense(other).is_contiguous()


@pytest.fixture(scope="module")
def totals(tmp_path_factory):
    """A source with nothing but the second stage of sums."""
    folder = tmp_path_factory.mktemp("totals")
    source = folder / "only.cu"
    source.write_text(f'#include "{cubins.SOURCES / "common.cuh"}"\nENTRY(only_totals, Totals, totals)\n')
    return HostLaunch(str(source), folder)


@pytest.mark.parametrize("dtype", cuda_kernels.SUFFIXES, ids=str)
def test_sums_of_sums(dtype, totals, monkeypatch):
    kernel = cuda_kernels.CudaKernel("only", "only.cu", lambda device: None, totals, device_type="cpu")
    monkeypatch.setitem(cuda_kernels.kernels, "only", kernel)
    for shapes in ([(2, 5, 3), None, (1, 77, 1)], [(1, 1, 4)], [(3, 300, 17), (1, 2, 8), (1, 1000, 1)], [None]):
        parts = [None if shape is None else noise(*shape).float() for shape in shapes]
        for part, total in zip(parts, cuda_kernels.totals("only", parts, dtype), strict=True):
            if part is None:
                assert total is None
            else:
                assert total.dtype == dtype
                exact = part.double().sum(1)
                assert (total - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max() + 1e-5


class _Wrong(torch.autograd.Function):
    """x * b, which multiplies what it is told by a factor of the derivative of that order."""

    @staticmethod
    def forward(ctx, x, b, factors):
        ctx.save_for_backward(x, b)
        ctx.factors = factors[1:]
        return x * b * factors[0]

    @staticmethod
    def backward(ctx, dy):
        x, b = ctx.saved_tensors
        if not ctx.factors:
            return dy * b, (dy * x).sum(0), None
        return _Wrong.apply(dy, b, ctx.factors), (dy * x).sum(0), None


@pytest.mark.parametrize(
    ("factors", "wrong"),
    [
        ([1, 1, 1], None),
        ([1.001, 1, 1], "y is off by "),
        ([1, 1.001, 1], "dx is off by "),
        ([1, 1, 1.001], "d2dy is off by "),
        ([1, 1, float("nan")], "d2dy is off by nan"),
    ],
    ids=str,
)
def test_the_check_before_use_names_the_derivative_that_is_wrong(factors, wrong):
    inputs = {"x": noise(5, 3).float(), "b": noise(3, seed=1).float()}
    found = kernel_checks.difference(
        lambda x, b, c: _Wrong.apply(x, b, factors) + c,
        lambda x, b, c: x * b + c,
        inputs,
        {"c": torch.tensor(0.5)},
        torch.device("cpu"),
    )
    assert found is None if wrong is None else found.startswith(wrong)


@pytest.mark.parametrize("name", cuda_kernels.kernels)
def test_the_checks_before_use_do_not_depend_on_the_default_dtype(name, on_host):
    with default_dtype(torch.float64):
        assert cuda_kernels.kernels[name].check(torch.device("cpu")) is None
    assert on_host[name].launched
