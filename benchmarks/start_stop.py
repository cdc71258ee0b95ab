"""From launch to the end of the first tick, and what a snapshot costs: `python benchmarks/start_stop.py`.

The peer is a script as one writes it: everything imported at the top, MLflow set up at once, images decoded by Pillow,
sheets computed with `gan.bench.plain` before the first step, and at a snapshot sheet, networks and training state
written one after the other while training waits. Both sides make the same files of the same network, and log to an
MLflow store in SQLite that each run makes for itself. The processes take turns.

The cost of a snapshot is the time of STEPS steps that begin with one, until its files are complete, less the time of
as many steps without. What ours does between and beside the steps is in it, and MLflow's handling of the sheet. On a
machine that is busy otherwise the seconds of the processor, all threads together, tell more than those of the wall; for
ours they are the most it can cost. Precision is what `train.py` chooses; the peer's is float32.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
RES, IMAGES, BATCH, CBASE, CMAX = 32, 1000, 16, 4096, 128
Seconds = tuple[float, float]  # of the wall, of the processor


def make_dataset(path: Path) -> None:
    """Noisy gradients, packed as dataset_tool.py packs."""
    import io
    import zipfile

    import numpy as np
    import PIL.Image

    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(IMAGES):
            small = PIL.Image.fromarray(rng.integers(0, 256, [4, 4, 3], dtype=np.uint8))
            pixels = np.asarray(small.resize((RES, RES), PIL.Image.Resampling.BICUBIC)).astype(int)
            pixels = (pixels + rng.integers(-8, 9, pixels.shape)).clip(0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            PIL.Image.fromarray(pixels).save(buffer, format="PNG", compress_level=0)
            archive.writestr(f"00000/img{i:08d}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))


def config_of(data: Path) -> Any:
    """The configuration of both sides."""
    from gan.config import DataInfo
    from gan.resolve import resolve
    from gan.train_options import TrainOptions

    options = TrainOptions(data=str(data), cbase=CBASE, cmax=CMAX, batch=BATCH, kimg=1000, snap=1)
    return resolve(options, DataInfo(str(data), "data", IMAGES, RES, RES, 3))


def flags(data: Path, outdir: Path) -> list[str]:
    """The same for train.py."""
    sizes = ["--cbase", CBASE, "--cmax", CMAX, "--batch", BATCH, "--kimg", 1000, "--snap", 1, "--metrics", "none"]
    return ["--data", str(data), "--outdir", str(outdir), *map(str, sizes)]


def launch(command: list[str], folder: Path) -> Seconds:
    """From the launch of a training script to its first status line; then it is stopped for good."""
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=folder)
    assert process.stdout is not None
    next(line for line in process.stdout if re.match("tick 0 ", line))
    wall = time.perf_counter() - begin
    process.kill()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    return wall, usage.ru_utime + usage.ru_stime


def now() -> Seconds:
    """Of the wall and of this process, all its threads."""
    return time.perf_counter(), time.process_time()


def cost(begin: Seconds, middle: Seconds, end: Seconds) -> Seconds:
    """How much longer the first part took."""
    wall, processor = (2 * m - b - e for b, m, e in zip(begin, middle, end, strict=True))
    return wall, processor


class Peer:
    """A training script as one writes it."""

    def __init__(self, folder: Path) -> None:
        import zipfile

        import mlflow
        import numpy as np
        import PIL.Image
        import scipy.linalg  # noqa: F401  (for the metrics)
        import torch

        from gan.bench import plain
        from gan.data.labels import LabelTable
        from gan.training.state import TrainingState

        self.mlflow, self.np, self.pil, self.torch, self.plain = mlflow, np, PIL.Image, torch, plain
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.config = config_of(folder / "data.zip")
        self.run_dir = folder / f"plain-{time.time_ns()}"
        self.run_dir.mkdir()
        mlflow.set_tracking_uri(f"sqlite:///{self.run_dir / 'mlflow.db'}")
        experiment = mlflow.create_experiment("data", artifact_location=str(self.run_dir / "mlartifacts"))
        mlflow.start_run(experiment_id=experiment, run_name=self.run_dir.name)
        self.archive = zipfile.ZipFile(folder / "data.zip")
        self.names = sorted(n for n in self.archive.namelist() if n.endswith(".png"))
        self.state = TrainingState(self.config, self.device)
        labels = LabelTable(torch.zeros([1, 0]), torch.zeros([IMAGES], dtype=torch.long))
        self.labels = LabelTable(labels.rows.to(self.device), labels.index.to(self.device))
        self.step = plain.PlainStep(self.state, self.config, self.labels)
        self.columns, self.rows = min(7680 // RES, 32), min(4320 // RES, 32)
        self.z = torch.randn([self.columns * self.rows, 512]).to(self.device)
        self.order = np.random.RandomState(0)

    def read(self, indices: Any) -> Any:
        """Images `[N, H, W, C]`."""
        opened = [self.pil.open(self.archive.open(self.names[i])) for i in indices]
        return self.np.stack([self.np.asarray(image) for image in opened])

    def save_sheet(self, images: Any, name: str) -> None:
        """Tile, write, log."""
        _, h, w, c = images.shape
        sheet = images.reshape(self.rows, self.columns, h, w, c).transpose(0, 2, 1, 3, 4)
        picture = self.pil.fromarray(sheet.reshape(self.rows * h, self.columns * w, c))
        picture.save(self.run_dir / name)
        self.mlflow.log_artifact(str(self.run_dir / name), "grids")

    def save_fakes(self, name: str) -> None:
        """Compute a sheet and save it."""
        G, parts = self.state.G_ema, []
        with self.torch.no_grad():
            for z in self.z.split(self.config.batch_gpu):
                w = self.plain.mapping(G.mapping, z, None)
                images = self.plain.synthesis(G, w[:, None].expand(-1, G.num_ws, -1), noise_mode="const")
                images = (images * 127.5 + 128).clamp(0, 255).to(self.torch.uint8)
                parts.append(images.permute(0, 2, 3, 1).cpu().numpy())
        self.save_sheet(self.np.concatenate(parts), name)

    def train(self, steps: int) -> None:
        """Some steps."""
        for _ in range(steps):
            indices = self.order.randint(IMAGES, size=BATCH)
            images = self.torch.from_numpy(self.read(indices).transpose(0, 3, 1, 2).copy()).to(self.device)
            self.step(images, self.torch.from_numpy(indices).to(self.device))

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            self.torch.cuda.synchronize()

    def tick(self) -> None:
        """Report."""
        means = {name: moments["mean"] for name, moments in self.state.stats.flush().items()}
        self.mlflow.log_metrics(means, step=self.state.progress.nimg)
        print(f"tick 0 kimg {self.state.progress.nimg / 1000:g}", flush=True)

    def save(self) -> None:
        """Sheet, networks, training state."""
        import pickle

        self.save_fakes("fakes.png")
        networks = {"G": self.state.G, "D": self.state.D, "G_ema": self.state.G_ema}
        with open(self.run_dir / "network-snapshot.pkl", "wb") as file:
            pickle.dump({name: network.state_dict() for name, network in networks.items()}, file)
        self.torch.save(self.state.state_dict(), self.run_dir / "training-state.pt")


def plain_launch(folder: Path) -> None:
    """Everything up to the first status line."""
    peer = Peer(folder)
    peer.save_sheet(peer.read(peer.np.resize(peer.np.arange(IMAGES), peer.columns * peer.rows)), "reals.png")
    peer.save_fakes("fakes_init.png")
    peer.train(1)
    peer.tick()


def plain_snapshot(folder: Path, steps: int, rounds: int) -> list[Seconds]:
    """What snapshots cost."""
    peer = Peer(folder)
    peer.train(1)
    costs = []
    for _ in range(rounds):
        begin = now()
        peer.save()
        peer.train(steps)
        peer.synchronize()
        middle = now()
        peer.train(steps)
        peer.synchronize()
        costs.append(cost(begin, middle, now()))
    peer.mlflow.end_run()
    return costs


def ours_snapshot(folder: Path, steps: int, rounds: int) -> list[Seconds]:
    """What snapshots cost."""
    from gan.cli.options import limit_spinning

    limit_spinning()

    import torch

    from gan.data.dataset import ImageDataset
    from gan.tracking import MlflowTracker
    from gan.training import run_folder
    from gan.training.signals import Signals
    from gan.training.state_files import StateFiles
    from gan.training.trainer import Trainer

    config = config_of(folder / "data.zip")
    costs: list[Seconds] = []

    class Measured(Trainer):
        """Has ticks at will, and measures."""

        def measure(self) -> bool:
            done = self.state.progress.nimg // self.config.batch_size
            if done == 1:
                self._end_tick()
                self._settle()
            elif done % (2 * steps) == 2:  # the steps without a snapshot are over
                self._synchronize()
                here = now()
                if done > 2:
                    costs.append(cost(self.begin, self.middle, here))
                if len(costs) == rounds:
                    raise KeyboardInterrupt
                self.begin = here
                self._end_tick()
            elif done % (2 * steps) == 2 + steps:  # and those with one
                self._settle()
                self.middle = now()
            return False

        def _settle(self) -> None:
            """Until all files are written, and MLflow has them."""
            self.files.outputs.finish()
            (mlflow,) = (t for t in self.files.trackers._trackers if isinstance(t, MlflowTracker))
            while mlflow._images or mlflow._ticks or mlflow.state()["run_id"] is None:
                time.sleep(0.05)
            self._synchronize()

        def _synchronize(self) -> None:
            if self.device.type == "cuda":
                torch.cuda.synchronize()

    run_dir = run_folder.create(folder / "ours", config)
    trainer = Measured(config, run_dir, ImageDataset(config.data.path), StateFiles(run_dir, keep=2), Signals())
    trainer.ticks.is_due = trainer.measure  # type: ignore[method-assign]
    with contextlib.suppress(KeyboardInterrupt):
        trainer.run()
    return costs


def summary(seconds: dict[str, list[Seconds]]) -> dict[str, Any]:
    """Median and spread of both sides, and ours / plain."""
    result: dict[str, Any] = {}
    for i, clock in enumerate(("wall", "processor")):
        sides = {side: [pair[i] for pair in pairs] for side, pairs in seconds.items()}
        medians = {side: statistics.median(times) for side, times in sides.items()}
        result[clock] = {
            **{s: {"median": medians[s], "min": min(t), "max": max(t), "runs": len(t)} for s, t in sides.items()},
            "ours / plain": medians["ours"] / medians["plain"],
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument("--snapshots", type=int, default=2, help="per process")
    parser.add_argument("--steps", type=int, default=32, help="with a snapshot, and as many without; multiples of 16")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side == "plain-launch":
        plain_launch(arguments.folder)
        os._exit(0)  # the clock has stopped
    if arguments.side:
        measure = {"plain": plain_snapshot, "ours": ours_snapshot}[arguments.side]
        print(json.dumps(measure(arguments.folder, arguments.steps, arguments.snapshots)))
        return
    launches: dict[str, list[Seconds]] = {"ours": [], "plain": []}
    stalls: dict[str, list[Seconds]] = {"ours": [], "plain": []}
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            make_dataset(folder / "data.zip")
            script = [sys.executable, str(ROOT / "train.py"), *flags(folder / "data.zip", folder / "runs")]
            launches["ours"].append(launch(script, folder))
            script = [sys.executable, __file__, "--side", "plain-launch", "--folder", name]
            launches["plain"].append(launch(script, folder))
            for side, times in stalls.items():
                command = [sys.executable, __file__, "--side", side, "--folder", name]
                command += ["--steps", str(arguments.steps), "--snapshots", str(arguments.snapshots)]
                output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=folder).stdout
                times += json.loads(output.splitlines()[-1])
        print(f"launch {launches}\nsnapshot {stalls}")
    import harness

    shape = {"resolution": RES, "cbase": CBASE, "cmax": CMAX, "batch": BATCH, "steps": arguments.steps}
    results = {"run": shape, "first tick s": summary(launches), "lost per snapshot s": summary(stalls)}
    print(json.dumps(results, indent=1))
    harness.write("start_stop", results)


if __name__ == "__main__":
    main()
