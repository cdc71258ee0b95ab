"""Sampling from a snapshot to PNG files, against the straightforward way: `python benchmarks/generate.py`.

Ours is `generate.py`. The peer maps and synthesises with `gan.bench.plain` and writes with Pillow's defaults, one thing
after the other. Both get the same network, seeds and batch. Two figures: the whole command, imports included, and the
pictures alone, from a loaded network to the last file. The processes take turns.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
CASES: dict[str, dict[str, Any]] = {
    "64 px, cbase 4096, cmax 128": {"res": 64, "cbase": 4096, "cmax": 128},
    "256 px, cbase 8192, cmax 256": {"res": 256, "cbase": 8192, "cmax": 256},
}


def make_network(path: Path, res: int, cbase: int, cmax: int) -> None:
    """A snapshot with an untrained generator."""
    import torch

    from gan import models
    from gan.networks import Generator

    torch.manual_seed(0)
    synthesis = {"channel_base": cbase, "channel_max": cmax, "num_fp16_res": 4, "conv_clamp": 256}
    G = Generator(512, 0, 512, res, 3, mapping_kwargs={"num_layers": 2}, synthesis_kwargs=synthesis)
    models.save(path, G=None, D=None, G_ema=G, training_set_kwargs={})


def sample_ours(network: Path, outdir: Path, count: int, batch: int) -> float:
    """Seconds for the pictures alone."""
    from gan.cli import generate
    from gan.cli.options import limit_spinning

    limit_spinning()
    G = generate._open(str(network), [])
    assert G is not None
    request = generate.Request(str(network), list(range(count)), None, None, 1.0, "const", outdir, batch, "auto")
    begin = time.perf_counter()
    generate._render(G, request)
    return time.perf_counter() - begin


def sample_plain(network: Path, outdir: Path, count: int, batch: int) -> float:
    """Seconds for the pictures alone."""
    import numpy as np
    import PIL.Image
    import torch

    from gan import models
    from gan.bench import plain

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    G = models.load(network).G_ema
    assert G is not None
    begin = time.perf_counter()
    G = G.to(device)
    outdir.mkdir(exist_ok=True)
    pictures = []
    with torch.no_grad():
        for first in range(0, count, batch):
            seeds = range(first, min(first + batch, count))
            z = np.concatenate([np.random.RandomState(seed).randn(1, G.z_dim) for seed in seeds])
            w = plain.mapping(G.mapping, torch.from_numpy(z).to(device, torch.float32), None)
            ws = w if w.ndim == 3 else w[:, None].expand(-1, G.num_ws, -1)
            images = plain.synthesis(G, ws, noise_mode="const")
            images = (images.permute(0, 2, 3, 1) * 127.5 + 128).clamp(0, 255).to(torch.uint8).cpu().numpy()
            for seed, image in zip(seeds, images, strict=True):
                PIL.Image.fromarray(image).save(outdir / f"seed{seed:04d}.png")
                pictures.append(image)
    size, columns = G.img_resolution, int(np.ceil(np.sqrt(count)))
    sheet = PIL.Image.new("RGB", (columns * size, -(-count // columns) * size))
    for i, image in enumerate(pictures):
        sheet.paste(PIL.Image.fromarray(image), (i % columns * size, i // columns * size))
    sheet.save(outdir / "grid.png")
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes per case and side")
    parser.add_argument("--count", type=int, default=64, help="pictures")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--case", choices=list(CASES), action="append", help="only this one")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        sample = {"ours": sample_ours, "plain": sample_plain}[arguments.side]
        folder = arguments.folder
        print(sample(folder / "net.pkl", folder / arguments.side, arguments.count, arguments.batch))
        return
    results: dict[str, Any] = {"pictures": arguments.count, "batch": arguments.batch}
    for name in arguments.case or CASES:
        with tempfile.TemporaryDirectory() as folder:
            make_network(Path(folder) / "net.pkl", **CASES[name])
            results[name] = compare(Path(folder), arguments)
        print(name, json.dumps(results[name], indent=1))
    import harness

    harness.write("generate", results)


def compare(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both sides in turn; seconds, and plain / ours."""
    seconds: dict[str, dict[str, list[float]]] = {s: {"command": [], "pictures": []} for s in ("ours", "plain")}
    size = ["--count", str(arguments.count), "--batch", str(arguments.batch)]
    for i in range(arguments.rounds + 1):
        for side, times in seconds.items():
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder), *size]
            begin = time.perf_counter()
            output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            whole = time.perf_counter() - begin
            if i > 0:  # the first fills the caches of the file system
                times["command"].append(whole)
                times["pictures"].append(float(output.split()[-1]))
    summary: dict[str, Any] = {}
    for what in ("command", "pictures"):
        sides = {side: seconds[side][what] for side in seconds}
        summary[what] = {
            **{s: {"median": statistics.median(t), "min": min(t), "max": max(t)} for s, t in sides.items()},
            "plain / ours": statistics.median(sides["plain"]) / statistics.median(sides["ours"]),
        }
    return summary


if __name__ == "__main__":
    main()
