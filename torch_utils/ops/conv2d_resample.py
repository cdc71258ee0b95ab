"""Convolution combined with upsampling or downsampling by a FIR filter."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from torch_utils.ops import conv2d
from torch_utils.ops.upfirdn2d import downsample_padding, quad, upfirdn2d, upsample_padding


def conv2d_resample(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """Upsample with `f`, convolve with `w`, downsample with `f`: `conv2d_resample_ref` in fewer multiplications.

    Args:
        x: `[N, C, H, W]`.
        w: `[O, C / groups, kh, kw]` of x's dtype.
        f: filter from `upfirdn2d.setup_filter`, or None for the identity.
        up, down: integer factors; the brightness is kept.
        padding: pixels of the upsampled image: an int, `[x, y]` or `[x0, x1, y0, y1]`.
        groups: as in `torch.nn.functional.conv2d`.
        flip_weight: True is torch's correlation, False a true convolution.
        flip_filter: True correlates with `f`, False convolves.
        gain: multiplies the output; where there is resampling, in the filter's pass.

    Returns:
        `[N, O, H', W']`. Differentiable to any order.
    """
    kh, kw = w.shape[2:]
    x0, x1, y0, y1 = pads = _resample_padding(f, up, down, padding)

    if kw == kh == 1 and up == 1 and down > 1:  # fewer pixels to convolve
        x = upfirdn2d(x, f, down=down, padding=pads, flip_filter=flip_filter, gain=gain)
        return _conv(x, w, groups=groups)
    if kw == kh == 1 and up > 1 and down == 1:  # fewer pixels to convolve
        x = _conv(x, w, groups=groups)
        return upfirdn2d(x, f, up=up, padding=pads, flip_filter=flip_filter, gain=gain * up**2)
    if up == 1 and down > 1:  # convolve only where a pixel is kept
        x = upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain)
        return _conv(x, w, stride=down, groups=groups, flip_weight=flip_weight)
    if up > 1:
        # Convolving the zero-stuffed image is a transposed convolution; the filter commutes and comes after it.
        # It yields the full convolution less its last up - 1 zeros, hence what is taken off the padding.
        pads = (x0 - (kw - 1), x1 - (kw - up), y0 - (kh - 1), y1 - (kh - up))
        crop_x, crop_y = max(min(-pads[0], -pads[1]), 0), max(min(-pads[2], -pads[3]), 0)
        x = _conv_transpose(x, w, up, (crop_y, crop_x), groups, flip_weight)
        pads = (pads[0] + crop_x, pads[1] + crop_x, pads[2] + crop_y, pads[3] + crop_y)
        x = upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain * up**2)
        return upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x
    if gain != 1:
        w = w * gain
    if x0 == x1 >= 0 and y0 == y1 >= 0:
        return _conv(x, w, padding=(y0, x0), groups=groups, flip_weight=flip_weight)
    return _conv(F.pad(x, pads), w, groups=groups, flip_weight=flip_weight)


def conv2d_resample_ref(
    x: torch.Tensor,
    w: torch.Tensor,
    f: torch.Tensor | None = None,
    up: int = 1,
    down: int = 1,
    padding: int | Sequence[int] = 0,
    groups: int = 1,
    flip_weight: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """`conv2d_resample`, written as its definition: upsample, convolve, downsample."""
    pads = _resample_padding(f, up, down, padding)
    x = upfirdn2d(x, f if up > 1 else None, up=up, padding=pads, flip_filter=flip_filter, gain=up**2)
    x = F.conv2d(x, w if flip_weight else w.flip([2, 3]), groups=groups)
    return (upfirdn2d(x, f, down=down, flip_filter=flip_filter) if down > 1 else x) * gain


def _resample_padding(
    f: torch.Tensor | None, up: int, down: int, padding: int | Sequence[int]
) -> tuple[int, int, int, int]:
    sides = quad(padding)
    for factor, extra in ((up, upsample_padding), (down, downsample_padding)):
        if factor < 1:
            raise ValueError(f"a resampling factor is at least 1, not {factor}")
        if factor > 1:
            more = extra(f, (factor, factor))
            sides = (sides[0] + more[0], sides[1] + more[1], sides[2] + more[2], sides[3] + more[3])
    return sides


def _conv(
    x: torch.Tensor,
    w: torch.Tensor,
    stride: int = 1,
    padding: tuple[int, int] = (0, 0),
    groups: int = 1,
    flip_weight: bool = True,
) -> torch.Tensor:
    if not flip_weight and w.shape[2:] != (1, 1):
        w = w.flip([2, 3])
    return conv2d.conv2d(x, w, stride=(stride, stride), padding=padding, groups=groups)


def _conv_transpose(
    x: torch.Tensor, w: torch.Tensor, stride: int, padding: tuple[int, int], groups: int, flip_weight: bool
) -> torch.Tensor:
    """Transposed convolution with a weight laid out as for a forward one, `[O, I / groups, kh, kw]`."""
    if flip_weight:
        w = w.flip([2, 3])
    out_channels, in_per_group, kh, kw = w.shape
    if groups == 1:
        w = w.transpose(0, 1)  # without a copy
    else:
        w = w.reshape(groups, out_channels // groups, in_per_group, kh, kw).transpose(1, 2)
        w = w.reshape(groups * in_per_group, out_channels // groups, kh, kw)
    return conv2d.conv_transpose2d(x, w, stride=(stride, stride), padding=padding, groups=groups)
