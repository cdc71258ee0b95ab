"""What a process does differently when it trains with others: what it says where, and how it ends."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from runs import run_train
from tiny import write_dataset

import torch_utils.world
from gan.cli import ranks
from gan.cli import train as command
from gan.cli.order import Order
from gan.cli.ranks import GatheredError
from gan.config import DataInfo
from gan.data.dataset import ImageDataset
from gan.errors import GanError
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import devices, run, run_folder
from torch_utils.distributed import JOB_FOLDER, Job, Place
from torch_utils.world import World

ROOT = Path(__file__).parents[2]
HOST = platform.node()


class Told(World):
    """A world in which everything that the others say is known beforehand."""

    def __init__(self, rank: int, others: list[Any], hosts: list[str]) -> None:
        super().__init__(Place(rank=rank, size=len(hosts), local_rank=rank, local_size=len(hosts)))
        self.hosts, self.others = hosts, others
        self.backend = "gloo"

    def gather(self, value: Any, what: str) -> list[Any]:
        return [*self.others[: self.rank], value, *self.others[self.rank :]]


def party(world: World) -> ranks.Ranks:
    one = ranks.Ranks(Place())
    one.place, one.world = world.place, world
    return one


def test_where_the_processes_are_is_said_in_a_line() -> None:
    assert ranks.described(Told(0, [], ["a", "a"])) == "2 on this machine, over gloo"
    assert ranks.described(Told(0, [], ["a", "b", "a"])) == "3 on 2 machines (2 on a, 1 on b), over gloo"
    many = Told(0, [], [f"n{i}" for i in range(9)])
    many.backend = "nccl"
    assert ranks.described(many).startswith("9 on 9 machines (1 on n0, 1 on n1, ")
    assert ranks.described(many).endswith("1 on n7, ...), over NCCL")


def test_as_many_processes_count_as_were_started() -> None:
    place = Place(rank=1, size=4, local_rank=1, local_size=4)
    assert ranks.counted(None, place) == ranks.counted(4, place) == (4, [])
    assert ranks.counted(2, place) == (4, ["--gpus 2: 4 processes were started; leave it out"])
    assert ranks.counted(2, Place()) == (1, ["--gpus 2: 1 process was started; leave it out"])


def test_all_must_be_started_alike() -> None:
    assert ranks.same_options(Told(0, [{"kimg": 1}], ["a", "b"]), {"kimg": 1}) == []
    assert ranks.same_options(Told(1, [{"kimg": 1, "mirror": True}], ["a", "b"]), {"kimg": 2}) == [
        "--kimg, --mirror: rank 1 (b) was started with something else; give all the same"
    ]


def test_all_must_have_the_same_images(tmp_path: Path) -> None:
    write_dataset(tmp_path / "a.zip", classes=2)
    write_dataset(tmp_path / "b.zip", classes=2)
    write_dataset(tmp_path / "other.zip", classes=4)
    a, b, other = (ImageDataset(tmp_path / f"{name}.zip", use_labels=True) for name in ("a", "b", "other"))
    assert ranks.same_images(Told(0, [b.fingerprint_anywhere], ["a", "b"]), a) == []
    assert ranks.same_images(Told(0, [None], ["a", "b"]), a) == ranks.same_images(Told(1, [None], ["a", "b"]), a) == []
    assert ranks.same_images(Told(0, [other.fingerprint_anywhere], ["a", "b"]), a) == [
        f"--data {tmp_path / 'a.zip'}: rank 1 (b) has other images there than rank 0; copy the dataset to all machines"
    ]
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        archive.extractall(tmp_path / "folder")
        archive.extractall(tmp_path / "copy")
    os.utime(next((tmp_path / "copy").rglob("*.png")), (1, 1))
    folder, copy = (ImageDataset(tmp_path / name, use_labels=True) for name in ("folder", "copy"))
    assert folder.fingerprint != copy.fingerprint
    assert folder.fingerprint_anywhere == copy.fingerprint_anywhere
    with open(tmp_path / "copy" / "dataset.json", "a") as file:
        file.write(" ")
    assert folder.fingerprint_anywhere != copy.fingerprint_anywhere


@pytest.mark.parametrize("rank", [0, 1])
def test_problems_of_all_are_one_list_in_every_process(rank: int) -> None:
    found: list[Any] = [[2, ["--gamma -1: no"]], [1, ["--gamma -1: no", "a.zip: is gone"]]]
    world = Told(rank, [found[1 - rank]], ["a", "b"])
    with pytest.raises(GatheredError) as caught:
        party(world).require_none(found[rank][1], found[rank][0])
    assert caught.value.problems == ["--gamma -1: no", "rank 1 (b): a.zip: is gone"]
    assert caught.value.exit_code == 2
    party(Told(rank, [[2, []]], ["a", "b"])).require_none([], 1)


def test_the_exit_code_is_that_of_whoever_had_a_problem() -> None:
    with pytest.raises(GatheredError) as caught:
        party(Told(0, [[1, ["a.zip: is gone"]]], ["a", "b"])).require_none([])
    assert caught.value.exit_code == 1


def test_what_does_not_divide_is_said_in_the_words_of_who_typed_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    problems = [
        "--batch 12 is not divisible by --gpus 8; try 8 or 16",
        "--batch-gpu 5 does not divide --batch 16 / --gpus 8 = 2; try one of 1, 2",
    ]
    seen = {}
    for argv in (["train.py"], ["train.py", "--gpus=8"]):
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(GatheredError) as caught:
            party(Told(0, [[2, []]] * 7, ["a"] * 8)).require_none(problems)
        seen[len(argv)] = caught.value.problems
    assert seen[2] == problems
    assert seen[1] == [
        "--batch 12 is not divisible by the 8 processes; try 8 or 16",
        "--batch-gpu 5 does not divide --batch 16 / 8 processes = 2; try one of 1, 2",
    ]


CPU_RUN = resolve(TrainOptions(data="x", device="cpu", dist_timeout=9), DataInfo("x", "tiny", 40, 16, 16, 3))


def test_patience_is_that_of_the_run_unless_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = run_folder.create(tmp_path, CPU_RUN)
    again, new = TrainOptions(resume=str(run_dir)), TrainOptions(data="x")
    assert command._patience(again, set(), None) == 9
    job = Job(tmp_path)
    job.remember(str(run_dir))
    assert command._patience(new, set(), job) == 9
    for typed, counts in ((5, 5), (float("inf"), 600), (-1, 600)):
        assert command._patience(dataclasses.replace(again, dist_timeout=typed), {"dist_timeout"}, None) == counts
    monkeypatch.chdir(run_dir)  # a new run has nothing of the run in whose folder somebody types
    assert command._patience(new, set(), None) == 600


@pytest.mark.parametrize("at", [None, 0.5])
def test_a_run_that_is_to_go_back_is_not_remembered_before_it_has(
    at: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = []

    def go_back(*args: Any, begun: Any, **kwargs: Any) -> bool:
        known.append(one.job.run_dir)
        begun()
        known.append(one.job.run_dir)
        return True

    monkeypatch.setattr(run, "train", go_back)
    monkeypatch.setattr(devices, "prepare", lambda *args: None)
    one = party(World())
    one.job = Job(tmp_path)
    assert command._start_together(one, Order(CPU_RUN, None, tmp_path / "run", at))  # type: ignore[arg-type]
    assert known == [None if at else str(tmp_path / "run"), str(tmp_path / "run")]


def test_a_run_has_begun_when_it_has_gone_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    class Complete:
        complete = True

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            events.append("all have its state")

        def settle(self) -> None:
            pass

    run_dir = run_folder.create(tmp_path, CPU_RUN)
    monkeypatch.setattr(run, "_state_to_go_on_from", lambda *args: events.append("gone back"))
    monkeypatch.setattr(run, "Trainer", Complete)
    dataset: Any = None
    assert run.train(CPU_RUN, run_dir, dataset, continued=True, at=0.5, begun=lambda: events.append("begun"))
    assert events == ["gone back", "all have its state", "begun"]


def test_workers_that_are_started_in_vain_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Job(tmp_path).fail(3)
    monkeypatch.setenv(JOB_FOLDER, str(tmp_path))
    said = {}
    for rank in (0, 1):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
        for name, value in {**place, "MASTER_ADDR": "localhost"}.items():
            monkeypatch.setenv(name, str(value))
        result = run_train("--data", "x.zip")
        assert result.exit_code == 3
        said[rank] = result.output
    assert said == {0: "started again in vain: mend the error above first (exit code 3)\n", 1: ""}


def test_what_keeps_processes_from_being_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranks, "is_there", lambda module: module != "psutil")
    with pytest.raises(GanError, match=r"^--gpus 1 needs psutil: python -m pip install .*psutil$"):
        ranks.launch(1, 0)

    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    monkeypatch.setattr(tempfile, "gettempdir", nowhere)
    with pytest.raises(GanError, match=r"No usable temporary directory found in \['/tmp'\]\); TMPDIR names another"):
        ranks.launch(1, 0)


# A process of rank 1 for each way to end, and one of rank 0; PyTorch is loaded once.
_ENDINGS = """
import json, os, signal, sys, tempfile
from pathlib import Path
from gan.cli import ranks
from gan.errors import FailedRunError, LostProcessError
from torch_utils.distributed import Job, Place
from torch_utils.world import World

