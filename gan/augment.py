"""Adaptive discriminator augmentation: the 18 transforms of StyleGAN2-ADA (arXiv 2006.06676, appendix B).

All shapes are static and nothing is read back from the device, whatever p is: the transforms of all images are drawn
at once, the geometric ones become one matrix per image and one warp, the colour ones one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from torch_utils import draws
from torch_utils.ops import upfirdn2d
from torch_utils.ops.warp import warp

# Decomposition low-pass filters of two symlets (Daubechies, Ten Lectures on Wavelets, table 8.1).
_SYM2 = (-0.12940952255092145, 0.22414386804185735, 0.836516303737469, 0.48296291314469025)
_SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)


class AugmentPipe(torch.nn.Module):
    """Transforms images, each transform with probability `multiplier * p` per image. Differentiable to second order.

    Multipliers (0 is off, 1 is usual): xflip, rotate90, xint; scale, rotate, aniso, xfrac; brightness, contrast,
    lumaflip, hue, saturation; imgfilter; noise, cutout. The other arguments are the strengths of those transforms.
    The buffer `p` is the overall probability; the ADA controller moves it.
    """

    p: torch.Tensor
    Hz_geom: torch.Tensor
    Hz_fbank: torch.Tensor

    def __init__(
        self,
        xflip: float = 0,
        rotate90: float = 0,
        xint: float = 0,
        xint_max: float = 0.125,
        scale: float = 0,
        rotate: float = 0,
        aniso: float = 0,
        xfrac: float = 0,
        scale_std: float = 0.2,
        rotate_max: float = 1,
        aniso_std: float = 0.2,
        xfrac_std: float = 0.125,
        brightness: float = 0,
        contrast: float = 0,
        lumaflip: float = 0,
        hue: float = 0,
        saturation: float = 0,
        brightness_std: float = 0.2,
        contrast_std: float = 0.5,
        hue_max: float = 1,
        saturation_std: float = 1,
        imgfilter: float = 0,
        imgfilter_bands: Sequence[float] = (1, 1, 1, 1),
        imgfilter_std: float = 1,
        noise: float = 0,
        cutout: float = 0,
        noise_std: float = 0.1,
        cutout_size: float = 0.5,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name not in ("self", "__class__")}
        super().__init__()
        self._init_args, self._init_kwargs = (), arguments
        self.register_buffer("p", torch.ones([]))
        self.xflip, self.rotate90, self.xint, self.xint_max = xflip, rotate90, xint, xint_max
        self.scale, self.rotate, self.aniso, self.xfrac = scale, rotate, aniso, xfrac
        self.scale_std, self.rotate_max, self.aniso_std, self.xfrac_std = scale_std, rotate_max, aniso_std, xfrac_std
        self.brightness, self.contrast, self.lumaflip = brightness, contrast, lumaflip
        self.hue, self.saturation = hue, saturation
        self.brightness_std, self.contrast_std = brightness_std, contrast_std
        self.hue_max, self.saturation_std = hue_max, saturation_std
        self.imgfilter, self.imgfilter_bands, self.imgfilter_std = imgfilter, list(imgfilter_bands), imgfilter_std
        self.noise, self.cutout, self.noise_std, self.cutout_size = noise, cutout, noise_std, cutout_size
        self.register_buffer("Hz_geom", upfirdn2d.setup_filter(_SYM6))
        self.register_buffer("Hz_fbank", torch.as_tensor(wavelet_bank(), dtype=torch.float32))

    def forward(self, images: torch.Tensor, debug_percentile: float | None = None) -> torch.Tensor:
        """Augment `[N, C, H, W]` float32 images in [-1, 1], all channels alike but for colours: see `apply_colour`.

        Args:
            debug_percentile: apply every transform, at this percentile of its distribution, instead of drawing.
        """
        n, _, height, width = images.shape
        draw = Draws(n, self.p, images.device, debug_percentile)
        if any((self.xflip, self.rotate90, self.xint, self.scale, self.rotate, self.aniso, self.xfrac)):
            images = warp(images, self._inverse_geometry(draw, width, height).to(images.dtype), self.Hz_geom)
        if any((self.brightness, self.contrast, self.lumaflip, self.hue, self.saturation)):
            images = apply_colour(images, self._colour_matrix(draw, images.shape[1]).to(images.dtype))
        if self.imgfilter:
            images = filter_reflected(
                images, (self._band_gains(draw).to(self.Hz_fbank.dtype) @ self.Hz_fbank).to(images.dtype)
            )
        if self.noise:
            sigma = draw.gated(self.noise, draw.abs_normal() * self.noise_std, 0)
            images = images + draws.randn(images.shape, images.device, images.dtype) * sigma[:, None, None, None]
        if self.cutout:
            size = draw.gated(self.cutout, draw.uniform() * 0 + self.cutout_size, 0)
            images = images * cutout_mask(draw.uniform(), draw.uniform(), size, width, height)
        return images

    def _inverse_geometry(self, draw: Draws, width: int, height: int) -> torch.Tensor:
        """Matrices `[N, 3, 3]` from output to input positions, in pixels from the centre of the image.

        With the image transformed by T1, then T2, ..., the inverse is inv(T1) @ inv(T2) @ ...
        """
        inverse = torch.eye(3, device=draw.device).expand(draw.n, 3, 3)
        if self.xflip:
            mirrored = draw.gated(self.xflip, (draw.uniform() * 2).floor(), 0)
            inverse = product(inverse, scale2d(1 - 2 * mirrored, torch.ones_like(mirrored)))
        if self.rotate90:
            quarter_turns = draw.gated(self.rotate90, (draw.uniform() * 4).floor(), 0)
            inverse = product(inverse, rotate2d(quarter_turns * (math.pi / 2)))
        if self.xint:
            closed = draw.closed(self.xint)  # one gate for both axes
            tx = draw.choose(closed, (draw.uniform() * 2 - 1) * self.xint_max, 0)
            ty = draw.choose(closed, (draw.uniform() * 2 - 1) * self.xint_max, 0)
            inverse = product(inverse, translate2d(-(tx * width).round(), -(ty * height).round()))
        if self.scale:
            s = draw.gated(self.scale, (draw.normal() * self.scale_std).exp2(), 1)
            shrunk = s.reciprocal()
            inverse = product(inverse, scale2d(shrunk, shrunk))
        if self.rotate:
            either = 1 - (1 - self.rotate * self.p).clamp(0, 1).sqrt()
            inverse = product(inverse, rotate2d(self._angle(draw, either)))
        if self.aniso:
            s = draw.gated(self.aniso, (draw.normal() * self.aniso_std).exp2(), 1)
            inverse = product(inverse, scale2d(s.reciprocal(), s))
        if self.rotate and not draw.deterministic:
            inverse = product(inverse, rotate2d(self._angle(draw, either)))
        if self.xfrac:
            closed = draw.closed(self.xfrac)
            tx = draw.choose(closed, draw.normal() * self.xfrac_std, 0)
            ty = draw.choose(closed, draw.normal() * self.xfrac_std, 0)
            inverse = product(inverse, translate2d(-tx * width, -ty * height))
        return inverse

    def _angle(self, draw: Draws, probability: torch.Tensor) -> torch.Tensor:
        """One of the two rotations `[N]`, each so probable that either happens with probability rotate * p."""
        closed = draw.closed_but_for(probability)
        return draw.choose(closed, (draw.uniform() * 2 - 1) * (math.pi * self.rotate_max), 0)

    def _colour_matrix(self, draw: Draws, channels: int) -> torch.Tensor:
        """Matrices `[N, 4, 4]` on homogeneous colours."""
        eye = torch.eye(4, device=draw.device)
        luma = torch.zeros([4, 4], device=draw.device)  # projection onto the luma axis (1, 1, 1) / sqrt(3)
        luma[:3, :3] = 1 / 3
        matrix = eye.expand(draw.n, 4, 4)
        if self.brightness:
            b = draw.gated(self.brightness, draw.normal() * self.brightness_std, 0)
            matrix = product(translate3d(b), matrix)
        if self.contrast:
            c = draw.gated(self.contrast, (draw.normal() * self.contrast_std).exp2(), 1)
            matrix = product(scale3d(c), matrix)
        if self.lumaflip:
            flipped = draw.gated(self.lumaflip, (draw.uniform() * 2).floor(), 0)
            matrix = product(eye - 2 * luma * flipped[:, None, None], matrix)  # Householder reflection
        if self.hue and channels > 1:
            theta = draw.gated(self.hue, (draw.uniform() * 2 - 1) * (math.pi * self.hue_max), 0)
            matrix = product(rotate_about_luma(theta), matrix)
        if self.saturation and channels > 1:
            s = draw.gated(self.saturation, (draw.normal() * self.saturation_std).exp2(), 1)
            matrix = product(luma + (eye - luma) * s[:, None, None], matrix)
        return matrix

    def _band_gains(self, draw: Draws) -> torch.Tensor:
        """Gains `[N, 4]` of the frequency bands; each draw amplifies one band and keeps the expected power."""
        power = torch.full([4], 1 / 13, device=draw.device)  # of natural images (1/f spectrum): (10, 1, 1, 1) / 13
        power[:1] = 10 / 13  # a slice: an element would be set by a copy from the host
        gains = torch.ones([draw.n, 4], device=draw.device)
        for band, strength in enumerate(self.imgfilter_bands):
            t = draw.gated(self.imgfilter * strength, (draw.normal() * self.imgfilter_std).exp2(), 1)
            bands = [t if i == band else torch.ones_like(t) for i in range(4)]
            row = torch.stack(bands, dim=1)
            gains = gains * row / (power * row.square()).sum(dim=1, keepdim=True).sqrt()
        return gains


class Draws:
    """The random numbers of one call, `[n]` each, drawn together and handed out one after the other."""

    _BATCH = 32  # more than all transforms together take of either kind

    def __init__(self, n: int, p: torch.Tensor, device: torch.device, percentile: float | None) -> None:
        self.n, self.p, self.device, self.percentile = n, p, device, percentile
        self.deterministic = percentile is not None
        if percentile is None:
            self._uniform = iter(draws.rand([self._BATCH, n], device, dim=1).unbind())
            self._normal = iter(draws.randn([self._BATCH, n], device, dim=1).unbind())

    def uniform(self) -> torch.Tensor:
        """Uniform in [0, 1)."""
        if self.percentile is None:
            return next(self._uniform)
        return torch.full([self.n], self.percentile, device=self.device)

    def normal(self) -> torch.Tensor:
        """Standard normal. (The deterministic value lacks a factor sqrt(2): a convention of the golden files.)"""
        if self.percentile is None:
            return next(self._normal)
        return torch.erfinv(torch.full([self.n], 2 * self.percentile - 1, device=self.device))

    def abs_normal(self) -> torch.Tensor:
        """Absolute value of a standard normal."""
        if self.percentile is None:
            return next(self._normal).abs()
        return torch.erfinv(torch.full([self.n], self.percentile, device=self.device))

    def closed(self, multiplier: float) -> torch.Tensor | None:
        """Which images stay as they are, `[n]` bool: each is transformed with probability multiplier * p. None: all."""
        return self.closed_but_for(self.p if multiplier == 1 else self.p * multiplier)

    def closed_but_for(self, probability: torch.Tensor) -> torch.Tensor | None:
        """Like `closed`, with the probability itself."""
        return None if self.deterministic else self.uniform() >= probability

    def choose(self, closed: torch.Tensor | None, value: torch.Tensor, neutral: float) -> torch.Tensor:
        """`value` where the gate is open, otherwise the neutral one; in place."""
        return value if closed is None else value.masked_fill_(closed, neutral)

    def gated(self, multiplier: float, value: torch.Tensor, neutral: float) -> torch.Tensor:
        """`choose` with a gate of its own."""
        return self.choose(self.closed(multiplier), value, neutral)


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Matrix product of `[N, k, k]`, in full precision even where TF32 is allowed: a position needs all its bits."""
    return (a[:, :, :, None] * b[:, None, :, :]).sum(dim=2)


