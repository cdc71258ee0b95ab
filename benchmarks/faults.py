"""What becomes of a run to which things happen: `python benchmarks/faults.py`; `--quick` for 10 kills in a minute.

A tiny run is trained once without disturbance. Then the same run is killed (-9) at random moments and continued, runs
on a file system of a few MB that fills up, and logs to an MLflow server that is killed, hung and brought back. Each
time what it has left behind is compared with the undisturbed run: tensors of all snapshots and of the training state,
sheets, stats.jsonl, MLflow's metrics. Everything goes through the command line, as a user's runs do.

Ends with a line of figures; exit code 1 if anything was lost, torn, or different.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import harness
import numpy as np
import PIL.Image
import torch

from gan import models
from gan.training.state_files import NEWEST, read_state

ROOT = Path(__file__).parents[1]
RES, BATCH, KIMG = 16, 20, 2
RUN = ["--cbase", 64, "--cmax", 8, "--map-depth", 1, "--batch", BATCH, "--mbstd-group", 5, "--kimg", KIMG]
RUN += ["--tick", 0.2, "--snap", 5, "--save-every", 0.01, "--device", "cpu", "--precision", "fp32"]
NOWHERE = "http://127.0.0.1:9"  # an MLflow server that is never there


@dataclasses.dataclass
class Fault:
    """What was done to runs, and what came of it."""

    name: str
    injected: int = 0
    runs: int = 0
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: dict[str, Any] = dataclasses.field(default_factory=dict)


class Bench:
    """A folder with a dataset, an empty MLflow store, and the undisturbed run."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng = folder, rng
        self.data, self.store = folder / "data.zip", folder / "empty.db"
        draw_dataset(self.data)
        making = subprocess.Popen(  # MLflow takes 10 s to make one, beside the first run
            [
                sys.executable,
                "-c",
                f"import mlflow; mlflow.MlflowClient('sqlite:///{self.store}').search_experiments()",
            ],
            env=environment(),
            stderr=subprocess.DEVNULL,
        )
        begin = time.monotonic()
        self.whole = self.new_outdir("whole")
        process = self.start(self.whole, uri=NOWHERE)
        self.first_step = self._wait_for_tick(process) - begin
        output, _ = process.communicate()
        assert process.returncode == 0, output
        self.seconds = time.monotonic() - begin
        making.wait()
        self.expected = contents(run_dir_of(self.whole))

    def new_outdir(self, name: str) -> Path:
        """A folder for runs, with an MLflow store if that is made."""
        outdir = self.folder / name
        outdir.mkdir()
        if self.store.exists():
            shutil.copy(self.store, outdir / "mlflow.db")
        return outdir

    def start(self, outdir: Path, uri: str | None = None, extra: list[object] | None = None) -> subprocess.Popen[str]:
        """Start the run, or continue it, in a process group of its own."""
        begun = any(outdir.glob("0*/training_options.json"))
        new = ["--data", self.data, *RUN]
        arguments = ["--outdir", outdir, *(["--resume"] if begun else new), *(extra or [])]
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *map(str, arguments)],
            env=environment(uri),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def compare(self, outdir: Path, fault: Fault, mlflow_db: Path | None = None) -> None:
        """Note every difference from the undisturbed run."""
        run_dir = run_dir_of(outdir)
        found = contents(run_dir)
        for name in sorted({*self.expected, *found}):
            if found.get(name) != self.expected.get(name):
                what = "missing" if name not in found else "not expected" if name not in self.expected else "different"
                fault.problems.append(f"{run_dir}: {name} is {what}")
        if mlflow_db is not None:
            fault.problems += mlflow_problems(mlflow_db, run_dir)

    @staticmethod
    def _wait_for_tick(process: subprocess.Popen[str]) -> float:
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("tick 0 "))
        return time.monotonic()


