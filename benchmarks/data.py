"""Images per second and core on their way to the step: `python benchmarks/data.py`.

Three ways to the same batches: a plain DataLoader that decodes with Pillow, the first epoch, which decodes and fills
the cache, and what comes after it. They take turns. "Per core" is by the processor time of the whole process, all its
threads included, so that a busy machine does not count; the wall clock stands beside it.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import numpy as np
import PIL.Image
import torch

from gan.data.dataset import ImageDataset
from gan.data.loader import BatchStream
from gan.data.packing import pack
from gan.data.sources import open_source
from torch_utils.memory import keep_freed_memory

BATCH = 32
PHOTOGRAPHS = "clothing-photos.zip"  # in the folder that GAN_TEST_DATA names


class PillowDataset(torch.utils.data.Dataset):
    """What one would write first: each image decoded by Pillow when it is due."""

    def __init__(self, path: Path) -> None:
        self.zip = zipfile.ZipFile(path)
        self.names = sorted(name for name in self.zip.namelist() if name.endswith(".png"))

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with PIL.Image.open(io.BytesIO(self.zip.read(self.names[index]))) as file:
            image = np.asarray(file.convert("RGB"))
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), index


def candidates(path: Path, cached_images: int) -> dict[str, Callable[[], int]]:
    """Each reads some batches and returns how many images they had."""
    loader = torch.utils.data.DataLoader(PillowDataset(path), BATCH, shuffle=True, drop_last=True)
    cached: list[BatchStream] = []

    def plain() -> int:
        return sum(len(images) for images, _ in loader)

    def first_epoch() -> int:
        for old in path.parent.glob("*.cache"):
            old.unlink()
        stream = BatchStream(ImageDataset(path), BATCH, 0, cache="disk", report=lambda topic, line: None)
        assert "made as images are first shown" in stream.lines[0]
        shown = sum(len(next(stream)[0]) for _ in range(-(-len(stream._dataset) // BATCH) + 1))
        stream.close()
        return shown - BATCH  # the last batch is only there to have the file written

    def afterwards() -> int:
        if not cached:
            cached.append(BatchStream(ImageDataset(path), BATCH, 0, cache="disk"))
            assert "complete" in cached[0].lines[0]
        return sum(len(next(cached[0])[0]) for _ in range(cached_images // BATCH))

    return {"Pillow in a DataLoader": plain, "first epoch": first_epoch, "cached": afterwards}


def measure(path: Path, cached_images: int, rounds: int) -> dict[str, Any]:
    """Images per second of processor time and of the wall clock."""
    ways = candidates(path, cached_images)
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, run in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            images = run()
            if turn:  # the first warms up
                rates[name].append((images / (time.process_time() - cpu), images / (time.perf_counter() - wall)))
    result: dict[str, Any] = {}
    for name, pairs in rates.items():
        per_core = [core for core, _ in pairs]
        result[name] = {
            "per_core_median": statistics.median(per_core),
            "per_core_min": min(per_core),
            "per_core_max": max(per_core),
            "wall_median": statistics.median(wall for _, wall in pairs),
        }
    for name in ("first epoch", "cached"):
        ratios = [a[0] / b[0] for a, b in zip(rates[name], rates["Pillow in a DataLoader"], strict=True)]
        result[name]["ratio_to_pillow"] = statistics.median(ratios)
        result[name]["ratio_range"] = [min(ratios), max(ratios)]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()  # as training on a CPU does
    source, what = "demo", "drawn landscapes"
    if "GAN_TEST_DATA" in os.environ:
        source, what = str(Path(os.environ["GAN_TEST_DATA"]) / PHOTOGRAPHS), "photographs"
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            path = Path(folder) / f"{size}.zip"
            count = 1024 if size >= 256 else 4096
            opened = open_source(source)
            packed = pack(opened, path, resolution=(size, size), transform="center-crop", max_images=count)
            cached_images = 2**30 // (3 * size**2)
            result = measure(path, cached_images // BATCH * BATCH, arguments.rounds)
            results[f"{size} px"] = {"images": packed.num_images, "of": what, **result}
            for name, figures in result.items():
                ratio = f", {figures['ratio_to_pillow']:.1f} x" if "ratio_to_pillow" in figures else ""
                print(f"{size:4d} px  {name:24s} {figures['per_core_median']:9.0f} images/s per core{ratio}")
    harness.write("data", results)


if __name__ == "__main__":
    main()
