"""Pad, upsample, filter and downsample images in one linear operation.

The gradient of an upfirdn2d is another upfirdn2d (see `adjoint_padding`), and the operation is registered that way:
differentiating it any number of times costs one FIR pass each, where plain autograd of a depthwise convolution falls
into one convolution per channel from the second order on.

On a CUDA device a compiled kernel does each pass (csrc/upfirdn2d.cu), if `kernels.prepare` could build it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils.ops import cuda_kernels, kernel_checks, upfirdn2d_cuda
from torch_utils.ops.upfirdn2d_cuda import Pair, Quad, adjoint_padding


def setup_filter(
    f: Sequence[float] | Sequence[Sequence[float]] | np.ndarray | torch.Tensor | None,
    device: torch.device | str = "cpu",
    normalize: bool = True,
    flip_filter: bool = False,
    gain: float = 1,
    separable: bool | None = None,
) -> torch.Tensor:
    """Make a FIR filter for `upfirdn2d` out of a list of taps.

    Args:
        f: taps, `[taps]` or `[height, width]`; None is the 1x1 identity.
        normalize: scale so that the taps sum to 1.
        flip_filter: reverse it.
        gain: overall gain of the two-dimensional filter; a 1-D filter gets its square root (it is applied twice).
        separable: keep a 1-D filter 1-D; the default keeps those of 8 or more taps and expands shorter ones.

    Returns:
        float32 `[taps]` (separable) or `[height, width]`.
    """
    taps = torch.as_tensor(1 if f is None else f, dtype=torch.float32)
    if taps.ndim > 2 or taps.numel() == 0:
        raise ValueError(f"a filter has one or two dimensions and at least one tap, not shape {list(taps.shape)}")
    if taps.ndim == 0:
        taps = taps[None]
    if separable is None:
        separable = taps.ndim == 1 and taps.numel() >= 8
    if taps.ndim == 1 and not separable:
        taps = taps.outer(taps)
    if separable and taps.ndim != 1:
        raise ValueError("a two-dimensional filter cannot be applied separably")
    if normalize:
        taps = taps / taps.sum()
    if flip_filter:
        taps = taps.flip(list(range(taps.ndim)))
    return (taps * gain ** (taps.ndim / 2)).to(device)


def upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """Upsample by zero insertion, pad, convolve with `f`, keep every `down`-th pixel. Equals `upfirdn2d_ref`.

    Args:
        x: `[N, C, H, W]`, any floating dtype.
        f: filter from `setup_filter`; not differentiated.
        up, down: factors, an int or `[x, y]`.
        padding: pixels of the upsampled image: an int, `[x, y]` or `[x0, x1, y0, y1]`; negative values crop.
        flip_filter: False is a true convolution, True a correlation.
        gain: multiplies the output.

    Returns:
        `[N, C, H', W']` of `x`'s dtype with W' = (W * up + x0 + x1 - fw) // down + 1. Differentiable to any order.
    """
    f, ups, downs, pads = _check(x, f, up, down, padding)
    if _kernel.takes(x, f) and f.dtype == torch.float32:
        shape = upfirdn2d_cuda.output_shape(x.shape, f, ups, downs, pads)
        if min(shape) > 0 and math.prod(shape) < 2**31:
            return upfirdn2d_cuda.upfirdn2d(x, f, ups, downs, pads, flip_filter, gain)
    if f.ndim == 2:
        return _Upfirdn2d.apply(x, f, ups, downs, pads, flip_filter, gain)
    # One pass per axis, each with the square root of the gain.
    (ux, uy), (dx, dy), (x0, x1, y0, y1) = ups, downs, pads
    x = _Upfirdn2d.apply(x, f[None, :], (ux, 1), (dx, 1), (x0, x1, 0, 0), flip_filter, gain**0.5)
    return _Upfirdn2d.apply(x, f[:, None], (1, uy), (1, dy), (0, 0, y0, y1), flip_filter, gain**0.5)


def has_kernel(x: torch.Tensor) -> bool:
    """Whether a compiled kernel filters images such as `x`."""
    return _kernel.takes(x)


def upfirdn2d_ref(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 1,
    down: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """`upfirdn2d`, written as its definition, step by step, in differentiable tensor operations."""
    f, (ux, uy), (dx, dy), (x0, x1, y0, y1) = _check(x, f, up, down, padding)
    n, c, h, w = x.shape
    x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, ux - 1, 0, 0, 0, uy - 1]).reshape(n, c, h * uy, w * ux)
    x = F.pad(x, [x0, x1, y0, y1])
    f2d = f if f.ndim == 2 else f.outer(f)
    weight = f2d if flip_filter else f2d.flip([0, 1])
    weight = (weight * gain).to(x.dtype).expand(c, 1, *f2d.shape)
    return F.conv2d(x, weight, groups=c)[:, :, ::dy, ::dx]


def filter2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """Filter `[N, C, H, W]` without changing its size; `padding` is added on top."""
    fw, fh = filter_size(f)
    pads = _add(padding, (fw // 2, (fw - 1) // 2, fh // 2, (fh - 1) // 2))
    return upfirdn2d(x, f, padding=pads, flip_filter=flip_filter, gain=gain)


def upsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """Upsample `[N, C, H, W]` to `[N, C, H * up, W * up]`, keeping the brightness; `padding` is added on top."""
    ux, uy = pair(up, "up")
    pads = _add(padding, upsample_padding(f, (ux, uy)))
    return upfirdn2d(x, f, up=(ux, uy), padding=pads, flip_filter=flip_filter, gain=gain * ux * uy)


def downsample2d(
    x: torch.Tensor,
    f: torch.Tensor | None,
    down: int | Sequence[int] = 2,
    padding: int | Sequence[int] = 0,
    flip_filter: bool = False,
    gain: float = 1,
) -> torch.Tensor:
    """Downsample `[N, C, H, W]` to `[N, C, H / down, W / down]`; `padding` is added on top."""
    downs = pair(down, "down")
    pads = _add(padding, downsample_padding(f, downs))
    return upfirdn2d(x, f, down=downs, padding=pads, flip_filter=flip_filter, gain=gain)


def filter_size(f: torch.Tensor | None) -> Pair:
    """Width and height of a filter, `(fw, fh)`."""
    return (1, 1) if f is None else (f.shape[-1], f.shape[0])


def upsample_padding(f: torch.Tensor | None, up: Pair) -> Quad:
    """The padding that makes upsampling by `up` (x, y) with `f` keep the image centred."""
    (fw, fh), (ux, uy) = filter_size(f), up
    return (fw + ux - 1) // 2, (fw - ux) // 2, (fh + uy - 1) // 2, (fh - uy) // 2


def downsample_padding(f: torch.Tensor | None, down: Pair) -> Quad:
    """The padding that makes downsampling by `down` (x, y) with `f` keep the image centred."""
    (fw, fh), (dx, dy) = filter_size(f), down
    return (fw - dx + 1) // 2, (fw - dx) // 2, (fh - dy + 1) // 2, (fh - dy) // 2


class _Upfirdn2d(torch.autograd.Function):
    """One FIR pass with a 2-D filter, closed under differentiation."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Quad, flip_filter: bool, gain: float
    ) -> torch.Tensor:
        y = _fir(x, f, up, down, padding, flip_filter, gain)
        ctx.save_for_backward(f)
        ctx.call = (up, down, flip_filter, gain)
        ctx.padding = adjoint_padding(x.shape, y.shape, filter_size(f), up, down, padding)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (f,) = ctx.saved_tensors
        up, down, flip_filter, gain = ctx.call
        dx = None
        if ctx.needs_input_grad[0]:
            dx = _Upfirdn2d.apply(dy, f, down, up, ctx.padding, not flip_filter, gain)
        return dx, None, None, None, None, None, None