def kills(bench: Bench, count: int, span: float = 0.7) -> Fault:
    """kill -9 at random moments, at the start of the program as well as in its steps and writes.

    `span`: in which part of the run, measured from its first step.
    """
    fault = Fault("kill -9 at a random moment, then --resume")
    while fault.injected < count:
        outdir = bench.new_outdir(f"killed{fault.runs}")
        fault.runs += 1
        complete = False
        while not complete:
            process = bench.start(outdir)  # or continue
            last = bench.first_step + (bench.seconds - bench.first_step) * span
            moment = bench.rng.uniform(0.3 * bench.first_step, last) if fault.injected < count else None
            try:
                output, _ = process.communicate(timeout=moment)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                fault.injected += 1
                continue
            complete = process.returncode == 0
            if not complete:
                begun = any(outdir.glob("0*/training_options.json"))
                kind = "continued" if begun else "new"
                fault.problems.append(f"{outdir}: exit {process.returncode} ({kind}): {output}")
                return fault
        bench.compare(outdir, fault, outdir / "mlflow.db")
    return fault


def full_disk(bench: Bench, count: int) -> Fault:
    """A file system of a few MB that something else fills at a random moment and frees at another."""
    fault = Fault("disk full in the middle, freed later")
    fault.notes.update(not_written=0, ended_early=0)
    for i in range(count):
        outdir = bench.folder / f"small{i}"
        outdir.mkdir()
        with small_disk(outdir, "32m"):
            fault.runs += 1
            process = bench.start(outdir, uri=NOWHERE)
            if i % 3:  # else it may be full before the first state: then the run ends at once
                wait_for_state(outdir)
            time.sleep(bench.rng.uniform(0, bench.seconds - bench.first_step) * 0.4)
            fill(outdir / "ballast")
            fault.injected += 1
            time.sleep(bench.rng.uniform(0.5, 1.5))
            if i % 2:  # else it stays full to the end: no success may be claimed
                (outdir / "ballast").unlink()
            output, _ = process.communicate()
            fault.notes["not_written"] += output.count("WAS NOT WRITTEN")
            fault.problems += [f"{outdir}: a traceback: {output}"] * ("Traceback" in output)
            torn = [problem for run_dir in outdir.glob("0*") for problem in torn_files(run_dir)]
            fault.problems += torn
            (outdir / "ballast").unlink(missing_ok=True)
            if process.returncode != 0:
                fault.notes["ended_early"] += 1
                process = bench.start(outdir, uri=NOWHERE)
                output, _ = process.communicate()
                if process.returncode != 0:
                    fault.problems.append(f"{outdir}: cannot be continued: {output}")
                    continue
            state = contents(run_dir_of(outdir))
            for name in (NEWEST, f"network-snapshot-{KIMG:06d}.pkl", f"fakes{KIMG:06d}.png", "stats.jsonl"):
                if state.get(name) != bench.expected[name]:
                    fault.problems.append(f"{outdir}: {name} is {'different' if name in state else 'missing'}")
    return fault


