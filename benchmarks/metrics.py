"""What metrics cost after the forward passes, against plain NumPy and SciPy: `python benchmarks/metrics.py`.

Ours run on --device, the plain ones on the CPU, in turn. `--quick` is a rehearsal with small sets.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import psutil
import scipy.linalg
import scipy.ndimage
import scipy.special
import torch

from gan.metrics import diversity, frechet, inception_score, kernel_distance, precision_recall, sliced_wasserstein


class Memory:
    """How much more memory this process has at most, while inside, than before: on the GPU, where that computes."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._done, self._process = device, threading.Event(), psutil.Process()

    def __enter__(self) -> Memory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        self._before = self._peak = self._process.memory_info().rss
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._peak = torch.cuda.max_memory_allocated()
            return
        self._done.set()
        self._thread.join()

    @property
    def megabytes(self) -> float:
        return (self._peak - self._before) / 1e6

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)


class Finished:
    """A measurement by its portions: what it comes to, and how long training would have stood still at most."""

    longest = 0.0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, measurement: Generator[None, None, Any]) -> Any:
        while True:
            begin = time.perf_counter()
            try:
                next(measurement)
            except StopIteration as end:
                return end.value
            if self._device.type == "cuda":
                torch.cuda.synchronize()
            self.longest = max(self.longest, time.perf_counter() - begin)


def features(rows: int, dim: int, seed: int) -> torch.Tensor:
    """Like those of a detector: none below 0, correlated, of falling variance."""
    random = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=torch.Generator().manual_seed(99)) * torch.arange(1, dim + 1) ** -0.5
    return (torch.randn(rows, dim, generator=random) @ mix * 0.1 + 0.3 + 0.02 * seed).relu()


def pictures(number: int, side: int, seed: int) -> torch.Tensor:
    """uint8 with structure of several scales."""
    random, total = torch.Generator().manual_seed(seed), torch.zeros(number, 3, side, side)
    for coarse in (4, 16, side):
        drawn = torch.randn(number, 3, coarse, coarse, generator=random) / coarse**0.5
        total += torch.nn.functional.interpolate(drawn, size=(side, side), mode="bilinear")
    return (total * 60 + 128).clamp(0, 255).to(torch.uint8)


def plain_fid(real: np.ndarray, fake: np.ndarray) -> float:
    a, b = (np.cov(rows, rowvar=False, bias=True, dtype=np.float64) for rows in (real, fake))
    root = scipy.linalg.sqrtm(a @ b)
    offset = real.mean(0, dtype=np.float64) - fake.mean(0, dtype=np.float64)
    return float(offset @ offset + np.trace(a + b - 2 * root.real))


def plain_kid(real: np.ndarray, fake: np.ndarray, subsets: int, size: int) -> float:
    random, total = np.random.default_rng(0), 0.0
    for _ in range(subsets):
        x, y = (rows[random.choice(len(rows), size, replace=False)] for rows in (real, fake))
        within = ((x @ x.T / x.shape[1] + 1) ** 3) + ((y @ y.T / x.shape[1] + 1) ** 3)
        between = (x @ y.T / x.shape[1] + 1) ** 3
        total += (within.sum() - np.trace(within)) / (size * (size - 1)) - 2 * between.mean()
    return float(total / subsets)


def plain_score(probabilities: np.ndarray) -> tuple[float, float]:
    scores = []
    for p in np.split(probabilities.astype(np.float64), 10):
        scores.append(np.exp(scipy.special.rel_entr(p, p.mean(0)).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))


def plain_pr(real: np.ndarray, fake: np.ndarray, k: int = 3) -> tuple[float, float]:
    """All distances of two sets at once."""

    def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T)

    def radii(rows: np.ndarray) -> np.ndarray:
        return np.partition(distances(rows, rows), k, axis=1)[:, k]

    def covered(rows: np.ndarray, others: np.ndarray) -> float:
        return float((distances(rows, others) <= radii(others)).any(1).mean())

    return covered(fake, real), covered(real, fake)


