"""Generated images to be measured, the same ones for the same network and seed.

They come in blocks of 32. Latents, labels and noise of a block follow from the seed and the block's number, so they do
not depend on how many are computed at a time, by how many processes, or in which run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch

from gan.errors import GanError
from gan.metric_names import Metric
from gan.metrics import perceptual_path
from gan.metrics.parts import BLOCK, Parts
from gan.networks import Generator as Network
from torch_utils import draws

Labels = tuple[np.ndarray, np.ndarray]
"""distinct labels float32 `[K, c_dim]`, and which of them each image of the dataset has, int64 `[images]`"""


class _Drawn:
    """Networks fed with random numbers that belong to a block."""

    kind = 0
    """tells the random numbers of one source from those of another"""

    def __init__(
        self, G: Network, labels: Labels, *, device: torch.device, seed: int, parts: Parts, force_fp32: bool
    ) -> None:
        self._G, self._labels, self._device, self._force_fp32 = G, labels, device, force_fp32
        self._seed, self._parts = seed, parts
        if G.c_dim != labels[0].shape[1]:
            raise GanError(
                f"the network takes labels of {G.c_dim} numbers and those of the dataset have {labels[0].shape[1]}; "
                "give the dataset that it was trained on"
            )

    def _generator(self, block: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed_of(block))

    def _seed_of(self, block: int, what: int = 0) -> int:
        sequence = np.random.SeedSequence((self._seed, self.kind, block, what))
        return int(sequence.generate_state(1, np.uint64)[0] >> 1)  # torch takes seeds of 63 bits on every device

    def _latents(self, random: torch.Generator) -> torch.Tensor:
        return torch.randn([BLOCK, self._G.z_dim], generator=random).to(self._device)

    def _conditions(self, random: torch.Generator) -> torch.Tensor:
        rows, index = self._labels
        which = torch.randint(len(index), [BLOCK], generator=random)
        return torch.from_numpy(rows)[torch.from_numpy(index)[which]].to(self._device)

    def _mapped(self, z: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return self._G.mapping(z, c, skip_w_avg_update=True)

    def _pictures(self, ws: torch.Tensor, block: int, part: int, parts: int, force_fp32: bool) -> torch.Tensor:
        """Of a part of a block, with the noise of that block."""
        _seed_device(self._device, self._seed_of(block, 1))
        with draws.part(part, parts):
            return self._G.synthesis(ws, noise_mode="random", force_fp32=force_fp32)


class Fakes(_Drawn):
    """Pictures of a generator, uint8 `[32, C, H, W]` a block."""

    kind = 0
    _finite: torch.Tensor | None = None

    def block(self, index: int) -> Generator[None, None, torch.Tensor]:
        random = self._generator(index)
        z, c = self._latents(random), self._conditions(random)

        def compute(part: int, parts: int) -> torch.Tensor:
            ws = self._mapped(z[part::parts], c[part::parts])
            images = self._pictures(ws, index, part, parts, self._force_fp32)
            finite = images.isfinite().all()
            self._finite = finite if self._finite is None else self._finite & finite
            return (images * 127.5 + 128).clamp(0, 255).to(torch.uint8)

        return (yield from self._parts.of(BLOCK, compute))

    def check(self) -> None:
        """Raises GanError if any pixel so far was no finite number: in 8 bits it would pass for a colour."""
        if self._finite is not None and not self._finite:
            raise GanError("the network makes pictures with values that are no finite numbers, so it has diverged")


class Paths(_Drawn):
    """Pairs of pictures that are a small step apart: their perceptual distances float32 `[32]` a block.

    Both of a pair have the same label and the same noise.
    """

    kind = 1

    def __init__(
        self,
        G: Network,
        labels: Labels,
        metric: Metric,
        lpips: Callable[[torch.Tensor], torch.Tensor],
        *,
        device: torch.device,
        seed: int,
        parts: Parts,
    ) -> None:
        # Half precision would round off the step.
        super().__init__(G, labels, device=device, seed=seed, parts=parts, force_fp32=True)
        self._metric, self._lpips = metric, lpips

    def block(self, index: int) -> Generator[None, None, torch.Tensor]:
        random = self._generator(index)
        z0, z1 = self._latents(random), self._latents(random)
        t = torch.rand([BLOCK], generator=random).to(self._device)
        if not self._metric.whole_path:
            t = torch.zeros_like(t)
        c = self._conditions(random)

        def compute(part: int, parts: int) -> torch.Tensor:
            own = slice(part, None, parts)
            near, far = (
                self._lpips(perceptual_path.prepared(pictures, self._metric.crop))
                for pictures in self._pairs(z0[own], z1[own], t[own], c[own], index, part, parts)
            )
            return perceptual_path.distances(near, far)

        return (yield from self._parts.of(BLOCK, compute))

    def _pairs(
        self,
        z0: torch.Tensor,
        z1: torch.Tensor,
        t: torch.Tensor,
        c: torch.Tensor,
        index: int,
        part: int,
        parts: int,
    ) -> Iterator[torch.Tensor]:
        if self._metric.space == "z":
            ends = [self._mapped(z, c) for z in perceptual_path.two_points(z0, z1, t, "z")]
        else:
            ends = list(perceptual_path.two_points(self._mapped(z0, c), self._mapped(z1, c), t, "w"))
        for ws in ends:
            yield self._pictures(ws, index, part, parts, force_fp32=True)

    def check(self) -> None:
        """Distances that are no numbers are found where their mean is taken."""


@contextlib.contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Whatever is drawn or seeded inside, the generators are afterwards as they were. Not to be held over a `yield`."""
    before = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    on_mps = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        yield
    finally:
        torch.set_rng_state(before)
        if on_cuda is not None:
            torch.cuda.set_rng_state(on_cuda, device)
        if on_mps is not None:
            torch.mps.set_rng_state(on_mps)


def _seed_device(device: torch.device, seed: int) -> None:
    """Seed the generator of this device alone, as others may not be ours."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
