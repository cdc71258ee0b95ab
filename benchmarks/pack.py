"""Images packed per second, by 1 to N processes: `GAN_TEST_DATA=FOLDER python benchmarks/pack.py`.

Against a plain loop in one process: read from the zip, decode with Pillow, crop, Lanczos, PNG of level 0, write to a
zip. They take turns. Ours does what dataset_tool.py does: headers, labels, digests and hashes for duplicates, the
journal to go on from, the report. "Per core" is by the processor time of all processes.
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

from gan.data.packing import pack
from gan.data.process_pool import default_workers

_NAMES = {"plain": "plain", "0": "no other process", "1": "1 worker process"}
PHOTOGRAPHS = "clothing-photos.zip"  # in the folder that GAN_TEST_DATA names


def plain(source: Path, dest: Path, size: int) -> int:
    """What one would write first."""
    with zipfile.ZipFile(source) as photos, zipfile.ZipFile(dest, "w", zipfile.ZIP_STORED) as packed:
        names = sorted(name for name in photos.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        for i, name in enumerate(names):
            image = PIL.Image.open(io.BytesIO(photos.read(name))).convert("RGB")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
            image = image.resize((size, size), PIL.Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            image.save(buffer, "PNG", compress_level=0)
            packed.writestr(f"{i // 1000:05d}/img{i:08d}.png", buffer.getvalue())
        return len(names)


def same_pixels(a: Path, b: Path) -> bool:
    """Whether two zips hold the same pictures."""
    with zipfile.ZipFile(a) as first, zipfile.ZipFile(b) as second:
        names = [name for name in first.namelist() if name.endswith(".png")]
        if names != [name for name in second.namelist() if name.endswith(".png")]:
            return False
        return all(np.array_equal(*(PIL.Image.open(io.BytesIO(z.read(n))) for z in (first, second))) for n in names)


def processor_seconds() -> float:
    """Of this process and of those that have ended below it."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def measure(source: Path, size: int, most: int, rounds: int) -> dict[str, Any]:
    """Images per second of each way, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        dests = {name: Path(folder) / f"{name}.zip" for name in ("plain", *(f"{n}" for n in range(most + 1)))}
        ways: dict[str, Callable[[], int]] = {"plain": lambda: plain(source, dests["plain"], size)}
        for n in range(most + 1):
            ways[f"{n}"] = lambda n=n: pack(source, dests[f"{n}"], resolution=(size, size), workers=n).num_images
        rates: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, run in ways.items():
                dests[name].unlink(missing_ok=True)
                os.sync()  # what the last one wrote is not this one's to wait for
                wall, cpu = time.perf_counter(), processor_seconds()
                images = run()
                wall, cpu = time.perf_counter() - wall, processor_seconds() - cpu
                if turn:  # the first warms up
                    rates[name].append((images / wall, images / cpu))
        assert same_pixels(dests["plain"], dests["1"])
    result: dict[str, Any] = {"images": images}
    for name, pairs in rates.items():
        walls, cores = zip(*pairs, strict=True)
        result[_NAMES.get(name, f"{name} worker processes")] = {
            **{"wall_median": statistics.median(walls), "wall_min": min(walls), "wall_max": max(walls)},
            "per_core_median": statistics.median(cores),
            "wall_to_plain": statistics.median(a[0] / b[0] for a, b in zip(pairs, rates["plain"], strict=True)),
            "per_core_to_plain": statistics.median(a[1] / b[1] for a, b in zip(pairs, rates["plain"], strict=True)),
            "wall_to_one": statistics.median(a[0] / b[0] for a, b in zip(pairs, rates["1"], strict=True)),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--processes", type=int, default=default_workers())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    source = Path(os.environ["GAN_TEST_DATA"]) / PHOTOGRAPHS
    results: dict[str, Any] = {}
    for size in arguments.sizes:
        results[f"{size} px"] = measure(source, size, arguments.processes, arguments.rounds)
        for name, found in results[f"{size} px"].items():
            if name != "images":
                wall, core = found["wall_median"], found["per_core_median"]
                ratios = f"{found['wall_to_plain']:.2f} x plain, {found['wall_to_one']:.2f} x one worker"
                per_core = f"{core:5.0f} per core ({found['per_core_to_plain']:.2f} x plain)"
                print(f"{size:4d} px  {name:18s} {wall:5.0f} images/s ({ratios}), {per_core}")
    harness.write("pack", results)


if __name__ == "__main__":
    main()
