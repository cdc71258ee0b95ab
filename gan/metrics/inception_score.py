"""Inception score: how sure a classifier is of each image, and how many classes they are (arXiv 1606.03498)."""

from __future__ import annotations

import itertools

import torch

from gan.errors import GanError
from gan.metrics.exact import check_finite, float64_device


def inception_score(probabilities: torch.Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation, over `splits` parts of the images, of exp(mean KL(p(y|x) || p(y))).

    Args:
        probabilities: `[N, classes]`, of the images in the order in which they were made.
    """
    number = len(probabilities)
    if number < splits:
        raise GanError(f"an inception score in {splits} parts needs at least {splits} images; there are {number}")
    check_finite(probabilities, "generated")
    probabilities = probabilities.to(float64_device(probabilities.device))
    bounds = [i * number // splits for i in range(splits + 1)]
    parts = [probabilities[begin:end].double() for begin, end in itertools.pairwise(bounds)]
    scores = torch.stack([_score(part) for part in parts])
    return float(scores.mean()), float(scores.std(correction=0))


def _score(p: torch.Tensor) -> torch.Tensor:
    own, together = torch.special.xlogy(p, p), torch.special.xlogy(p, p.mean(0))  # 0 log 0 is 0
    return (own - together).sum(1).mean().exp()
