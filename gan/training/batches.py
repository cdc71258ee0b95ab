"""The batches of a run."""

from __future__ import annotations

from collections.abc import Callable

import torch

from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream
from torch_utils.distributed import Place


def batches_on(
    device: torch.device,
    dataset: ImageDataset,
    config: TrainConfig,
    start: int,
    report: Callable[[str, str], None] = print,
    place: Place | None = None,
) -> BatchStream:
    """Endless batches (images, indices) on the device, from the `start`-th image of the run on.

    `report` and `place` are those of `BatchStream`: with several processes, it is this one's share that comes.
    """
    workers = config.workers
    if workers is None:  # on a CPU they would take cores from the training that they wait for
        workers = 0 if device.type == "cpu" else 2
    return BatchStream(
        dataset,
        config.batch_size,
        config.seed,
        start,
        device=device,
        workers=workers,
        cache=config.cache,
        cache_dir=config.cache_dir,
        report=report,
        place=place,
    )
