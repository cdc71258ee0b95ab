"""All gradients of a network in one buffer: zeroed, guarded and reduced in one operation each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch


class FlatGradients:
    """Owns the `.grad` of the given parameters as views into one flat tensor.

    A parameter that a phase does not reach has a gradient of zeros, in parameter order, on every rank alike.

    Args:
        room: {name: number of elements} of what else is averaged over the ranks, behind the gradients.
    """

    whole: torch.Tensor
    """the gradients and the room: what one reduction averages"""
    flat: torch.Tensor
    """the gradients"""
    room: dict[str, torch.Tensor]
    """by name, each `[elements]`"""

    def __init__(self, parameters: Iterable[torch.nn.Parameter], room: Mapping[str, int] | None = None) -> None:
        self.parameters, sizes = list(parameters), dict(room or {})
        first, number = self.parameters[0], sum(p.numel() for p in self.parameters)
        self.whole = torch.zeros(number + sum(sizes.values()), dtype=first.dtype, device=first.device)
        self.flat, *views = self.whole.split([number, *sizes.values()])
        self.room = dict(zip(sizes, views, strict=True))
        offset = 0
        for parameter in self.parameters:
            part = self.flat[offset : offset + parameter.numel()]
            # In the parameter's own order of memory: the optimiser walks through both side by side.
            parameter.grad = part.as_strided(parameter.shape, parameter.stride())
            offset += parameter.numel()

    def zero(self) -> None:
        """Start a new accumulation."""
        self.flat.zero_()

    def guard(self) -> torch.Tensor:
        """Replace NaN by 0 and infinities by +-1e5, and return whether there were any: float `[1]`, 0 or 1.

        Counting them takes five passes over memory; one sum tells whether there are any.
        """
        bad = 1 - self.flat.sum().isfinite().to(torch.float32)
        torch.nan_to_num(self.flat, nan=0.0, posinf=1e5, neginf=-1e5, out=self.flat)
        return bad[None]
