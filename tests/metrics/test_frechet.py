"""Frechet distances: golden, of Gaussians with a closed form, of sets that have no full rank, in parts."""

import json

import numpy as np
import pytest
import scipy.linalg
import torch
from checks import refusal
from portions import finished, in_portions

from gan.metrics import frechet
from gan.metrics.frechet import Gaussian, MomentSums, frechet_distance


def gaussian(rows, device="cpu"):
    sums = MomentSums(rows.shape[1], torch.device(device))
    sums.add(rows)
    return sums.gaussian()


def between(real, fake, **options):
    return finished(frechet_distance(real, fake, **options))


def distance(real, fake):
    return between(gaussian(real), gaussian(fake))


def given(mean, cov):
    return Gaussian(1000, torch.tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64))


@pytest.fixture
def rows():
    torch.manual_seed(0)
    return torch.randn(500, 12, dtype=torch.float64) @ torch.randn(12, 12, dtype=torch.float64)


def test_golden(golden):
    data = golden("metrics.npz")
    expected = json.loads(str(data["meta"]))["fid"]
    assert distance(torch.from_numpy(data["real"]), torch.from_numpy(data["gen"])) == pytest.approx(expected, rel=1e-10)


class TestKnownAnswers:
    def test_one_dimension(self):
        # (m1 - m2)^2 + (s1 - s2)^2
        assert between(given([1.0], [[4.0]]), given([3.0], [[9.0]])) == pytest.approx(5)

    def test_covariances_with_the_same_axes(self):
        turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
        a, b = torch.tensor([0.0, 1, 4, 9]).double(), torch.tensor([1.0, 1, 16, 0]).double()
        found = between(given([0.0] * 4, turn * a @ turn.T), given([0.0] * 4, turn * b @ turn.T))
        assert found == pytest.approx(1 + 0 + 4 + 9)

    def test_any_covariances_as_scipy_has_it(self, rows):
        other = rows.roll(1, 1) * torch.linspace(0.5, 2, 12)
        a, b = gaussian(rows), gaussian(other)
        root = scipy.linalg.sqrtm(a.cov.numpy() @ b.cov.numpy())
        expected = float((a.mean - b.mean).square().sum() + a.cov.trace() + b.cov.trace()) - 2 * np.trace(root).real
        assert between(a, b) == pytest.approx(expected, rel=1e-9)

    def test_equal_sets_are_0_apart(self, rows):
        assert distance(rows, rows.clone()) == pytest.approx(0, abs=1e-10)

    def test_so_are_equal_sets_that_have_fewer_images_than_numbers(self):
        torch.manual_seed(1)
        few = torch.rand(40, 200)
        assert 0 <= distance(few, few.flip(0)) < 1e-5

    def test_a_shift_adds_its_square(self, rows):
        assert distance(rows, rows + 0.5) == pytest.approx(12 * 0.25)

    def test_the_further_the_worse(self, rows):
        found = [distance(rows, rows * factor) for factor in (1.0, 1.1, 1.5, 3.0)]
        assert found == sorted(found)
        assert found[1] > 0.01

    def test_which_is_which_does_not_matter(self, rows):
        other = rows.abs()
        assert distance(rows, other) == pytest.approx(distance(other, rows), rel=1e-10)

    def test_a_covariance_that_rounding_took_below_0_has_no_root_there(self):
        # 1 + (1 + 1) - 2 (1 + 0), and what the trace says.
        rounded = given([0.0, 1.0], [[1.0, 0.0], [0.0, -1e-4]])
        assert between(given([0.0, 0.0], torch.eye(2).double()), rounded) == pytest.approx(2 - 1e-4)
        assert between(rounded, given([0.0, 0.0], torch.eye(2).double())) == pytest.approx(2 - 1e-4)

    def test_one_image_is_a_point(self):
        assert distance(torch.zeros(1, 3), torch.full((1, 3), 2.0)) == pytest.approx(12)


