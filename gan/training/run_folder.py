"""The folder of a run, and finding it again."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

from gan.config import TrainConfig
from gan.errors import GanError
from gan.files import Locked, explain_os_error, lock, write_text
from gan.snapshot_names import kimg_of

OPTIONS_FILE = "training_options.json"
_LOCK_FILE = "run.lock"


def create(outdir: str | Path, config: TrainConfig) -> Path:
    """Make `00003-metfaces-auto1` with the next free number, holding the options. Raises GanError if it cannot be."""
    outdir = Path(outdir)
    try:
        outdir.mkdir(parents=True, exist_ok=True)
        while True:
            taken = [int(match[1]) for p in outdir.iterdir() if (match := re.match(r"(\d{5})", p.name))]
            run_dir = outdir / f"{max(taken, default=-1) + 1:05d}-{config.desc}"
            try:
                run_dir.mkdir()
                break
            except FileExistsError:  # another run took the number in the meantime
                continue
    except OSError as error:
        raise explain_os_error(error, outdir) from error
    try:
        write_options(run_dir, config)
    except GanError:
        with contextlib.suppress(OSError):  # no run without its options
            run_dir.rmdir()
        raise
    return run_dir


def write_options(run_dir: Path, config: TrainConfig) -> None:
    """Write the options that `read_options` reads."""
    write_text(run_dir / OPTIONS_FILE, config.to_json())


def read_options(run_dir: Path) -> TrainConfig:
    """The configuration of a run. Raises GanError if the folder is not one."""
    path = run_dir / OPTIONS_FILE
    try:
        return TrainConfig.from_json(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise GanError(f"{run_dir}: not a run folder ({OPTIONS_FILE} cannot be read)") from error


def newest(outdir: str | Path) -> Path:
    """The run with the highest number under `outdir`. Raises GanError if there is none."""
    runs = [p.parent for p in Path(outdir).glob(f"[0-9][0-9][0-9][0-9][0-9]-*/{OPTIONS_FILE}")]
    if not runs:
        raise GanError(f"--outdir {outdir}: holds no run to continue; start one with --data DATASET")
    return max(runs, key=lambda run: run.name[:5])


def newest_snapshot(outdir: str | Path) -> Path:
    """The newest snapshot of the newest run under `outdir` that has one. Raises GanError if there is none."""
    paths = Path(outdir).glob("[0-9][0-9][0-9][0-9][0-9]-*/*.pkl")
    snapshots = [(path.parent.name[:5], kimg, path) for path in paths if (kimg := kimg_of(path.name)) is not None]
    try:
        return max(snapshots)[-1]
    except ValueError:
        raise GanError(f"{outdir}: holds no snapshot yet; train first, or name one with --network FILE") from None


def in_kimg(nimg: int) -> str:
    """To the image, as `--at` takes it: 1234.592."""
    return f"{nimg / 1000:.10g}"


def resume_command(run_dir: Path, *options: str) -> str:
    """What to type to continue a run."""
    return shlex.join(["python", "train.py", "--resume", str(run_dir), *options])


@contextlib.contextmanager
def locked(run_dir: Path, report: Callable[[str], None]) -> Iterator[None]:
    """While open, no other process trains in this folder. Raises GanError if one does.

    Whatever ends this process ends the lock (`gan.files.lock`). `report` takes a line where there cannot be any.
    """
    path = run_dir / _LOCK_FILE
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise explain_os_error(error, path) from error
    with file:
        try:
            problem = lock(file)
        except Locked as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise GanError(f"{run_dir}: is being trained by {holder}; stop that one first, or wait for it") from error
        if problem is not None:
            report(f"Run:       {run_dir} cannot be locked ({problem}): take care that no other process trains there")
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {platform.node()}\n".encode())
        yield