def server_faults(bench: Bench, count: int) -> Fault:
    """An MLflow server that is killed, or stopped, and brought back.

    Before the fault the longest step is one in which MLflow is imported.
    """
    fault = Fault("MLflow server killed or hung, then back")
    longest = {"before": 0.0, "from_then_on": 0.0}
    for i in range(count):
        outdir, kill = bench.new_outdir(f"served{i}"), i % 2 == 0
        database, port = outdir / "server.db", free_port()
        shutil.copy(bench.store, database)
        server = start_server(database, port)
        longer = ["--kimg", 2 * KIMG, "--tick", BATCH / 1000]  # a tick a step, for its duration
        process = bench.start(outdir, uri=f"http://127.0.0.1:{port}", extra=longer)
        fault.runs += 1
        time.sleep(bench.first_step + bench.rng.uniform(2, 5))
        moment = time.time()
        os.killpg(server.pid, signal.SIGKILL if kill else signal.SIGSTOP)
        fault.injected += 1
        time.sleep(3)
        if kill:
            server.wait()
            server = start_server(database, port)
        else:
            os.killpg(server.pid, signal.SIGCONT)
        output, _ = process.communicate()
        if process.returncode != 0:
            fault.problems.append(f"{outdir}: exit {process.returncode}: {output}")
        run_dir = run_dir_of(outdir)
        subprocess.run(
            [sys.executable, "-m", "gan", "mlflow-sync", str(run_dir)],
            cwd=ROOT,
            env=environment(f"http://127.0.0.1:{port}"),
            check=True,
            stdout=subprocess.DEVNULL,
        )
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
        fault.problems += mlflow_problems(database, run_dir)
        for tick in map(json.loads, (run_dir / "stats.jsonl").read_text().splitlines()):
            when = "before" if tick["timestamp"] < moment else "from_then_on"
            longest[when] = max(longest[when], tick["Timing/sec_per_tick"]["mean"])
    fault.notes.update({f"longest_step_{when}_s": round(seconds, 2) for when, seconds in longest.items()})
    if longest["from_then_on"] > 1:
        fault.problems.append(f"a step took {longest['from_then_on']:.2f} s")
    return fault


def contents(run_dir: Path) -> dict[str, str]:
    """Digests of everything in a run folder that does not tell the time; a torn file says what is wrong with it."""
    found = {}
    for path in sorted(run_dir.iterdir()):
        if path.name not in ("log.txt", "run.lock", "mlflow-run.json", "training_options.json"):
            try:
                found[path.name] = digest(path)
            except Exception as error:
                found[path.name] = f"torn: {error}"
    # When an older state was saved goes by the clock.
    return {name: text for name, text in found.items() if not name.startswith("training-state-")}


def torn_files(run_dir: Path) -> list[str]:
    """Files that are not whole, and temporary ones."""
    return [
        f"{run_dir}: {name} {text}"
        for name, text in contents(run_dir).items()
        if text.startswith("torn") or name.endswith(".tmp")
    ]


def digest(path: Path) -> str:
    """Of what a file says, times apart."""
    text = hashlib.sha256()
    if path.suffix == ".pkl":
        snapshot = models.load(path)
        for name in ("G", "D", "G_ema"):
            update(text, getattr(snapshot, name).state_dict())
    elif path.suffix == ".pt":
        state = read_state(path).state
        progress = {k: v for k, v in state["progress"].items() if not k.endswith("seconds")}
        update(text, {**state, "progress": progress})
    elif path.name == "stats.jsonl":
        for line in path.read_text().splitlines():
            record = json.loads(line)
            timed = ("Timing/", "Resources/", "timestamp")
            text.update(json.dumps({k: v for k, v in record.items() if not k.startswith(timed)}).encode() + b"\n")
    else:
        with contextlib.suppress(PIL.UnidentifiedImageError), PIL.Image.open(path) as image:
            image.load()
        text.update(path.read_bytes())
    return text.hexdigest()