class TestMomentSums:
    def test_mean_and_covariance_as_numpy_has_them(self, rows):
        found = gaussian(rows)
        assert found.number == 500
        assert np.allclose(found.mean, rows.numpy().mean(0), rtol=1e-12)
        assert np.allclose(found.cov, np.cov(rows.numpy(), rowvar=False, bias=True), rtol=1e-10)

    @pytest.mark.parametrize("at_once", [1, 7, 64, 500])
    def test_in_batches(self, rows, at_once, monkeypatch):
        monkeypatch.setattr(frechet, "_ROWS_AT_ONCE", 50)
        sums = MomentSums(12, torch.device("cpu"))
        for some in rows.split(at_once):
            sums.add(some)
        assert sums.number == 500
        assert torch.allclose(sums.gaussian().cov, gaussian(rows).cov, rtol=1e-12)

    def test_by_several_processes(self, rows):
        ranks = [MomentSums(12, torch.device("cpu")) for _ in range(3)]
        for index, some in enumerate(rows.split(64)):
            ranks[index % 3].add(some)
        for other in ranks[1:]:
            ranks[0].merge(other.raw())
        assert ranks[0].number == 500
        assert torch.allclose(ranks[0].gaussian().cov, gaussian(rows).cov, rtol=1e-12)

    def test_float32_far_from_0_loses_nothing(self):
        # Sums of float32 would be off by hundreds.
        torch.manual_seed(2)
        far = (torch.randn(4000, 3) + 1000).float()
        expected = np.cov(far.numpy().astype(np.float64), rowvar=False, bias=True)
        assert np.allclose(gaussian(far).cov, expected, rtol=1e-6, atol=1e-8)

    def test_half_precision_is_summed_in_float64(self, rows):
        half = rows.half()
        assert torch.equal(gaussian(half).cov, gaussian(half.double()).cov)

    def test_memory_that_runs_out_loses_no_row_and_counts_none_twice(self, rows, monkeypatch):
        monkeypatch.setattr(frechet, "_ROWS_AT_ONCE", 50)
        convert, calls = torch.Tensor.double, []

        def out_of_memory_at_times(tensor):
            calls.append(len(tensor))
            if len(calls) in (3, 6):
                raise torch.OutOfMemoryError
            return convert(tensor)

        sums = MomentSums(12, torch.device("cpu"))
        with monkeypatch.context() as patched:
            patched.setattr(torch.Tensor, "double", out_of_memory_at_times)
            with pytest.raises(torch.OutOfMemoryError):
                sums.add(rows[:300])
            with pytest.raises(torch.OutOfMemoryError):
                sums.count()
            assert sums.number == 300
            sums.count()
        sums.add(rows[300:])
        assert calls == [50] * 8  # 6 of them counted
        assert sums.number == 500
        assert torch.allclose(sums.gaussian().cov, gaussian(rows).cov, rtol=1e-12)

    def test_nothing_is_refused(self):
        assert "no images" in refusal(MomentSums(3, torch.device("cpu")).gaussian)


def test_a_kept_root_gives_the_same(rows):
    real, fake = gaussian(rows), gaussian(rows.exp().clamp(max=5))
    kept, portions = in_portions(real.with_half())
    assert portions == 1
    assert kept.half is not None
    assert torch.allclose(kept.half @ kept.half, real.cov)
    assert finished(kept.with_half()) is kept
    assert in_portions(frechet_distance(kept, fake)) == (between(real, fake), 2)
    assert in_portions(frechet_distance(real, fake))[1] == 3


def test_where_there_is_no_float64_the_cpu_stands_in(rows):
    real, fake = gaussian(rows), finished(gaussian(rows + 1).with_half())
    assert between(real, fake, device=torch.device("mps")) == between(real, fake)
    moved = fake.on(torch.device("mps"))
    assert {each.device.type for each in (moved.mean, moved.cov, moved.half)} == {"cpu"}
    assert moved.number == 500


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_features_that_are_no_numbers_are_refused(rows, bad):
    broken = rows.clone()
    broken[3, 4] = bad
    assert "generated" in refusal(distance, rows, broken)
    assert "real" in refusal(distance, broken, rows)
    assert "real images are not finite" in refusal(finished, gaussian(broken).with_half())


def test_torchmetrics_agrees():
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Pixels(torch.nn.Module):
        num_features = 12

        def forward(self, images):
            return images.flatten(1)

    torch.manual_seed(3)
    real, fake = torch.rand(300, 3, 2, 2), torch.rand(280, 3, 2, 2).square()
    oracle = FrechetInceptionDistance(feature=Pixels(), normalize=True).double()
    oracle.set_dtype(torch.float64)
    oracle.update(real.double(), real=True)
    oracle.update(fake.double(), real=False)
    a, b = gaussian(real.flatten(1)), gaussian(fake.flatten(1))
    # It divides by N - 1, the reference by N.
    a, b = (Gaussian(each.number, each.mean, each.cov * each.number / (each.number - 1)) for each in (a, b))
    assert between(a, b) == pytest.approx(float(oracle.compute()), rel=1e-4)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(rows):
    real, fake = rows.float(), rows.float().abs()
    expected = pytest.approx(distance(real, fake), rel=1e-8)
    a, b = finished(gaussian(real.cuda(), "cuda").with_half()), gaussian(fake.cuda(), "cuda")
    assert between(a, b) == expected
    assert between(a.on(torch.device("cpu")), b, device=torch.device("cpu")) == expected
    assert between(gaussian(real), b, device=torch.device("cuda")) == expected


@pytest.mark.gpu
def test_sums_move_with_the_rows_that_wait(rows):
    sums = MomentSums(12, torch.device("cuda"))
    sums.add(rows[:200].cuda())
    sums.count()
    sums.add(rows[200:400].cuda())
    sums.move(torch.device("cpu"))
    sums.add(rows[400:].cuda())
    found = sums.gaussian()
    assert found.cov.device.type == "cpu"
    assert torch.allclose(found.cov, gaussian(rows).cov, rtol=1e-10)
