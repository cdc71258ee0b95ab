"""The kernels of warp: their operators, `gan::warp_sample` and its transpose, each the gradient of the other.

Images are read in either layout and come back in the same one.
"""

from __future__ import annotations

from typing import Any

import torch

from torch_utils.ops import cuda_kernels

TAPS = 12
"""of the low-pass that the kernels are made for"""
_MARGIN = TAPS // 4
_TILE, _GROUP = 16, 3  # pixels a side and channels of a block
_LAYOUT = "4P11i"  # source, target, inverse, lowpass; channels, height, width; strides of source, of target


def _sample(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    images = cuda_kernels.dense(images)
    samples = _fake_sample(images, inverse, lowpass)
    _launch("warp_sample", images, samples, inverse, lowpass, images.shape, samples.shape)
    return samples


def _transposed(samples: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    samples = cuda_kernels.dense(samples)
    images = _fake_transposed(samples, inverse, lowpass)
    _launch("warp_sample_transposed", samples, images, inverse, lowpass, images.shape, images.shape)
    return images


def _launch(
    entry: str,
    source: torch.Tensor,
    target: torch.Tensor,
    inverse: torch.Tensor,
    lowpass: torch.Tensor,
    pictures: torch.Size,
    computed: torch.Size,
) -> None:
    """A thread for each pixel or sample that is computed, and for each group of channels."""
    n, channels, height, width = pictures
    assert min(height, width) >= 2, pictures
    for t, shape in ((inverse, (n, 3, 3)), (lowpass, (TAPS,))):
        expected = shape, torch.float32, source.device
        assert (t.shape, t.dtype, t.device) == expected, (t.shape, t.dtype, t.device, expected)
    tiles = -(-computed[2] // _TILE) * -(-computed[3] // _TILE)
    inverse, lowpass = inverse.contiguous(), lowpass.contiguous()  # kept until the launch
    pointers = [cuda_kernels.pointer(t) for t in (source, target, inverse, lowpass)]
    cuda_kernels.kernels["warp"].run(
        f"{entry}_{cuda_kernels.SUFFIXES[source.dtype]}",
        (n * tiles, -(-channels // _GROUP), 1),
        (cuda_kernels.THREADS, 1, 1),
        _LAYOUT,
        *pointers,
        channels,
        height,
        width,
        *source.stride(),
        *target.stride(),
        device=source.device,
    )


def _fake_sample(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    n, c, height, width = images.shape
    return _empty(images, [n, c, 2 * (height + 2 * _MARGIN), 2 * (width + 2 * _MARGIN)])


def _fake_transposed(samples: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    n, c, height, width = samples.shape
    return _empty(samples, [n, c, height // 2 - 2 * _MARGIN, width // 2 - 2 * _MARGIN])


def _empty(like: torch.Tensor, shape: list[int]) -> torch.Tensor:
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=cuda_kernels.layout(like))


def _setup(ctx: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    _, inverse, lowpass = inputs
    ctx.save_for_backward(inverse, lowpass)


def _sample_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return sample_transposed(dy, *ctx.saved_tensors), None, None


def _transposed_backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    return sample(dy, *ctx.saved_tensors), None, None


sample = cuda_kernels.define(
    "warp_sample(Tensor images, Tensor inverse, Tensor lowpass) -> Tensor",
    _sample,
    _fake_sample,
    _setup,
    _sample_backward,
)
"""images `[N, C, H, W]`, inverse float32 `[N, 3, 3]`, lowpass float32 `[TAPS]` -> `[N, C, 2 (H + 6), 2 (W + 6)]`."""
sample_transposed = cuda_kernels.define(
    "warp_sample_transposed(Tensor samples, Tensor inverse, Tensor lowpass) -> Tensor",
    _transposed,
    _fake_transposed,
    _setup,
    _transposed_backward,
)
"""samples `[N, C, 2 (H + 6), 2 (W + 6)]` -> `[N, C, H, W]`."""
