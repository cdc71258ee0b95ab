"""Inception score: how sure a classifier is of each image, and how many classes they are (arXiv 1606.03498)."""

from __future__ import annotations

import itertools
from collections.abc import Generator

import torch

from gan.errors import GanError
from gan.metrics.exact import check_finite, float64_device


def inception_score(
    probabilities: torch.Tensor, splits: int = 10, device: torch.device | None = None
) -> Generator[None, None, tuple[float, float]]:
    """Mean and standard deviation, over `splits` parts of the images, of exp(mean KL(p(y|x) || p(y))); a part each.

    Args:
        probabilities: `[N, classes]`, of the images in the order in which they were made.
        device: where it is computed, or the CPU where there is no float64; None: where they are.
    """
    number = len(probabilities)
    if number < splits:
        raise GanError(f"an inception score in {splits} parts needs at least {splits} images; there are {number}")
    check_finite(probabilities, "generated")
    device = float64_device(device or probabilities.device)
    scores = []
    for begin, end in itertools.pairwise(i * number // splits for i in range(splits + 1)):
        scores.append(_score(probabilities[begin:end].to(device).double()))
        yield
    of_parts = torch.stack(scores)
    return float(of_parts.mean()), float(of_parts.std(correction=0))


def _score(p: torch.Tensor) -> torch.Tensor:
    own, together = torch.special.xlogy(p, p), torch.special.xlogy(p, p.mean(0))  # 0 log 0 is 0
    return (own - together).sum(1).mean().exp()