def _fir(
    x: torch.Tensor, f: torch.Tensor, up: Pair, down: Pair, padding: Quad, flip_filter: bool, gain: float
) -> torch.Tensor:
    (ux, uy), (x0, x1, y0, y1) = up, padding
    n, c, h, w = x.shape
    if x.device.type == "cpu":
        # On CPUs a depthwise convolution of few channels is about 10 times slower in the other layout.
        x = x.contiguous(memory_format=torch.channels_last)
    if up != (1, 1):
        # Zero insertion and padding in one write. Cheaper than a depthwise transposed convolution, a slow path on CPUs.
        left, top = max(x0, 0), max(y0, 0)
        shape = (n, c, h * uy + top + max(y1, 0), w * ux + left + max(x1, 0))
        layout = torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        stuffed = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout).zero_()
        stuffed[:, :, top : top + h * uy : uy, left : left + w * ux : ux] = x
        x, padding = stuffed, (min(x0, 0), min(x1, 0), min(y0, 0), min(y1, 0))
    x0, x1, y0, y1 = padding
    symmetric = x0 == x1 >= 0 and y0 == y1 >= 0  # the convolution pads by itself, without another copy
    if not symmetric:
        x = F.pad(x, padding)
    weight = f if flip_filter else f.flip([0, 1])
    weight = (weight * gain).to(x.dtype).expand(c, 1, *f.shape)
    return F.conv2d(x, weight, stride=(down[1], down[0]), padding=(y0, x0) if symmetric else 0, groups=c)


