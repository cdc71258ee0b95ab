"""What the cost of a step of one process grows with: `python benchmarks/scaling.py`; `--plot` draws the results.

Resolution, batch, augmentation probability and the number of images in the set, each alone, the rest as in `BASE`. For
docs/performance.md; many processes, and docs/scaling.md, are `processes.py`'s.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import train_step

BASE = {"res": 64, "precision": "auto", "cbase": 4096, "cmax": 128, "batch": 16, "plain": False}
RESOLUTIONS, BATCHES, PROBABILITIES, IMAGES = (32, 64, 128, 256), (4, 8, 16, 32, 64), (0.0, 0.2, 0.6, 0.85), (1, 10, 40)
PICTURE = Path(__file__).parents[1] / "docs" / "images" / "scaling.png"


def step_cases() -> dict[str, dict[str, Any]]:
    cases = {f"resolution {res}": {**BASE, "res": res} for res in RESOLUTIONS}
    cases |= {f"batch {batch}": {**BASE, "batch": batch} for batch in BATCHES}
    return cases | {f"p {p:g}": {**BASE, "p": p} for p in PROBABILITIES}


def with_images(thousands: int) -> dict[str, float]:
    """Opening a set of so many images, the first epoch, and getting a batch from the cache."""
    import torch

    from gan.bench.images import RandomImages
    from gan.data.dataset import ImageDataset
    from gan.data.loader import BatchStream
    from gan.data.packing import pack

    class Many(RandomImages):
        def __init__(self) -> None:
            super().__init__((32, 32))
            self.names = [f"{i:06d}.png" for i in range(thousands * 1000)]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "many.zip"
        pack(Many(), path)
        figures: dict[str, float] = {"thousand_images": thousands}
        for run in ("first", "cached"):
            begin = time.perf_counter()
            dataset = ImageDataset(path, cache_folder=path.parent)
            figures[f"{run}_open_seconds"] = time.perf_counter() - begin
            stream = BatchStream(dataset, 16, 0, device=torch.device("cpu"), workers=0, cache="disk")
            begin, batches = time.perf_counter(), len(dataset) // 16 + 1
            for _ in range(batches):
                next(stream)
            figures[f"{run}_batch_ms"] = (time.perf_counter() - begin) / batches * 1000
            stream.close()
    return figures


def plot(results: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(14, 3.2), constrained_layout=True)
    for axis, (kind, values, log) in zip(
        axes, (("resolution", RESOLUTIONS, True), ("batch", BATCHES, True), ("p", PROBABILITIES, False)), strict=False
    ):
        found = [results["steps"][f"{kind} {value:g}"] for value in values]
        axis.plot(values, [r["sec_per_kimg"] for r in found], "o-", color="#2a6f97")
        axis.set_ylabel("seconds per 1,000 images")
        axis.set_ylim(0, 1.15 * max(r["sec_per_kimg"] for r in found))
        axis.set_title("augmentation probability p" if kind == "p" else kind)
        memory = axis.twinx()
        memory.plot(values, [r["memory"]["peak_gb"] for r in found], "s--", color="#b5651d", markersize=4)
        memory.set_ylim(0, 1.15 * max(r["memory"]["peak_gb"] for r in found))
        memory.set_ylabel("peak GB (dashed)")
        if log:
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [str(v) for v in values])
    images = results["images"]
    axes[3].plot(IMAGES, [r["cached_batch_ms"] for r in images], "o-", color="#2a6f97", label="a batch, cached")
    axes[3].plot(IMAGES, [r["first_batch_ms"] for r in images], "s--", color="#b5651d", label="a batch, first epoch")
    axes[3].set_title("thousand images in the set")
    axes[3].set_ylabel("ms for 16 images")
    axes[3].set_ylim(bottom=0)
    axes[3].legend()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(PICTURE, dpi=110)
    print(f"wrote {PICTURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90, help="for each case, at most")
    parser.add_argument("--periods", type=int, default=3, help="of 16 steps, for each case")
    parser.add_argument("--plot", action="store_true", help="draw the results that are there")
    arguments = parser.parse_args()
    if arguments.plot:
        plot(json.loads((harness.RESULTS / "scaling.json").read_text())["results"])
        return
    steps = train_step.measured(step_cases(), arguments.seconds, arguments.periods, train_step.__file__)
    images = []
    for thousands in IMAGES:
        images.append(with_images(thousands))
        print(images[-1], flush=True)
    harness.write("scaling", {"steps": steps, "images": images})


if __name__ == "__main__":
    main()
