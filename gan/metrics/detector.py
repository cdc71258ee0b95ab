"""A detector that is loaded: what it says of pictures."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from gan.errors import GanError, one_line
from torch_utils.memory import is_out_of_memory

_TRIAL = (2, 3, 64, 64)  # of images


class Detector:
    """A TorchScript network that takes RGB pictures `[N, 3, H, W]` of 0..255.

    Grey pictures are repeated to three channels. Of RGBA it sees the colours, with the transparent ones as they are.
    """

    def __init__(self, name: str, path: Path, sha256: str, device: torch.device) -> None:
        self.name, self.path, self.sha256, self.device = name, path, sha256, device
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated; files in it are what there is
                self._network = torch.jit.load(str(path), map_location=device)
                self._network.eval()
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise GanError(f"{path}: cannot be loaded ({_last_line(error)}); is it whole?") from error
        with torch.no_grad():
            self.features(torch.zeros(_TRIAL, dtype=torch.uint8, device=device))

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Of images uint8 `[N, C, H, W]`: float32 `[N, d]`, on the device."""
        return self._call(images, return_features=True)

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """Of images uint8 `[N, C, H, W]`: those of its classes, float32 `[N, classes]`."""
        return self._call(images, no_output_bias=True)

    def lpips(self, images: torch.Tensor) -> torch.Tensor:
        """Of images float32 `[N, C, H, W]`: `[N, d]`, whose squared distances are those of LPIPS."""
        return self._call(images, resize_images=False, return_lpips=True)

    def _call(self, images: torch.Tensor, **options: bool) -> torch.Tensor:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                found = self._network(_as_rgb(images), **options)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self._wrong(options, _last_line(error)) from error
        if not isinstance(found, torch.Tensor) or found.ndim != 2 or len(found) != len(images):
            shape = list(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
            raise self._wrong(options, f"for {len(images)} images it gives {shape}")
        return found.float()

    def _wrong(self, options: dict[str, bool], what: str) -> GanError:
        call = ", ".join(f"{key}={value}" for key, value in options.items())
        return GanError(
            f"{self.path}: is not the detector that it is called ({call}: {what}); fetch it with python -m "
            "gan metrics --prefetch, or give the folder of another one with --detectors"
        )


def _as_rgb(images: torch.Tensor) -> torch.Tensor:
    if images.shape[1] == 1:
        return images.expand(-1, 3, -1, -1)
    return images[:, :3]


def _last_line(error: Exception) -> str:
    """What went wrong: before it TorchScript says where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    raised = [line for line in lines if line.startswith("RuntimeError:")]
    return one_line(RuntimeError((raised or lines[:1] or [type(error).__name__])[-1].removeprefix("RuntimeError: ")))
