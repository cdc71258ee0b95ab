"""The CUDA kernels against PyTorch's operations and a device copy: `python benchmarks/ops.py --device cuda`.

Tensors are several times the GPU's cache, and calls are queued between two events, so that what is timed is the device.
GB/s counts every large tensor that a pass has to read or write, once; what PyTorch moves besides is its own affair.
"""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import torch

from gan.augment import AugmentPipe, rotate2d
from gan.bench.ceiling import copy_rate, synchronize
from torch_utils.ops import bias_act, cuda_kernels, kernels, noise_bias_act, upfirdn2d, warp

Function = Callable[..., torch.Tensor]
PASSES = ("forward", "backward", "second")
_SAMPLES, _SECONDS = 7, 0.02  # of each pass; of each sample


@dataclasses.dataclass
class Op:
    """An operation at a point.

    Args:
        kernel: that computes it.
        ours, ref: of `inputs`.
        inputs: the first is x; all that require a gradient get one.
        saved: large tensors that the backward pass needs besides dy: y (or x), as bytes.
    """

    kernel: str
    ours: Function
    ref: Function
    inputs: list[torch.Tensor]
    saved: int = 0


class Passes:
    """The passes of a function at a point, each to be called again and again."""

    def __init__(self, function: Function, inputs: list[torch.Tensor]) -> None:
        self._function, self._inputs = function, inputs
        self._leaves = [t for t in inputs if t.requires_grad]
        self._y = function(*inputs)
        self._dy = torch.randn_like(self._y).requires_grad_()
        self._ddx = torch.randn_like(inputs[0])
        (self._dx,) = torch.autograd.grad(self._y, inputs[0], self._dy, create_graph=True)

    def forward(self) -> object:
        with torch.no_grad():
            return self._function(*self._inputs)

    def backward(self) -> object:
        return torch.autograd.grad(self._y, self._leaves, self._dy, retain_graph=True)

    def second(self) -> object:
        """The gradient of <dx, ddx> in dy, as R1 and path length take it."""
        return torch.autograd.grad(self._dx, self._dy, self._ddx, retain_graph=True)


def size_of(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def moved(op: Op) -> dict[str, int]:
    """Bytes that each pass cannot help moving."""
    with torch.no_grad():
        y = size_of(op.ours(*op.inputs))
    x = size_of(op.inputs[0])
    return {"forward": x + y, "backward": y + op.saved + x, "second": x + min(op.saved, y) + y}


def seconds_of(run: Callable[[], object], device: torch.device) -> list[float]:
    """Of a call, in several samples of as many calls as make them long enough."""
    run()
    begin = time.perf_counter()
    run()
    synchronize(device)
    calls = max(1, min(int(_SECONDS / max(time.perf_counter() - begin, 1e-6)), 200))
    found = []
    for _ in range(_SAMPLES):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1000 / calls)
        else:
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            found.append((time.perf_counter() - begin) / calls)
    return found


def result_of(op: Op, copy: float, device: torch.device) -> dict[str, Any]:
    """Milliseconds and share of the copy's rate of each pass: with kernels, without, and as `_ref` defines it."""
    launched: list[str] = []
    real = cuda_kernels.CudaKernel.run

    def run(self: cuda_kernels.CudaKernel, entry: str, *args: Any, **options: Any) -> None:
        launched.append(entry)
        real(self, entry, *args, **options)

    cuda_kernels.CudaKernel.run = run  # type: ignore[method-assign]
    try:
        Passes(op.ours, op.inputs).backward()
    finally:
        cuda_kernels.CudaKernel.run = real  # type: ignore[method-assign]
    result: dict[str, Any] = {"kernel": op.kernel, "launched": sorted(set(launched))}
    bytes_of = moved(op)
    for name, function, around in (
        ("ours", op.ours, contextlib.nullcontext),
        ("native", op.ours, kernels.disabled),
        ("ref", op.ref, kernels.disabled),
    ):
        with around():
            passes = Passes(function, op.inputs)
            result[name] = {each: pace(getattr(passes, each), bytes_of[each], copy, device) for each in PASSES}
        del passes
    return result


