"""Kernel distances: golden, as their definition has them, unbiased, the same for the same seed."""

import json

import numpy as np
import pytest
import torch
from checks import refusal
from portions import finished, in_portions

from gan.metrics.kernel_distance import kernel_distance


def by_definition(x, y):
    """Sums over pairs, one at a time."""

    def kernel(a, b):
        return (a @ b / len(a) + 1) ** 3

    n = len(x)
    same = [(i, j) for i in range(n) for j in range(n) if i != j]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in same) / (n * (n - 1))
    return float(within - 2 * sum(kernel(a, b) for a in x for b in y) / n**2)


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.rand(400, 16)


def test_golden(golden):
    data = golden("metrics.npz")
    expected = json.loads(str(data["meta"]))["kid_full_single_subset"]["value"]
    real, fake = torch.from_numpy(data["real"])[:280], torch.from_numpy(data["gen"])
    assert finished(kernel_distance(real, fake, 1, 280)) == pytest.approx(expected, rel=1e-10)


def test_definition(rows):
    x, y = rows[:9].double(), rows[9:18].double() * 1.3
    assert finished(kernel_distance(x, y, 1, 9)) == pytest.approx(by_definition(x, y), rel=1e-10)


def test_equal_distributions_are_0_apart_on_average(rows):
    # Without bias the mean is 0 within its own error, above or below.
    torch.manual_seed(1)
    found = [finished(kernel_distance(torch.rand(100, 16), torch.rand(100, 16), 1, 100)) for _ in range(200)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(200)
    assert min(found) < 0 < max(found)


def test_the_further_the_worse(rows):
    torch.manual_seed(2)
    fake = torch.rand(300, 16)
    found = [finished(kernel_distance(rows, fake + shift, 20, 100)) for shift in (0, 0.1, 0.3, 1.0)]
    assert found == sorted(found)
    assert found[1] > 2 * abs(found[0])


def test_choices_follow_from_the_seed(rows):
    real, fake = rows[:200], rows[200:] * 1.2
    first = finished(kernel_distance(real, fake, 5, 50, seed=0))
    torch.manual_seed(99)
    np.random.seed(99)  # noqa: NPY002
    assert finished(kernel_distance(real, fake, 5, 50, seed=0)) == first
    assert finished(kernel_distance(real, fake, 5, 50, seed=1)) != first


def test_a_choice_has_no_row_twice_and_changes(rows):
    # All rows of one set, many times: the same number each time, up to the order of sums.
    one, many = (finished(kernel_distance(rows[:100], rows[100:200], n, 100)) for n in (1, 7))
    assert one == pytest.approx(many, rel=1e-4)
    some = [finished(kernel_distance(rows, rows * 1.1, n, 20)) for n in (1, 2)]
    assert some[0] != pytest.approx(some[1], rel=1e-6)


def test_a_small_set_is_taken_whole(rows):
    assert finished(kernel_distance(rows[:50], rows[50:80], 3, 1000)) == pytest.approx(
        finished(kernel_distance(rows[:50], rows[50:80], 3, 30))
    )


def test_one_portion_a_choice(rows):
    assert in_portions(kernel_distance(rows, rows + 1, 13, 10))[1] == 13
    assert in_portions(kernel_distance(rows[:5], rows[5:9]))[1] == 100


def test_half_precision_is_computed_in_float32(rows):
    half = rows.half()
    assert finished(kernel_distance(half, half * 2, 2, 50)) == finished(
        kernel_distance(half.float(), half.float() * 2, 2, 50)
    )


def test_one_image_is_refused(rows):
    assert "1 and 400" in refusal(finished, kernel_distance(rows[:1], rows))


def test_features_that_are_no_numbers_are_refused(rows):
    broken = rows.clone()
    broken[3, 4] = torch.nan
    assert "generated images are not finite" in refusal(finished, kernel_distance(rows, broken))
    assert "real images are not finite" in refusal(finished, kernel_distance(broken, rows))


@pytest.mark.filterwarnings("ignore:Metric .Kernel Inception Distance. will save")
def test_torchmetrics_agrees(rows):
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.kid import KernelInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 16

        def forward(self, images):
            return images.flatten(1)

    real, fake = rows[:200], rows[200:] * 0.9
    oracle = KernelInceptionDistance(feature=Pixels(), subsets=1, subset_size=200, normalize=True)
    oracle.update(real.reshape(-1, 1, 4, 4), real=True)
    oracle.update(fake.reshape(-1, 1, 4, 4), real=False)
    expected = float(oracle.compute()[0])
    assert finished(kernel_distance(real, fake, 1, 200)) == pytest.approx(expected, rel=1e-3)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(rows):
    real, fake = rows[:200], rows[200:] * 0.9
    on_cpu = finished(kernel_distance(real, fake, 5, 100))
    assert finished(kernel_distance(real, fake, 5, 100, device=torch.device("cuda"))) == pytest.approx(on_cpu, rel=1e-4)
    assert finished(kernel_distance(real.cuda(), fake.cuda(), 5, 100)) == pytest.approx(on_cpu, rel=1e-4)
