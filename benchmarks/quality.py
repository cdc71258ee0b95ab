"""Does bfloat16 train as float32 does? `python benchmarks/quality.py --data clothing32.zip`.

Runs train.py once per precision and seed, on the same data for the same kimg, and compares the curves of stats.jsonl:
for each statistic and each third of the run, the means of the precisions and the spread over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import harness

CURVES = (
    "Loss/scores/real",
    "Loss/scores/fake",
    "Loss/signs/real",
    "Loss/G/loss",
    "Loss/D/loss",
    "Loss/r1_penalty",
    "Loss/pl_penalty",
)
PRECISIONS = ("fp32", "bf16")
THIRDS = 3


def train(data: str, precision: str, seed: int, kimg: int, core: int | None, outdir: str) -> dict[str, list[float]]:
    """{curve: its mean in each third of the run}"""
    script = str(Path(__file__).parents[1] / "train.py")
    command = [sys.executable, script, "--data", data, "--outdir", outdir, "--kimg", str(kimg), "--tick", "0.5"]
    command += ["--snap", "1000", "--cbase", "2048", "--cmax", "64", "--precision", precision, "--seed", str(seed)]
    command += ["--desc", precision, "--metrics", "none"]
    environment = {**os.environ, "MLFLOW_TRACKING_URI": ""}
    if core is not None:
        command, environment["OMP_NUM_THREADS"] = ["taskset", "-c", str(core), *command], "1"
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    (stats,) = Path(outdir).glob("*/stats.jsonl")
    ticks = [json.loads(line) for line in stats.read_text().splitlines()]
    result: dict[str, list[float]] = {}
    for curve in CURVES:
        parts: list[list[tuple[float, float]]] = [[] for _ in range(THIRDS)]
        for tick in ticks:
            if curve in tick:
                at = min(int(tick["Progress/kimg"]["mean"] * THIRDS / kimg), THIRDS - 1)
                parts[at].append((tick[curve]["num"], tick[curve]["mean"]))
        result[curve] = [sum(n * mean for n, mean in part) / sum(n for n, _ in part) for part in parts]
    print(f"{precision} seed {seed}: done", flush=True)
    return result


def compare(runs: dict[str, list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """A row for each curve and third: means and spreads, and whether the precisions differ by less than the spread."""
    rows = []
    for curve in CURVES:
        for third in range(THIRDS):
            values = {precision: [run[curve][third] for run in found] for precision, found in runs.items()}
            means = {precision: statistics.mean(found) for precision, found in values.items()}
            spread = max(max(found) - min(found) for found in values.values())
            difference = abs(means["bf16"] - means["fp32"])
            row = {"curve": curve, "third": third + 1, "values": values, "means": means}
            rows.append({**row, "spread": spread, "difference": difference, "within": difference <= spread})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True, help="dataset of dataset_tool.py")
    parser.add_argument("--kimg", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--cores", type=int, default=0, help="runs at a time, each on a core of its own; 0: one, free")
    arguments = parser.parse_args()
    cores: list[int | None] = list(range(arguments.cores)) or [None]
    free = list(cores)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(cores)) as pool:

        def run(precision: str, seed: int) -> dict[str, list[float]]:
            core = free.pop()
            try:
                outdir = f"{folder}/{precision}-{seed}"
                return train(arguments.data, precision, seed, arguments.kimg, core, outdir)
            finally:
                free.append(core)

        waiting = {
            precision: [pool.submit(run, precision, seed) for seed in range(arguments.seeds)]
            for precision in PRECISIONS
        }
        runs = {precision: [future.result() for future in futures] for precision, futures in waiting.items()}
    rows = compare(runs)
    print(f"{'curve':18s} {'third':>5s} {'float32':>9s} {'bfloat16':>9s} {'differ':>8s} {'spread':>8s}")
    for row in rows:
        means = row["means"]
        print(
            f"{row['curve']:18s} {row['third']:5d} {means['fp32']:9.3f} {means['bf16']:9.3f} "
            f"{row['difference']:8.3f} {row['spread']:8.3f}{'' if row['within'] else '  beyond'}"
        )
    harness.write("quality", {"kimg": arguments.kimg, "seeds": arguments.seeds, "rows": rows})


if __name__ == "__main__":
    main()
