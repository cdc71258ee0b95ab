"""Add a bias, apply an activation, scale and clamp.

On a CPU a compiled kernel does it in one pass over memory each way (csrc/bias_act_cpu.cpp), if `kernels.prepare` was
called and one could be built. The slope follows from the output, so only that is kept for the gradient. On a GPU a
kernel does it for all activations (csrc/bias_act.cu, bias_act_cuda.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from torch_utils.ops import bias_act_cuda, cpu_kernels, cuda_kernels, kernel_checks
from torch_utils.ops.activations import HOMOGENEOUS, Activation, activations


def bias_act(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """`clamp(gain * act(x + b), -clamp, clamp)`. Equals `bias_act_ref`.

    Args:
        x: any shape and floating dtype.
        b: bias `[x.shape[dim]]` of x's dtype, or None.
        dim: the dimension of `x` that `b` runs along.
        act: one of `activations`.
        alpha: slope of lrelu below zero.
        gain: scale after the activation; default: sqrt(2) for relu, lrelu and swish, otherwise 1.
        clamp: limit of the absolute output, or None; where it bites, the gradient is 0.

    Returns:
        The shape and dtype of `x`. Differentiable to any order; not to be changed in place before its gradient has been
        computed, which reads it.
    """
    _, alpha, gain = _check(x, b, dim, act, alpha, gain, clamp)
    if _cuda_kernel.takes(x, b) and bias_act_cuda.takes(x, b, act, alpha, gain, clamp):
        return bias_act_cuda.forward(x, b, 0 if b is None else dim % x.ndim, act, alpha, gain, clamp)
    if act in HOMOGENEOUS and gain > 0:
        if _kernel.ops is not None:
            call = _kernel_call(x, b, dim, act, alpha, gain, clamp)
            if call is not None:
                return call.forward(x, b)
        # As few passes over memory as native operations allow; each has native derivatives of any order.
        if b is not None:
            x = torch.add(_along(b * gain if gain != 1 else b, dim, x.ndim), x, alpha=gain)
        elif gain != 1:
            x = x * gain
        if act == "lrelu":
            x = F.leaky_relu(x, alpha)
        elif act == "relu":
            x = F.relu(x)
        return x if clamp is None else F.hardtanh(x, -clamp, clamp)
    return bias_act_ref(x, b, dim, act, alpha, gain, clamp)


def bias_act_ref(
    x: torch.Tensor,
    b: torch.Tensor | None = None,
    dim: int = 1,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """`bias_act`, written as its definition, step by step, in differentiable tensor operations."""
    spec, alpha, gain = _check(x, b, dim, act, alpha, gain, clamp)
    if b is not None:
        x = x + _along(b, dim, x.ndim)
    x = spec.function(x, alpha) * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


class _Call(NamedTuple):
    """A call of the kernel, without its tensors."""

    ops: Any
    channels_innermost: bool
    """in memory: channels_last, or `[N, C]`"""
    relu: bool
    alpha: float
    gain: float
    clamp: float
    """NaN for none"""

    def forward(self, x: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
        if torch.is_grad_enabled() and (x.requires_grad or (b is not None and b.requires_grad)):
            return _BiasAct.apply(x, b, self)
        return self.ops.bias_act.default(x, b, *self[1:])

    def gradient(self, dy: torch.Tensor, y: torch.Tensor, bias: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
        """dx and, if asked for, db; differentiable in dy if there is something to differentiate."""
        if torch.is_grad_enabled() and (dy.requires_grad or y.requires_grad):
            # The derivative in y is zero. Detached, y keeps the forward graph out of the second derivatives, that would
            # carry zeros through all of it; but if dy is a constant, something has to make dx differentiable.
            return _BiasActGradient.apply(dy, y.detach() if dy.requires_grad else y, self, bias)
        layout = torch.channels_last if self.channels_innermost and y.ndim == 4 else torch.contiguous_format
        dx, db = self.ops.bias_act_grad.default(dy.contiguous(memory_format=layout), y, *self[1:], bias)
        return dx, db if bias else None


class _BiasAct(torch.autograd.Function):
    """The kernel, differentiable."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, b: torch.Tensor | None, call: _Call) -> torch.Tensor:
        y = call.forward(x, b)
        ctx.save_for_backward(y)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return y

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return None, None, None
        (y,) = ctx.saved_tensors
        dx, db = ctx.call.gradient(dy, y, bias=ctx.needs_input_grad[1])
        return dx, db, None


