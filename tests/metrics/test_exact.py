"""Products with all their bits, and settings left as they were."""

import contextlib

import pytest
import torch

from gan.metrics.exact import computed_in, float64_device, without_tf32


@pytest.fixture
def settings():
    """Those of products and of convolutions, put back afterwards: they take no monkeypatch."""
    both = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [each.allow_tf32 for each in both]
    yield both
    for each, allowed in zip(both, before, strict=True):
        each.allow_tf32 = allowed


@pytest.mark.parametrize("allowed", [(True, True), (False, True), (True, False)])
def test_tf32_is_off_inside_and_afterwards_as_it_was(allowed, settings):
    matmul, cudnn = settings
    matmul.allow_tf32, cudnn.allow_tf32 = allowed
    with contextlib.suppress(ZeroDivisionError), without_tf32():
        assert (matmul.allow_tf32, cudnn.allow_tf32) == (False, False)
        raise ZeroDivisionError
    assert (matmul.allow_tf32, cudnn.allow_tf32) == allowed


def test_the_cpu_stands_in_for_devices_without_float64():
    assert float64_device(torch.device("mps")) == torch.device("cpu")
    assert float64_device(torch.device("cuda", 1)) == torch.device("cuda", 1)


def test_half_precision_is_a_way_of_storing():
    expected = {torch.float16: torch.float32, torch.float32: torch.float32, torch.float64: torch.float64}
    assert {dtype: computed_in(torch.zeros(1, dtype=dtype)) for dtype in expected} == expected


@pytest.mark.gpu
def test_products_and_convolutions_have_all_their_bits(settings):
    torch.manual_seed(0)
    for each in settings:
        each.allow_tf32 = True
    x = torch.randn(256, 256, device="cuda")
    image, weight = torch.randn(2, 64, 16, 16, device="cuda"), torch.randn(64, 64, 3, 3, device="cuda")
    with without_tf32():
        product, convolved = x @ x, torch.conv2d(image, weight)
    assert (product - x.double() @ x.double()).abs().max() < 1e-4
    assert (convolved - torch.conv2d(image.double(), weight.double())).abs().max() < 1e-3
