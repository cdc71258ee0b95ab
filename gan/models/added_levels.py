"""What the levels that a discriminator gets on top begin with, so that it judges a picture as it did half its size.

The old first layer, `fromrgb`, reads the picture itself. So that is what each new level hands on, halved: in pairs of
channels x and -x, of which the leaky ReLU leaves `lrelu(x) - lrelu(-x) = 1.2 x`. Behind the last of them its `conv1`
does what `fromrgb` did. The other channels begin as ever, and are read once the weights that read them have moved.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from gan.networks import Discriminator

_KEPT = 1 + 0.2  # of x, see above


class AddedLevels:
    """The levels of `target` above `old_top`, in whose place the file's networks had `weight` and `bias`.

    Args:
        weight: `[C, img_channels]` with its gain, of the old `fromrgb`, for the pictures of here.
        bias: `[C]` of it.
        gain: of its activation.
    """

    def __init__(
        self, target: Discriminator, old_top: int, weight: torch.Tensor, bias: torch.Tensor, gain: float
    ) -> None:
        self._target, self._last = target, 2 * old_top
        self._weight, self._bias, self._gain = weight, bias, gain
        self._shrink = 0.5**0.5 if target.b4.architecture == "resnet" else 1.0  # what a level's conv1 is called with

    @staticmethod
    def possible(target: Any, old_top: int) -> bool:
        """Whether the new levels have channels enough, and the activation that this is about."""
        blocks = [target.get_submodule(f"b{level}") for level in target.block_resolutions if level > old_top]
        return target.b4.architecture in ("orig", "resnet") and all(
            block.conv0.activation == "lrelu" and len(block.conv0.weight) >= 2 * target.img_channels for block in blocks
        )

    def takes_over(self, level: int, layer: str) -> bool:
        """Whether this tensor does what `fromrgb` did."""
        return level == self._last and layer in ("conv1.weight", "conv1.bias")

    def value(self, level: int, layer: str) -> Callable[[torch.Tensor], torch.Tensor] | None:
        """What a tensor of a new level begins with, from what the new network was made with; None: with that."""
        if layer == "skip.weight":
            return torch.zeros_like
        part, _, leaf = layer.partition(".")
        if part not in ("fromrgb", "conv0", "conv1") or leaf not in ("weight", "bias"):
            return None
        module: Any = self._target.get_submodule(f"b{level}.{part}")
        gain = module.act_gain * (self._shrink if part == "conv1" else 1)
        if self.takes_over(level, layer):
            scale = self._gain / gain  # within a leaky ReLU as good as behind it
            rows = self._bias * scale if leaf == "bias" else torch.cat([self._weight, -self._weight], dim=1) * scale
        else:
            identity = torch.eye(self._target.img_channels, dtype=torch.float64) / (_KEPT * gain)
            rows = torch.cat([identity, -identity])
            rows = rows if part == "fromrgb" else torch.cat([rows, -rows], dim=1)
            rows = torch.zeros(len(rows)) if leaf == "bias" else rows
        return _at_centre(rows if leaf == "bias" else rows / module.weight_gain)


def _at_centre(rows: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """Of the first outputs: `[outputs]`, or `[outputs, inputs]` at the centre of the kernel."""

    def value(fresh: torch.Tensor) -> torch.Tensor:
        result = fresh.clone()
        given = rows[: len(fresh)].to(fresh)
        result[: len(given)] = 0
        if fresh.ndim == 1:
            result[: len(given)] = given
        else:
            centre = fresh.shape[2] // 2
            result[: len(given), : given.shape[1], centre, centre] = given
        return result

    return value
