"""Which of several processes this one is, as whoever started them says: torchrun, our own launcher, Slurm.

Nothing else reads their environment variables but for a word of the doctor's about Slurm. No torch in here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path

JOB_FOLDER = "GAN_JOB_FOLDER"
LOST_EXIT_CODE = 75
"""of a process that has lost the others, as sysexits.h says: try again"""
STOPPED_EXIT_CODE = 130
"""of one that was asked to stop"""


class DistributedError(RuntimeError):
    """Several processes cannot go on together. The text is for people."""


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among those that train together."""

    rank: int = 0
    """0 to size - 1"""
    size: int = 1
    local_rank: int = 0
    """among those of this machine"""
    local_size: int = 1
    address: str | None = None
    """host of the store at which all meet"""
    port: int | None = None
    serves: bool = False
    """whether this process is to make that store, because no agent has"""

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files and speaks to people."""
        return self.rank == 0


def place() -> Place | None:
    """The place of this process; None: it was started by itself. Raises DistributedError for a broken environment.

    Asked before torch is imported, it keeps torch from printing traces of C++ whenever another process is gone.
    """
    found = _found()
    if found is not None:
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    return found


def _found() -> Place | None:
    if "RANK" in os.environ:
        rank = _number("RANK")
        return _checked(
            Place(
                rank=rank,
                size=_number("WORLD_SIZE"),
                local_rank=_number("LOCAL_RANK"),
                local_size=_number("LOCAL_WORLD_SIZE"),
                address=_text("MASTER_ADDR"),
                port=_number("MASTER_PORT"),
                serves=rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
            )
        )
    # of a step: only srun sets it, so that a script of sbatch that starts one process by itself is one by itself
    if os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        return _checked(_slurm_place())
    return None


def _slurm_place() -> Place:
    rank = _number("SLURM_PROCID")
    tasks = tasks_per_node(_text("SLURM_STEP_TASKS_PER_NODE"))
    node = _number("SLURM_NODEID")
    if node >= len(tasks):
        raise _broken("SLURM_NODEID", f"is {node}, but SLURM_STEP_TASKS_PER_NODE names {len(tasks)} nodes")
    # the same on all nodes, not that of another job, and below those that systems give out themselves
    port = 15000 + (_number("SLURM_JOB_ID") + 61 * _number("SLURM_STEP_ID", 0)) % 15000
    return Place(
        rank=rank,
        size=_number("SLURM_STEP_NUM_TASKS"),
        local_rank=_number("SLURM_LOCALID"),
        local_size=tasks[node],
        address=os.environ.get("MASTER_ADDR") or first_host(_text("SLURM_STEP_NODELIST")),
        port=_number("MASTER_PORT", port),
        serves=rank == 0,
    )


def tasks_per_node(text: str) -> list[int]:
    """Slurm's "2(x3),1" is [2, 2, 2, 1]."""
    tasks = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise _broken("SLURM_STEP_TASKS_PER_NODE", f"is {text!r}")
        tasks += [int(match[1])] * int(match[2] or 1)
    return tasks


def first_host(text: str) -> str:
    """Of Slurm's "node[01-04,7],b7" node01."""
    match = re.match(r"(?:[^\[,]|\[[^\]]*\])*", text)  # commas in brackets do not end it
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", match[0] if match else text)


def _checked(place: Place) -> Place:
    if not (0 <= place.rank < place.size and 0 <= place.local_rank < place.local_size <= place.size):
        raise DistributedError(
            f"the environment of this process is contradictory (rank {place.rank} of {place.size}, "
            f"local rank {place.local_rank} of {place.local_size}): start it with torchrun, srun or --gpus"
        )
    return place


def _text(name: str) -> str:
    text = os.environ.get(name, "")
    if not text:
        raise _broken(name, "is not set")
    return text


def _number(name: str, default: int | None = None) -> int:
    if default is not None and not os.environ.get(name):
        return default
    text = _text(name)
    if not text.isdecimal():
        raise _broken(name, f"is {text!r}")
    return int(text)


def _broken(name: str, what: str) -> DistributedError:
    started_by = "srun" if name.startswith("SLURM") else "torchrun"
    return DistributedError(
        f"the environment says that this is one of several processes, but {name} {what}: start all of them with "
        f"{started_by} or --gpus, or unset {'SLURM_STEP_NUM_TASKS' if started_by == 'srun' else 'RANK'}"
    )


def launched() -> bool:
    """Whether our own launcher has started this process."""
    return JOB_FOLDER in os.environ


class Job:
    """What workers that are started again learn from those before them: a folder of whoever starts them, on a node."""

    def __init__(self, folder: Path, start: Path | None = None) -> None:
        self.folder = folder
        self._start = start or folder
        """a folder for the time until workers are started again"""

    @property
    def run_dir(self) -> str | None:
        """The folder of the run that the workers before this one had begun."""
        try:
            return (self.folder / "run").read_text(encoding="utf-8", errors="surrogateescape")
        except OSError:
            return None

    def remember(self, run_dir: str) -> None:
        """Workers that are started again are to continue this run."""
        self._write("run", run_dir)
        self._write("begun", "")

    @property
    def begun(self) -> bool:
        """Whether the workers that are there now are past their start: they heed signals."""
        return (self.folder / "begun").exists()

    def start(self) -> None:
        """Workers are about to be started."""
        (self.folder / "begun").unlink(missing_ok=True)

    @property
    def failed(self) -> int | None:
        """The exit code of a worker whose error starting again would not mend."""
        try:
            return int((self.folder / "failed").read_text())
        except (OSError, ValueError):
            return None

    def fail(self, exit_code: int) -> None:
        """Workers that are started again are to end with this."""
        self._write("failed", str(exit_code))

    def give_up(self, rank: int) -> None:
        """The others of this machine go on without one that did not come in time."""
        with contextlib.suppress(OSError):
            (self.folder / f"given-up.{rank}").touch()

    def take_given_up(self) -> set[int]:
        """Ranks that were given up since this was asked last."""
        found = list(self.folder.glob("given-up.*"))
        for path in found:
            path.unlink(missing_ok=True)
        return {int(path.suffix[1:]) for path in found}

    def first(self, key: str) -> bool:
        """Whether no other worker of this machine has asked this since they were started; better twice than never."""
        try:
            os.close(os.open(self._start / f"first-{key}", os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
        except OSError:
            return True
        return True

    def _write(self, name: str, text: str) -> None:
        # whole or not at all: several workers write it, and each may be killed meanwhile
        temporary = self.folder / f".{name}.{os.getpid()}"
        try:
            temporary.write_text(text, encoding="utf-8", errors="surrogateescape")
            temporary.replace(self.folder / name)
        except OSError:
            temporary.unlink(missing_ok=True)  # a full /tmp: restarted workers will do what the command line says


def job() -> Job | None:
    """What this process's launcher keeps for its workers; None: nobody starts them again."""
    if "RANK" not in os.environ:
        return None
    # torchrun's is RUN_ID_xyz/attempt_2/LOCAL_RANK/error.json
    parents = Path(os.environ.get("TORCHELASTIC_ERROR_FILE", "")).parents
    start = next((parent for parent in parents if parent.name.startswith("attempt_")), None)
    if folder := os.environ.get(JOB_FOLDER):
        return Job(Path(folder), start)
    return None if start is None else Job(start.parent, start)
