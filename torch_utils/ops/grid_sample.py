"""Bilinear sampling of images at given positions, differentiable to any order with respect to the images."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def grid_sample(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Sample `x` bilinearly at `grid`, zeros outside. Equals `grid_sample_ref`.

    PyTorch's own has no second derivative. For a fixed grid the operation is linear in `x`, so its gradient is the
    transposed operation, whose gradient is the operation again.

    Args:
        x: `[N, C, H, W]` float.
        grid: `[N, H', W', 2]` of x's dtype: (x, y) with -1 and 1 at the outer edges of the image; not differentiated.

    Returns:
        `[N, C, H', W']`.
    """
    return _Sample.apply(x, grid)


def grid_sample_ref(x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """`torch.nn.functional.grid_sample`: bilinear, zero padding, align_corners False. Differentiable once."""
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


class _Sample(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(grid)
        ctx.size = x.shape[2:]
        return grid_sample_ref(x, grid)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (grid,) = ctx.saved_tensors
        return _Scatter.apply(dy, grid, ctx.size) if ctx.needs_input_grad[0] else None, None


class _Scatter(torch.autograd.Function):
    """The transpose of `_Sample`: add each value of `[N, C, H', W']` to the four pixels that it came from."""

    @staticmethod
    def forward(ctx: Any, dy: torch.Tensor, grid: torch.Tensor, size: torch.Size) -> torch.Tensor:
        ctx.save_for_backward(grid)
        x = dy.new_empty([*dy.shape[:2], *size])  # its shape is asked for, not its values
        # Bilinear, zero padding, align_corners False; the gradient of x alone.
        return torch.ops.aten.grid_sampler_2d_backward(dy, x, grid, 0, 0, False, (True, False))[0]

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor) -> tuple[Any, ...]:
        (grid,) = ctx.saved_tensors
        return _Sample.apply(ddx, grid), None, None