ranks._CAUSE_SECONDS = ranks._FIRST_SECONDS = 0.0
folder = Path(sys.argv[1])

class First(World):
    def first(self, what):
        return what not in self.said

    def leave(self, text):
        (folder / "left").write_text(text)

def asked_to_end(seconds):
    os.kill(os.getpid(), signal.SIGTERM)

def no_folder():
    raise FileNotFoundError("No usable temporary directory found")

def case(name, error, rank=1, said=(), run_dir=True, here=None):
    own = folder / name
    own.mkdir()
    child = os.fork()
    if child == 0:
        screen = os.open(own / "screen", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        os.dup2(screen, 1)
        os.dup2(screen, 2)
        if name == "asked to end":
            ranks.time.sleep = asked_to_end
        if name == "cause comes":
            ranks.time.sleep = lambda seconds: Job(own).first("error")
        if name == "no folder":
            tempfile.TemporaryFile = no_folder
        if here:
            Job(own).first(here)
        party = ranks.Ranks(Place(rank=rank, size=2, local_rank=rank, local_size=2))
        party.world, party.job = First(party.place), Job(own)
        party.world.said = said
        with party.speaking():
            print("early")
            if run_dir:
                party.output.move_to(own / "run-dir")
                party.remember(own / "run-dir")
            os.write(1, b"late, past Python\\n")
            raise error
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    log = own / "run-dir" / "log-rank1.txt"
    job = Job(own)
    return {
        "exit": status,
        "screen": (own / "screen").read_text(),
        "log": log.read_text() if log.exists() else None,
        "failed": job.failed,
        "run": job.run_dir,
        "loss is news": job.first("error"),
    }

cases = {
    "people": case("people", FailedRunError("it diverged")),
    "late": case("late", FailedRunError("it diverged"), said=("error", "cause")),
    "missed": case("missed", FailedRunError("it diverged"), said=("error",)),
    "lost late": case("lost late", LostProcessError("rank 0 is gone"), said=("error", "cause")),
    "first": case("first", FailedRunError("it diverged"), rank=0, run_dir=False),
    "lost": case("lost", LostProcessError("rank 0 is gone")),
    "lost, the store too": case("lost, the store too", LostProcessError("rank 0 is gone"), here="error"),
    "asked to end": case("asked to end", LostProcessError("rank 0 is gone")),
    "cause comes": case("cause comes", LostProcessError("rank 0 is gone")),
    "no folder": case("no folder", ValueError()),
    "unknown": case("unknown", ValueError("odd")),
    "unknown early": case("unknown early", ValueError("odd"), run_dir=False),
    "interrupted": case("interrupted", KeyboardInterrupt()),
    "gathered": case("gathered", ranks.GatheredError(["--batch 3: no"], 2)),
}
print(json.dumps({**cases, "left": (folder / "left").read_text()}))
"""


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    command = [sys.executable, "-c", _ENDINGS, str(tmp_path_factory.mktemp("endings"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(done.stdout)
    return result


def test_an_error_for_people_is_on_the_screen_with_its_rank_and_ends_those_that_follow(endings: Any) -> None:
    found = endings["people"]
    assert found["screen"] == f"rank 1 ({HOST}): error: it diverged\n"
    assert found["log"] == f"early\nlate, past Python\nrank 1 ({HOST}): error: it diverged\n"
    assert (found["exit"], found["failed"]) == (3, 3)
    assert found["run"].endswith("run-dir")


def test_only_the_first_error_is_on_the_screen(endings: Any) -> None:
    found = endings["late"]
    assert found["screen"] == ""
    assert found["log"].endswith("\nerror: it diverged\n")
    assert found["exit"] == 3
    assert endings["lost late"]["screen"] == ""


def test_a_cause_is_said_also_after_others_have_missed_that_process(endings: Any) -> None:
    assert endings["missed"]["screen"] == endings["people"]["screen"]


def test_the_first_process_keeps_the_screen_and_names_no_rank(endings: Any) -> None:
    assert endings["first"]["screen"] == "early\nlate, past Python\nerror: it diverged\n"
    assert endings["first"]["log"] is None


def test_a_lost_process_is_worth_starting_again(endings: Any) -> None:
    found = endings["lost"]
    assert (found["exit"], found["failed"]) == (75, None)
    assert found["screen"] == f"rank 1 ({HOST}): error: rank 0 is gone\n"


def test_without_the_store_an_error_is_said_once_on_a_machine(endings: Any) -> None:
    assert endings["lost, the store too"]["screen"] == ""
    assert endings["lost, the store too"]["exit"] == 75


def test_who_has_lost_others_waits_for_somebody_who_knows_why(endings: Any) -> None:
    assert (endings["cause comes"]["exit"], endings["cause comes"]["screen"]) == (75, "")


def test_who_is_about_to_say_why_is_not_kept_from_it(endings: Any) -> None:
    assert (endings["asked to end"]["exit"], endings["asked to end"]["screen"]) == (75, endings["lost"]["screen"])


def test_without_a_temporary_folder_only_errors_are_kept(endings: Any) -> None:
    assert endings["no folder"]["screen"] == (
        f"rank 1 ({HOST}): error: ValueError; more in log-rank1.txt of the run folder\n"
    )
    assert endings["no folder"]["log"].startswith("late, past Python\nTraceback")


def test_a_traceback_goes_to_the_log_if_there_is_one(endings: Any) -> None:
    found = endings["unknown"]
    assert found["screen"] == f"rank 1 ({HOST}): error: ValueError: odd; more in log-rank1.txt of the run folder\n"
    assert "Traceback (most recent call last)" in found["log"]
    assert (found["exit"], found["failed"]) == (1, None)
    assert "Traceback (most recent call last)" in endings["unknown early"]["screen"]


def test_a_second_ctrl_c_and_what_all_have_found_end_without_a_word_of_the_others(endings: Any) -> None:
    assert (endings["interrupted"]["exit"], endings["interrupted"]["screen"]) == (130, "interrupted\n")
    assert (endings["gathered"]["exit"], endings["gathered"]["screen"]) == (2, "")
    assert (endings["interrupted"]["failed"], endings["gathered"]["failed"]) == (None, 2)
    assert endings["left"] == "rank 1 was interrupted"
    assert not endings["interrupted"]["loss is news"]
    assert endings["gathered"]["loss is news"]


def test_that_a_gpu_waits_for_a_rank_that_hangs_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch_utils.world, "join", lambda place, timeout: World(place))
    one = ranks.Ranks(Place())
    one.job = Job(tmp_path)
    one.join(1.0)
    one.world.on_hang("rank 1 did not come")
    one.world.on_hang("rank 1 did not come")
    assert capsys.readouterr().err == "error: rank 1 did not come\n"