def translate2d(tx: torch.Tensor, ty: torch.Tensor) -> torch.Tensor:
    """`[N]`, `[N]` -> `[N, 3, 3]`."""
    zero, one = _zero_and_one(tx)
    return _matrix([[one, zero, tx], [zero, one, ty], [zero, zero, one]])


def scale2d(sx: torch.Tensor, sy: torch.Tensor) -> torch.Tensor:
    """`[N]`, `[N]` -> `[N, 3, 3]`."""
    zero, one = _zero_and_one(sx)
    return _matrix([[sx, zero, zero], [zero, sy, zero], [zero, zero, one]])


def rotate2d(theta: torch.Tensor) -> torch.Tensor:
    """Radians `[N]` -> `[N, 3, 3]`."""
    (zero, one), cos, sin = _zero_and_one(theta), theta.cos(), theta.sin()
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def translate3d(t: torch.Tensor) -> torch.Tensor:
    """The same shift `[N]` of all three colours -> `[N, 4, 4]`."""
    zero, one = _zero_and_one(t)
    return _matrix([[one, zero, zero, t], [zero, one, zero, t], [zero, zero, one, t], [zero, zero, zero, one]])


def scale3d(s: torch.Tensor) -> torch.Tensor:
    """The same factor `[N]` for all three colours -> `[N, 4, 4]`."""
    zero, one = _zero_and_one(s)
    return _matrix([[s, zero, zero, zero], [zero, s, zero, zero], [zero, zero, s, zero], [zero, zero, zero, one]])


