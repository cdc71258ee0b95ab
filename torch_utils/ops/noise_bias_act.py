"""Scale each sample's channels, add noise and a bias, apply an activation, scale and clamp: what follows a convolution.

On a CUDA device a compiled kernel does it in one pass over memory each way (csrc/noise_bias_act.cu), if
`kernels.prepare` could build it. Without noise, bias and activation it is the modulation in front of a convolution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_utils.ops import cuda_kernels, noise_bias_act_cuda
from torch_utils.ops.bias_act import activations, bias_act, bias_act_ref

_MaybeTensor = torch.Tensor | None


def noise_bias_act(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """`bias_act(x * scale[:, :, None, None] + noise * strength, b, ...)`. Equals `noise_bias_act_ref`.

    Args:
        x: `[N, C, H, W]`, any floating dtype.
        scale: `[N, C]`, or None.
        noise: broadcastable to x, or None. The kernel takes `[N, 1, H, W]` and `[H, W]`.
        strength: `[]`, what noise is multiplied by, or None.
        b: bias `[C]`, or None.
        act, alpha, gain, clamp: as in `bias_act`.

    All but x are usually float32 and are not rounded to x's dtype by the kernel.

    Returns:
        The shape and dtype of `x`. Differentiable to any order.
    """
    strength = None if noise is None else strength
    if _kernel.launch is not None:
        curve = _kernel_curve(x, scale, noise, strength, b, act, alpha, gain, clamp)
        if curve is not None:
            return noise_bias_act_cuda.noise_bias_act(x, scale, noise, strength, b, *curve)
    if noise is not None:
        noise = (noise if strength is None else noise * strength).to(x.dtype)
    if scale is not None:
        scale = scale.to(x.dtype)[:, :, None, None]
        x = x * scale if noise is None else torch.addcmul(noise, x, scale)
    elif noise is not None:
        x = x + noise
    b = None if b is None else b.to(x.dtype)
    return bias_act(x, b, act=act, alpha=alpha, gain=gain, clamp=clamp)


def noise_bias_act_ref(
    x: torch.Tensor,
    scale: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    strength: torch.Tensor | None = None,
    b: torch.Tensor | None = None,
    act: str = "linear",
    alpha: float | None = None,
    gain: float | None = None,
    clamp: float | None = None,
) -> torch.Tensor:
    """`noise_bias_act`, written as its definition, step by step, in differentiable tensor operations."""
    if scale is not None:
        x = x * scale.to(x.dtype)[:, :, None, None]
    if noise is not None:
        x = x + (noise if strength is None else noise * strength).to(x.dtype)
    return bias_act_ref(x, None if b is None else b.to(x.dtype), act=act, alpha=alpha, gain=gain, clamp=clamp)


def _kernel_curve(
    x: torch.Tensor,
    scale: _MaybeTensor,
    noise: _MaybeTensor,
    strength: _MaybeTensor,
    b: _MaybeTensor,
    act: str,
    alpha: float | None,
    gain: float | None,
    clamp: float | None,
) -> tuple[float, float, float] | None:
    """Alpha, gain and clamp as the kernel takes them; None for what it does not compute."""
    if act not in ("linear", "lrelu") or x.ndim != 4 or not _kernel.takes(x, scale, noise, strength, b):
        return None
    if (scale is None and noise is None) or (noise is not None and noise.requires_grad):
        return None  # the former is bias_act
    n, c, h, w = x.shape
    shapes: tuple[Any, ...] = ([(n, c)], [(n, 1, h, w), (h, w)], [()], [(c,)])
    for tensor, allowed in zip((scale, noise, strength, b), shapes, strict=True):
        if tensor is not None and (tensor.dtype != torch.float32 or tensor.shape not in allowed):
            return None
    spec = activations[act]
    alpha = 1.0 if act == "linear" else spec.default_alpha if alpha is None else alpha
    gain = spec.default_gain if gain is None else gain
    if not (0 <= alpha < math.inf and 0 < gain < math.inf):  # a negative slope hides the sign
        return None
    if clamp is None:
        return alpha, gain, math.nan
    return (alpha, gain, clamp) if clamp >= 0 else None


def _check_kernel(device: torch.device) -> str | None:
    """Compare the kernel with `noise_bias_act_ref` where it could go wrong; what is wrong, or None."""
    random = torch.Generator().manual_seed(0)
    settings: list[dict[str, Any]] = [{"act": "lrelu", "alpha": 0.25, "gain": 1.5, "clamp": 1.5}, {"gain": 1.0}]
    shapes = (
        ((2, 40, 5, 7), torch.channels_last),
        ((2, 9, 5, 7), torch.channels_last),
        ((2, 5, 6, 8), torch.contiguous_format),
        ((1, 2, 72, 64), torch.contiguous_format),
        ((2, 3, 3, 3), torch.contiguous_format),
    )
    for shape, layout in shapes:
        x, dy, scale, *others = _check_inputs(shape, random, device)
        for dtype in cuda_kernels.SUFFIXES:
            for setting in settings:
                low: list[_MaybeTensor] = [x.to(dtype).contiguous(memory_format=layout), dy.to(dtype), scale]
                low += others if "act" in setting else [None, None, None]
                exact = [None if t is None else t.double() for t in low]
                actual = _check_derivatives(noise_bias_act, low, setting)
                for which, value in _check_derivatives(noise_bias_act_ref, exact, setting).items():
                    limit = 8 * torch.finfo(dtype).eps * value.abs().max()
                    if not (actual[which].double() - value).abs().max() <= limit:  # also if it is NaN
                        return f"{which} of {list(shape)} in {str(dtype).removeprefix('torch.')}"
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=device).reshape(1, 1, 2, 2)
    for dtype in cuda_kernels.SUFFIXES:
        y = noise_bias_act(odd.to(dtype), torch.full([1, 1], 2.0, device=device), act="lrelu", gain=1, clamp=3)
        if y.float().nan_to_num(nan=7).flatten().tolist() != [7, 3, -3, 2]:
            return "NaN and infinity"
    return None


def _check_inputs(shape: tuple[int, ...], random: torch.Generator, device: torch.device) -> tuple[torch.Tensor, ...]:
    """x, dy, scale, noise, strength, b, such that rounding does not decide on which side of a kink a number is."""
    n, c, h, w = shape

    def steps(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=random) * 4).round()

    scale = 2 ** torch.randint(-1, 2, [n, c], generator=random).float()
    x, b = steps(*shape) / 4 / scale[:, :, None, None], steps(c) / 4 + 1 / 8  # their sum: odd multiples of 1/8
    tensors = x, steps(*shape) / 4, scale, steps(n, 1, h, w) / 2, torch.tensor(0.5), b
    return tuple(t.to(device) for t in tensors)


def _check_derivatives(
    function: Callable[..., torch.Tensor], tensors: Sequence[_MaybeTensor], settings: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """The output, its derivatives, and those of a sum of their squares; tensors as _check_inputs gives them."""
    x, dy, scale, noise, strength, b = tensors
    named = {"x": x, "scale": scale, "strength": strength, "b": b, "dy": dy}
    leaves = {name: t.detach().requires_grad_() for name, t in named.items() if t is not None}
    inputs = {name: leaf for name, leaf in leaves.items() if name != "dy"}
    with torch.enable_grad():
        y = function(noise=noise, **inputs, **settings)
        # Of a sum: to take a cotangent, autograd.grad imports sympy, which costs more than all of this.
        first = torch.autograd.grad((y * leaves["dy"]).sum(), list(inputs.values()), create_graph=True)
        # Weighted, so that no derivative outweighs the others.
        total = torch.stack([(d.float() / d.detach().float().abs().max()).square().sum() for d in first]).sum()
        second = torch.autograd.grad(total, [leaves[name] for name in ("dy", "x", "scale")])
    names = [*(f"d{name}" for name in inputs), "second derivative in dy", "second derivative in x", "second in scale"]
    return {"y": y.detach(), **dict(zip(names, (d.detach() for d in (*first, *second)), strict=True))}


_kernel = cuda_kernels.register(noise_bias_act_cuda.NAME, "noise_bias_act.cu", _check_kernel)