def plain_descriptors(images: np.ndarray, seed: int) -> dict[int, np.ndarray]:
    """One picture after the other."""
    random, found = np.random.default_rng(seed), dict[int, list[np.ndarray]]()
    taps = np.outer([1, 4, 6, 4, 1], [1, 4, 6, 4, 1]).astype(np.float32)[None] / 256
    for image in images:
        picture = image.astype(np.float32)
        while True:
            height, last = picture.shape[1], min(picture.shape[1:]) < 31
            level = picture
            if not last:
                smaller = scipy.ndimage.convolve(picture, taps, mode="mirror")[:, ::2, ::2]
                spread = np.zeros_like(picture)
                spread[:, ::2, ::2] = smaller
                level = picture - scipy.ndimage.convolve(spread, 4 * taps, mode="mirror")
                picture = smaller
            for y, x in random.integers(0, height - 6, (64, 2)):
                found.setdefault(height, []).append(level[:, y : y + 7, x : x + 7].reshape(3, 49))
            if last:
                break
    return {height: np.stack(patches) for height, patches in found.items()}


def plain_swd(real: np.ndarray, fake: np.ndarray) -> float:
    levels, found = [plain_descriptors(images, seed) for seed, images in enumerate((real, fake))], []
    for height in levels[0]:
        rows = [level[height] for level in levels]
        rows = [(r - r.mean((0, 2), keepdims=True)) / r.std((0, 2), keepdims=True) for r in rows]
        random, total = np.random.default_rng(0), 0.0
        for _ in range(4):
            directions = random.standard_normal((147, 128)).astype(np.float32)
            directions /= np.linalg.norm(directions, axis=0)
            a, b = (np.sort(r.reshape(len(r), -1) @ directions, axis=0) for r in rows)
            total += float(np.abs(a - b).mean()) / 4
        found.append(1000 * total)
    return float(np.mean(found))


def swd(real: torch.Tensor, fake: torch.Tensor, finished: Finished) -> float:
    sets = []
    for images in (real, fake):
        parts = [
            sliced_wasserstein.descriptors(some, range(32 * i, 32 * i + len(some)))
            for i, some in enumerate(images.split(32))
        ]
        sets.append({height: torch.cat([part[height] for part in parts]) for height in parts[0]})
    found = finished(sliced_wasserstein.distances(*sets))
    return sum(found.values()) / len(found)


def gaussian(rows: torch.Tensor) -> frechet.Gaussian:
    sums = frechet.MomentSums(rows.shape[1], rows.device)
    for some in rows.split(32):
        sums.add(some)
    return sums.gaussian()


Ways = dict[str, Callable[[], Any]]


def fid(a: argparse.Namespace, device: torch.device, finished: Finished) -> tuple[str, Ways]:
    real, fake = (features(a.rows, a.dim, seed) for seed in (0, 1))
    reals, fakes = real.to(device), fake.to(device)
    known = finished(gaussian(reals).with_half())
    return f"fid of {a.rows} x {a.dim}", {
        "ours": lambda: finished(frechet.frechet_distance(gaussian(reals), gaussian(fakes))),
        "ours, reals known": lambda: finished(frechet.frechet_distance(known, gaussian(fakes))),
        "ours, both known": lambda: finished(frechet.frechet_distance(known, known)),
        "plain": lambda: plain_fid(real.numpy(), fake.numpy()),
    }


def kid(a: argparse.Namespace, device: torch.device, finished: Finished) -> tuple[str, Ways]:
    real, fake = (features(a.rows, a.dim, seed) for seed in (0, 1))
    reals, fakes, size = real.to(device), fake.to(device), min(1000, a.rows)
    return f"kid of 100 x {size} x {a.dim}", {
        "ours": lambda: finished(kernel_distance.kernel_distance(reals, fakes, 100, size)),
        "plain": lambda: plain_kid(real.numpy(), fake.numpy(), 100, size),
    }


