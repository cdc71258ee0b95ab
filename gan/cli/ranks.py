"""A process that trains together with others: what it says where, what they must agree on, and how it ends."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from gan.errors import GanError, LostProcessError, UsageError, printable
from gan.packages import install, is_there
from gan.train_options import flag
from torch_utils import distributed
from torch_utils.distributed import DistributedError, Place

if TYPE_CHECKING:
    from gan.data.dataset import ImageDataset
    from torch_utils.world import World

LOG_NAME = "log-rank{}.txt"
_CAUSE_SECONDS = 3.0  # for whoever knows why processes are lost to say it
_FIRST_SECONDS = 0.5  # for the first process to say what all have found


class GatheredError(UsageError):
    """What all processes found in the command line and the dataset; every one has the same list, and the first says it.

    Its exit code is that of the first problem.
    """

    def __init__(self, problems: Sequence[str], exit_code: int) -> None:
        super().__init__(problems)
        self.exit_code = exit_code


def here() -> Place | None:
    """Which of several processes this one is; None: it was started by itself. Raises GanError."""
    try:
        return distributed.place()
    except DistributedError as error:
        raise GanError(str(error)) from error


class Output:
    """Standard output and error of this process: the first has the screen, the others a file each in the run folder.

    What a process prints before there is a run folder is kept for that file. Only errors of the others are for the
    screen. All of it by file descriptors, since libraries print past Python.
    """

    def __init__(self, place: Place) -> None:
        self._place = place
        self._screen: int | None = None
        self._early: Any = None
        if not place.is_first:
            sys.stdout.flush()
            sys.stderr.flush()
            self._screen = os.dup(2)
            try:
                self._early = tempfile.TemporaryFile()  # noqa: SIM115
            except OSError:  # no folder for it: it is lost, but for errors
                self._early = open(os.devnull, "w+b")  # noqa: SIM115
            self._redirect(self._early.fileno())

    @property
    def in_file(self) -> bool:
        """Whether what is printed can be read in the run folder."""
        return self._screen is not None and self._early is None

    def move_to(self, run_dir: Path) -> None:
        """There is a run folder. On a machine that does not share it, it is made, for this file alone."""
        if self._early is None:
            return
        with contextlib.suppress(OSError):  # then it stays where nobody reads it; errors reach the screen anyway
            run_dir.mkdir(parents=True, exist_ok=True)
            with open(run_dir / LOG_NAME.format(self._place.rank), "ab", buffering=0) as file:
                sys.stdout.flush()
                sys.stderr.flush()
                self._early.seek(0)
                shutil.copyfileobj(self._early, file)
                self._redirect(file.fileno())
                self._early = None

    def error(self, lines: Sequence[str]) -> None:
        """Say an error on the screen, with the rank if this is not the first."""
        rank, host = self._place.rank, printable(platform.node())
        who = f"rank {rank} ({host}): " if rank else ""
        self.screen("".join(f"{who}error: {printable(line)}\n" for line in lines))

    def screen(self, text: str) -> None:
        """Print to the screen, at once, so that lines of several processes do not mix."""
        click.echo(text, nl=False, err=True)  # where what the others print goes, it belongs too
        if self._screen is not None:
            with contextlib.suppress(OSError):
                os.write(self._screen, text.encode("utf-8", "replace"))

    @staticmethod
    def _redirect(descriptor: int) -> None:
        for stream in (1, 2):
            os.dup2(descriptor, stream)


class Ranks:
    """The processes of this run as one of them sees them.

    Attributes:
        place: of this one.
        world: all of them, once `join` has met them.
        output: of this one.
        job: what is kept for workers that replace this one; None: nobody starts any.
    """

    def __init__(self, place: Place) -> None:
        from torch_utils.world import World

        self.place = place
        self.world: World = World(place)
        self.output = Output(place)
        self.job = distributed.job()

    def join(self, timeout: float) -> None:
        """Meet the others. Raises DistributedError, naming those that do not come."""
        from torch_utils.world import join

        self.world = join(self.place, timeout)
        self.world.on_hang = self._hangs

    def run_to_go_on_with(self) -> Path | None:
        """The run of those that these processes replace; None: they replace none."""
        own = None if self.job is None else self.job.run_dir
        known = [run for run in self.world.gather(own, "the start") if run is not None]
        return Path(known[0]) if known else None

    def remember(self, run_dir: Path) -> None:
        """What replaces this process continues this run, whatever the command line says."""
        if self.job is not None:
            self.job.remember(str(run_dir))

    def require_none(self, problems: Sequence[str], exit_code: int = 2) -> None:
        """Raises GatheredError with the problems of all processes if any has one; `exit_code` if it is the first."""
        found = self.world.gather([exit_code, list(problems)], "the checks")
        said: dict[str, str] = {}
        for rank, (_, own) in enumerate(found):
            for problem in own:
                said.setdefault(problem, problem if rank == 0 else f"rank {rank} ({self.world.hosts[rank]}): {problem}")
        if said:
            code = next(code for code, own in found if own)
            raise GatheredError([_as_started(line, self.place) for line in said.values()], code)

    @contextlib.contextmanager
    def speaking(self) -> Iterator[None]:
        """Inside, errors are said once by all processes together, root cause first, and end this one."""
        try:
            yield
        except click.exceptions.Exit:
            raise
        except (Exception, KeyboardInterrupt) as error:
            # PyTorch's launcher asks those that are left to end, which this one does as soon as it has spoken.
            _ignore("SIGTERM", "SIGINT")
            self._end_with(error)

    def _end_with(self, error: BaseException) -> NoReturn:
        if isinstance(error, GatheredError):
            if self.place.is_first:
                self.output.error(error.problems)
            self._end(error.exit_code)
        if isinstance(error, LostProcessError | DistributedError):
            time.sleep(_CAUSE_SECONDS)
            self._say(str(error).splitlines(), self._is_first_to("error"))
            self._end(LostProcessError.exit_code, for_good=False)
        if isinstance(error, GanError):
            time.sleep(0.0 if self.place.is_first else _FIRST_SECONDS)
            self._say(str(error).splitlines(), self._is_first_cause())
            self._end(error.exit_code)
        if isinstance(error, KeyboardInterrupt):
            if self._is_first_to("interrupt"):
                self.output.screen("interrupted\n")
            self._is_first_to("error")  # that it is gone is no news then
            self.world.leave(f"rank {self.place.rank} was interrupted")
            self._end(distributed.STOPPED_EXIT_CODE, for_good=False)
        self._say_unknown(error)
        self._end(1, for_good=False)

    def _hangs(self, text: str) -> None:
        self._say([text], self._is_first_to("error"))

    def _say(self, lines: Sequence[str], aloud: bool) -> None:
        if aloud:
            self.output.error(lines)
        elif not self.place.is_first:
            click.echo("".join(f"error: {printable(line)}\n" for line in lines), nl=False, err=True)

    def _say_unknown(self, error: BaseException) -> None:
        """An error that is not for people: its traceback is in the log, or on the screen if there is none."""
        details = traceback.format_exc()
        is_first = self._is_first_cause()
        if self.place.is_first:
            if is_first:
                click.echo(details, nl=False, err=True)
            return
        click.echo(details, nl=False, err=True)
        if not is_first:
            return
        words = " ".join(str(error).split())[:300]
        kind = f"{type(error).__name__}: {words}" if words else type(error).__name__
        if self.output.in_file:
            self.output.error([f"{kind}; more in {LOG_NAME.format(self.place.rank)} of the run folder"])
        else:
            self.output.error([kind, *details.splitlines()])

    def _is_first_cause(self) -> bool:
        """Whether a cause is news, which it is also after somebody has missed the process that it has befallen.

        That somebody is lost is none any more then.
        """
        first = self._is_first_to("cause")
        self._is_first_to("error")
        return first

    def _is_first_to(self, what: str) -> bool:
        """Whether no other process is; without the store, where all meet, none of this machine."""
        try:
            first = self.world.first(what)
        except Exception:  # it is gone with whoever kept it
            first = True
        return first and (self.job is None or self.job.first(what))

    def _end(self, exit_code: int, for_good: bool = True) -> NoReturn:
        """End this process; `for_good`: those that replace it are to end as well."""
        if for_good and self.job is not None:
            self.job.fail(exit_code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)  # past PyTorch, which aborts, or waits, if something is still under way between processes


def launch(processes: int, max_restarts: int, in_vain: str | None = None) -> int:
    """Have this command line run by as many processes as --gpus says; its exit code.

    `in_vain`: what is said when processes are lost for good, in place of what --max-restarts has to do with it.
    """
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise GanError(f"no temporary folder can be written ({error.strerror}); TMPDIR names another") from error
    if not is_there("psutil"):
        raise GanError(f"--gpus {processes} needs psutil: {install('psutil')}")
    from torch_utils import launch as launcher

    command = [sys.executable, *sys.orig_argv[1:]]
    try:
        return launcher.launch(command, processes, max_restarts, lambda line: click.echo(line, err=True), in_vain)
    except DistributedError as error:
        raise LostProcessError(str(error)) from error


def counted(typed: int | None, place: Place) -> tuple[int, list[str]]:
    """--gpus of processes that were started by others, and the problem if something else was typed."""
    if typed is None or typed == place.size:
        return place.size, []
    were = "process was" if place.size == 1 else "processes were"
    return place.size, [f"--gpus {typed}: {place.size} {were} started; leave it out"]


def ignore_early_signals() -> None:
    """There is nothing yet that SIGUSR1 could have saved, and by itself it ends a process."""
    _ignore("SIGUSR1")


def _ignore(*names: str) -> None:
    for name in names:
        with contextlib.suppress(AttributeError, ValueError):  # Windows has it not; in another thread
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def same_options(world: World, given: Mapping[str, Any]) -> list[str]:
    """The problem with processes that were started with other options than the first."""
    first, *others = world.gather(dict(given), "the options")
    for rank, other in enumerate(others, 1):
        different = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if different:
            shown = ", ".join(map(flag, different))
            return [f"{shown}: rank {rank} ({world.hosts[rank]}) was started with something else; give all the same"]
    return []


def same_images(world: World, dataset: ImageDataset | None) -> list[str]:
    """The problem with a machine whose copy of the dataset is another; None: this process could not open its own."""
    first, *others = world.gather(None if dataset is None else dataset.fingerprint_anywhere, "the dataset")
    for rank, other in enumerate(others, 1):
        if other != first and None not in (first, other):
            path = "" if dataset is None else f" {dataset.path}"
            where = f"rank {rank} ({world.hosts[rank]})"
            return [f"--data{path}: {where} has other images there than rank 0; copy the dataset to all machines"]
    return []


def described(world: World) -> str:
    """How many processes on which machines, and how they talk: `4 on 2 machines (2 on a, 2 on b), over NCCL`."""
    machines = Counter(world.hosts)
    if len(machines) == 1:
        where = "this machine"
    else:
        shown = [f"{count} on {printable(host)}" for host, count in list(machines.items())[:8]]
        where = f"{len(machines)} machines ({', '.join(shown)}{', ...' if len(machines) > 8 else ''})"
    return f"{world.size} on {where}, over {'NCCL' if world.backend == 'nccl' else 'gloo'}"


def _as_started(problem: str, place: Place) -> str:
    """A problem in the words of who has not typed --gpus, but started so many processes."""
    if any(argument.split("=")[0] == "--gpus" for argument in sys.argv):
        return problem
    count = "1 process" if place.size == 1 else f"{place.size} processes"
    return problem.replace(f"--gpus {place.size} =", f"{count} =").replace(
        f"by --gpus {place.size};", f"by the {place.size} processes;"
    )
