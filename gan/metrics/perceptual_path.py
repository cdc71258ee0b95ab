"""Perceptual path length: how much a picture changes when its latent moves a little (arXiv 1812.04948)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gan.errors import GanError

EPSILON = 1e-4
_LARGEST = 256  # pixels: VGG was trained on pictures of about that size


def slerp(a: torch.Tensor, b: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """Points on the unit sphere, a share t of the way from the direction of a to that of b.

    Args:
        a, b: `[N, d]`.
        t: `[N, 1]`.
    """
    a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)
    dot = (a * b).sum(1, keepdim=True)
    angle = t * dot.clamp(-1, 1).acos()
    across = F.normalize(b - dot * a, dim=1)
    return F.normalize(a * angle.cos() + across * angle.sin(), dim=1)


def two_points(
    a: torch.Tensor, b: torch.Tensor, t: torch.Tensor, space: str, epsilon: float = EPSILON
) -> tuple[torch.Tensor, torch.Tensor]:
    """The points at t and t + epsilon of paths from a to b: on the sphere in z, straight in w.

    Args:
        a, b: `[N, d]` in z; any shape `[N, ...]` in w.
        t: `[N]`; 0 at the beginning of a path.
        space: z or w.
    """
    t = t.reshape(-1, *[1] * (a.ndim - 1))
    if space == "z":
        return slerp(a, b, t), slerp(a, b, t + epsilon)
    return torch.lerp(a, b, t), torch.lerp(a, b, t + epsilon)


def prepared(images: torch.Tensor, crop: bool) -> torch.Tensor:
    """Pictures as the detector takes them: maybe only their middle, at most 256 pixels and a bit, about 0..255.

    Args:
        images: `[N, C, H, W]` in -1..1, not rounded: the differences are smaller than a level of 8 bits.
        crop: rows 3/8 to 7/8 and columns 2/8 to 6/8 only.
    """
    height, width = images.shape[2] // 8, images.shape[3] // 8
    if crop and height and width:
        images = images[:, :, 3 * height : 7 * height, 2 * width : 6 * width]
    factor = min(images.shape[2:]) // _LARGEST
    if factor > 1:
        images = F.avg_pool2d(images, factor)
    return (images + 1) * 127.5


def distances(a: torch.Tensor, b: torch.Tensor, epsilon: float = EPSILON) -> torch.Tensor:
    """Distance `[N]` of each pair of LPIPS features `[N, d]`, in steps of epsilon squared."""
    return (a - b).square().sum(1) / epsilon**2


def length(distances: torch.Tensor) -> float:
    """Mean of the distances `[N]` that are neither below the 1st percentile nor above the 99th."""
    number = len(distances)
    if not number:
        raise GanError("there are no pairs of images to measure a path between")
    ordered = distances.cpu().double().sort().values
    if not ordered.isfinite().all():
        raise GanError("the features of the generated images are not finite numbers")
    # The percentiles are values that occur: the one below the 1st, the one above the 99th.
    low, high = ordered[(number - 1) // 100], ordered[-(-(number - 1) * 99 // 100)]
    return float(ordered[(ordered >= low) & (ordered <= high)].mean())