def score(a: argparse.Namespace, device: torch.device, finished: Finished) -> tuple[str, Ways]:
    probabilities = features(a.rows, a.dim // 2, 0).softmax(1)
    on_device = probabilities.to(device)
    return f"is of {a.rows} x {a.dim // 2}", {
        "ours": lambda: finished(inception_score.inception_score(on_device)),
        "ours, rows on the CPU": lambda: finished(inception_score.inception_score(probabilities, device=device)),
        "plain": lambda: plain_score(probabilities.numpy()),
    }


def pr(a: argparse.Namespace, device: torch.device, finished: Finished) -> tuple[str, Ways]:
    real, fake = (features(a.pr_rows, 2 * a.dim, seed) for seed in (0, 1))
    reals, fakes = real.to(device), fake.to(device)
    known = finished(precision_recall.radii(reals, 3))
    return f"pr of {a.pr_rows} x {2 * a.dim}", {
        "ours": lambda: finished(precision_recall.precision_recall(reals, fakes)),
        "ours, reals known": lambda: finished(precision_recall.precision_recall(reals, fakes, real_radii=known)),
        "ours, rows on the CPU": lambda: finished(precision_recall.precision_recall(real, fake, device=device)),
        "plain": lambda: plain_pr(real.numpy(), fake.numpy()),
    }


def patches(a: argparse.Namespace, device: torch.device, finished: Finished) -> tuple[str, Ways]:
    real, fake = (pictures(a.images, a.side, seed) for seed in (0, 1))
    reals, fakes = real.to(device), fake.to(device)
    return f"swd of {a.images} at {a.side} px", {
        "ours": lambda: swd(reals, fakes, finished),
        "plain": lambda: plain_swd(real.numpy(), fake.numpy()),
    }


def alike(a: argparse.Namespace, device: torch.device, finished: Finished) -> tuple[str, Ways]:
    images = pictures(a.images, a.side, 0).to(device)
    return f"diversity of {a.images} at {a.side} px", {
        "ours": lambda: finished(diversity.mean_distance(diversity.reduced(images))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--rows", type=int, default=50_000, help="features of each set")
    parser.add_argument("--dim", type=int, default=2048, help="numbers of a feature; twice as many for pr")
    parser.add_argument("--pr-rows", type=int, default=10_000)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--side", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder")
    parser.add_argument("--quick", action="store_true", help="small sets, once, nothing is written")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.rows, arguments.dim, arguments.pr_rows, arguments.images, arguments.rounds = 2000, 128, 1000, 128, 1
    device, results = torch.device(arguments.device), {}
    print(f"{'case':34s} {'way':24s} {'seconds':>9s} {'to ours':>8s} {'portion':>9s} {'memory':>10s}  result")
    for case in (fid, kid, score, pr, patches, alike):
        finished = Finished(device)
        name, ways = case(arguments, device, finished)
        # The first call of each is its warm-up, in which its memory is taken.
        found: dict[str, Any] = {}
        for way, run in ways.items():
            finished.longest = 0
            with Memory(torch.device("cpu") if way == "plain" else device) as memory:
                found[way] = {"result": run()}
            found[way] |= {"peak_mb": memory.megabytes, "longest_portion_ms": finished.longest * 1000 or None}
        timing = harness.alternate(ways, arguments.rounds, warmup=0)
        for way, of in found.items():
            of |= timing[way]
            of["to_ours"] = of["median_ms"] / timing["ours"]["median_ms"]
            portion = f"{of['longest_portion_ms']:.0f} ms" if of["longest_portion_ms"] else ""
            seconds, memory_text = f"{of['median_ms'] / 1000:.3f}", f"{of['peak_mb']:.0f} MB"
            print(
                f"{name:34s} {way:24s} {seconds:>9s} {of['to_ours']:>8.2f} {portion:>9s} {memory_text:>10s}  ", end=""
            )
            print(of["result"], flush=True)
        results[name] = found
    if not arguments.quick:
        harness.write("metrics" if device.type == "cpu" else f"metrics_{device.type}", results, arguments.out)


if __name__ == "__main__":
    main()
