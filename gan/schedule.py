"""The numbers that change during training, as pure functions of the image counter."""

from __future__ import annotations

from typing import TypeVar

import torch

Number = TypeVar("Number", float, torch.Tensor)


def ema_beta(batch: int, ema_kimg: float, nimg: int, rampup: float | None = None) -> float:
    """Weight of the old value in the moving average of G: half-life `ema_kimg` thousand images.

    `rampup` limits the half-life to that share of the images seen so far, so that early averages forget fast.
    """
    half_life = ema_kimg * 1000
    if rampup is not None:
        half_life = min(half_life, nimg * rampup)
    return 0.5 ** (batch / max(half_life, 1e-8))


def lazy_adam(lr: float, betas: tuple[float, float], interval: int) -> tuple[float, tuple[float, float]]:
    """Learning rate and betas of an optimiser that also takes a regularisation step every `interval` batches.

    It then takes (interval + 1) steps where it took interval (arXiv 1912.04958, appendix B).
    """
    c = interval / (interval + 1)
    return lr * c, (betas[0] ** c, betas[1] ** c)


def is_due(batch_index: int, interval: int) -> bool:
    """Whether something that happens every `interval` batches happens after or in this one."""
    return batch_index % interval == 0


def ada_step(batch: int, interval: int, ada_kimg: float) -> float:
    """How far one adjustment moves p: from 0 to 1 in `ada_kimg` thousand images."""
    return batch * interval / (ada_kimg * 1000)


def adjusted_p(
    p: torch.Tensor, sign_sum: torch.Tensor, sign_count: torch.Tensor, target: float, step: float, p_max: float
) -> torch.Tensor:
    """The new augmentation p `[]`: up when D's output signs on reals, averaging r_t, exceed the target, else down.

    arXiv 2006.06676, section 3.1, eq. 1. All on the device; kept in [0, p_max] without a hidden surplus.
    """
    r_t = torch.where(sign_count > 0, sign_sum / sign_count, target)  # no signs, no move
    return (p + (r_t - target).sign() * step).clamp(0, p_max)


def step_seed(seed: int, nimg: int, rank: int = 0) -> int:
    """Seed of the random numbers of the batch that starts at image `nimg`: what makes resuming equal not stopping."""
    # splitmix64 finaliser (Steele et al. 2014): neighbouring counters give unrelated seeds.
    mask = (1 << 64) - 1
    # One more than the counters: all zeros would stay zero, the seed that made the networks.
    x = ((seed + 1) * 0x9E3779B97F4A7C15 + nimg * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return (x ^ (x >> 31)) >> 1  # torch takes seeds of 63 bits on every device
