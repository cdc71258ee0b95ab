"""Operations against their definition: `python benchmarks/ops.py`; the CUDA kernels alone with `--device cuda`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_ops
import harness
import torch

from gan import augment
from gan.networks import modulated_conv2d
from torch_utils.memory import keep_freed_memory
from torch_utils.ops import bias_act, conv2d_resample, kernels, upfirdn2d, warp


def with_gradient(function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> Callable[[], object]:
    """Forward and backward of `function` at x."""

    def run() -> object:
        y = function(x)
        return torch.autograd.grad(y, x, torch.ones_like(y))

    return run


def leaf(*shape: int, channels_last: bool = False) -> torch.Tensor:
    x = torch.randn(shape)
    return (x.contiguous(memory_format=torch.channels_last) if channels_last else x).requires_grad_()


def modulated_conv_plain(x: torch.Tensor, w: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    """The definition: weights of each sample, one grouped convolution."""
    n, c, height, width = x.shape
    w = w[None] * s[:, None, :, None, None]
    w = w * (w.square().sum(dim=[2, 3, 4], keepdim=True) + 1e-8).rsqrt()
    y = torch.nn.functional.conv2d(x.reshape(1, n * c, height, width), w.flatten(0, 1), padding=1, groups=n)
    return y.reshape(n, -1, height, width)


def kernel_against_operations(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """bias_act with gradients of x and b: the compiled kernel, and the native operations that stand in for it."""
    x = torch.randn(16, 128, 32, 32).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    b, dy = torch.zeros(128, dtype=dtype, requires_grad=True), torch.randn_like(x)

    def run() -> object:
        return torch.autograd.grad(bias_act.bias_act(x, b, act="lrelu", clamp=256.0), [x, b], dy)

    def native() -> object:
        with kernels.disabled():
            return run()

    return {"ours": run, "plain": native}


def cases() -> dict[str, dict[str, Callable[[], object]]]:
    f = upfirdn2d.setup_filter([1, 3, 3, 1])
    fir = leaf(16, 64, 65, 65)
    rgb = leaf(16, 3, 64, 64)
    act, b = leaf(16, 64, 64, 64, channels_last=True), torch.zeros(64)
    conv, w, s = leaf(16, 64, 32, 32, channels_last=True), torch.randn(64, 64, 3, 3), torch.rand(16, 64) + 0.5
    lowpass = augment.AugmentPipe().Hz_geom
    turn = augment.rotate2d(torch.full([16], 0.3))
    act_options: dict[str, Any] = {"act": "lrelu", "clamp": 256.0}

    def warped(limit: int) -> Callable[[], object]:
        run = with_gradient(lambda x: warp.warp(x, turn, lowpass), rgb)

        def limited() -> object:
            warp._DENSE_LIMIT = limit
            return run()

        return limited

    return {
        "upfirdn2d, 4x4 filter on 16x64x65x65": {
            "ours": with_gradient(lambda x: upfirdn2d.upfirdn2d(x, f, padding=1), fir),
            "plain": with_gradient(lambda x: upfirdn2d.upfirdn2d_ref(x, f, padding=1), fir),
        },
        "upsample2d of 16x3x64x64": {
            "ours": with_gradient(lambda x: upfirdn2d.upsample2d(x, f), rgb),
            "plain": with_gradient(lambda x: upfirdn2d.upfirdn2d_ref(x, f, up=2, padding=[2, 1, 2, 1], gain=4), rgb),
        },
        "bias_act lrelu with clamp on 16x64x64x64": {
            "ours": with_gradient(lambda x: bias_act.bias_act(x, b, **act_options), act),
            "plain": with_gradient(lambda x: bias_act.bias_act_ref(x, b, **act_options), act),
        },
        "bias_act on 16x128x32x32, kernel against native": kernel_against_operations(torch.float32),
        "bias_act on 16x128x32x32, the same in bfloat16": kernel_against_operations(torch.bfloat16),
        "conv2d_resample up 2 on 16x64x32x32": {
            "ours": with_gradient(lambda x: conv2d_resample.conv2d_resample(x, w, f, up=2, padding=1), conv),
            "plain": with_gradient(lambda x: conv2d_resample.conv2d_resample_ref(x, w, f, up=2, padding=1), conv),
        },
        "modulated_conv2d 64 to 64 on 16x64x32x32": {
            "ours": with_gradient(lambda x: modulated_conv2d(x, w, s, padding=1), conv),
            "plain": with_gradient(lambda x: modulated_conv_plain(x, w, s), conv),
        },
        "warp of 16x3x64x64: matrix products against FIR passes": {"ours": warped(300), "plain": warped(0)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rehearse", action="store_true", help="the cases of CUDA with tiny tensors on --device")
    parser.add_argument("--only", default="", help="cases of CUDA whose name contains this")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder")
    arguments = parser.parse_args()
    if arguments.device == "cuda" or arguments.rehearse:
        cuda_ops.measure(torch.device(arguments.device), arguments.out, arguments.rehearse, arguments.only)
        return
    torch.manual_seed(0)
    results = {}
    keep_freed_memory()
    print(kernels.prepare())
    print(f"{'forward and backward, float32':58s} {'ours ms':>9s} {'plain ms':>9s} {'ratio':>6s}")
    for name, candidates in cases().items():
        timing = harness.alternate(candidates, rounds=15)
        ratio = timing["plain"]["median_ms"] / timing["ours"]["median_ms"]
        print(f"{name:58s} {timing['ours']['median_ms']:9.2f} {timing['plain']['median_ms']:9.2f} {ratio:6.2f}")
        results[name] = {**timing, "ratio": ratio}
    harness.write("ops", results, arguments.out)


if __name__ == "__main__":
    main()
