"""Inception scores: golden, and where the answer is known."""

import json

import pytest
import torch
from checks import refusal
from portions import finished, in_portions

from gan.metrics.inception_score import inception_score


def score(probabilities, splits=10):
    return finished(inception_score(probabilities, splits))


def test_golden(golden):
    data = golden("metrics.npz")
    expected = json.loads(str(data["meta"]))["inception_score"]
    found = score(torch.from_numpy(data["probs"]), expected["splits"])
    assert found == pytest.approx((expected["mean"], expected["std"]), rel=1e-10)


class TestKnownAnswers:
    def test_a_classifier_that_knows_nothing(self):
        assert score(torch.full([100, 8], 1 / 8)) == pytest.approx((1, 0))

    def test_each_class_equally_often_and_for_certain(self):
        # Zeros have no logarithm and count for nothing.
        assert score(torch.eye(8).repeat(20, 1), splits=2) == pytest.approx((8, 0))

    def test_one_class_for_certain(self):
        assert score(torch.eye(8)[:1].repeat(50, 1)) == pytest.approx((1, 0))

    def test_parts_are_scored_by_themselves(self):
        # The first half sees 4 classes, the second one: mean and deviation of 4 and 1.
        halves = torch.cat([torch.eye(4).repeat(5, 1), torch.eye(4)[:1].repeat(20, 1)])
        assert score(halves, splits=2) == pytest.approx((2.5, 1.5))

    def test_parts_of_unequal_size_leave_nobody_out(self):
        # 7 images in 2 parts: 3 of one class, 4 of four.
        probabilities = torch.cat([torch.eye(4)[:1].repeat(3, 1), torch.eye(4)])
        assert score(probabilities, splits=2) == pytest.approx((2.5, 1.5))


def test_fewer_images_than_parts_are_refused():
    assert "10 parts" in refusal(score, torch.full([9, 4], 0.25))


def test_probabilities_that_are_no_numbers_are_refused():
    assert "not finite" in refusal(score, torch.full([20, 4], torch.nan))


def test_one_portion_a_part():
    probabilities = torch.rand(70, 4).softmax(1)
    assert in_portions(inception_score(probabilities, 7)) == (score(probabilities, 7), 7)
    assert in_portions(inception_score(probabilities)) == (score(probabilities, 10), 10)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    probabilities = torch.rand(100, 50).softmax(1)
    on_gpu = finished(inception_score(probabilities, device=torch.device("cuda")))
    assert on_gpu == pytest.approx(score(probabilities), rel=1e-10)
