"""Convolution that stays a convolution however often it is differentiated.

A convolution y = C(x, w) has two derivatives, the gradient of its input, x' = I(y', w), and that of its weight,
w' = W(x, y'). The three maps are bilinear and each other's derivatives:

    C(x, w):   dx = I(dy, w)    dw = W(x, dy)
    I(y, w):   dy = C(dx, w)    dw = W(dx, y)
    W(x, y):   dx = I(y, dw)    dy = C(x, dw)

So the second derivatives that R1 and path length regularisation need cost one native convolution each. PyTorch's own
double backward computes the weight's by convolving with kernels of the size of the image.

The gradient of a weight is computed only if somebody asked for it: the inner gradient of R1 (with respect to the
images) and of path length (to the latents) need none. What a node of autograd returns cannot depend on that, so it is
made in a node of its own, which autograd leaves out by itself: see `_Carrier`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F

Pair = tuple[int, int]


def conv2d(
    x: torch.Tensor, w: torch.Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), groups: int = 1
) -> torch.Tensor:
    """`torch.nn.functional.conv2d` with affordable derivatives of any order.

    Args:
        x: `[N, I, H, W]`.
        w: `[O, I / groups, kh, kw]` of x's dtype.
        stride, padding: (y, x).
    """
    call = _Call(stride, padding, groups, (x.shape[2], x.shape[3]), _layout(x))
    return _convolve(x, w, call)


def conv_transpose2d(
    x: torch.Tensor, w: torch.Tensor, stride: Pair = (1, 1), padding: Pair = (0, 0), groups: int = 1
) -> torch.Tensor:
    """`torch.nn.functional.conv_transpose2d` with affordable derivatives of any order.

    Args:
        x: `[N, I, H, W]`.
        w: `[I, O / groups, kh, kw]` of x's dtype.
        stride, padding: (y, x).
    """
    height = (x.shape[2] - 1) * stride[0] - 2 * padding[0] + w.shape[2]
    width = (x.shape[3] - 1) * stride[1] - 2 * padding[1] + w.shape[3]
    call = _Call(stride, padding, groups, (height, width), _layout(x))
    return _convolve(x, w, call, transposed=True)


@dataclasses.dataclass(frozen=True)
class _Call:
    """The arguments that the three maps of one convolution have in common, and the maps without derivatives."""

    stride: Pair
    padding: Pair
    groups: int
    input_size: Pair
    layout: torch.memory_format
    """of the tensor that the convolution was called with, and so of all gradients of activations"""

    def map(self, x: torch.Tensor, w: torch.Tensor, transposed: bool) -> torch.Tensor:
        """C, or I if transposed."""
        return self.input(x, w) if transposed else self.output(x, w)

    def shape(self, x: torch.Tensor, w: torch.Tensor, transposed: bool) -> tuple[int, int, int, int]:
        """Of what `map` returns."""
        return self.input_shape(x, w) if transposed else self.output_shape(x, w)

    def output(self, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """C: `[N, I, H, W]`, `[O, I / groups, kh, kw]` -> `[N, O, H', W']`."""
        return F.conv2d(x, w, stride=self.stride, padding=self.padding, groups=self.groups)

    def input(self, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """I: `[N, O, H', W']`, `[O, I / groups, kh, kw]` -> `[N, I, H, W]`."""
        y = y.contiguous(memory_format=self.layout)
        x = torch.empty(self.input_shape(y, w), dtype=y.dtype, device=y.device, memory_format=self.layout)
        return self._backward(y, x, w, (True, False, False))[0]

    def weight(self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """W: `[N, I, H, W]`, `[N, O, H', W']` -> the shape and layout of w, whose values do not matter."""
        if x.device.type == "cpu" and self.groups == 1 and w.shape[2] > 1 and y[:, 0].numel() <= 2 * y.shape[1]:
            return self._weight_as_product(x, y, w)
        return self._backward(y, x, w, (False, True, False))[1]

    def _weight_as_product(self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        """W as a matrix product with the patches of x written out.

        With fewer pixels than channels, the low resolutions of a wide network, this is up to 9 times faster on a CPU
        than the native one, whose cost does not fall below that of handling the weight.
        """
        (dy, dx), (kh, kw), (height, width) = self.stride, w.shape[2:], y.shape[2:]
        x = F.pad(x, [self.padding[1], self.padding[1], self.padding[0], self.padding[0]]).permute(0, 2, 3, 1)
        n, row, column, channel = x.stride()
        patches = x.as_strided(
            (len(x), height, width, kh, kw, x.shape[3]), (n, dy * row, dx * column, row, column, channel)
        )
        product = y.permute(1, 0, 2, 3).flatten(1) @ patches.reshape(-1, kh * kw * x.shape[3])  # [O, kh * kw * I]
        return product.view(-1, kh, kw, x.shape[3]).permute(0, 3, 1, 2)  # channels_last

    def input_shape(self, y: torch.Tensor, w: torch.Tensor) -> tuple[int, int, int, int]:
        return y.shape[0], w.shape[1] * self.groups, *self.input_size

    def output_shape(self, x: torch.Tensor, w: torch.Tensor) -> tuple[int, int, int, int]:
        sides = [(x.shape[2 + i] + 2 * self.padding[i] - w.shape[2 + i]) // self.stride[i] + 1 for i in (0, 1)]
        return x.shape[0], w.shape[0], sides[0], sides[1]

    def _backward(self, y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, wanted: tuple[bool, bool, bool]) -> Any:
        return torch.ops.aten.convolution_backward(
            y, x, w, None, self.stride, self.padding, (1, 1), False, (0, 0), self.groups, wanted
        )


def _layout(x: torch.Tensor) -> torch.memory_format:
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def _needs_graph(x: torch.Tensor, w: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)


def _convolve(x: torch.Tensor, w: torch.Tensor, call: _Call, transposed: bool = False) -> torch.Tensor:
    """C, or I if transposed."""
    if not _needs_graph(x, w):
        return call.map(x, w, transposed)
    carrier = _Carrier.apply(w, (x,), call.shape(x, w, transposed), call, transposed) if w.requires_grad else None
    return _Convolve.apply(x, w, carrier, call, transposed)


class _Convolve(torch.autograd.Function):
    """C or I, each the gradient of the other. The gradient of w leaves through the carrier."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, w: torch.Tensor, carrier: torch.Tensor | None, call: _Call, transposed: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(w)
        ctx.call, ctx.transposed = call, transposed
        return call.map(x, w, transposed)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        (w,) = ctx.saved_tensors
        dy = dy.contiguous(memory_format=ctx.call.layout)  # once, for the gradients of both
        dx = _convolve(dy, w, ctx.call, not ctx.transposed) if ctx.needs_input_grad[0] else None
        return dx, None, dy if ctx.needs_input_grad[2] else None, None, None