def update(text: Any, value: Any) -> None:
    if isinstance(value, torch.Tensor):
        text.update(value.contiguous().numpy().tobytes())
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            text.update(str(key).encode())
            update(text, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            update(text, item)
    else:
        text.update(repr(value).encode())


def mlflow_problems(database: Path, run_dir: Path) -> list[str]:
    """Ticks that the store has twice or not at all, and runs that are there twice."""
    lines = (run_dir / "stats.jsonl").read_text().splitlines()
    expected = [json.loads(line)["Progress/kimg"]["mean"] for line in lines]
    with contextlib.closing(sqlite3.connect(database)) as store:
        rows = store.execute("select run_uuid, value from metrics where key = 'Progress/kimg' order by step").fetchall()
    problems = [f"{database}: {len({run for run, _ in rows})} runs"] * (len({run for run, _ in rows}) != 1)
    if [value for _, value in rows] != expected:
        problems.append(f"{database}: {len(rows)} ticks instead of {len(expected)}, or others")
    return problems


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    """Mount a file system of this size there."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def wait_for_state(outdir: Path) -> None:
    """Until a run has saved its first state."""
    while not any(outdir.glob(f"0*/{NEWEST}")):
        time.sleep(0.05)


def fill(path: Path) -> None:
    """Take all the room that is left."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        size = 2**16
        while size:
            try:
                if file.write(b"\0" * size) < size:
                    size //= 2
            except OSError:
                size //= 2


def may_mount() -> bool:
    """Whether this process may; otherwise it may be started again in a namespace of its own, where it does."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            with small_disk(Path(folder), "1m"):
                return True
        except (OSError, subprocess.CalledProcessError):
            return False


def start_server(database: Path, port: int) -> subprocess.Popen[bytes]:
    """`mlflow server` on this database; returns when it answers."""
    arguments = ["--host", "127.0.0.1", "--port", port, "--backend-store-uri", f"sqlite:///{database}"]
    arguments += ["--artifacts-destination", database.parent / "served"]
    server = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *map(str, arguments)],
        env={**environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    for _ in range(600):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1)
            return server
        time.sleep(0.1)
    raise SystemExit("the MLflow server does not start")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(uri: str | None = None) -> dict[str, str]:
    """One thread a run: networks this small gain nothing from more."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
    chosen = {} if uri is None else {"MLFLOW_TRACKING_URI": uri}
    return {**kept, **chosen, "OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}


def run_dir_of(outdir: Path) -> Path:
    (run_dir,) = outdir.glob("0*")
    return run_dir


def draw_dataset(path: Path) -> None:
    """Coloured gradients, packed as dataset_tool.py packs."""
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for i in range(60):
            buffer = io.BytesIO()
            image = PIL.Image.fromarray(rng.integers(0, 256, [2, 2, 3], dtype=np.uint8)).resize((RES, RES))
            image.save(buffer, format="PNG", compress_level=0)
            archive.writestr(f"00000/img{i:08d}.png", buffer.getvalue())
        archive.writestr("dataset.json", json.dumps({"labels": None}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 kills and nothing else, in under a minute; no JSON")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--disks", type=int, default=10)
    parser.add_argument("--servers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=None, help="of the moments; by default another one each time")
    options = parser.parse_args()
    if not options.quick and not may_mount() and "GAN_FAULTS_NAMESPACE" not in os.environ and shutil.which("unshare"):
        os.environ["GAN_FAULTS_NAMESPACE"] = "1"
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--mount", sys.executable, *sys.argv])
    seed = random.randrange(10**6) if options.seed is None else options.seed
    begin = time.monotonic()
    faults: list[Fault] = []
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), random.Random(seed))
        print(f"undisturbed: first tick after {bench.first_step:.1f} s, all of it {bench.seconds:.1f} s; seed {seed}")
        parts: list[tuple[Callable[[Bench, int], Fault], int]] = [(functools.partial(kills, span=0.2), 10)]
        if not options.quick:
            parts = [(kills, options.kills), (full_disk, options.disks), (server_faults, options.servers)]
        if not options.quick and not may_mount():
            print("no right to mount a small file system here: full disks are left out")
            del parts[1]
        for inject, count in parts:
            fault = inject(bench, count)
            faults.append(fault)
            print(f"{fault.name}: {fault.injected} times in {fault.runs} runs {fault.notes or ''}", flush=True)
            for problem in fault.problems:
                print(f"  LOST: {problem}", flush=True)
    if not options.quick:
        harness.write("faults", {fault.name: dataclasses.asdict(fault) for fault in faults})
    lost = sum(len(fault.problems) for fault in faults)
    figures = ", ".join(f"{fault.injected} x {fault.name}" for fault in faults)
    print(f"{figures}: {lost} things lost, torn or different, in {time.monotonic() - begin:.0f} s")
    raise SystemExit(lost > 0)


if __name__ == "__main__":
    main()
