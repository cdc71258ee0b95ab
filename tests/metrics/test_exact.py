"""Products with all their bits, and settings left as they were."""

import contextlib

import pytest
import torch

from gan.metrics.exact import computed_in, float64_device, without_tf32


@pytest.fixture
def matmul():
    """The settings of products, put back afterwards: they take no monkeypatch."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_tf32
    yield settings
    settings.allow_tf32 = before


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_off_inside_and_afterwards_as_it_was(allowed, matmul):
    matmul.allow_tf32 = allowed
    with contextlib.suppress(ZeroDivisionError), without_tf32():
        assert not matmul.allow_tf32
        raise ZeroDivisionError
    assert matmul.allow_tf32 is allowed


def test_the_cpu_stands_in_for_devices_without_float64():
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_half_precision_is_a_way_of_storing():
    expected = {torch.float16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {dtype: computed_in(torch.zeros(1, dtype=dtype)) for dtype in expected} == expected


@pytest.mark.gpu
def test_products_have_all_their_bits(matmul):
    torch.manual_seed(0)
    matmul.allow_tf32 = True
    x = torch.randn(256, 256, device="cuda")
    with without_tf32():
        product = x @ x
    assert (product - x.double() @ x.double()).abs().max() < 1e-4
