"""Whether networks that were written are the same as before: equal tensors, pictures and scores.

What a format cannot carry (float16 rounds, a layout has no place for an option) is told apart from everything else:
what was written must equal the source as the format can carry it; its difference from the source itself is told.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gan.errors import GanError
from gan.models.snapshot import Snapshot
from gan.networks import Generator

Images = Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]  # of z [N, z_dim], c [N, c_dim] and psi

_BATCHES = ((3, 1.0), (1, 0.5))  # pictures, truncation psi
_NUM_PICTURES = sum(number for number, _ in _BATCHES)
# Of pictures that go from -1 to 1; larger ones are allowed more. Rounding in another order of sums is far below.
_SAME, _SAME_ELSEWHERE = 1e-5, 1e-3


@torch.no_grad()
def compare(
    source: Snapshot, written: Snapshot, half: bool, reduce: Callable[[torch.nn.Module], None] | None = None
) -> tuple[float | None, float | None]:
    """The largest differences of pictures that go from -1 to 1, and of D's logits; None without a network that makes
    them.

    Args:
        written: what was opened again.
        half: floating-point tensors may be as far apart as rounding to float16 makes them.
        reduce: takes from a network what the format cannot carry.

    Raises GanError if there is a difference that these do not explain.
    """
    picture_differences, score_difference = [], None
    images: torch.Tensor | None = None
    for name in ("G", "G_ema"):
        if (there := getattr(source, name)) is not None:
            again, carried = _again(name, source, written, half, reduce)
            images = _pictures(there, _torch_images(there))
            found = _pictures(there, _torch_images(again))
            expected = images if carried is there else _pictures(there, _torch_images(carried))
            _check(expected, found, _SAME, f"opened again, its {name} makes other pictures")
            picture_differences.append(_largest(images, found))
    if source.D is not None:
        again, carried = _again("D", source, written, half, reduce)
        if images is None:
            images = torch.randn([_NUM_PICTURES, source.D.img_channels, *source.D.img_size])
        logits, found = _logits(source.D, images), _logits(again, images)
        expected = logits if carried is source.D else _logits(carried, images)
        _check(expected, found, _SAME, "opened again, its D judges otherwise")
        score_difference = _largest(logits, found)
    return max(picture_differences, default=None), score_difference


@torch.no_grad()
def compare_images(G: Generator, images: Images, program: str) -> float:
    """The largest difference of the pictures that another program computes. Raises GanError if it is no rounding."""
    expected, found = _pictures(G, _torch_images(G)), _pictures(G, images)
    _check(expected, found, _SAME_ELSEWHERE, f"{program} makes other pictures of it")
    return _largest(expected, found)


def _again(
    name: str,
    source: Snapshot,
    written: Snapshot,
    half: bool,
    reduce: Callable[[torch.nn.Module], None] | None,
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A network as it was written, and what it must equal: the source's, or a copy with what the format explains.

    Raises GanError if a tensor differs by more than that.
    """
    there, again = getattr(source, name), getattr(written, name)
    if again is None:
        raise GanError(f"{name} is not in it")
    tensors = again.state_dict()
    for key, tensor in there.state_dict().items():
        if key not in tensors or not _stored_alike(tensor, tensors[key], half):
            raise GanError(f"{name}.{key} is another tensor in it")
    if not half and reduce is None:  # nothing to explain
        return again, there
    carried = copy.deepcopy(there)
    carried.load_state_dict({key: tensors[key] for key in there.state_dict()})
    if reduce is not None:
        reduce(carried)
    return again, carried


def _stored_alike(before: torch.Tensor, after: torch.Tensor, half: bool) -> bool:
    """Equal, or with half as far apart as rounding to float16 makes them."""
    if before.shape != after.shape:
        return False
    if not half:
        return torch.equal(before, after)
    return bool(((before - after).abs() <= before.abs() * 2**-11 + 2**-25).all())


def _torch_images(G: Any) -> Images:
    return lambda z, c, psi: G(z, c, truncation_psi=psi, noise_mode="const", force_fp32=True)


def _pictures(G: Generator, compute: Images) -> torch.Tensor:
    """The same latents and labels for everyone, `[_NUM_PICTURES, C, H, W]`; G says of which sizes."""
    images, first = [], 0
    tracked = G.mapping.w_avg_beta is not None  # without a mean there is no truncation
    for number, psi in _BATCHES:
        seeds = range(first, first + number)
        z = torch.from_numpy(np.concatenate([np.random.RandomState(seed).randn(1, G.z_dim) for seed in seeds])).float()
        images.append(compute(z, _labels(G.c_dim)[first : first + number], psi if tracked else 1.0))
        first += number
    return torch.cat(images)


def _logits(D: Any, images: torch.Tensor) -> torch.Tensor:
    """Of as many images as one minibatch-stddev group has room for."""
    group = D.b4.mbstd.group_size if D.b4.mbstd is not None else None
    number = min(group or _NUM_PICTURES, _NUM_PICTURES)
    logits: torch.Tensor = D(images[:number], _labels(D.c_dim)[:number], force_fp32=True)
    return logits


def _labels(c_dim: int) -> torch.Tensor:
    """`[_NUM_PICTURES, c_dim]`: the first classes in turn."""
    return torch.eye(c_dim)[torch.arange(_NUM_PICTURES) % max(c_dim, 1)] if c_dim else torch.zeros([_NUM_PICTURES, 0])


def _largest(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float((expected - found).abs().max())


def _check(expected: torch.Tensor, found: torch.Tensor, limit: float, complaint: str) -> None:
    largest = _largest(expected, found) if expected.shape == found.shape else float("nan")
    if not largest <= limit * max(1.0, float(expected.abs().max())):
        raise GanError(f"{complaint} (largest difference {largest:.3g}); please report it")
