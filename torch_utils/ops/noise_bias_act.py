"""Scale each sample's channels, add noise and a bias, apply an activation, scale and clamp: what follows a convolution.

On a CUDA device a compiled kernel does it in one pass over memory each way (csrc/noise_bias_act.cu), if
`kernels.prepare` could build it. Without noise, bias and activation it is the modulation in front of a convolution.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch

from torch_utils.ops import cuda_kernels, kernel_checks, noise_bias_act_cuda
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
        The shape and dtype of `x`. Differentiable to any order; not to be changed in place before its gradient has been
        computed, which reads it.
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
    shapes = (
        ((2, 40, 5, 7), torch.channels_last),
        ((2, 9, 5, 7), torch.channels_last),
        ((2, 5, 6, 8), torch.contiguous_format),
        ((1, 2, 72, 64), torch.contiguous_format),
        ((2, 3, 3, 3), torch.contiguous_format),
    )
    lrelu: dict[str, Any] = {"act": "lrelu", "alpha": 0.25, "gain": 1.5, "clamp": 1.5}
    for shape, layout in shapes:
        wide = _off_the_kinks(shape, random)
        for dtype, suffix in cuda_kernels.SUFFIXES.items():
            inputs = {**wide, "x": wide["x"].to(dtype).contiguous(memory_format=layout)}
            constants = {"noise": inputs.pop("noise")}
            modulation = {name: inputs[name] for name in ("x", "scale")}
            for given, others, settings in ((inputs, constants, lrelu), (modulation, {}, {})):
                op, ref = (functools.partial(function, **settings) for function in (noise_bias_act, noise_bias_act_ref))
                wrong = kernel_checks.difference(op, ref, given, others, device)
                if wrong:
                    return f"{settings.get('act', 'linear')} of {list(shape)} in {suffix}: {wrong}"
    odd = torch.tensor([math.nan, math.inf, -math.inf, 1.0], device=device).reshape(1, 1, 2, 2)
    two = torch.full([1, 1], 2.0, dtype=torch.float32, device=device)
    for dtype, suffix in cuda_kernels.SUFFIXES.items():
        y = noise_bias_act(odd.to(dtype), two, act="lrelu", gain=1, clamp=3)
        if y.nan_to_num(nan=7).flatten().tolist() != [7, 3, -3, 2]:
            return f"NaN and infinity in {suffix}"
    return None


def _off_the_kinks(shape: tuple[int, int, int, int], random: torch.Generator) -> dict[str, torch.Tensor]:
    """Arguments such that rounding does not decide on which side of a kink a number is."""
    n, c, h, w = shape

    def steps(*size: int) -> torch.Tensor:
        return (torch.randn(size, generator=random, dtype=torch.float32) * 4).round() / 4

    scale = 2 ** torch.randint(-1, 2, [n, c], generator=random).to(torch.float32)
    return {
        "x": steps(n, c, h, w) / scale[:, :, None, None],
        "scale": scale,
        "noise": 2 * steps(n, 1, h, w),
        "strength": torch.tensor(0.5, dtype=torch.float32),
        "b": steps(c) + 1 / 8,  # so sums are odd multiples of 1/8
    }


_kernel = cuda_kernels.register(noise_bias_act_cuda.NAME, "noise_bias_act.cu", _check_kernel)
