"""Inception scores: golden, and where the answer is known."""

import json

import pytest
import torch
from checks import refusal

from gan.metrics.inception_score import inception_score


def test_golden(golden):
    data = golden("metrics.npz")
    expected = json.loads(str(data["meta"]))["inception_score"]
    found = inception_score(torch.from_numpy(data["probs"]), expected["splits"])
    assert found == pytest.approx((expected["mean"], expected["std"]), rel=1e-10)


class TestKnownAnswers:
    def test_a_classifier_that_knows_nothing(self):
        assert inception_score(torch.full([100, 8], 1 / 8)) == pytest.approx((1, 0))

    def test_each_class_equally_often_and_for_certain(self):
        # Zeros have no logarithm and count for nothing.
        assert inception_score(torch.eye(8).repeat(20, 1), splits=2) == pytest.approx((8, 0))

    def test_one_class_for_certain(self):
        assert inception_score(torch.eye(8)[:1].repeat(50, 1)) == pytest.approx((1, 0))

    def test_parts_are_scored_by_themselves(self):
        # The first half sees 4 classes, the second one: mean and deviation of 4 and 1.
        halves = torch.cat([torch.eye(4).repeat(5, 1), torch.eye(4)[:1].repeat(20, 1)])
        assert inception_score(halves, splits=2) == pytest.approx((2.5, 1.5))

    def test_parts_of_unequal_size_leave_nobody_out(self):
        # 7 images in 2 parts: 3 of one class, 4 of four.
        probabilities = torch.cat([torch.eye(4)[:1].repeat(3, 1), torch.eye(4)])
        assert inception_score(probabilities, splits=2) == pytest.approx((2.5, 1.5))


def test_fewer_images_than_parts_are_refused():
    assert "10 parts" in refusal(inception_score, torch.full([9, 4], 0.25))


def test_probabilities_that_are_no_numbers_are_refused():
    assert "not finite" in refusal(inception_score, torch.full([20, 4], torch.nan))