def pace(run: Callable[[], object], moved: int, copy: float, device: torch.device) -> dict[str, float]:
    """Milliseconds of a call, and what they say of the bytes that it has to move."""
    seconds = seconds_of(run, device)
    rate = moved / statistics.median(seconds)
    return {
        "ms": 1000 * statistics.median(seconds),
        "min_ms": 1000 * min(seconds),
        "max_ms": 1000 * max(seconds),
        "gb_per_second": rate / 1e9,
        "share_of_copy": rate / copy,
    }


def launch_microseconds(device: torch.device) -> dict[str, float]:
    """What a call costs the host, for an operation on next to nothing."""
    x, b = torch.randn(2, 16, 4, 4, device=device), torch.zeros(16, device=device)

    def call() -> object:
        return bias_act.bias_act(x, b, act="lrelu", clamp=256.0)

    found = {}
    for name, around in (("ours", contextlib.nullcontext), ("native", kernels.disabled)):
        with around():
            call()
            synchronize(device)
            begin = time.perf_counter()
            for _ in range(500):
                call()
            found[name] = (time.perf_counter() - begin) / 500 * 1e6
            synchronize(device)
    return found


def cases(device: torch.device, tiny: bool) -> Iterator[tuple[str, Callable[[], Op]]]:
    """What a step of 256 px takes, with more images."""
    n, c, side, rgb = (2, 8, 16, 16) if tiny else (32, 128, 128, 256)
    halves, layouts = (torch.float16, torch.float32), (torch.channels_last, torch.contiguous_format)
    if device.type == "cpu":
        halves = (torch.bfloat16, torch.float32)

    def leaf(shape: list[int], dtype: torch.dtype, layout: torch.memory_format) -> torch.Tensor:
        return torch.randn(shape, device=device).to(dtype).contiguous(memory_format=layout).requires_grad_()

    def small(*shape: int) -> torch.Tensor:
        return torch.rand(shape, device=device).add_(0.5).requires_grad_()

    def activation(act: str, dtype: torch.dtype, layout: torch.memory_format) -> Op:
        x, b = leaf([n, c, side, side], dtype, layout), small(c).detach().to(dtype).requires_grad_()
        options: dict[str, Any] = {"act": act, "clamp": 256.0}

        def ours(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return bias_act.bias_act(x, b, **options)

        def ref(x: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return bias_act.bias_act_ref(x, b, **options)

        return Op("bias_act", ours, ref, [x, b], size_of(x))

    def epilogue(dtype: torch.dtype, layout: torch.memory_format) -> Op:
        x = leaf([n, c, side, side], dtype, layout)
        noise = torch.randn(n, 1, side, side, device=device)
        inputs = [x, small(n, c), noise, small(), small(c)]
        options: dict[str, Any] = {"act": "lrelu", "clamp": 256.0}
        op, ref = noise_bias_act.noise_bias_act, noise_bias_act.noise_bias_act_ref
        both = 2 * size_of(x)  # y and x
        return Op("noise_bias_act", lambda *a: op(*a, **options), lambda *a: ref(*a, **options), inputs, both)

    def modulation(dtype: torch.dtype) -> Op:
        x = leaf([n, c, side, side], dtype, torch.channels_last)
        return Op(
            "noise_bias_act",
            noise_bias_act.noise_bias_act,
            noise_bias_act.noise_bias_act_ref,
            [x, small(n, c)],
            size_of(x),
        )

    def fir(shape: list[int], dtype: torch.dtype, layout: torch.memory_format, f: torch.Tensor, **options: Any) -> Op:
        def ours(x: torch.Tensor) -> torch.Tensor:
            return upfirdn2d.upfirdn2d(x, f, **options)

        def ref(x: torch.Tensor) -> torch.Tensor:
            return upfirdn2d.upfirdn2d_ref(x, f, **options)

        return Op("upfirdn2d", ours, ref, [leaf(shape, dtype, layout)])

    def warped(images: int, size: int) -> Op:
        lowpass = AugmentPipe().Hz_geom.to(device)
        turn = rotate2d(torch.full([images], 0.3, device=device))
        x = leaf([images, 3, size, size], torch.float32, torch.contiguous_format)
        return Op("warp", lambda x: warp.warp(x, turn, lowpass), lambda x: warp.warp_ref(x, turn, lowpass), [x])

    for layout in layouts:
        order = "channels_last" if layout == torch.channels_last else "NCHW"
        for dtype in halves:
            name = f"{str(dtype).removeprefix('torch.')}, {order}"
            yield f"noise_bias_act lrelu, {name}", lambda d=dtype, m=layout: epilogue(d, m)  # type: ignore[misc]
            yield f"bias_act lrelu, {name}", lambda d=dtype, m=layout: activation("lrelu", d, m)  # type: ignore[misc]
    half, f = halves[0], upfirdn2d.setup_filter([1, 3, 3, 1]).to(device)
    last, plain = layouts
    wide, pictures = [n, c, side, side], [n, 3, rgb, rgb]
    odd = [n, c, side + 1, side + 1]
    taps = AugmentPipe().Hz_geom.to(device)
    yield "modulation", lambda: modulation(half)
    yield "FIR after a transposed convolution", lambda: fir(odd, half, last, f, padding=1, gain=4)
    yield "FIR before a strided convolution", lambda: fir(wide, half, last, f, padding=2)
    yield "FIR and down 2, skip of D", lambda: fir(wide, half, last, f, down=2, padding=1)
    yield "FIR after a transposed convolution, NCHW", lambda: fir(odd, half, plain, f, padding=1, gain=4)
    yield "pictures up 2", lambda: fir(pictures, torch.float32, plain, f, up=2, padding=[2, 1, 2, 1], gain=4)
    yield "pictures down 2, 12 taps", lambda: fir(pictures, torch.float32, plain, taps, down=2, padding=5)
    yield "pictures up 2, 12 taps", lambda: fir(pictures, torch.float32, plain, taps, up=2, padding=6, gain=4)
    yield "warp", lambda: warped(n, rgb)
    yield "warp of few large pictures", lambda: warped(max(n // 8, 1), 4 * rgb)
    yield "bias_act swish", lambda: activation("swish", half, last)


def measure(device: torch.device, folder: Path, tiny: bool = False, only: str = "") -> dict[str, Any]:
    """All cases; what fails has {"error": why}. Written after each."""
    torch.manual_seed(0)
    prepared = kernels.prepare(device)
    print(prepared)
    copy = copy_rate(device)
    launch = launch_microseconds(device)
    results: dict[str, Any] = {"prepared": prepared, "copy_gb_per_second": copy / 1e9, "call_microseconds": launch}
    print(f"copy {copy / 1e9:.0f} GB/s; a call {launch['ours']:.1f} us on the host, native {launch['native']:.1f}")
    print(f"{'':42s}" + "".join(f"{each + ' ms':>12s}{'of copy':>8s}{'native':>8s}{'ref':>8s}" for each in PASSES))
    found: dict[str, Any] = {}
    for name, make in cases(device, tiny):
        if only not in name:
            continue
        try:
            found[name] = result_of(make(), copy, device)
        except (RuntimeError, ValueError, AssertionError) as error:
            found[name] = {"error": str(error).partition("\n")[0]}
            print(f"{name:42s}{found[name]['error']}")
        else:
            print(f"{name:42s}" + line_of(found[name]), flush=True)
        results["cases"] = found
        harness.write(f"ops_{device.type}" + "_rehearsal" * tiny, results, folder, quiet=True)
    return results


def line_of(result: dict[str, Any]) -> str:
    """Ours, its share of the copy's rate, and how many times longer PyTorch's operations and `_ref` take."""
    text = ""
    for each in PASSES:
        ours, native, ref = (result[name][each] for name in ("ours", "native", "ref"))
        text += f"{ours['ms']:12.3f}{ours['share_of_copy']:8.0%}"
        text += f"{native['ms'] / ours['ms']:8.2f}{ref['ms'] / ours['ms']:8.2f}"
    return text + ("" if result["launched"] else "   (no kernel)")
