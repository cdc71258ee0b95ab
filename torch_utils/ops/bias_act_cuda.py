"""bias_act on GPUs: operators that launch the kernels of csrc/bias_act.cu. See bias_act.py for what they compute.

With s the slope of bias_act, its gradient is the map (v, vb) -> (s (v + vb), sum s (v + vb)), which is its own
transpose: `bias_act_grad`. For linear, relu and lrelu, whose s does not change, it is its own gradient as well; the
others have `bias_act_grad2` on top, and PyTorch's operations from the third order on.
"""

from __future__ import annotations

import functools
import math
import operator
from typing import Any, NamedTuple

import torch

from torch_utils.ops import cuda_kernels
from torch_utils.ops.activations import HOMOGENEOUS, activations

NAME = "bias_act"  # of the kernel
Settings = tuple[Any, ...]  # dim, act, alpha, gain, clamp

_THREADS = 256  # a block
_BLOCKS = 132 * 16  # enough for the largest GPUs; beyond it blocks do more, so that there are fewer parts to add
_PACKS = 2  # that are worth a thread
_PARTS = 2048  # of a sum, at most
_TYPES = list(cuda_kernels.SUFFIXES)
_NAMES = list(activations)  # in the order of `enum Act`
_WIDE = 16  # bytes that a thread reads at once


def takes(x: torch.Tensor, b: torch.Tensor | None, act: str, alpha: float, gain: float, clamp: float | None) -> bool:
    """Whether the kernel, if it is in use, does this, and does it faster than PyTorch."""
    if b is not None and b.dtype != x.dtype:
        return False
    if act == "linear" and clamp is None and (b is None or gain == 1):
        return False  # a single operation of PyTorch's
    return act not in HOMOGENEOUS or (0 < gain < math.inf and 0 <= alpha < math.inf)


