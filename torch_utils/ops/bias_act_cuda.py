"""bias_act on GPUs: operators that launch the kernels of csrc/bias_act.cu. See bias_act.py for what they compute.

With s the slope of bias_act, its gradient is the map (v, vb) -> (s (v + vb), sum s (v + vb)), which is its own
transpose: `bias_act_grad`. For linear, relu and lrelu, whose s does not change, it is its own gradient as well; the
others have `bias_act_grad2` on top, and PyTorch's operations from the third order on.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from torch_utils.ops import cuda_kernels
from torch_utils.ops.activations import HOMOGENEOUS, activations

NAME = "bias_act"  # of the kernel
_BLOCKS = 132 * 16  # enough for the largest GPUs; beyond it blocks do more, so that there are fewer parts to add
_PACKS = 2  # that are worth a thread
_PARTS = 2048  # of a sum, at most
_NAMES = list(activations)  # in the order of `enum Act`
_WIDE = 16  # bytes that a thread reads at once


class Settings(NamedTuple):
    """How bias_act is computed: the last arguments of the operators."""

    dim: int
    act: str
    alpha: float
    gain: float
    clamp: float | None


def takes(x: torch.Tensor, b: torch.Tensor | None, act: str, alpha: float, gain: float, clamp: float | None) -> bool:
    """Whether the kernel, if it is in use, does this, and does it faster than PyTorch."""
    if b is not None and b.dtype != x.dtype:
        return False
    if act == "linear" and clamp is None and (b is None or gain == 1):
        return False  # a single operation of PyTorch's
    return act not in HOMOGENEOUS or (0 < gain < math.inf and 0 <= alpha < math.inf)


def forward(
    x: torch.Tensor, b: torch.Tensor | None, dim: int, act: str, alpha: float, gain: float, clamp: float | None
) -> torch.Tensor:
    """bias_act of what it takes, differentiable to any order."""
    return _forward(x, b, dim, act, alpha, gain, clamp)


class _Tensors(NamedTuple):
    """Of `struct Params`, in its order; all but those along channels laid out alike."""

    y: torch.Tensor
    x: torch.Tensor | None
    b: torch.Tensor | None = None
    t: torch.Tensor | None = None
    tb: torch.Tensor | None = None
    o: torch.Tensor | None = None
    z: torch.Tensor | None = None


class _Geometry(NamedTuple):
    """How a tensor, `[outer, channels, inner]` in memory, is dealt to blocks; numbers of `struct Params`."""

    name: str
    width: int
    length: int
    part: int
    inner: int
    grid: cuda_kernels.Size
    block: cuda_kernels.Size


def _rows(outer: int, channels: int, pack: int) -> _Geometry | None:
    """For inner 1 and packs of that many numbers; None if they do not fit."""
    merged = pack // math.gcd(pack, channels)  # this many rows are one row here, so that packs fit
    if outer % merged != 0:
        return None
    width, length = merged * channels, outer // merged
    packs = width // pack
    columns = -(-packs // cuda_kernels.THREADS)
    across = -(-packs // columns)
    down = cuda_kernels.THREADS // across
    part = _part(length, down, _BLOCKS // columns)
    return _Geometry("rows", width, length, part, 1, (columns, -(-length // part), 1), (across, down, 1))


def _planes(outer: int, channels: int, inner: int, pack: int) -> _Geometry | None:
    """For packs of that many numbers; None if they do not fit."""
    if inner % pack != 0:
        return None
    inner //= pack
    length = outer * inner
    threads = min(cuda_kernels.THREADS, _rounded_up(length, 32))
    part = _part(length, threads, 2 * _BLOCKS // channels)
    return _Geometry("planes", channels, length, part, inner, (channels, -(-length // part), 1), (threads, 1, 1))


def _part(length: int, threads: int, parts: int) -> int:
    """What a block of so many threads takes, for about so many parts or fewer."""
    parts = max(1, min(parts, _PARTS, -(-length // (threads * _PACKS))))
    return _rounded_up(-(-length // parts), threads)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@functools.lru_cache(maxsize=4096)
def _deal(
    memory: tuple[int, int, int], dtype: torch.dtype, alignment: int, lines: bool, gradient: bool
) -> tuple[str, _Geometry, tuple[int, ...]]:
    """The widest kernel that fits, its geometry, and this as numbers of `struct Params`."""
    outer, channels, inner = memory
    task, pack, geometry = "slopes" if gradient else "lines", _WIDE // dtype.itemsize, None
    if lines and alignment == _WIDE:
        geometry = _rows(outer, channels, pack) if inner == 1 else _planes(outer, channels, inner, pack)
    if geometry is None:
        task, pack = "any", 4 // dtype.itemsize
        if inner == 1 and alignment >= 4:
            geometry = _rows(outer, channels, pack)
    if geometry is None:
        pack, geometry = 1, _planes(outer, channels, inner, 1)
    assert geometry is not None  # single numbers always fit
    entry = f"{NAME}_{task}_{geometry.name}_{pack}_{cuda_kernels.SUFFIXES[dtype]}"
    numbers = channels, geometry.width, geometry.length, geometry.part, *cuda_kernels.division(geometry.inner)
    return entry, geometry, numbers


def _memory(x: torch.Tensor, dim: int | None) -> tuple[int, int, int]:
    """A dense tensor as `[outer, channels, inner]` in the order of memory; without a dim, no channels."""
    if dim is None or x.shape[dim] == 1:
        return 1, 1, x.numel()
    channels, inner = x.shape[dim], x.stride(dim)
    return x.numel() // (channels * inner), channels, inner


def _launch(tensors: _Tensors, sums: bool, settings: Settings) -> torch.Tensor:
    """Compute y and, if it is there, z; returns the sums of the latter along channels, empty if not asked for."""
    y, x, b, t, tb, o, z = tensors
    whole = x, t, o, z
    per_channel = sums or b is not None or tb is not None
    channels = y.shape[settings.dim] if per_channel else 1  # y may have no dimension at all
    for tensor in whole:
        assert tensor is None or (tensor.shape, tensor.dtype, tensor.device) == (y.shape, y.dtype, y.device)
    for tensor in (b, tb):
        assert tensor is None or (tensor.shape, tensor.dtype, tensor.device) == ((channels,), y.dtype, y.device)
    memory = _memory(y, settings.dim if per_channel else None)
    alignment = math.gcd(*map(cuda_kernels.pointer, (y, *whole)), _WIDE)
    entry, geometry, numbers = _deal(memory, y.dtype, alignment, settings.act in HOMOGENEOUS, t is not None)
    shape = 1, geometry.grid[1] * geometry.width // channels, channels
    parts = y.new_empty(shape, dtype=torch.float32) if sums else None
    cuda_kernels.kernels[NAME].run(
        entry,
        geometry.grid,
        geometry.block,
        "8P7Ii3f",
        *map(cuda_kernels.pointer, (*tensors, parts)),
        *numbers,
        _NAMES.index(settings.act),
        settings.gain,
        settings.gain * settings.alpha if settings.act == "lrelu" else settings.gain,
        math.nan if settings.clamp is None else settings.clamp,
        device=y.device,
    )
    (total,) = cuda_kernels.totals(NAME, [parts], y.dtype)
    return y.new_empty(0) if total is None else total.view(channels)


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x in the order of memory of a dense tensor."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


def _packed(b: torch.Tensor | None) -> torch.Tensor | None:
    return None if b is None else b.contiguous()


# The output.


def _run_forward(x: torch.Tensor, b: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    x = cuda_kernels.dense(x)
    y = torch.empty_like(x)
    _launch(_Tensors(y=y, x=x, b=_packed(b)), False, Settings(*settings))
    return y


def _fake_forward(x: torch.Tensor, b: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    return torch.empty_like(cuda_kernels.dense(x))


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, b, *settings = inputs
    ctx.settings = Settings(*settings)
    if ctx.settings.act not in HOMOGENEOUS:
        ctx.save_for_backward(x, b)
    else:
        ctx.save_for_backward(None if ctx.settings.act == "linear" and ctx.settings.clamp is None else output, None)
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: torch.Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 7
    if dy is None:
        return nothing
    kept, b = ctx.saved_tensors
    if ctx.settings.act in HOMOGENEOUS and kept is not None and dy.requires_grad:
        # The derivative in y is zero. Detached, y keeps the forward graph out of the second derivatives, that would
        # carry zeros through all of it; but if dy is a constant, something has to make dx differentiable.
        kept = kept.detach()
    dx, db = _gradient(dy, None, kept, b, ctx.needs_input_grad[1], *ctx.settings)
    return dx, db if ctx.needs_input_grad[1] else None, *nothing[2:]


# The gradient: of t and tb, s (t + tb) and, if asked for, its sum along channels. kept: y for linear, relu and lrelu,
# otherwise x, as is b; tb is only there for these three, whose gradients are differentiated by this operator.


def _run_gradient(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    kept: torch.Tensor | None,
    b: torch.Tensor | None,
    sum: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    how = Settings(*settings)
    assert tb is None or how.act in HOMOGENEOUS
    x = None if kept is None else cuda_kernels.dense(kept)
    t = cuda_kernels.dense(t) if x is None else _like(t, x)
    y = torch.empty_like(t)
    return y, _launch(_Tensors(y=y, x=x, b=_packed(b), t=t, tb=_packed(tb)), sum, how)


def _fake_gradient(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    kept: torch.Tensor | None,
    b: torch.Tensor | None,
    sum: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    like = cuda_kernels.dense(t if kept is None else kept)
    return torch.empty_like(like), t.new_empty(t.shape[settings[0]] if sum else 0)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    t, _, kept, b, ctx.gave_sum, *settings = inputs
    ctx.settings, ctx.shape = Settings(*settings), t.shape
    ctx.save_for_backward(kept, *((None, None) if ctx.settings.act in HOMOGENEOUS else (b, t)))
    ctx.set_materialize_grads(False)


def _differentiate_gradient(ctx: Any, v: torch.Tensor | None, vb: torch.Tensor | None) -> tuple[Any, ...]:
    needs, nothing = ctx.needs_input_grad, (None,) * 10
    vb = vb if ctx.gave_sum else None
    if v is None and vb is None:
        return nothing
    kept, b, t = ctx.saved_tensors
    if v is None:
        assert vb is not None
        v, vb = _along(vb, ctx.settings.dim, len(ctx.shape)).expand(ctx.shape), None
    if ctx.settings.act in HOMOGENEOUS:
        dt = dtb = None
        if needs[0] or needs[1]:
            dt, dtb = _gradient(v, vb, kept, None, needs[1], *ctx.settings)
        dkept = torch.zeros_like(kept) if needs[2] else None  # as slopes do not change
        return dt, dtb if needs[1] else None, dkept, *nothing[3:]
    if torch.is_grad_enabled():
        dt, dx, db = _second_natively(v, vb, t, kept, b, *ctx.settings)
    else:
        dt, dx, db = _second(v, vb, t, kept, b, needs[3], *ctx.settings)
    return dt, None, dx, db if needs[3] else None, *nothing[4:]


# The gradient of the gradient, of the activations whose slope changes: with t and o for the two cotangents,
# s (t + tb) and s' (t + tb) o, and the sum of the latter along channels.


def _run_second(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    o: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor | None,
    sum: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x = cuda_kernels.dense(x)
    y, z = torch.empty_like(x), torch.empty_like(x)
    tensors = _Tensors(y=y, x=x, b=_packed(b), t=_like(t, x), tb=_packed(tb), o=_like(o, x), z=z)
    return y, z, _launch(tensors, sum, Settings(*settings))


def _fake_second(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    o: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor | None,
    sum: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    like = cuda_kernels.dense(x)
    return torch.empty_like(like), torch.empty_like(like), x.new_empty(x.shape[settings[0]] if sum else 0)


def _second_natively(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    o: torch.Tensor,
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in PyTorch's operations, to be differentiated again."""

    def plus(large: torch.Tensor, small: torch.Tensor | None) -> torch.Tensor:
        return large if small is None else large + _along(small, dim, x.ndim)

    x, t = plus(x, b), plus(t, tb)
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = activations[act].function(x, alpha) * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    (first,) = torch.autograd.grad(y, x, t, create_graph=True)
    (slope,) = torch.autograd.grad(y, x, o, create_graph=True)
    (second,) = torch.autograd.grad(slope, x, t, create_graph=True)
    others = [i for i in range(x.ndim) if i != dim]
    return first, second, second.sum(others)


def _along(b: torch.Tensor, dim: int, ndim: int) -> torch.Tensor:
    return b.reshape([-1 if i == dim else 1 for i in range(ndim)])


_SETTINGS = "int dim, str act, float alpha, float gain, float? clamp"
_forward = cuda_kernels.define(
    f"bias_act(Tensor x, Tensor? b, {_SETTINGS}) -> Tensor",
    _run_forward,
    _fake_forward,
    _keep_forward,
    _differentiate_forward,
)
_gradient = cuda_kernels.define(
    f"bias_act_grad(Tensor t, Tensor? tb, Tensor? kept, Tensor? b, bool sum, {_SETTINGS}) -> (Tensor, Tensor)",
    _run_gradient,
    _fake_gradient,
    _keep_gradient,
    _differentiate_gradient,
)
_second = cuda_kernels.define(
    f"bias_act_grad2(Tensor t, Tensor? tb, Tensor o, Tensor x, Tensor? b, bool sum, {_SETTINGS})"
    " -> (Tensor, Tensor, Tensor)",
    _run_second,
    _fake_second,
)