def pair(value: int | Sequence[int], name: str) -> Pair:
    """An int or `[x, y]` of positive ints as a tuple."""
    values = (value, value) if isinstance(value, int) else tuple(int(v) for v in value)
    if len(values) != 2 or min(values) < 1:
        raise ValueError(f"{name} is a positive int or [x, y], not {value}")
    return values


def quad(padding: int | Sequence[int]) -> Quad:
    """Padding given as an int, `[x, y]` or `[x0, x1, y0, y1]` as all four."""
    sides = (padding,) * 4 if isinstance(padding, int) else tuple(int(p) for p in padding)
    if len(sides) == 2:
        sides = (sides[0], sides[0], sides[1], sides[1])
    if len(sides) != 4:
        raise ValueError(f"padding is an int, [x, y] or [x0, x1, y0, y1], not {padding}")
    return sides


def _add(padding: int | Sequence[int], extra: Quad) -> Quad:
    (a, b, c, d), (x0, x1, y0, y1) = quad(padding), extra
    return a + x0, b + x1, c + y0, d + y1


def _check(
    x: torch.Tensor,
    f: torch.Tensor | None,
    up: int | Sequence[int],
    down: int | Sequence[int],
    padding: int | Sequence[int],
) -> tuple[torch.Tensor, Pair, Pair, Quad]:
    if f is None:
        f = torch.ones([1, 1], dtype=torch.float32, device=x.device)
    if x.ndim != 4 or f.ndim not in (1, 2):
        raise ValueError(f"upfirdn2d takes [N, C, H, W] and a 1-D or 2-D filter, not {list(x.shape)}, {list(f.shape)}")
    return f, pair(up, "up"), pair(down, "down"), quad(padding)


def _check_kernel(device: torch.device) -> str | None:
    """Compare the kernel with `upfirdn2d_ref`, in all derivatives; what is wrong, or None."""
    short, skewed = setup_filter([1, 3, 3, 1]), setup_filter([[1, 2, 0, 3], [4, 5, 6, 1]] * 2)
    long = setup_filter([1, -2, 3, 4, 5, 6, 7, 8, 9, -3, 2, 1])
    calls: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
        "filter": (short, {"padding": [1, 2, 2, 1], "gain": 4}),
        "up 2": (short, {"up": 2, "padding": [2, 1, 3, 1], "gain": 4}),
        "down 2": (short, {"down": 2, "padding": [1, 1, 2, -1]}),
        "2-D filter": (skewed, {"padding": [2, -1, 0, 3]}),
        "long filter, up 2": (long, {"up": 2, "padding": [6, 5, -1, 8], "flip_filter": True}),
        "long filter, down 2": (long, {"down": 2, "padding": [-1, 8, 6, 5], "gain": 2}),
        "long filter": (long, {"up": [3, 1], "down": [1, 2], "padding": 7}),
    }
    generator = torch.Generator().manual_seed(0)
    for dtype, suffix in cuda_kernels.SUFFIXES.items():
        for layout in (torch.contiguous_format, torch.channels_last):
            for name, (f, call) in calls.items():
                x = torch.randn([2, 8, 9, 7], generator=generator, dtype=torch.float32)
                inputs = {"x": x.to(dtype).contiguous(memory_format=layout)}
                op, ref = (functools.partial(function, **call) for function in (upfirdn2d, upfirdn2d_ref))
                wrong = kernel_checks.difference(op, ref, inputs, {"f": f}, device)
                if wrong:
                    return f"{name} in {suffix}: {wrong}"
    return None


_kernel = cuda_kernels.register(upfirdn2d_cuda.NAME, "upfirdn2d.cu", _check_kernel)
