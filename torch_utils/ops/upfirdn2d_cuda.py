"""The operator of upfirdn2d on CUDA devices, whose gradient is itself, and how its kernels are launched.

Filters of 4x4 taps that are the product of a column and a row, and separable ones of 12, have kernels of their own for
upsampling by 2, downsampling by 2 and (4x4) neither, on both axes: half precision in channels_last, float32 in both
layouts. All else is done by a kernel that does anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torch_utils.ops import cuda_kernels

Pair = tuple[int, int]
Quad = tuple[int, int, int, int]

NAME = "upfirdn2d"
_LAYOUT = "3P15if8i12I"  # Params of the source
_LINE = 128  # bytes that a group of neighbouring threads should read at once
_ENOUGH_THREADS = 2**18  # to fill a large GPU: then they get more rows, up to _ROWS, which read fewer pixels twice
_ROWS = 32
_MODES = {((1, 1), (1, 1)): "filter", ((2, 2), (1, 1)): "up", ((1, 1), (2, 2)): "down"}
# Entry points for filters that are products: the channels of a thread, which are its pack.
_WIDTHS = {
    torch.float32: {"filter4": 1, "up4": 1, "down4": 1, "up12": 1, "down12": 1},
    torch.float16: {"filter4": 8, "up4": 8, "down4": 4},
    torch.bfloat16: {"filter4": 8, "up4": 8, "down4": 4},
}


class _Axis(NamedTuple):
    """How outputs along an axis are grouped into units: see `Params` in the source."""

    units: int
    first: int
    origin: int

    @staticmethod
    def of(size: int, up: int, padding: int, even_first: bool) -> _Axis:
        if up == 1:
            return _Axis(size, 0, -padding)
        origin = -((padding + 1) // 2) if even_first else -(padding // 2)
        first = padding + 2 * origin - (0 if even_first else 1)
        return _Axis((size - first + 1) // 2, first, origin)


def adjoint_padding(
    x_shape: Sequence[int], y_shape: Sequence[int], filter_wh: Pair, up: Pair, down: Pair, pad: Quad
) -> Quad:
    """The padding of the transposed operation, which exchanges up and down and flips the filter."""
    sides: list[int] = []
    for axis, before in ((0, pad[0]), (1, pad[2])):
        size_in, size_out, taps = x_shape[3 - axis], y_shape[3 - axis], filter_wh[axis]
        sides += [taps - before - 1, size_in * up[axis] - size_out * down[axis] + before - up[axis] + 1]
    return sides[0], sides[1], sides[2], sides[3]


def output_shape(
    shape: Sequence[int], f: torch.Tensor, up: Sequence[int], down: Sequence[int], padding: Sequence[int]
) -> list[int]:
    """`[N, C, H', W']`, which has no pixels if a side is below 1."""
    n, c, h, w = shape
    x0, x1, y0, y1 = padding
    height = (h * up[1] + y0 + y1 - f.shape[0]) // down[1] + 1
    return [n, c, height, (w * up[0] + x0 + x1 - f.shape[-1]) // down[0] + 1]


def _upfirdn2d(
    x: torch.Tensor,
    f: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    assert (f.dtype, f.device) == (torch.float32, x.device), (f.dtype, f.device, x.device)
    x, f = cuda_kernels.dense(x), f.contiguous()
    y = _fake(x, f, up, down, padding, flip_filter, gain)
    entry, width = _entry(x, f, up, down)
    if entry == "any" and f.ndim == 1:  # a pass for each axis
        x = _upfirdn2d(x, f[None, :], (up[0], 1), (down[0], 1), (*padding[:2], 0, 0), flip_filter, 1)
        return _upfirdn2d(x, f[:, None], (1, up[1]), (1, down[1]), (0, 0, *padding[2:]), flip_filter, gain)
    n, c, in_h, in_w = x.shape
    out_h, out_w = y.shape[2:]
    images, channels = (n * c, 1) if x.is_contiguous() else (n, c)
    if entry == "any":
        along, down_, most_rows = _Axis(out_w, 0, 0), _Axis(out_h, 0, 0), 1
    else:
        along = _Axis.of(out_w, up[0], padding[0], even_first=width == 1)
        down_ = _Axis.of(out_h, up[1], padding[2], even_first=False)
        most_rows = _ROWS
    packs = channels // width
    rows = _rows(down_.units, images * along.units * packs, most_rows)
    strips = math.ceil(down_.units / rows)
    group = _group(packs, _LINE // (width * x.element_size()))
    threads = images * strips * along.units * packs
    pairs = channels == 1 and along.first == 0 and out_w % 2 == 0
    cuda_kernels.kernels[NAME].run(
        f"{NAME}_{entry}_{cuda_kernels.SUFFIXES[x.dtype]}",
        (math.ceil(threads / cuda_kernels.THREADS), 1, 1),
        (cuda_kernels.THREADS, 1, 1),
        _LAYOUT,
        *map(cuda_kernels.pointer, (x, f, y)),
        *(in_h, in_w, out_h, out_w, channels),
        *(up[1], up[0], down[1], down[0], padding[2], padding[0]),
        *(f.shape[0], f.shape[-1], f.ndim == 1, flip_filter, gain),
        *(threads, down_.units, rows, down_.first, along.first, down_.origin, along.origin, pairs),
        *(number for size in (group, along.units, packs // group, strips) for number in cuda_kernels.division(size)),
        device=x.device,
    )
    return y


def _entry(x: torch.Tensor, f: torch.Tensor, up: Sequence[int], down: Sequence[int]) -> tuple[str, int]:
    """The entry point, without its suffix, and how many channels its threads have."""
    mode = _MODES.get(((up[0], up[1]), (down[0], down[1])))
    square = f.shape[0] == f.shape[-1] and (f.ndim == 1 or f.shape[0] == 4)
    entry = f"{mode}{f.shape[0]}"
    width = _WIDTHS[x.dtype].get(entry, 0)
    channels = 1 if x.is_contiguous() else x.shape[1]
    if square and width and channels % width == 0 and x.data_ptr() % (width * x.element_size()) == 0:
        return entry, width
    return "any", 1


def _rows(units: int, columns: int, most: int) -> int:
    """How many units, one below the other, each thread does."""
    rows = most
    while rows > 4 and columns * math.ceil(units / rows) < _ENOUGH_THREADS:
        rows //= 2
    return math.ceil(units / math.ceil(units / rows))


def _group(packs: int, wanted: int) -> int:
    """How many packs of a pixel neighbouring threads have, before the next pixel's come: `packs` divides by it."""
    group = next(size for size in range(min(packs, wanted), 0, -1) if packs % size == 0)
    return group if 4 * group >= wanted else packs  # fewer would leave most of a cache line unread


def _fake(
    x: torch.Tensor,
    f: torch.Tensor,
    up: Sequence[int],
    down: Sequence[int],
    padding: Sequence[int],
    flip_filter: bool,
    gain: float,
) -> torch.Tensor:
    shape = output_shape(x.shape, f, up, down, padding)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=cuda_kernels.layout(x))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, f, up, down, padding, flip_filter, gain = inputs
    ctx.save_for_backward(f)
    before = adjoint_padding(x.shape, output.shape, (f.shape[-1], f.shape[0]), up, down, padding)
    ctx.call = (down, up, before, not flip_filter, gain)


def _backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    dx = upfirdn2d(dy, *ctx.saved_tensors, *ctx.call) if ctx.needs_input_grad[0] else None
    return dx, None, None, None, None, None, None


upfirdn2d = cuda_kernels.define(
    f"{NAME}(Tensor x, Tensor f, SymInt[] up, SymInt[] down, SymInt[] padding, bool flip_filter, float gain) -> Tensor",
    _upfirdn2d,
    _fake,
    _setup,
    _backward,
)
"""As `upfirdn2d.upfirdn2d`, with f float32, up and down `[x, y]` and padding `[x0, x1, y0, y1]`."""
