"""Precision and recall: golden, as their definition has them, in tiles of any size."""

import json

import pytest
import torch
from checks import refusal
from portions import finished, in_portions

from gan.metrics import precision_recall as module
from gan.metrics.precision_recall import precision_recall, radii


def by_definition(real, fake, k):
    def radii(rows):
        return torch.cdist(rows, rows).sort(dim=1).values[:, k]  # the nearest is the row itself

    def covered(rows, others):
        return float((torch.cdist(rows, others) <= radii(others)).any(1).double().mean())

    real, fake = real.double(), fake.double()
    return covered(fake, real), covered(real, fake)


@pytest.fixture
def sets():
    torch.manual_seed(0)
    return torch.randn(230, 6), torch.randn(170, 6) * 0.8 + 0.4


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(module, "_BYTES_AT_ONCE", {"cpu": 2 * 4 * 20 * (20 + 6)})  # of 20 rows


def test_golden(golden):
    data = golden("metrics.npz")
    expected = json.loads(str(data["meta"]))
    real, fake = torch.from_numpy(data["real"]), torch.from_numpy(data["gen"])
    for dtype in (torch.float64, torch.float32):
        found = finished(precision_recall(real.to(dtype), fake.to(dtype), 3))
        assert found == pytest.approx((expected["precision"], expected["recall"]), rel=1e-10)


@pytest.mark.parametrize("k", [1, 3, 25])
@pytest.mark.usefixtures("small_tiles")
def test_definition(sets, k):
    found, portions = in_portions(precision_recall(*sets, k))
    assert found == by_definition(*sets, k)
    # 12 and 9 tiles a side; distances within a set are computed once for both rows.
    assert portions == 12 * 13 // 2 + 9 * 10 // 2 + 12 * 9


@pytest.mark.usefixtures("small_tiles")
def test_radii_that_are_known_give_the_same(sets):
    real, fake = sets
    known, portions = in_portions(radii(real, 5))
    assert portions == 12 * 13 // 2
    assert torch.allclose(known.sqrt(), torch.cdist(real, real).sort(dim=1).values[:, 5], rtol=1e-4)
    found, portions = in_portions(precision_recall(real, fake, 5, real_radii=known))
    assert found == finished(precision_recall(real, fake, 5))
    assert portions == 9 * 10 // 2 + 12 * 9
    nothing = torch.zeros_like(known)
    assert finished(precision_recall(real, fake, 5, real_radii=nothing)) == (0, found[1])


def test_tiles_of_any_size_give_the_same(sets, monkeypatch):
    whole = finished(precision_recall(*sets))
    for size in (2**11, 2**13, 2**30):
        monkeypatch.setattr(module, "_BYTES_AT_ONCE", {"cpu": size})
        assert finished(precision_recall(*sets)) == whole


def test_a_tile_stays_within_its_memory():
    rows = module._Rows(torch.zeros(100_000, 1).expand(-1, 4096), torch.zeros(4096), torch.device("cpu"))
    side = next(rows.tiles()).stop
    assert 0.9 < 2 * 4 * side * (side + 4096) / module._BYTES_AT_ONCE["cpu"] <= 1


class TestKnownAnswers:
    def test_a_ball_holds_its_surface(self):
        outside, inside = torch.tensor([[2.0], [9.0]]), torch.tensor([[0.0], [1.0], [10.0], [11.0]])
        # The balls of the four reach just to the two; those of the two reach beyond all.
        assert finished(precision_recall(outside, inside, 1)) == (1, 1)
        assert finished(precision_recall(inside, outside, 1)) == (1, 1)

    def test_equal_sets_have_all(self, sets):
        real = sets[0]
        assert finished(precision_recall(real, real.flip(0))) == (1, 1)

    def test_sets_far_apart_have_nothing(self, sets):
        assert finished(precision_recall(sets[0], sets[1] + 100)) == (0, 0)

    def test_one_good_picture_again_and_again_is_precise_and_recalls_nothing(self, sets):
        real = sets[0]
        assert finished(precision_recall(real, real[:1].expand(100, -1) + 0.01)) == (1, 0)

    def test_half_of_the_fakes_are_good(self, sets):
        real = sets[0]
        fake = torch.cat([real[:80], real[:80] + 100])
        precision, recall = finished(precision_recall(real, fake))
        assert precision == 0.5
        assert recall > 0.8  # from any real the nearest of the 80 is not far

    def test_exchanged_sets_exchange_their_parts(self, sets):
        real, fake = sets
        assert finished(precision_recall(fake, real)) == finished(precision_recall(real, fake))[::-1]

    def test_far_from_0_is_no_other_answer(self, sets):
        # Products of such numbers would leave no digits of the distances in float32.
        real, fake = sets
        assert finished(precision_recall(real + 1000, fake + 1000)) == pytest.approx(by_definition(*sets, 3), abs=0.01)

    def test_the_further_the_worse(self, sets):
        real, fake = sets
        found = [finished(precision_recall(real, fake + shift))[0] for shift in (0, 1, 2, 4)]
        assert found == sorted(found, reverse=True)
        assert found[0] > 2 * found[2]


def test_half_precision_is_computed_in_float32(sets):
    real, fake = (each.half() for each in sets)
    assert finished(precision_recall(real, fake)) == by_definition(real, fake, 3)


def test_features_that_are_no_numbers_are_refused(sets):
    real, broken = sets
    broken[3, 4] = torch.inf
    assert "generated images are not finite" in refusal(finished, precision_recall(real, broken))
    assert "real images are not finite" in refusal(finished, precision_recall(broken, real))


def test_k_images_are_refused(sets):
    real, fake = sets
    assert "3 real and 170 generated" in refusal(finished, precision_recall(real[:3], fake))
    assert finished(precision_recall(real[:4], fake))


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu(sets):
    real, fake = sets
    on_cpu = finished(precision_recall(real, fake))
    assert finished(precision_recall(real, fake, device=torch.device("cuda"))) == on_cpu
    assert finished(precision_recall(real.cuda(), fake.cuda())) == on_cpu
    known = finished(radii(real, 3, device=torch.device("cuda"))).cpu()
    assert finished(precision_recall(real, fake, device=torch.device("cuda"), real_radii=known)) == on_cpu