class _Carrier(torch.autograd.Function):
    """Stands for w where a convolution uses it, so that w's gradient is a node that autograd can leave out.

    An argument that the convolution ignores, of the convolution's output shape and one element's memory. The
    convolution hands its own gradient on to it, and the gradient of w is made of that here. The convolution's other
    factor comes in a tuple, where autograd does not see it: as an argument it would make this node a way to that
    factor's gradient, and so never to be left out.
    """

    @staticmethod
    def forward(
        ctx: Any, w: torch.Tensor, factor: tuple[torch.Tensor], shape: tuple[int, ...], call: _Call, transposed: bool
    ) -> torch.Tensor:
        ctx.save_for_backward(*factor, w)
        ctx.call, ctx.transposed = call, transposed
        return w.new_empty([]).expand(shape)  # nobody reads it

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
        factor, w = ctx.saved_tensors
        x, y = (gradient, factor) if ctx.transposed else (factor, gradient)
        return _WeightGradient.apply(x, y, w.detach(), ctx.call), None, None, None, None


class _WeightGradient(torch.autograd.Function):
    """W."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor, call: _Call) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        ctx.call = call
        return call.weight(x, y, w)

    @staticmethod
    def backward(ctx: Any, dw: torch.Tensor) -> tuple[Any, ...]:
        x, y = ctx.saved_tensors
        dx = _convolve(y, dw, ctx.call, transposed=True) if ctx.needs_input_grad[0] else None
        dy = _convolve(x, dw, ctx.call) if ctx.needs_input_grad[1] else None
        return dx, dy, None, None
