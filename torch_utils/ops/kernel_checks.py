"""What the checks of kernels before their use share: the kernel's derivatives beside those of its reference.

The reference computes in float64 on the CPU, from the same numbers. Nothing here depends on the default dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

Tensors = Mapping[str, torch.Tensor]
Call = Callable[..., torch.Tensor]


def difference(
    op: Call, ref: Call, inputs: Tensors, constants: Tensors, device: torch.device, floor: float = 1e-5
) -> str | None:
    """How the output of `op`, a gradient or a second gradient differs from that of `ref`: "dx is off by ..."; or None.

    Args:
        op, ref: called with inputs and constants by name; ref in float64 on the CPU, op on the `device`.
        inputs: on the CPU, in the dtypes and layouts that op is to have them in; the first one's sets the tolerance,
            4 eps or `floor`, of the largest number.
        constants: the same for what is not differentiated.
    """
    found = _derivatives(op, *({name: t.to(device) for name, t in some.items()} for some in (inputs, constants)))
    exact = _derivatives(ref, *({name: t.double() for name, t in some.items()} for some in (inputs, constants)))
    tolerance = max(4 * torch.finfo(next(iter(inputs.values())).dtype).eps, floor)
    for what, expected in exact.items():
        error, largest = (found[what] - expected).abs().max(), expected.abs().max()
        if not error <= tolerance * largest:  # NaN too
            return f"{what} is off by {error:.1e}, of {largest:.1e} at most"
    return None


def _derivatives(call: Call, inputs: Tensors, constants: Tensors) -> dict[str, torch.Tensor]:
    """y, dx for each input x, and of the sum of all <dx, some v> the gradients in dy and every x: "d2dy", "d2x"."""
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    with torch.enable_grad():
        y = call(**leaves, **constants)
        dy = _cotangent(y, 0).requires_grad_()
        # Of sums: to take a cotangent, autograd.grad imports sympy, which costs more than all of this.
        first = torch.autograd.grad((y * dy).sum(), list(leaves.values()), create_graph=True)
        total = torch.stack([(dx * _cotangent(dx, i)).sum().double() for i, dx in enumerate(first, 1)]).sum()
        leaves["dy"] = dy
        second = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    results = {"y": y, **{f"d{name}": dx for name, dx in zip(inputs, first, strict=True)}}
    results |= {f"d2{name}": d2 for name, d2 in zip(leaves, second, strict=True)}
    return {name: t.detach().cpu().double() for name, t in results.items()}


def _cotangent(like: torch.Tensor, seed: int) -> torch.Tensor:
    """Numbers that every dtype has: the same whatever that of `like` is."""
    values = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32, device="cpu")
    return values.bfloat16().to(like)
