"""The operators of noise_bias_act on CUDA devices: what they compute, their derivatives, and how they are launched.

With t = x * scale + noise * strength + b, y = clamp(gain * act(t)) and s the slope of y in t, which y itself tells:

    noise_bias_act           y
    noise_bias_act_grad      g = s dy, and with it dx = g * scale, and the sums of g x over the pixels (dscale), of
                             g noise (dstrength), and of g over samples and pixels (db)
    noise_bias_act_tangent   s (u * scale + x * v + noise * q + r)

The second is the derivative of the first. The third is that of the second in dy, whose derivatives in x and scale have
its own form; and those of the third have the form of the second again. So they are closed under differentiation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from torch_utils.ops import cuda_kernels
from torch_utils.ops.cuda_kernels import THREADS

NAME = "noise_bias_act"
# That a large tensor is divided into, if it has that many parts: several for each multiprocessor. Those of a gradient
# write partial sums, which are to be few.
_MAP_BLOCKS, _GRADIENT_BLOCKS = 8192, 2048
_LAYOUT = "9P8I3f"  # of `Map` and `Gradient`
_LONG = 512  # packs of a plane from which on a whole block, not a warp, goes through it
Curve = tuple[float, float, float]
"""alpha, gain and clamp; NaN for none"""
MaybeTensor = torch.Tensor | None


class _Plan(NamedTuple):
    """How the threads share a tensor: see `Shape` in the source."""

    variant: str
    """the end of the entry point's name"""
    grid: cuda_kernels.Size
    chunks: int
    chunk: int
    lanes: int
    rows: bool

    @staticmethod
    def of(blocks: int, like: torch.Tensor, *tensors: MaybeTensor) -> _Plan:
        """`tensors`: all that are read or written in packs."""
        n, c, h, w = like.shape
        rows = not like.is_contiguous()
        length, pack = c if rows else h * w, 16 // like.element_size()
        packed = length % pack == 0 and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
        packs = length // pack if packed else length
        lanes = min(1 << (packs - 1).bit_length(), 32)
        if rows:
            groups = math.ceil(packs / lanes)
            chunks, chunk = _divided(h * w, THREADS // lanes, blocks // (n * groups))
            grid = (n * chunks, groups, 1)
        elif packs < _LONG:
            chunks, chunk = 1, packs
            grid = (math.ceil(n * c * lanes / THREADS), 1, 1)
        else:
            lanes = THREADS
            chunks, chunk = _divided(packs, lanes, blocks // (n * c))
            grid = (n * c, chunks, 1)
        variant = f"_{cuda_kernels.SUFFIXES[like.dtype]}"
        if packed:
            variant = ("_rows" if rows else "_planes") + variant
        return _Plan(variant, grid, chunks, chunk, lanes, rows)

    def shape(self, like: torch.Tensor, noise: MaybeTensor) -> tuple[int, ...]:
        n, c, h, w = like.shape
        step = h * w if noise is not None and noise.ndim == 4 else 0
        return n, c, h * w, step, self.chunks, self.chunk, self.lanes, self.rows


def _divided(size: int, step: int, parts: int) -> tuple[int, int]:
    """Into how many parts, `parts` or fewer, and of what size, to divide what blocks go through in steps."""
    wanted = max(1, min(parts, size // (4 * step)))
    part = math.ceil(size / (wanted * step)) * step
    return math.ceil(size / part), part


def _alike(*tensors: MaybeTensor) -> list[MaybeTensor]:
    """The same in memory, in the layout of the first that there is."""
    form = cuda_kernels.layout(_first(*tensors))
    return [None if t is None else t.contiguous(memory_format=form) for t in tensors]


def _first(*tensors: MaybeTensor) -> torch.Tensor:
    return next(t for t in tensors if t is not None)


def _dense(*tensors: MaybeTensor) -> list[MaybeTensor]:
    return [None if t is None else t.contiguous() for t in tensors]


def _check(
    like: torch.Tensor,
    whole: Sequence[MaybeTensor],
    factors: Sequence[MaybeTensor],
    noise: MaybeTensor,
    numbers: Sequence[MaybeTensor] = (),
    biases: Sequence[MaybeTensor] = (),
) -> None:
    """That the kernel, which sees addresses alone, finds behind them what it reads."""
    n, c, h, w = like.shape
    plane = (h, w) if noise is not None and noise.ndim == 2 else (n, 1, h, w)
    small = (factors, (n, c)), ((noise,), plane), (numbers, ()), (biases, (c,))
    for tensor in whole:
        assert tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (like.shape, like.dtype, like.device)
    for tensors, shape in small:
        for t in tensors:
            assert t is None or (t.shape, t.dtype, t.device) == (shape, torch.float32, like.device)


def _map(
    x: MaybeTensor,
    x_factor: MaybeTensor,
    z: MaybeTensor,
    z_factor: MaybeTensor,
    noise: MaybeTensor,
    strength: MaybeTensor,
    b: MaybeTensor,
    y: MaybeTensor,
    curve: Curve,
) -> torch.Tensor:
    """curve(t), or t * slope(y), with t = x * x_factor + z * z_factor + noise * strength + b."""
    y, x, z = _alike(y, x, z)
    x_factor, z_factor, noise, strength, b = _dense(x_factor, z_factor, noise, strength, b)
    out = torch.empty_like(_first(y, x, z))
    _check(out, (y, x, z), (x_factor, z_factor), noise, (strength,), (b,))
    plan = _Plan.of(_MAP_BLOCKS, out, x, z, noise, y, out)
    pointers = map(cuda_kernels.pointer, (x, x_factor, z, z_factor, noise, strength, b, y, out))
    cuda_kernels.kernels[NAME].run(
        f"{NAME}_map{plan.variant}",
        plan.grid,
        (THREADS, 1, 1),
        _LAYOUT,
        *pointers,
        *plan.shape(out, noise),
        *curve,
        device=out.device,
    )
    return out


def _forward(
    x: torch.Tensor,
    scale: MaybeTensor,
    noise: MaybeTensor,
    strength: MaybeTensor,
    b: MaybeTensor,
    alpha: float,
    gain: float,
    clamp: float,
) -> torch.Tensor:
    return _map(x, scale, None, None, noise, strength, b, None, (alpha, gain, clamp))


def _tangent(
    u: MaybeTensor,
    x: MaybeTensor,
    scale: MaybeTensor,
    v: MaybeTensor,
    noise: MaybeTensor,
    q: MaybeTensor,
    r: MaybeTensor,
    y: MaybeTensor,
    alpha: float,
    gain: float,
    clamp: float,
) -> torch.Tensor:
    # Without y the curve is a line, and its slope times t is the curve at t.
    return _map(u, scale, x, v, noise, q, r, y, (alpha, gain, clamp))


def _grad(
    dy: torch.Tensor,
    y: MaybeTensor,
    x: MaybeTensor,
    scale: MaybeTensor,
    noise: MaybeTensor,
    alpha: float,
    gain: float,
    clamp: float,
    want_x: bool,
    want_b: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    y, x, dense = _alike(y, x, dy)
    assert dense is not None
    scale, noise = _dense(scale, noise)
    dx = torch.empty_like(dense) if want_x else dy.new_empty([0])
    _check(dense, (y, x), (scale,), noise)
    plan = _Plan.of(_GRADIENT_BLOCKS, dense, dense, y, x, noise, dx)
    n, c = dy.shape[:2]
    shapes = (n, plan.chunks, c), (1, n * plan.chunks, c), (1, plan.grid[0] * plan.grid[1], 1)
    wanted = x is not None, want_b, noise is not None
    parts = [_floats(dy, *s) if want else None for s, want in zip(shapes, wanted, strict=True)]
    pointers = map(cuda_kernels.pointer, (dense, y, x, scale, noise, dx if want_x else None, *parts))
    cuda_kernels.kernels[NAME].run(
        f"{NAME}_gradient{plan.variant}",
        plan.grid,
        (THREADS, 1, 1),
        _LAYOUT,
        *pointers,
        *plan.shape(dense, noise),
        *(alpha, gain, clamp),
        device=dy.device,
    )
    dscale, db, dstrength = cuda_kernels.totals(NAME, parts)

    def result(total: MaybeTensor, *shape: int) -> torch.Tensor:
        return _floats(dy, 0) if total is None else total.reshape(shape)

    return dx, result(dscale, n, c), result(dstrength), result(db, c)


def _floats(like: torch.Tensor, *shape: int) -> torch.Tensor:
    return like.new_empty(shape, dtype=torch.float32)


def _forward_fake(x: torch.Tensor, *others: Any) -> torch.Tensor:
    return torch.empty_like(cuda_kernels.dense(x))


def _tangent_fake(
    u: MaybeTensor, x: MaybeTensor, scale: Any, v: Any, noise: Any, q: Any, r: Any, y: MaybeTensor, *curve: float
) -> torch.Tensor:
    return _forward_fake(_first(y, u, x))


def _grad_fake(
    dy: torch.Tensor,
    y: MaybeTensor,
    x: MaybeTensor,
    scale: MaybeTensor,
    noise: MaybeTensor,
    alpha: float,
    gain: float,
    clamp: float,
    want_x: bool,
    want_b: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    n, c = dy.shape[:2]
    dx = _forward_fake(_first(y, x, dy)) if want_x else dy.new_empty([0])
    dscale = _floats(dy, n, c) if x is not None else _floats(dy, 0)
    dstrength = _floats(dy) if noise is not None else _floats(dy, 0)
    return dx, dscale, dstrength, _floats(dy, c if want_b else 0)


def _forward_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, scale, noise, _, _, *ctx.curve = inputs
    for_x, for_scale, _, for_strength, for_b = ctx.needs_input_grad[:5]
    ctx.wants = for_x, for_scale, for_strength, for_b
    ctx.save_for_backward(
        None if _is_line(*ctx.curve) else output,
        x if for_scale else None,
        scale if for_x else None,
        noise if for_strength else None,
    )
    ctx.set_materialize_grads(False)


def _forward_backward(ctx: Any, dy: MaybeTensor) -> tuple[MaybeTensor, ...]:
    if dy is None:
        return (None,) * 8
    y, x, scale, noise = ctx.saved_tensors
    # The derivative in y is zero. Detached, y keeps the forward graph out of the second derivatives, that would carry
    # zeros through all of it; but if dy is a constant, something has to make dx differentiable.
    if y is not None and dy.requires_grad:
        y = y.detach()
    for_x, for_scale, for_strength, for_b = ctx.wants
    dx, dscale, dstrength, db = noise_bias_act_grad(dy, y, x, scale, noise, *ctx.curve, for_x, for_b)
    return (
        dx if for_x else None,
        dscale if for_scale else None,
        None,
        dstrength if for_strength else None,
        db if for_b else None,
        *(None, None, None),
    )


def _grad_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    dy, y, x, scale, noise, alpha, gain, clamp, ctx.gave_x, ctx.gave_b = inputs
    ctx.curve = alpha, gain, clamp
    ctx.gave_scale, ctx.gave_strength = x is not None, noise is not None
    ctx.like = dy.shape, dy.dtype, dy.device
    ctx.for_dy, ctx.for_y, ctx.for_x, ctx.for_scale = ctx.needs_input_grad[:4]
    ctx.save_for_backward(
        dy if ctx.for_x or ctx.for_scale else None,
        y,
        x if ctx.for_dy else None,
        scale if ctx.for_dy else None,
        noise if ctx.for_dy else None,
    )
    ctx.set_materialize_grads(False)


def _grad_backward(ctx: Any, u: MaybeTensor, v: MaybeTensor, q: MaybeTensor, r: MaybeTensor) -> tuple[MaybeTensor, ...]:
    dy, y, x, scale, noise = ctx.saved_tensors
    u, v = u if ctx.gave_x else None, v if ctx.gave_scale else None
    q, r = q if ctx.gave_strength else None, r if ctx.gave_b else None
    ddy = dx = dscale = None
    if ctx.for_dy and any(t is not None for t in (u, v, q, r)):
        if u is None and v is None and y is None:  # nothing of the size of the result
            shape, dtype, device = ctx.like
            u = torch.zeros(shape, dtype=dtype, device=device)
        ddy = noise_bias_act_tangent(
            u,
            None if v is None else x,
            None if u is None else scale,
            v,
            None if q is None else noise,
            *(q, r, y),
            *ctx.curve,
        )
    for_x, for_scale = ctx.for_x and v is not None, ctx.for_scale and u is not None
    if for_x or for_scale:
        of_scale = u if for_scale else None
        dx, dscale, _, _ = noise_bias_act_grad(dy, y, of_scale, v, None, *ctx.curve, for_x, False)
    dslope = torch.zeros_like(y) if ctx.for_y else None  # as slopes do not change
    return (ddy, dslope, dx if for_x else None, dscale if for_scale else None, *(None,) * 6)


def _tangent_setup(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    u, x, scale, v, noise, _, _, y, *ctx.curve = inputs
    ctx.wants = for_u, for_x, for_scale, for_v, _, for_q, _, _ = ctx.needs_input_grad[:8]
    ctx.save_for_backward(
        u if for_scale else None,
        x if for_v else None,
        scale if for_u else None,
        v if for_x else None,
        noise if for_q else None,
        y,
    )
    ctx.set_materialize_grads(False)


def _tangent_backward(ctx: Any, dt: MaybeTensor) -> tuple[MaybeTensor, ...]:
    if dt is None:
        return (None,) * 11
    u, x, scale, v, noise, y = ctx.saved_tensors
    for_u, for_x, for_scale, for_v, _, for_q, for_r, for_y = ctx.wants
    du = dx = dscale = dv = dq = dr = None
    if for_u or for_v or for_q or for_r:
        du, dv, dq, dr = noise_bias_act_grad(dt, y, x, scale, noise, *ctx.curve, for_u, for_r)
    if for_x or for_scale:
        dx, dscale, _, _ = noise_bias_act_grad(dt, y, u, v, None, *ctx.curve, for_x, False)
    return (
        du if for_u else None,
        dx if for_x else None,
        dscale if for_scale else None,
        dv if for_v else None,
        None,
        dq if for_q else None,
        dr if for_r else None,
        torch.zeros_like(y) if for_y else None,
        *(None,) * 3,
    )


def _is_line(alpha: float, gain: float, clamp: float) -> bool:
    """Whether the slope is the same everywhere, so that y tells nothing."""
    return alpha == 1 and math.isnan(clamp)


noise_bias_act = cuda_kernels.define(
    f"{NAME}(Tensor x, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? b,"
    " float alpha, float gain, float clamp) -> Tensor",
    _forward,
    _forward_fake,
    _forward_setup,
    _forward_backward,
)
noise_bias_act_grad = cuda_kernels.define(
    f"{NAME}_grad(Tensor dy, Tensor? y, Tensor? x, Tensor? scale, Tensor? noise,"
    " float alpha, float gain, float clamp, bool want_x, bool want_b) -> (Tensor, Tensor, Tensor, Tensor)",
    _grad,
    _grad_fake,
    _grad_setup,
    _grad_backward,
)
noise_bias_act_tangent = cuda_kernels.define(
    f"{NAME}_tangent(Tensor? u, Tensor? x, Tensor? scale, Tensor? v, Tensor? noise, Tensor? q, Tensor? r,"
    " Tensor? y, float alpha, float gain, float clamp) -> Tensor",
    _tangent,
    _tangent_fake,
    _tangent_setup,
    _tangent_backward,
)
