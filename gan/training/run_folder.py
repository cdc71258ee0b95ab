"""The folder of a run, and finding it again."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from gan.config import TrainConfig
from gan.errors import GanError
from gan.files import explain_os_error, write_text
from gan.tracking import jsonl

OPTIONS_FILE = "training_options.json"
_LOCK_FILE = "run.lock"
_NUMBERED = re.compile(r"(?:network-snapshot-|fakes)(\d{6,})\.(?:pkl|png)")


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
    write_options(run_dir, config)
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
    snapshots = Path(outdir).glob("[0-9][0-9][0-9][0-9][0-9]-*/network-snapshot-[0-9]*.pkl")
    try:
        return max(snapshots, key=lambda p: (p.parent.name[:5], p.name))
    except ValueError:
        raise GanError(f"{outdir}: holds no snapshot yet; train first, or name one with --network FILE") from None


@contextlib.contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """While open, no other process trains in this folder. Raises GanError if one does.

    A lock of the process: whatever ends it, kill -9 included, ends the lock, and processes that it forked hold no part.
    """
    try:
        import fcntl
    except ImportError:  # Windows keeps the files of a run from being replaced while another process has them open
        yield
        return
    path = run_dir / _LOCK_FILE
    try:
        file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise explain_os_error(error, path) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise GanError(f"{run_dir}: is being trained by {holder}; stop that one first, or wait for it") from error
        except OSError:  # a file system without locks
            yield
            return
        with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
            file.truncate(0)
            file.write(f"process {os.getpid()} on {os.uname().nodename}\n")
            file.flush()
        yield


def new_set_aside(run_dir: Path, above: int = 0) -> Path:
    """Make the folder `set-aside-01` or the next, with a number above `above`, and a copy of the statistics in it."""
    taken = [set_aside_number(path) for path in run_dir.glob("set-aside-[0-9][0-9]*")]
    aside = run_dir / f"set-aside-{max([above, *taken]) + 1:02d}"
    try:
        aside.mkdir()
        for path in (run_dir / jsonl.FILE_NAME, run_dir / OPTIONS_FILE):
            if path.exists():
                shutil.copy2(path, aside)
    except OSError as error:
        raise explain_os_error(error, aside) from error
    return aside


def set_aside_number(aside: Path) -> int:
    """The number of a folder that `new_set_aside` made."""
    return int(aside.name.rpartition("-")[2])


def set_aside(run_dir: Path, nimg: int, aside: Path) -> None:
    """Move snapshots and sheets of a time after `nimg` images; what may be of either side of that moment is copied."""
    try:
        for path in sorted(run_dir.iterdir()):
            match = _NUMBERED.fullmatch(path.name)
            if match and int(match[1]) > nimg // 1000:
                os.replace(path, aside / path.name)
            elif match and int(match[1]) == nimg // 1000:
                shutil.copy2(path, aside)
    except OSError as error:
        raise explain_os_error(error, aside) from error