class _BiasActGradient(torch.autograd.Function):
    """dx and db of the kernel: linear in dy, closed under differentiation."""

    @staticmethod
    def forward(
        ctx: Any, dy: torch.Tensor, y: torch.Tensor, call: _Call, bias: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        ctx.save_for_backward(y)
        ctx.call = call
        ctx.set_materialize_grads(False)
        return call.gradient(dy, y, bias)

    @staticmethod
    def backward(ctx: Any, ddx: torch.Tensor | None, ddb: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        (y,) = ctx.saved_tensors
        if ddb is not None:  # db is the sum of dx
            ddb = _along(ddb, 1, y.ndim)
            ddx = ddb.expand_as(y) if ddx is None else ddx + ddb
        if ddx is None:
            return None, None, None, None
        ddy = ctx.call.gradient(ddx, y, bias=False)[0] if ctx.needs_input_grad[0] else None
        return ddy, torch.zeros_like(y) if ctx.needs_input_grad[1] else None, None, None


def _kernel_call(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> _Call | None:
    """How the kernel computes this; None for what it does not do or does no faster."""
    if not x.is_cpu or x.dtype not in (torch.float32, torch.bfloat16) or x.numel() == 0:
        return None
    if type(x) is not torch.Tensor or x.ndim not in (2, 4) or torch.compiler.is_compiling():
        return None
    if b is not None and (dim % x.ndim != 1 or b.dtype != x.dtype or not b.is_cpu or not b.is_contiguous()):
        return None
    if act != "lrelu":
        alpha = float(act == "linear")
    if not (0 <= alpha < math.inf and gain < math.inf):  # a negative slope hides the sign
        return None
    if act == "linear" and gain == 1 and clamp is None:
        return None
    if x.is_contiguous():
        innermost = x.ndim == 2
    elif x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        innermost = True
    else:
        return None
    return _Call(_kernel.ops, innermost, act == "relu", alpha, gain, math.nan if clamp is None else clamp)


def _check_kernel(ops: Any) -> str | None:
    """Compare the kernel with `bias_act_ref` where it could go wrong; what is wrong, or None."""
    settings: list[dict[str, Any]] = [
        {"act": "lrelu", "alpha": 0.2, "gain": 1.4, "clamp": 1.5},
        {"act": "relu", "alpha": 0.0, "gain": 1.4, "clamp": None},
        {"act": "linear", "alpha": 1.0, "gain": 1.0, "clamp": 1.0},
    ]
    random = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for shape, layout in (
            ((2, 129, 5, 7), torch.channels_last),
            ((2, 5, 9, 13), torch.contiguous_format),
            ((151, 3), torch.contiguous_format),
        ):
            x, b = _off_the_kinks(shape, dtype, layout, random)
            dy = torch.randn(shape, generator=random).to(dtype)
            for case in settings:
                wrong = _difference(ops, x, b, dy, case)
                if wrong:
                    return f"{wrong} of {case['act']} in {str(dtype).removeprefix('torch.')}"
    odd = torch.tensor([[math.nan, math.inf, -math.inf, 1.0]])
    for dtype in (torch.float32, torch.bfloat16):
        y = _Call(ops, True, False, 0.2, 2.0, 3.0).forward(odd.to(dtype), None).float()
        if y.nan_to_num(nan=7.0).tolist() != [[7, 3, -3, 2]]:
            return "NaN and infinity"
    return None


def _off_the_kinks(
    shape: Sequence[int], dtype: torch.dtype, layout: torch.memory_format, random: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """x and b whose sum is odd multiples of 1/8, so that rounding does not decide on which side of a kink it is."""
    total = (torch.randn(shape, generator=random, dtype=torch.float32) * 4).floor() / 4 + 1 / 8
    b = (torch.randn(shape[1], generator=random, dtype=torch.float32) * 16).round() / 16
    return (total - _along(b, 1, len(shape))).to(dtype).contiguous(memory_format=layout), b.to(dtype)


def _difference(ops: Any, x: torch.Tensor, b: torch.Tensor, dy: torch.Tensor, settings: dict[str, Any]) -> str | None:
    """Which result of a call is too far from that of `bias_act_ref`."""
    with torch.enable_grad():
        exact_x, exact_b = x.double().requires_grad_(), b.double().requires_grad_()
        exact_y = bias_act_ref(exact_x, exact_b, **settings)
        # Of a sum: to take a cotangent, autograd.grad imports sympy, which costs more than all of this.
        exact_dx, exact_db = torch.autograd.grad((exact_y * dy.double()).sum(), [exact_x, exact_b])
    clamp = math.nan if settings["clamp"] is None else settings["clamp"]
    innermost = x.ndim == 2 or not x.is_contiguous()
    call = _Call(ops, innermost, settings["act"] == "relu", settings["alpha"], settings["gain"], clamp)
    with torch.no_grad():
        y = call.forward(x, b)
        dx, db = call.gradient(dy, y, bias=True)
    assert db is not None
    tolerance = 4 * torch.finfo(x.dtype).eps
    for name, actual, exact in (("y", y, exact_y), ("dx", dx, exact_dx), ("db", db, exact_db)):
        close = (actual.double() - exact).abs().max() <= tolerance * exact.abs().max()
        if not close:  # also if it is NaN
            return name
    return None


def _check_cuda_kernel(device: torch.device) -> str | None:
    """Compare the kernel with `bias_act_ref` on the CPU where it could go wrong; what is wrong, or None."""
    layouts = (
        ((2, 24, 5, 3), torch.channels_last),
        ((3, 5, 4, 6), torch.contiguous_format),
        ((2, 129, 3, 5), torch.channels_last),
        ((151, 3), torch.contiguous_format),
    )
    cases = [("lrelu", *layout) for layout in layouts]
    cases += [(act, *layouts[i % len(layouts)]) for i, act in enumerate(activations)]
    for dtype, suffix in cuda_kernels.SUFFIXES.items():
        random = torch.Generator().manual_seed(0)
        for act, shape, layout in cases:
            x, b = _off_the_kinks(shape, dtype, layout, random)
            settings = {"dim": 1, "act": act, "alpha": 0.2, "gain": 1.5, "clamp": 0.75}
            op, ref = (functools.partial(function, **settings) for function in (bias_act_cuda.forward, bias_act_ref))
            wrong = kernel_checks.difference(op, ref, {"x": x, "b": b}, {}, device)
            if wrong:
                return f"{act} in {suffix}: {wrong}"
        odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0], dtype=dtype, device=device)
        y = bias_act_cuda.forward(odd, None, 0, "lrelu", 0.2, 2.0, 3.0)
        if y.nan_to_num(nan=7.0).tolist() != [7, 3, -3, 2]:
            return f"NaN and infinity in {suffix}"
    return None


_kernel = cpu_kernels.register("bias_act", "bias_act_cpu.cpp", _check_kernel)
_cuda_kernel = cuda_kernels.register(bias_act_cuda.NAME, "bias_act.cu", _check_cuda_kernel)


def _along(b: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    return b.reshape([-1 if i == dim % ndim else 1 for i in range(ndim)])


def _check(
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float | None,
    gain: float | None,
    clamp: float | None,
) -> tuple[Activation, float, float]:
    if act not in activations:
        raise ValueError(f"activation {act!r} is not one of {', '.join(activations)}")
    if b is not None and (b.ndim != 1 or b.shape[0] != x.shape[dim]):
        raise ValueError(f"a bias of shape {list(b.shape)} does not fit dimension {dim} of {list(x.shape)}")
    if clamp is not None and clamp < 0:
        raise ValueError(f"clamp must be at least 0, not {clamp}")
    spec = activations[act]
    return spec, spec.default_alpha if alpha is None else alpha, spec.default_gain if gain is None else gain
