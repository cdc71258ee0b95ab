"""The hyperparameters, augmentations and networks that have names."""

from __future__ import annotations

import dataclasses

PRETRAINED_BASE = "https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/"
PRETRAINED = {  # name: file below the base address; trained to start other runs from
    "ffhq256": "transfer-learning-source-nets/ffhq-res256-mirror-paper256-noaug.pkl",
    "ffhq512": "transfer-learning-source-nets/ffhq-res512-mirror-stylegan2-noaug.pkl",
    "ffhq1024": "transfer-learning-source-nets/ffhq-res1024-mirror-stylegan2-noaug.pkl",
    "celebahq256": "transfer-learning-source-nets/celebahq-res256-mirror-paper256-kimg100000-ada-target0.5.pkl",
    "lsundog256": "transfer-learning-source-nets/lsundog-res256-paper256-kimg100000-noaug.pkl",
}

_BLIT = ("xflip", "rotate90", "xint")
_GEOM = ("scale", "rotate", "aniso", "xfrac")
_COLOR = ("brightness", "contrast", "lumaflip", "hue", "saturation")
AUGMENT_PIPES: dict[str, tuple[str, ...]] = {
    "blit": _BLIT,
    "geom": _GEOM,
    "color": _COLOR,
    "filter": ("imgfilter",),
    "noise": ("noise",),
    "cutout": ("cutout",),
    "bg": _BLIT + _GEOM,
    "bgc": _BLIT + _GEOM + _COLOR,
    "bgcf": (*_BLIT, *_GEOM, *_COLOR, "imgfilter"),
    "bgcfn": (*_BLIT, *_GEOM, *_COLOR, "imgfilter", "noise"),
    "bgcfnc": (*_BLIT, *_GEOM, *_COLOR, "imgfilter", "noise", "cutout"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """The hyperparameters that belong together (arXiv 2006.06676, table 5). None: follows from the data (`auto`)."""

    ref_gpus: int | None = 8
    """number of GPUs that the batch was divided over"""
    kimg: int = 25000
    batch: int | None = 32
    mbstd: int | None = 4
    channel_base: int | None = 32768
    channel_max: int = 512
    lr: float | None = 0.002
    gamma: float | None = 10
    ema_kimg: float | None = 10
    ema_rampup: float | None = None
    mapping_layers: int = 8
    pl_weight: float = 2
    style_mixing_prob: float = 0.9
    d_architecture: str = "resnet"
    use_noise: bool = True
    aug: str = "ada"
    ada_kimg: int = 500
    tick_kimg: float = 4
    snap: int = 50


PRESETS = {
    "auto": Preset(
        ref_gpus=None,
        batch=None,
        mbstd=None,
        channel_base=None,
        lr=None,
        gamma=None,
        ema_kimg=None,
        ema_rampup=0.05,
        mapping_layers=2,
    ),
    "stylegan2": Preset(),
    "paper256": Preset(batch=64, mbstd=8, channel_base=16384, lr=0.0025, gamma=1, ema_kimg=20),
    "paper512": Preset(batch=64, mbstd=8, lr=0.0025, gamma=0.5, ema_kimg=20),
    "paper1024": Preset(gamma=2),
    "cifar": Preset(
        ref_gpus=2,
        kimg=100000,
        batch=64,
        mbstd=32,
        lr=0.0025,
        gamma=0.01,
        ema_kimg=500,
        ema_rampup=0.05,
        mapping_layers=2,
        pl_weight=0,
        style_mixing_prob=0,
        d_architecture="orig",
    ),
}
# What `--demo` takes instead of a preset of --cfg: small enough to learn simple pictures of 64x64 in minutes on a
# laptop. No augmentation, because p would hardly leave 0 in so short a run; no noise, which flat drawings have no use
# for and which costs a short run a long grainy phase (docs/experiments.md).
DEMO_PRESET = Preset(
    ref_gpus=1,
    kimg=16,
    batch=16,
    channel_base=1024,
    channel_max=64,
    lr=0.0025,
    gamma=0.05,
    ema_kimg=1,
    ema_rampup=0.05,
    mapping_layers=2,
    pl_weight=0,
    style_mixing_prob=0,
    use_noise=False,
    aug="noaug",
    tick_kimg=2,
    snap=4,
)
