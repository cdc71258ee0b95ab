"""What a run says when it starts: what runs, on what, and why; one line each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.decode import decoder
from gan.training import disk, resources
from gan.training.run_folder import in_kimg
from gan.training.state import TrainingState


def announcement(
    config: TrainConfig,
    run_dir: Path,
    dataset: ImageDataset,
    state: TrainingState,
    half_dtype: torch.dtype,
    cache_lines: list[str],
    metric_lines: Sequence[str] = (),
) -> Iterator[str]:
    """The lines."""
    data, progress = config.data, state.progress
    sizes = [sum(p.numel() for p in net.parameters()) / 1e6 for net in (state.G, state.D)]
    classes = f", {data.label_dim} label values" if data.label_dim else ""
    begin = f"continuing at {in_kimg(progress.nimg)} kimg" if progress.nimg else "starting"
    yield f"Run:       {run_dir} ({begin}, {config.total_kimg} kimg in all)"
    yield f"Data:      {data.path}: {len(dataset)} images, {data.described}{classes}; decoded by {decoder()}"
    for line in cache_lines:
        yield f"Cache:     {line}"
    yield f"Networks:  G {sizes[0]:.2f} M parameters, D {sizes[1]:.2f} M"
    spread = f" on {config.gpus} processes" if config.gpus > 1 else ""
    yield f"Batch:     {config.batch_size}{spread}, {config.batch_gpu} at a time"
    each = ", in each process" if config.gpus > 1 else ""
    yield f"Computing: {resources.computing(state.device, state.G, half_dtype)}{each}"
    yield f"Kernels:   {resources.kernels_in_use()}"
    yield from disk.outlook(config, run_dir, progress.nimg)
    yield from metric_lines
    if not resources.can_measure_memory():
        yield "Memory:    cpumem reads 0, because psutil is not installed"
    if progress.rollbacks:
        yield "Rates:     halved since training had failed once"
    yield "Stop with Ctrl-C: the run is saved, and python train.py --resume goes on where it was"


def with_topic(topic: str, lines: Sequence[str]) -> list[str]:
    """Lines of one topic, `Weights:` for one, which the first of them names."""
    return [f"{topic if i == 0 else '':<11}{line}" for i, line in enumerate(lines)]
