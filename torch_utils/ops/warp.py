"""Pictures resampled through one affine matrix each, without aliasing, as if reflected on and on at their borders."""

from __future__ import annotations

from collections.abc import Callable

import torch

from torch_utils.ops import cuda_kernels, grid_sample, kernel_checks, upfirdn2d, warp_cuda

_DENSE_LIMIT = 300  # pixels; see on_both_axes


def warp(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    """Resample images through `inverse`. Equals `warp_ref`; on a GPU, where its kernels are in use, without the plane.

    Args:
        images: `[N, C, H, W]`.
        inverse: `[N, 3, 3]`, output to input position, in pixels from the centre; not differentiated.
        lowpass: `[taps]`; not differentiated.

    Returns:
        `[N, C, H, W]`. Differentiable to any order.
    """
    if not _takes(images, inverse, lowpass):
        return warp_ref(images, inverse, lowpass)
    sampled = warp_cuda.sample(images, inverse.float(), lowpass.float())
    margin = lowpass.shape[0] // 4
    return upfirdn2d.downsample2d(sampled, lowpass, padding=-2 * margin, flip_filter=True)


def warp_ref(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    """`warp` by way of the upsampled plane, in PyTorch's operations.

    Twofold oversampling with an orthogonal low-pass (sym6), bilinear lookup, and the same filter flipped on the way
    down.
    """
    margin = lowpass.shape[0] // 4  # output pixels beyond the border that the downsampling filter looks at
    sampled = sample_ref(images, inverse, lowpass)
    return on_both_axes(sampled, lambda rows: _downsampled(rows, lowpass, margin))


def sample_ref(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    """The lookup alone: `[N, C, H, W]` -> `[N, C, 2 * (H + 2 * margin), 2 * (W + 2 * margin)]`, margin = taps // 4.

    A reflected picture is periodic with 2 * (size - 1) pixels, so one upsampled period holds the whole plane; positions
    are taken modulo that period, and no padding has to be sized by reading the matrices.
    """
    height, width = images.shape[2:]
    margin = lowpass.shape[0] // 4
    plane = on_both_axes(images, lambda rows: _upsampled_period(rows, lowpass))
    period_x, period_y = plane.shape[3] - 1, plane.shape[2] - 1  # the last row and column repeat the first

    x = _sample_positions(width, margin, images)  # [W'] in output pixels from the centre
    y = _sample_positions(height, margin, images)  # [H']
    a = inverse[:, :2, :, None, None]
    position = a[:, :, 0] * x[None, None, None, :] + a[:, :, 1] * y[None, None, :, None] + a[:, :, 2]  # [N, 2, H', W']
    # Index into the upsampled plane, whose pixel k stands for the position (k + 1) / 2 from the left edge: its middle,
    # (k + 0.5) / 2, and the quarter of a pixel by which sym6 leans off the middle of its taps.
    u = (position[:, 0] * 2 + (width - 1)).remainder(period_x)
    v = (position[:, 1] * 2 + (height - 1)).remainder(period_y)
    grid = torch.stack([(2 * u + 1) / (period_x + 1) - 1, (2 * v + 1) / (period_y + 1) - 1], dim=-1)
    return grid_sample.grid_sample(plane, grid)


def _takes(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> bool:
    """Whether the kernels compute this; shapes that make no sense are for PyTorch to complain about."""
    if not _kernel.takes(images, inverse, lowpass) or images.ndim != 4 or min(images.shape[2:]) < 2:
        return False
    n, c, height, width = images.shape
    samples = n * c * 4 * (height + warp_cuda.TAPS // 2) * (width + warp_cuda.TAPS // 2)
    return inverse.shape == (n, 3, 3) and lowpass.shape == (warp_cuda.TAPS,) and samples < 2**31


def _sample_positions(size: int, margin: int, like: torch.Tensor) -> torch.Tensor:
    """Positions of the twice oversampled output pixels, `[2 * (size + 2 * margin)]`, in pixels from the centre.

    They lie a quarter of a pixel right of the middle of each half pixel, for the same lean of sym6.
    """
    k = torch.arange(2 * (size + 2 * margin), dtype=like.dtype, device=like.device)
    return (k + 1) / 2 - margin - size / 2


def on_both_axes(images: torch.Tensor, operation: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply a linear operation on axis 2 of `[N, C, H, W]` to axes 2 and 3.

    Up to a size, as two products with its matrix: FIR passes over three channels are the slowest thing that a CPU can
    be given, and at these sizes the product is no more work. Its cost grows with the third power, though.
    """
    height, width = images.shape[2:]
    if max(height, width) > _DENSE_LIMIT:
        return operation(operation(images).transpose(2, 3)).transpose(2, 3)
    rows = operation(torch.eye(height, dtype=images.dtype, device=images.device)[None, None])
    columns = rows
    if width != height:
        columns = operation(torch.eye(width, dtype=images.dtype, device=images.device)[None, None])
    return rows @ images @ columns.transpose(2, 3)


def _upsampled_period(rows: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    """One period of the rows continued by reflection, upsampled by 2: H rows become 4 * (H - 1) + 1."""
    size = rows.shape[2]
    margin = (lowpass.shape[0] // 2 + 1) // 2  # input pixels that the filter sees beyond the period
    extended = torch.arange(-margin, 2 * (size - 1) + margin + 1, device=rows.device)
    rows = rows.index_select(2, reflected(extended, size))
    pads = [0, 0, -2 * margin, -2 * margin - 1]
    return upfirdn2d.upsample2d(rows, lowpass[:, None], up=[1, 2], padding=pads)


def _downsampled(rows: torch.Tensor, lowpass: torch.Tensor, margin: int) -> torch.Tensor:
    """Rows downsampled by 2, less `margin` rows on either side: `[N, C, 2 * (H + 2 * margin), W]` -> `[N, C, H, W]`."""
    pads = [0, 0, -2 * margin, -2 * margin]
    return upfirdn2d.downsample2d(rows, lowpass[:, None], down=[1, 2], padding=pads, flip_filter=True)


def reflected(index: torch.Tensor, size: int) -> torch.Tensor:
    """Pixel indices of any size folded into `[0, size)` by reflection about the first and the last pixel."""
    if size == 1:
        return torch.zeros_like(index)
    index = index.remainder(2 * (size - 1))
    return torch.minimum(index, 2 * (size - 1) - index)


def _check(device: torch.device) -> str | None:
    """Compare the kernels with `sample_ref`, in all derivatives; what is wrong, or None."""
    cos, sin = 0.8, 0.6
    rows = [[[1.0, 0, 0], [0, 1, 0], [0, 0, 1]], [[cos, -sin, 31.3], [1.3 * sin, 1.3 * cos, -2.6], [0, 0, 1]]]
    constants = {
        "inverse": torch.tensor(rows, dtype=torch.float32),
        "lowpass": torch.tensor([1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1, 2], dtype=torch.float32) / 32,
    }
    images = torch.randn([2, 3, 9, 14], generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    for dtype, suffix in cuda_kernels.SUFFIXES.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            inputs = {"images": images.to(dtype).contiguous(memory_format=layout)}
            wrong = kernel_checks.difference(_sample, sample_ref, inputs, constants, device, floor=1e-4)
            if wrong:
                return f"in {suffix}: {wrong}"
    return None


def _sample(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    return warp_cuda.sample(images, inverse, lowpass)


_kernel = cuda_kernels.register("warp", "warp.cu", _check)