def forward(x: torch.Tensor, b: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    """bias_act of x, b and `Settings`, differentiable to any order."""
    return _forward(x, b, *settings)


class _Tensors(NamedTuple):
    """Of `struct Params`; all but those along channels laid out alike."""

    x: torch.Tensor | None
    b: torch.Tensor | None
    t: torch.Tensor | None
    tb: torch.Tensor | None
    o: torch.Tensor | None
    ob: torch.Tensor | None
    y: torch.Tensor
    z: torch.Tensor | None


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
    columns = -(-packs // _THREADS)
    across = -(-packs // columns)
    down = _THREADS // across
    part = _part(length, down, _BLOCKS // columns)
    return _Geometry("rows", width, length, part, 1, (columns, -(-length // part), 1), (across, down, 1))


def _planes(outer: int, channels: int, inner: int, pack: int) -> _Geometry | None:
    """For packs of that many numbers; None if they do not fit."""
    if inner % pack != 0:
        return None
    inner //= pack
    length = outer * inner
    threads = min(_THREADS, _rounded_up(length, 32))
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
    return entry, geometry, (channels, *geometry[1:5], *division(geometry.inner))


def _memory(x: torch.Tensor, dim: int | None) -> tuple[int, int, int]:
    """A dense tensor as `[outer, channels, inner]` in the order of memory; without a dim, no channels."""
    if dim is None or x.shape[dim] == 1:
        return 1, 1, x.numel()
    channels, inner = x.shape[dim], x.stride(dim)
    return x.numel() // (channels * inner), channels, inner


def division(divisor: int) -> tuple[int, int]:
    """factor and shift, with which `n // divisor == (n * factor // 2**32 + n) >> shift` for every n below 2**31."""
    shift = (divisor - 1).bit_length()
    return ((1 << 32) * ((1 << shift) - divisor)) // divisor + 1, shift


def _launch(tensors: _Tensors, sums: tuple[bool, bool], settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute y and, if it is there, z; returns their sums along channels, empty where they are not asked for."""
    x, (dim, act, alpha, gain, clamp) = tensors.y, settings
    pointers = [cuda_kernels.pointer(t) for t in tensors]
    per_channel = any(sums) or any(pointers[i] for i in (1, 3, 5))
    together = functools.reduce(operator.or_, (pointers[i] for i in (0, 2, 4, 6, 7)))
    alignment = math.gcd(together, _WIDE)
    memory = _memory(x, dim if per_channel else None)
    entry, geometry, numbers = _deal(memory, x.dtype, alignment, act in HOMOGENEOUS, tensors.t is not None)
    shape = geometry.grid[1], geometry.width
    parts = [x.new_empty(shape, dtype=torch.float32) if wanted else None for wanted in sums]
    cuda_kernels.kernels[NAME].run(
        entry,
        geometry.grid,
        geometry.block,
        "10P7Ii3f",
        *pointers,
        *(cuda_kernels.pointer(part) for part in parts),
        *numbers,
        _NAMES.index(act),
        gain,
        gain * alpha if act == "lrelu" else gain,
        math.nan if clamp is None else clamp,
        device=x.device,
    )
    y_sum, z_sum = (x.new_empty(0) if part is None else _sum(part, x.shape[dim], x.dtype) for part in parts)
    return y_sum, z_sum


def _sum(parts: torch.Tensor, channels: int, dtype: torch.dtype) -> torch.Tensor:
    """`parts.view(-1, channels).sum(0)`"""
    sums = parts.new_empty(channels, dtype=dtype)
    block = (4, 64, 1)
    grid = (-(-channels // block[0]), 1, 1)
    params = parts.data_ptr(), sums.data_ptr(), parts.numel() // channels, channels, _TYPES.index(dtype)
    cuda_kernels.kernels[NAME].run(f"{NAME}_sums", grid, block, "2P2Ii", *params, device=parts.device)
    return sums


def _dense(x: torch.Tensor) -> torch.Tensor:
    """x in an order of memory that the kernel knows."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return x
    return x.contiguous()


def _like(x: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """x in the order of memory of a dense tensor."""
    return x if x.stride() == other.stride() else torch.empty_like(other).copy_(x)


def _packed(b: torch.Tensor | None) -> torch.Tensor | None:
    return None if b is None else b.contiguous()


# The output.


def _run_forward(x: torch.Tensor, b: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    x = _dense(x)
    y = torch.empty_like(x)
    _launch(_Tensors(x, _packed(b), None, None, None, None, y, None), (False, False), settings)
    return y


def _fake_forward(x: torch.Tensor, b: torch.Tensor | None, *settings: Any) -> torch.Tensor:
    return torch.empty_like(_dense(x))


def _keep_forward(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, b, *settings = inputs
    ctx.settings = tuple(settings)
    _, act, _, _, clamp = settings
    if act not in HOMOGENEOUS:
        ctx.save_for_backward(x, b)
    else:
        ctx.save_for_backward(None if act == "linear" and clamp is None else output, None)
    ctx.set_materialize_grads(False)


def _differentiate_forward(ctx: Any, dy: torch.Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * 7
    if dy is None:
        return nothing
    kept, b = ctx.saved_tensors
    if ctx.settings[1] in HOMOGENEOUS and kept is not None and dy.requires_grad:
        # The derivative in y is zero. Detached, y keeps the forward graph out of the second derivatives, that would
        # carry zeros through all of it; but if dy is a constant, something has to make dx differentiable.
        kept = kept.detach()
    dx, db = _gradient(dy, None, kept, b, ctx.needs_input_grad[1], *ctx.settings)
    return dx, db if ctx.needs_input_grad[1] else None, *nothing[2:]


# The gradient: of t and tb, s (t + tb) and, if asked for, its sum along channels. kept: y for linear, relu and lrelu,
# otherwise x, as is b.


def _run_gradient(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    kept: torch.Tensor | None,
    b: torch.Tensor | None,
    sum: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    like = _dense(t if kept is None else kept)
    y = torch.empty_like(like)
    x = None if kept is None else like
    y_sum, _ = _launch(
        _Tensors(x, _packed(b), _like(t, like), _packed(tb), None, None, y, None), (sum, False), settings
    )
    return y, y_sum


def _fake_gradient(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    kept: torch.Tensor | None,
    b: torch.Tensor | None,
    sum: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(_dense(t if kept is None else kept)), t.new_empty(t.shape[settings[0]] if sum else 0)


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    t, tb, kept, b, _, *settings = inputs
    ctx.settings, ctx.shape = tuple(settings), t.shape
    ctx.save_for_backward(kept, *((None,) * 3 if settings[1] in HOMOGENEOUS else (b, t, tb)))
    ctx.set_materialize_grads(False)


def _differentiate_gradient(ctx: Any, v: torch.Tensor | None, vb: torch.Tensor | None) -> tuple[Any, ...]:
    needs, nothing = ctx.needs_input_grad, (None,) * 10
    lines = ctx.settings[1] in HOMOGENEOUS
    if (v is None and vb is None) or not any(needs[:2] if lines else needs):
        return nothing
    kept, b, t, tb = ctx.saved_tensors
    if v is None:
        assert vb is not None
        v, vb = _along(vb, ctx.settings[0], len(ctx.shape)).expand(ctx.shape), None
    if lines:
        dt, dtb = _gradient(v, vb, kept, None, needs[1], *ctx.settings)
        return dt, dtb if needs[1] else None, *nothing[2:]
    if torch.is_grad_enabled():
        dt, dtb, dx, db = _second_natively(v, vb, t, tb, kept, b, *ctx.settings)
    else:
        dt, dtb, dx, db = _second(v, vb, t, tb, kept, b, needs[1], needs[3], *ctx.settings)
    return dt, dtb if needs[1] else None, dx, db if needs[3] else None, *nothing[4:]


# The gradient of the gradient, of the activations whose slope changes: with t and o for the two cotangents,
# s (t + tb) and s' (t + tb) (o + ob), and their sums along channels.


def _run_second(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    o: torch.Tensor,
    ob: torch.Tensor | None,
    x: torch.Tensor,
    b: torch.Tensor | None,
    sum_t: bool,
    sum_x: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    x = _dense(x)
    y, z = torch.empty_like(x), torch.empty_like(x)
    tensors = _Tensors(x, _packed(b), _like(t, x), _packed(tb), _like(o, x), _packed(ob), y, z)
    y_sum, z_sum = _launch(tensors, (sum_t, sum_x), settings)
    return y, y_sum, z, z_sum


def _fake_second(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    o: torch.Tensor,
    ob: torch.Tensor | None,
    x: torch.Tensor,
    b: torch.Tensor | None,
    sum_t: bool,
    sum_x: bool,
    *settings: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    like, channels = _dense(x), x.shape[settings[0]]
    y_sum, z_sum = x.new_empty(channels if sum_t else 0), x.new_empty(channels if sum_x else 0)
    return torch.empty_like(like), y_sum, torch.empty_like(like), z_sum


def _second_natively(
    t: torch.Tensor,
    tb: torch.Tensor | None,
    o: torch.Tensor,
    ob: torch.Tensor | None,
    x: torch.Tensor,
    b: torch.Tensor | None,
    dim: int,
    act: str,
    alpha: float,
    gain: float,
    clamp: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in PyTorch's operations, to be differentiated again."""

    def plus(large: torch.Tensor, small: torch.Tensor | None) -> torch.Tensor:
        return large if small is None else large + _along(small, dim, x.ndim)

    x, t, o = plus(x, b), plus(t, tb), plus(o, ob)
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    y = activations[act].function(x, alpha) * gain
    if clamp is not None:
        y = y.clamp(-clamp, clamp)
    (first,) = torch.autograd.grad(y, x, t, create_graph=True)
    (slope,) = torch.autograd.grad(y, x, o, create_graph=True)
    (second,) = torch.autograd.grad(slope, x, t, create_graph=True)
    others = [i for i in range(x.ndim) if i != dim]
    return first, first.sum(others), second, second.sum(others)


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
    "bias_act_grad2(Tensor t, Tensor? tb, Tensor o, Tensor? ob, Tensor x, Tensor? b, bool sum_t, bool sum_x, "
    f"{_SETTINGS}) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_second,
    _fake_second,
)
