"""Networks of a few thousand parameters, as they come out of a file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from gan.models import Snapshot
from gan.networks import Discriminator, Generator


def tiny_snapshot(
    c_dim: int = 0, size: int | Sequence[int] = 8, channels: int = 3, conv_clamp: float | None = 256, **synthesis: Any
) -> Snapshot:
    """G, D and a G_ema of other numbers, with noise, a mean of w, and labels named a, b, ..."""
    torch.manual_seed(0)
    shared: dict[str, Any] = {"channel_base": 64, "channel_max": 8, "num_fp16_res": 4, "conv_clamp": conv_clamp}
    mapping = {"num_layers": 2}
    G = Generator(16, c_dim, 16, size, channels, mapping_kwargs=mapping, synthesis_kwargs={**shared, **synthesis})
    G.eval().requires_grad_(False)
    G.mapping.w_avg.normal_()
    for name, parameter in G.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.5)
    G_ema = copy.deepcopy(G)
    for parameter in G_ema.parameters():
        parameter.mul_(0.9)
    D = Discriminator(c_dim, size, channels, **shared).eval().requires_grad_(False)
    kwargs = {"class_names": [chr(ord("a") + i) for i in range(c_dim)]} if c_dim else {}
    return Snapshot(G, D, G_ema, augment_p=0.25, training_set_kwargs=kwargs, source="tiny")


@torch.no_grad()
def pictures(G: Any, psi: float = 1.0, seeds: Sequence[int] = range(3)) -> torch.Tensor:
    """Of these seeds, `[N, C, H, W]`; the classes in turn."""
    z = torch.cat([torch.randn([1, G.z_dim], generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    images: torch.Tensor = G(z, labels(G, seeds), truncation_psi=psi, noise_mode="const", force_fp32=True)
    return images


def labels(G: Any, seeds: Sequence[int]) -> torch.Tensor:
    """`[N, c_dim]`: the class of each seed."""
    return torch.eye(max(G.c_dim, 1))[[seed % max(G.c_dim, 1) for seed in seeds], : G.c_dim]