def rotate_about_luma(theta: torch.Tensor) -> torch.Tensor:
    """Rotation by radians `[N]` about the axis (1, 1, 1) of RGB space -> `[N, 4, 4]` (Rodrigues' formula)."""
    (zero, one), cos = _zero_and_one(theta), theta.cos()
    third, side = (1 - cos) / 3, theta.sin() / 3**0.5
    same, less, more = cos + third, third - side, third + side
    return _matrix(
        [[same, less, more, zero], [more, same, less, zero], [less, more, same, zero], [zero, zero, zero, one]]
    )


def _zero_and_one(like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both `[N]`, of one launch."""
    zero, one = torch.arange(2, dtype=like.dtype, device=like.device)
    return zero.expand_as(like), one.expand_as(like)


def _matrix(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([entry for row in rows for entry in row], dim=-1).unflatten(-1, (len(rows), -1))


def apply_colour(images: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply the colours of `[N, C, H, W]` by `[N, 4, 4]`.

    Grey images (C = 1) use the mean of the matrix's RGB rows; the alpha of RGBA images (C = 4) stays as it is.
    """
    n, channels, height, width = images.shape
    if channels == 4:
        return torch.cat([apply_colour(images[:, :3], matrix), images[:, 3:]], dim=1)
    if channels == 3:
        factor, offset = matrix[:, :3, :3], matrix[:, :3, 3:]
    elif channels == 1:
        mean_row = matrix[:, :3].mean(dim=1, keepdim=True)
        factor, offset = mean_row[:, :, :3].sum(dim=2, keepdim=True), mean_row[:, :, 3:]
    else:
        raise ValueError(f"colour transforms take images of 1, 3 or 4 channels, not {channels}")
    return torch.baddbmm(offset, factor, images.reshape(n, channels, height * width)).reshape(images.shape)


def filter_reflected(images: torch.Tensor, filters: torch.Tensor) -> torch.Tensor:
    """Filter each of `[N, C, H, W]` with its own separable symmetric filter `[N, taps]`, borders reflected.

    Written as two products with banded matrices: a depthwise convolution with per-image weights has no affordable
    second derivative.
    """
    height, width = images.shape[2:]
    rows = _filter_matrix(filters, height)  # [N, H, H]
    columns = rows if width == height else _filter_matrix(filters, width)  # [N, W, W]
    return rows[:, None] @ images @ columns[:, None].transpose(2, 3)


def _filter_matrix(filters: torch.Tensor, size: int) -> torch.Tensor:
    """`[N, taps]` -> `[N, size, size]`: entry (i, j) is what pixel j contributes to the filtered pixel i.

    The reflected picture repeats itself after 2 * (size - 1) pixels, of which j and -j are the same pixel. (What adds
    into a matrix at given indices, as scatter_add_ does, adds in any order on a GPU.)
    """
    taps, period = filters.shape[1], max(2 * (size - 1), 1)
    folded = F.pad(filters, [0, -taps % period]).unflatten(1, (-1, period)).sum(dim=1)  # taps for the same pixel
    steps = torch.arange(2 * size - 1, device=filters.device)
    itself = folded[:, (steps + (taps // 2 - size + 1)).remainder(period)]  # at (size - 1 - i) + j
    mirrored = folded[:, (taps // 2 - steps).remainder(period)]  # at i + j
    matrix = itself.unfold(1, size, 1).flip(1)
    matrix[:, :, 1:-1] += mirrored.unfold(1, size, 1)[:, :, 1:-1]  # the first and the last pixel are their own mirror
    return matrix


def cutout_mask(cx: torch.Tensor, cy: torch.Tensor, size: torch.Tensor, width: int, height: int) -> torch.Tensor:
    """0 inside a box of `size` (share of width and height) about (cx, cy), else 1: `[N]` -> `[N, 1, H, W]`."""
    x = (torch.arange(width, device=cx.device) + 0.5) / width
    y = (torch.arange(height, device=cx.device) + 0.5) / height
    outside_x = (x[None, :] - cx[:, None]).abs() >= size[:, None] / 2  # [N, W]
    outside_y = (y[None, :] - cy[:, None]).abs() >= size[:, None] / 2  # [N, H]
    return (outside_x[:, None, None, :] | outside_y[:, None, :, None]).to(cx.dtype)


def wavelet_bank() -> np.ndarray:
    """Four-band orthogonal filter bank of sym2, low to high: float64 `[4, 43]`, each row symmetric."""
    low = np.asarray(_SYM2)
    high = low * (-1.0) ** np.arange(low.size)
    low2, high2 = np.convolve(low, low[::-1]) / 2, np.convolve(high, high[::-1]) / 2
    bank = np.eye(4, 1)
    for row in range(1, 4):
        stuffed = np.zeros([4, bank.shape[1] * 2 - 1])
        stuffed[:, ::2] = bank
        bank = np.stack([np.convolve(band, low2) for band in stuffed])
        middle = (bank.shape[1] - high2.size) // 2
        bank[row, middle : middle + high2.size] += high2
    return bank
