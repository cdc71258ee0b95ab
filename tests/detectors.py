"""Small TorchScript detectors with the calls of the real ones: they see little, but the same each time."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F

from gan.metric_names import INCEPTION, VGG

FEATURES = 16


class _Eye(torch.nn.Module):
    """Convolutions with random weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        random = torch.Generator().manual_seed(seed)
        self.register_buffer("near", torch.randn([8, 3, 3, 3], generator=random))
        self.register_buffer("far", torch.randn([FEATURES, 8, 3, 3], generator=random) / 6)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = images.to(torch.float32) / 127.5 - 1
        x = F.leaky_relu(F.conv2d(x, self.near, stride=2), 0.2)
        return F.leaky_relu(F.conv2d(x, self.far, stride=2), 0.2)


class _Inception(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye = _Eye(1)
        random = torch.Generator().manual_seed(2)
        self.register_buffer("weight", torch.randn([10, FEATURES], generator=random))
        self.register_buffer("bias", torch.randn([10], generator=random))

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False) -> torch.Tensor:
        features = self.eye(img).mean([2, 3])
        if return_features:
            return features
        return F.linear(features, self.weight, None if no_output_bias else self.bias).softmax(1)


class _Vgg(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.eye = _Eye(3)

    def forward(
        self, img: torch.Tensor, resize_images: bool = True, return_features: bool = False, return_lpips: bool = False
    ) -> torch.Tensor:
        seen = self.eye(F.interpolate(img.to(torch.float32), [32, 32]) if resize_images else img)
        if return_lpips:
            return seen.flatten(1)
        if return_features:
            return seen.mean([2, 3])
        return seen.mean([2, 3]).softmax(1)


def write_detectors(folder: Path) -> Path:
    """Both detectors under their names in a folder, for --detectors."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, network in ((INCEPTION, _Inception()), (VGG, _Vgg())):
        write_script(folder / name, network)
    return folder


def write_script(path: Path, network: torch.nn.Module) -> None:
    """A network as a TorchScript file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; the detectors that there are, are such files
        torch.jit.script(network.eval()).save(str(path))
