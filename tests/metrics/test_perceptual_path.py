"""Perceptual path length: golden, paths on the sphere, crop and reduction, and a generator whose answer is known."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from checks import refusal

from gan.metrics.perceptual_path import EPSILON, distances, length, prepared, slerp, two_points


def test_golden(golden):
    data = golden("metrics.npz")
    expected = json.loads(str(data["meta"]))["ppl"]
    assert length(torch.from_numpy(data["ppl_dist"])) == pytest.approx(expected, rel=1e-10)


class TestSlerp:
    def test_a_quarter_turn(self):
        a, b = torch.tensor([[3.0, 0.0]]), torch.tensor([[0.0, 0.5]])
        for t in (0.0, 0.3, 1.0):
            angle = t * math.pi / 2
            found = slerp(a, b, torch.tensor([[t]]))
            assert torch.allclose(found, torch.tensor([[math.cos(angle), math.sin(angle)]]), atol=1e-6)

    def test_it_stays_on_the_sphere_and_keeps_its_speed(self):
        torch.manual_seed(0)
        a, b = torch.randn(50, 16).double(), torch.randn(50, 16).double()
        steps = [slerp(a, b, torch.full([50, 1], t)) for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
        for point in steps:
            assert torch.allclose(point.norm(dim=1), torch.ones(50).double())
        lengths = torch.stack([(p - q).norm(dim=1) for p, q in itertools.pairwise(steps)])
        assert torch.allclose(lengths, lengths[:1].expand(4, -1))
        assert torch.allclose(steps[-1], b / b.norm(dim=1, keepdim=True))

    def test_from_a_direction_to_itself(self):
        a = torch.randn(3, 8)
        assert torch.allclose(slerp(a, 2 * a, torch.full([3, 1], 0.5)), a / a.norm(dim=1, keepdim=True), atol=1e-3)


class TestTwoPoints:
    def test_in_w_straight(self):
        a, b, t = torch.zeros(4, 3, 5), torch.ones(4, 3, 5), torch.tensor([0.0, 0.25, 0.5, 0.9])
        near, far = two_points(a, b, t, "w")
        assert torch.allclose(near, t[:, None, None].expand_as(near))
        assert torch.allclose(far - near, torch.full_like(near, EPSILON), rtol=1e-3)

    def test_in_z_around(self):
        torch.manual_seed(1)
        a, b, t = torch.randn(4, 64).double(), torch.randn(4, 64).double(), torch.rand(4).double()
        near, far = two_points(a, b, t, "z")
        angle = torch.nn.functional.cosine_similarity(a, b).acos()
        assert torch.allclose((far - near).norm(dim=1), EPSILON * angle, rtol=1e-6)
        assert torch.equal(near, slerp(a, b, t[:, None]))

    def test_the_beginning_of_a_path(self):
        a, b = torch.randn(4, 8), torch.randn(4, 8)
        assert torch.equal(two_points(a, b, torch.zeros(4), "w")[0], a)
        at_end = two_points(a, b, torch.zeros(4), "z")[0]
        assert torch.allclose(at_end, a / a.norm(dim=1, keepdim=True), atol=1e-6)


class TestPrepared:
    def test_the_middle(self):
        places = torch.arange(64.0).reshape(1, 1, 8, 8) / 127.5 - 1
        assert torch.allclose(prepared(places, crop=True)[0, 0], torch.arange(64.0).reshape(8, 8)[3:7, 2:6])
        assert torch.allclose(prepared(places, crop=False)[0, 0], torch.arange(64.0).reshape(8, 8), atol=1e-5)

    @pytest.mark.parametrize(
        ("size", "crop", "expected"),
        [
            ((256, 256), False, (256, 256)),
            ((512, 512), False, (256, 256)),
            ((1024, 1024), False, (256, 256)),
            ((1024, 1024), True, (256, 256)),
            ((512, 512), True, (256, 256)),
            ((256, 256), True, (128, 128)),
            ((512, 768), False, (256, 384)),
            ((4, 4), True, (4, 4)),
        ],
    )
    def test_sizes(self, size, crop, expected):
        assert prepared(torch.zeros(1, 1, *size), crop).shape[2:] == expected

    def test_reduction_is_a_mean_of_boxes(self):
        images = torch.rand(1, 2, 512, 512) * 2 - 1
        boxes = images.reshape(1, 2, 256, 2, 256, 2).mean([3, 5])
        assert torch.allclose(prepared(images, crop=False), (boxes + 1) * 127.5, atol=1e-4)

    def test_levels_are_neither_rounded_nor_cut_off(self):
        found = prepared(torch.tensor([-1.0, 0, 1, 1.2]).reshape(1, 1, 2, 2), crop=False)
        assert torch.allclose(found.flatten(), torch.tensor([0, 127.5, 255, 280.5]))


def test_a_linear_generator_has_a_known_length():
    # Features A w along straight paths: |A (b - a)|^2, whatever t and epsilon are.
    torch.manual_seed(2)
    matrix = torch.randn(6, 8).double()
    a, b = torch.randn(1000, 8).double(), torch.randn(1000, 8).double()
    near, far = two_points(a, b, torch.rand(1000).double(), "w")
    found = distances(near @ matrix.T, far @ matrix.T)
    expected = ((b - a) @ matrix.T).square().sum(1)
    assert torch.allclose(found, expected, rtol=1e-6)


def test_the_step_is_that_of_the_paper():
    assert distances(torch.zeros(1, 3), torch.full((1, 3), 1e-4)).item() == pytest.approx(3)


class TestLength:
    @pytest.mark.parametrize("number", [1, 2, 50, 100, 101, 1000, 1234])
    def test_percentiles_as_numpy_has_them(self, number):
        torch.manual_seed(number)
        values = torch.rand(number).double()
        low = np.percentile(values.numpy(), 1, method="lower")
        high = np.percentile(values.numpy(), 99, method="higher")
        kept = values[(values >= low) & (values <= high)]
        assert length(values) == pytest.approx(float(kept.mean()))

    def test_outliers_do_not_count(self):
        values = torch.ones(1000)
        values[:9] = 1e9
        assert length(values) == 1

    def test_nothing_and_no_numbers_are_refused(self):
        assert "no pairs" in refusal(length, torch.zeros(0))
        assert "not finite" in refusal(length, torch.tensor([1.0, float("nan")]))
