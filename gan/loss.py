"""The losses of the four training phases: tensors in, a loss and named statistics out.

Nothing here knows of ranks, files, flags or loggers. Statistics are detached tensors whose elements are observations.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from gan.networks import Discriminator, Generator
from torch_utils import draws

Augment = Callable[[torch.Tensor], torch.Tensor]
Statistics = dict[str, torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Latents:
    """What the images of one batch are made from. N samples."""

    z: torch.Tensor
    """`[N, z_dim]`"""
    c: torch.Tensor
    """`[N, c_dim]` labels"""
    z_mix: torch.Tensor | None = None
    """`[N, z_dim]` for style mixing"""
    cutoff: torch.Tensor | None = None
    """`[N]` ws from this index on come from z_mix"""

    @staticmethod
    def draw(n: int, z_dim: int, num_ws: int, labels: torch.Tensor, mixing_prob: float) -> Latents:
        """Draw latents, with labels taken at random from `labels` `[images, c_dim]`.

        Style mixing (arXiv 1812.04948, section 3.1): with `mixing_prob` a sample's ws come from two latents, switching
        at an index uniform in [1, num_ws).
        """
        device = labels.device
        z = torch.randn([n, z_dim], device=device)
        c = labels[torch.randint(len(labels), [n], device=device)]
        if mixing_prob <= 0:
            return Latents(z, c)
        cutoff = torch.randint(1, num_ws, [n], device=device)
        mixed = torch.rand([n], device=device) < mixing_prob
        return Latents(z, c, torch.randn_like(z), torch.where(mixed, cutoff, num_ws))

    def every(self, start: int, step: int) -> Latents:
        """Samples start, start + step, ...: this deal keeps minibatch-stddev groups together."""
        parts = (self.z, self.c, self.z_mix, self.cutoff)
        return Latents(*(None if part is None else part[start::step] for part in parts))  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class PhaseOutput:
    """What one phase says about one (micro-)batch."""

    loss: torch.Tensor
    """`[]` to differentiate"""
    stats: Statistics
    """detached"""
    w_mean: torch.Tensor | None = None
    """`[w_dim]` mean of the mapped main latents, for w_avg"""
    pl_mean: torch.Tensor | None = None
    """`[]` the path-length mean moved on"""


def mapped(G: Generator, latents: Latents) -> tuple[torch.Tensor, torch.Tensor]:
    """ws `[N, num_ws, w_dim]` with style mixing applied, and the mean `[w_dim]` of the main latents' w."""
    ws = G.mapping(latents.z, latents.c, skip_w_avg_update=True)
    w_mean = ws[:, 0].detach().mean(dim=0)
    if latents.z_mix is not None and latents.cutoff is not None:
        other = G.mapping(latents.z_mix, latents.c, skip_w_avg_update=True)
        from_main = torch.arange(G.num_ws, device=ws.device) < latents.cutoff[:, None]  # [N, L]
        ws = torch.where(from_main[:, :, None], ws, other)
    return ws, w_mean


def generator_main(G: Generator, D: Discriminator, augment: Augment, latents: Latents) -> PhaseOutput:
    """Non-saturating loss of G: softplus(-D(G(z))) (arXiv 1406.2661)."""
    ws, w_mean = mapped(G, latents)
    logits = D(augment(G.synthesis(ws)), latents.c)
    loss = F.softplus(-logits)
    return PhaseOutput(loss.mean(), {**_scores("fake", logits), "Loss/G/loss": loss.detach()}, w_mean)


def path_length(
    G: Generator,
    latents: Latents,
    pl_mean: torch.Tensor,
    pl_weight: float,
    pl_decay: float = 0.01,
    noise: torch.Tensor | None = None,
) -> PhaseOutput:
    """Path length regularisation of G (arXiv 1912.04958, section 3.2, eq. 4).

    Args:
        pl_mean: `[]` running mean of the path lengths.
        noise: `[N, C, H, W]` standard normal, drawn here if None.
    """
    ws, w_mean = mapped(G, latents)
    img = G.synthesis(ws)
    # Not randn_like: it fills memory in the order of the layout, and layouts differ between devices.
    y = draws.randn(img.shape, img.device, img.dtype) if noise is None else noise
    y = y / math.sqrt(img.shape[2] * img.shape[3])
    (gradient,) = torch.autograd.grad((img * y).sum(), ws, create_graph=True)  # [N, L, D]
    lengths = gradient.square().sum(dim=2).mean(dim=1).sqrt()  # [N]
    new_mean = pl_mean.lerp(lengths.mean(), pl_decay)
    penalty = (lengths - new_mean).square()
    stats = {"Loss/pl_penalty": penalty.detach(), "Loss/G/reg": penalty.detach() * pl_weight}
    return PhaseOutput(penalty.mean() * pl_weight, stats, w_mean, new_mean.detach())


def discriminator_main(
    G: Generator, D: Discriminator, augment: Augment, latents: Latents, real: torch.Tensor, real_c: torch.Tensor
) -> PhaseOutput:
    """Logistic loss of D: softplus(D(G(z))) + softplus(-D(real)), fakes and reals judged in one pass."""
    with torch.no_grad():
        ws, w_mean = mapped(G, latents)
        fake = G.synthesis(ws)
    images = augment(torch.cat([fake, real]))
    logits = D(images, torch.cat([latents.c, real_c]), num_batches=2)
    fake_logits, real_logits = logits.chunk(2)
    loss = F.softplus(fake_logits) + F.softplus(-real_logits)
    stats = {**_scores("fake", fake_logits), **_scores("real", real_logits), "Loss/D/loss": loss.detach()}
    stats |= {**_distances("fake", fake), **_distances("real", real)}
    return PhaseOutput(loss.mean(), stats, w_mean)


def r1(D: Discriminator, augment: Augment, real: torch.Tensor, real_c: torch.Tensor, gamma: float) -> PhaseOutput:
    """R1 regularisation of D: gamma / 2 * |dD(real) / dreal|^2 (arXiv 1801.04406, eq. 9)."""
    real = real.detach().requires_grad_()
    logits = D(augment(real), real_c)
    (gradient,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    penalty = gradient.square().sum(dim=[1, 2, 3])  # [N]
    loss = penalty * (gamma / 2)
    stats = {**_scores("real", logits), "Loss/r1_penalty": penalty.detach(), "Loss/D/reg": loss.detach()}
    return PhaseOutput(loss.mean(), stats)


def _scores(kind: str, logits: torch.Tensor) -> Statistics:
    logits = logits.detach()
    return {f"Loss/scores/{kind}": logits, f"Loss/signs/{kind}": logits.sign()}


@torch.no_grad()
def _distances(kind: str, images: torch.Tensor) -> Statistics:
    """How far each image is from the next of the batch, `[N]`: falls when the images grow alike.

    The root mean square difference of the images `[N, C, H, W]` shrunk to 16 pixels at the shorter side, in their units
    (-1 to 1).
    """
    if len(images) == 1:
        return {}
    small = F.avg_pool2d(images.float(), max(min(images.shape[2:]) // 16, 1)).flatten(1)
    difference = small - small.roll(1, dims=0)
    return {f"Health/distance/{kind}": difference.square().mean(dim=1).sqrt()}
