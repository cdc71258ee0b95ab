"""Mean distances of pictures: by their definition, and where the answer is known."""

import pytest
import torch
from checks import refusal
from portions import finished, in_portions

from gan.metrics import diversity
from gan.metrics.diversity import mean_distance, reduced


def images(number, *size, channels=3):
    return torch.randint(0, 256, (number, channels, *size), dtype=torch.uint8)


def test_definition(monkeypatch):
    monkeypatch.setattr(diversity, "_ROWS_AT_ONCE", 7)
    torch.manual_seed(0)
    rows = torch.rand(30, 12) * 255
    pairs = [(a - b).square().mean().sqrt() for i, a in enumerate(rows) for b in rows[:i]]
    found, portions = in_portions(mean_distance(rows))
    assert found == pytest.approx(float(torch.stack(pairs).mean()), rel=1e-6)
    assert portions == 5


def test_black_and_white_are_255_apart():
    both = torch.cat([torch.zeros(1, 3, 32, 32), torch.full((1, 3, 32, 32), 255)]).to(torch.uint8)
    assert finished(mean_distance(reduced(both))) == 255


def test_equal_pictures_are_0_apart():
    torch.manual_seed(1)
    assert finished(mean_distance(reduced(images(1, 32, 32).expand(50, -1, -1, -1)))) == 0


def test_half_as_much_contrast_is_half_as_far():
    torch.manual_seed(2)
    rows = reduced(images(60, 16, 16))
    assert finished(mean_distance(rows / 2 + 30)) == pytest.approx(finished(mean_distance(rows)) / 2)


def test_fewer_different_pictures_are_less_far():
    torch.manual_seed(3)
    rows = reduced(images(64, 16, 16))
    found = [finished(mean_distance(rows[:few].repeat(64 // few, 1))) for few in (2, 4, 16, 64)]
    assert found == sorted(found)


def test_reduction_is_a_mean_of_areas():
    torch.manual_seed(4)
    pictures = images(2, 64, 32)
    expected = pictures.float().reshape(2, 3, 16, 4, 16, 2).mean([3, 5]).flatten(1)
    assert torch.allclose(reduced(pictures), expected, atol=1e-4)


@pytest.mark.parametrize(("size", "channels"), [((4, 4), 3), ((17, 40), 3), ((16, 16), 1)])
def test_pictures_of_any_size(size, channels):
    assert reduced(images(3, *size, channels=channels)).shape == (3, channels * 256)


def test_one_picture_is_refused():
    assert "at least 2" in refusal(finished, mean_distance(torch.zeros(1, 4)))
