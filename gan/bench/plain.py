"""A training step written the way the literature describes it: the peer that ours is measured against.

One formula, one operation: float32 in PyTorch's default layout, demodulation out of per-sample weights, FIR filters as
depthwise convolutions that autograd differentiates, the augmentation padded by what its matrices need, fakes and reals
judged one after the other, loops over parameters. It runs on the very parameters of `gan.networks` and gives the same
gradients (tests/bench/test_plain.py), so only the way of computing differs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from gan import schedule
from gan.augment import AugmentPipe, Draws, apply_colour, cutout_mask
from gan.config import TrainConfig
from gan.data.labels import LabelTable
from gan.loss import Latents, Statistics
from gan.networks import Discriminator, Generator, MappingNetwork
from gan.training.state import TrainingState
from gan.training.timing import PhaseTimer
from torch_utils.ops.grid_sample import grid_sample
from torch_utils.ops.warp import reflected


def fir(
    x: torch.Tensor, f: torch.Tensor, up: int = 1, down: int = 1, pad: tuple[int, ...] = (0, 0, 0, 0), gain: float = 1
) -> torch.Tensor:
    """Zero insertion, padding (x0, x1, y0, y1), convolution with `f` `[h, w]`, decimation."""
    n, c, h, w = x.shape
    if up > 1:
        x = F.pad(x.reshape(n, c, h, 1, w, 1), [0, up - 1, 0, 0, 0, up - 1]).reshape(n, c, h * up, w * up)
    x = F.pad(x, list(pad))
    return F.conv2d(x, (f.flip([0, 1]) * gain).to(x.dtype).repeat(c, 1, 1, 1), groups=c, stride=down)


def activate(
    x: torch.Tensor, bias: torch.Tensor | None, act: str, gain: float, clamp: float | None = None
) -> torch.Tensor:
    """Bias, nonlinearity, gain, clamp: an operation each."""
    if bias is not None:
        x = x + bias.reshape([1, -1] + [1] * (x.ndim - 2))
    if act == "lrelu":
        x = F.leaky_relu(x, 0.2)
    if gain != 1:
        x = x * gain
    return x if clamp is None else x.clamp(-clamp, clamp)


def dense(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """A fully connected layer with equalised learning rate."""
    x = x @ (layer.weight * layer.weight_gain).t()
    gain = 1 if layer.activation == "linear" else math.sqrt(2)
    return activate(x, layer.bias * layer.bias_gain, layer.activation, gain)


def resampled_conv(x: torch.Tensor, w: torch.Tensor, f: torch.Tensor, up: int = 1, down: int = 1) -> torch.Tensor:
    """A 1x1 or 3x3 convolution, transposed and blurred for up = 2, blurred and strided for down = 2."""
    k = w.shape[2]
    if up == 2 and k == 1:
        return fir(F.conv2d(x, w), f, up=2, pad=(2, 1, 2, 1), gain=4)
    if up == 2:
        return fir(F.conv_transpose2d(x, w.transpose(0, 1), stride=2), f, pad=(1, 1, 1, 1), gain=4)
    if down == 2 and k == 1:
        return F.conv2d(fir(x, f, down=2, pad=(1, 1, 1, 1)), w)
    if down == 2:
        return F.conv2d(fir(x, f, pad=(2, 2, 2, 2)), w, stride=2)
    return F.conv2d(x, w, padding=k // 2)


def modulated_conv(layer: Any, x: torch.Tensor, styles: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    """Modulate, convolve, demodulate, add noise (arXiv 1912.04958, eq. 1 and 3)."""
    w = layer.weight[None] * styles[:, None, :, None, None]  # [N, O, I, k, k]
    d = (w.square().sum(dim=[2, 3, 4]) + 1e-8).rsqrt()  # [N, O]
    x = x * styles[:, :, None, None]
    x = resampled_conv(x, layer.weight, layer.resample_filter, up=layer.up)
    x = x * d[:, :, None, None]
    return x if noise is None else x + noise


def synthesis_layer(layer: Any, x: torch.Tensor, w: torch.Tensor, noise_mode: str, gain: float = 1) -> torch.Tensor:
    noise = None
    if layer.use_noise and noise_mode == "random":
        noise = torch.randn([len(x), 1, *layer.noise_const.shape], device=x.device) * layer.noise_strength
    elif layer.use_noise and noise_mode == "const":
        noise = layer.noise_const * layer.noise_strength
    x = modulated_conv(layer, x, dense(layer.affine, w), noise)
    clamp = None if layer.conv_clamp is None else layer.conv_clamp * gain
    return activate(x, layer.bias, layer.activation, layer.act_gain * gain, clamp)


def to_rgb(layer: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    styles = dense(layer.affine, w) * layer.weight_gain
    y = F.conv2d(x * styles[:, :, None, None], layer.weight)
    return activate(y, layer.bias, "linear", 1, layer.conv_clamp)


def mapping(network: MappingNetwork, z: torch.Tensor | None, c: torch.Tensor | None) -> torch.Tensor:
    """z `[N, z_dim]`, c `[N, c_dim]` -> w `[N, w_dim]`, not broadcast."""
    dtype = network.fc0.weight.dtype
    parts = [] if z is None else [z.to(dtype)]
    if network.c_dim > 0 and c is not None:
        parts.append(dense(network.embed, c.to(dtype)))
    x = torch.cat([p * (p.square().mean(dim=1, keepdim=True) + 1e-8).rsqrt() for p in parts], dim=1)
    for i in range(network.num_layers):
        x = dense(getattr(network, f"fc{i}"), x)
    return x


def synthesis(G: Generator, ws: torch.Tensor, noise_mode: str = "random") -> torch.Tensor:
    """ws `[N, num_ws, w_dim]` -> images `[N, C, H, W]`; skip architecture only."""
    x: Any = None
    img: torch.Tensor | None = None
    first = 0
    for res in G.synthesis.block_resolutions:
        block = getattr(G.synthesis, f"b{res}")
        w = iter(ws[:, first : first + block.num_conv + 1].unbind(dim=1))
        if block.in_channels == 0:
            x = block.const[None].repeat(len(ws), 1, 1, 1)
        else:
            x = synthesis_layer(block.conv0, x, next(w), noise_mode)
        x = synthesis_layer(block.conv1, x, next(w), noise_mode)
        if img is not None:
            img = fir(img, block.resample_filter, up=2, pad=(2, 1, 2, 1), gain=4)
        rgb = to_rgb(block.torgb, x, next(w))
        img = rgb if img is None else img + rgb
        first += block.num_conv
    assert img is not None
    return img


def conv_layer(layer: Any, x: torch.Tensor, gain: float = 1) -> torch.Tensor:
    x = resampled_conv(x, layer.weight * layer.weight_gain, layer.resample_filter, layer.up, layer.down)
    clamp = None if layer.conv_clamp is None else layer.conv_clamp * gain
    return activate(x, layer.bias, layer.activation, layer.act_gain * gain, clamp)


def discriminate(D: Discriminator, img: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Images `[N, C, H, W]` -> logits `[N, 1]`; resnet and orig architectures."""
    x: torch.Tensor | None = None
    for res in D.block_resolutions:
        block = getattr(D, f"b{res}")
        x = conv_layer(block.fromrgb, img) if x is None else x
        if block.architecture == "resnet":
            y = conv_layer(block.skip, x, gain=math.sqrt(0.5))
            x = y + conv_layer(block.conv1, conv_layer(block.conv0, x), gain=math.sqrt(0.5))
        else:
            x = conv_layer(block.conv1, conv_layer(block.conv0, x))
    assert x is not None
    last = D.b4
    if last.mbstd is not None:
        n, channels, h, w = x.shape
        group = min(last.mbstd.group_size or n, n)
        y = x.reshape(group, -1, last.mbstd.num_channels, channels // last.mbstd.num_channels, h, w)
        y = ((y - y.mean(dim=0)).square().mean(dim=0) + 1e-8).sqrt().mean(dim=[2, 3, 4])  # [n / group, features]
        x = torch.cat([x, y.reshape(-1, last.mbstd.num_channels, 1, 1).repeat(group, 1, h, w)], dim=1)
    logits = dense(last.out, dense(last.fc, conv_layer(last.conv, x).flatten(1)))
    if D.c_dim > 0:
        logits = (logits * mapping(D.mapping, None, c)).sum(dim=1, keepdim=True) / math.sqrt(last.cmap_dim)
    return logits


class EachDraw(Draws):
    """A random number generator call for every quantity."""

    def uniform(self) -> torch.Tensor:
        return torch.rand([self.n], device=self.device)

    def normal(self) -> torch.Tensor:
        return torch.randn([self.n], device=self.device)

    def abs_normal(self) -> torch.Tensor:
        return self.normal().abs()


def warp(images: torch.Tensor, inverse: torch.Tensor, lowpass: torch.Tensor) -> torch.Tensor:
    """Pad by reflection as far as the matrices `[N, 3, 3]` reach, upsample by 2, look up, downsample by 2."""
    n, c, height, width = images.shape
    taps = lowpass.shape[0]
    size = torch.tensor([width, height], dtype=images.dtype, device=images.device)
    corners = torch.tensor([[-1, -1], [1, -1], [1, 1], [-1, 1]], dtype=images.dtype, device=images.device)
    reach = (corners * (size - 1) / 2) @ inverse[:, :2, :2].transpose(1, 2) + inverse[:, None, :2, 2]  # [N, 4, 2]
    margin = taps // 4
    low = (-reach.amin(dim=(0, 1)) + margin * 2 - (size - 1) / 2).clamp(min=0).ceil()
    high = (reach.amax(dim=(0, 1)) + margin * 2 - (size - 1) / 2).clamp(min=0).ceil()
    x0, y0, x1, y1 = (int(v) for v in torch.cat([low, high]))  # a read from the device
    if max(x0, x1) < width and max(y0, y1) < height:
        images = F.pad(images, [x0, x1, y0, y1], mode="reflect")
    else:  # further than one reflection reaches
        columns, rows = (
            torch.arange(-a, s + b, device=images.device) for a, b, s in ((x0, x1, width), (y0, y1, height))
        )
        images = images.index_select(3, reflected(columns, width)).index_select(2, reflected(rows, height))
    shift = torch.tensor([(x0 - x1) / 2, (y0 - y1) / 2], dtype=images.dtype, device=images.device)

    row, column = lowpass[None, :], lowpass[:, None]
    pad0, pad1 = (taps + 1) // 2, (taps - 2) // 2
    n, c, h, w = images.shape
    x = F.pad(images.reshape(n, c, h, 1, w, 1), [0, 1, 0, 0, 0, 1]).reshape(n, c, h * 2, w * 2)
    x = fir(fir(x, row, pad=(pad0, pad1, 0, 0), gain=2), column, pad=(0, 0, pad0, pad1), gain=2)

    out_h, out_w = (height + margin * 2) * 2, (width + margin * 2) * 2
    ys = (torch.arange(out_h, dtype=x.dtype, device=x.device) + 0.5) / 2 - margin - height / 2
    xs = (torch.arange(out_w, dtype=x.dtype, device=x.device) + 0.5) / 2 - margin - width / 2
    # The filter leans a quarter of a pixel to the left, both on the way up and on the way down.
    points = torch.stack([*torch.meshgrid(xs + 0.25, ys + 0.25, indexing="xy"), torch.ones_like(xs + ys[:, None])], -1)
    where = points.reshape(-1, 3) @ inverse[:, :2].transpose(1, 2) - 0.25 + shift  # [N, H' * W', 2] pixels
    grid = where / torch.tensor([w / 2, h / 2], dtype=x.dtype, device=x.device)
    x = grid_sample(x, grid.reshape(n, out_h, out_w, 2))
    crop0, crop1 = (taps - 1) // 2 - margin * 2, (taps - 2) // 2 - margin * 2
    x = _correlate_down(_correlate_down(x, row, crop0, crop1).transpose(2, 3), row, crop0, crop1).transpose(2, 3)
    return x


def _correlate_down(x: torch.Tensor, row: torch.Tensor, crop0: int, crop1: int) -> torch.Tensor:
    """Filter along x with `row` `[1, taps]` unflipped, keep every second column."""
    x = F.pad(x, [crop0, crop1, 0, 0])
    return F.conv2d(x, row.to(x.dtype).repeat(x.shape[1], 1, 1, 1), groups=x.shape[1])[:, :, :, ::2]


def augment(pipe: AugmentPipe, images: torch.Tensor, draws: type[Draws] = EachDraw) -> torch.Tensor:
    """The transforms of `pipe` at its probability."""
    n, c, height, width = images.shape
    draw = draws(n, pipe.p, images.device, None)
    if any((pipe.xflip, pipe.rotate90, pipe.xint, pipe.scale, pipe.rotate, pipe.aniso, pipe.xfrac)):
        images = warp(images, pipe._inverse_geometry(draw, width, height).to(images.dtype), pipe.Hz_geom)
    if any((pipe.brightness, pipe.contrast, pipe.lumaflip, pipe.hue, pipe.saturation)):
        images = apply_colour(images, pipe._colour_matrix(draw, c).to(images.dtype))
    if pipe.imgfilter:
        taps = (pipe._band_gains(draw).to(images.dtype) @ pipe.Hz_fbank).repeat_interleave(c, dim=0)[:, None]
        half = taps.shape[2] // 2
        columns = reflected(torch.arange(-half, width + half, device=images.device), width)
        rows = reflected(torch.arange(-half, height + half, device=images.device), height)
        x = images[:, :, rows][:, :, :, columns].reshape(1, n * c, height + 2 * half, width + 2 * half)
        x = F.conv2d(F.conv2d(x, taps[:, :, None], groups=n * c), taps[:, :, :, None], groups=n * c)
        images = x.reshape(n, c, height, width)
    if pipe.noise:
        sigma = draw.gated(pipe.noise, draw.abs_normal() * pipe.noise_std, 0)
        images = images + torch.randn_like(images) * sigma[:, None, None, None]
    if pipe.cutout:
        size = draw.gated(pipe.cutout, draw.uniform() * 0 + pipe.cutout_size, 0)
        images = images * cutout_mask(draw.uniform(), draw.uniform(), size, width, height)
    return images


class PlainStep:
    """Trains like `gan.training.step.TrainStep`, the plain way."""

    def __init__(self, state: TrainingState, config: TrainConfig, labels: LabelTable) -> None:
        self.state, self.config, self.labels = state, config, labels
        self.timer = PhaseTimer(state.device)
        self._draws: type[Draws] = EachDraw
        self._optimizers = {}
        for name, ours in (("G", state.G_opt), ("D", state.D_opt)):
            network, group = getattr(state, name), ours.param_groups[0]
            network.zero_grad(set_to_none=True)
            network.to(memory_format=torch.contiguous_format)  # the state has them in the layout of our convolutions
            options = {"lr": group["lr"], "betas": group["betas"], "eps": group["eps"]}
            self._optimizers[name] = torch.optim.Adam(network.parameters(), **options)

    def __call__(self, images: torch.Tensor, indices: torch.Tensor) -> None:
        """Images uint8 `[batch, C, H, W]` and their places in the dataset `[batch]`, on the device."""
        progress, config = self.state.progress, self.config
        index = progress.nimg // config.batch_size
        torch.manual_seed(schedule.step_seed(config.seed, progress.nimg))
        real, real_c = images.to(torch.float32) / 127.5 - 1, self.labels.take(indices)
        for name, interval in config.phase_intervals().items():
            if index % interval == 0:
                with self.timer(name):
                    self._train(name, interval, real, real_c)
        progress.nimg += config.batch_size
        self._average(config)
        if (index + 1) % config.augment.ada_interval == 0:
            self._adjust_p(config)

    def _train(self, name: str, interval: int, real: torch.Tensor, real_c: torch.Tensor) -> None:
        network, optimizer = getattr(self.state, name[0]), self._optimizers[name[0]]
        optimizer.zero_grad(set_to_none=True)
        network.requires_grad_(True)
        rounds = len(real) // self.config.batch_gpu
        for x, c in zip(real.split(self.config.batch_gpu), real_c.split(self.config.batch_gpu), strict=True):
            stats = self._accumulate(name, interval / rounds, x, c)
            for key, values in stats.items():
                self.state.stats.report(key, values)
        network.requires_grad_(False)
        for parameter in network.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
        optimizer.step()

    def _accumulate(self, name: str, gain: float, real: torch.Tensor, real_c: torch.Tensor) -> Statistics:
        """Add the gradients of one micro-batch."""
        state, weights = self.state, self.config.loss
        n = len(real)
        if name == "Greg":
            n = max(n // weights.pl_batch_shrink, 1)
        latents = Latents.draw(n, state.G.z_dim, state.G.num_ws, self.labels.draw(n), weights.style_mixing_prob)
        if name == "Gmain":
            logits = self._judge(synthesis(state.G, self._mapped(latents)), latents.c)
            loss = F.softplus(-logits)
            (loss.mean() * gain).backward()
            return _scores("fake", logits) | {"Loss/G/loss": loss.detach()}
        if name == "Greg":
            ws = self._mapped(latents)
            img = synthesis(state.G, ws)
            noise = torch.randn(img.shape, dtype=img.dtype, device=img.device) / math.sqrt(img.shape[2] * img.shape[3])
            (gradient,) = torch.autograd.grad((img * noise).sum(), ws, create_graph=True)
            lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()
            mean = state.pl_mean.lerp(lengths.mean(), weights.pl_decay)
            state.pl_mean.copy_(mean.detach())
            penalty = (lengths - mean).square()
            (penalty.mean() * weights.pl_weight * gain).backward()
            return {"Loss/pl_penalty": penalty.detach(), "Loss/G/reg": penalty.detach() * weights.pl_weight}
        if name == "Dmain":
            with torch.no_grad():
                fake = synthesis(state.G, self._mapped(latents))
            logits = self._judge(fake, latents.c)
            fake_loss = F.softplus(logits)
            (fake_loss.mean() * gain).backward()
            stats = _scores("fake", logits)
            logits = self._judge(real, real_c)
            real_loss = F.softplus(-logits)
            (real_loss.mean() * gain).backward()
            self._remember_signs(logits)
            return stats | _scores("real", logits) | {"Loss/D/loss": (fake_loss + real_loss).detach()}
        real = real.detach().requires_grad_()
        logits = self._judge(real, real_c)
        (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        penalty = gradient.square().sum(dim=[1, 2, 3])
        loss = penalty * (weights.r1_gamma / 2)
        (loss.mean() * gain).backward()
        self._remember_signs(logits)
        return _scores("real", logits) | {"Loss/r1_penalty": penalty.detach(), "Loss/D/reg": loss.detach()}

    def _mapped(self, latents: Latents) -> torch.Tensor:
        network = self.state.G.mapping
        w = mapping(network, latents.z, latents.c)
        network.w_avg.copy_(w.detach().mean(dim=0).lerp(network.w_avg, network.w_avg_beta or 1))
        ws = w[:, None].repeat(1, self.state.G.num_ws, 1)
        if latents.z_mix is None or latents.cutoff is None:
            return ws
        other = mapping(network, latents.z_mix, latents.c)[:, None].repeat(1, self.state.G.num_ws, 1)
        keep = torch.arange(self.state.G.num_ws, device=ws.device) < latents.cutoff[:, None]
        return torch.where(keep[:, :, None], ws, other)

    def _judge(self, images: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        if self.state.augment is not None:
            images = augment(self.state.augment, images, self._draws)
        return discriminate(self.state.D, images, c)

    def _remember_signs(self, logits: torch.Tensor) -> None:
        signs = logits.detach().sign()
        self.state.ada_signs += torch.stack([signs.sum(), torch.ones_like(signs).sum()])

    @torch.no_grad()
    def _average(self, config: TrainConfig) -> None:
        state, optim = self.state, config.optim
        beta = schedule.ema_beta(config.batch_size, optim.ema_kimg, state.progress.nimg, optim.ema_rampup)
        for average, parameter in zip(state.G_ema.parameters(), state.G.parameters(), strict=True):
            average.copy_(parameter.lerp(average, beta))
        for copied, buffer in zip(state.G_ema.buffers(), state.G.buffers(), strict=True):
            copied.copy_(buffer)

    def _adjust_p(self, config: TrainConfig) -> None:
        state, options = self.state, config.augment
        if state.augment is None or options.target is None:
            return
        total, count = state.ada_signs.tolist()  # a read from the device
        move = schedule.ada_step(config.batch_size, options.ada_interval, options.ada_kimg)
        move *= float(torch.sign(torch.tensor(total / count - options.target))) if count else 0
        state.augment.p.copy_((state.augment.p + move).clamp(0, options.p_max))
        state.ada_signs.zero_()


def _scores(kind: str, logits: torch.Tensor) -> Statistics:
    logits = logits.detach()
    return {f"Loss/scores/{kind}": logits, f"Loss/signs/{kind}": logits.sign()}
