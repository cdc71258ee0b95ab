"""What is measured beside a run, when, and what is said of it; the numbers themselves are made up here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from gan.config import DataInfo, TrainConfig
from gan.errors import GanError
from gan.metric_names import INCEPTION, VGG
from gan.metrics.measure import Measurement
from gan.resolve import resolve
from gan.snapshot_names import BEST
from gan.tracking import measurements
from gan.train_options import TrainOptions
from gan.training import evaluation
from gan.training.evaluation import Evaluation
from gan.training.tracked import tracked
from gan.training.turns import Asked
from torch_utils.distributed import Place
from torch_utils.world import ALONE, DistributedError, World


def measurement(metric: str, **results: float) -> Measurement:
    return Measurement(metric, results or {metric: 1.5}, 3.0, 40, 40, None, None, 0, "lanczos")


class Detectors:
    """Those that are there."""

    def __init__(self, there: Collection[str] = ()) -> None:
        self.there = there

    def path(self, name: str) -> Path | None:
        return Path(name) if name in self.there else None

    def missing_line(self, names: Sequence[str]) -> str:
        return f"{' and '.join(names)} not found"

    def problem_with(self, name: str) -> str | None:
        if self.path(name) is None:
            return self.missing_line([name])
        return f"{name}: is damaged" if "damaged" in self.there else None

    def sha256(self, name: str) -> str:
        return f"hash of {name}"

    def forget(self) -> None:
        self.forgotten = True


class Reals:
    """40 images."""

    fingerprint = "that of the images"

    def __init__(self, dataset: Any, detectors: Detectors) -> None:
        self.detectors, self.notes = detectors, list[str]()

    def __len__(self) -> int:
        return 40


class Measuring:
    """Takes three portions, the second of which has the results of the first metric, the third those of the others."""

    made: ClassVar[list[Measuring]] = []
    fails: str | None = None
    fails_in = 1
    seconds = 2.0  # that a portion takes
    needs = 3
    numbers: ClassVar[dict[str, dict[str, float]]] = {}

    def __init__(self, G: Any, reals: Reals, metrics: list[str], **settings: Any) -> None:
        self.reals, self.G, self.metrics, self.settings = reals, G, metrics, settings
        self.portions, self.measurements, self.failures = 0, list[Measurement](), list[str]()
        Measuring.made.append(self)

    @property
    def done(self) -> bool:
        return self.portions >= self.needs

    @property
    def share(self) -> float:
        return self.portions / self.needs

    def advance(self) -> None:
        Clock.now += self.seconds
        self.portions += 1
        if self.fails is not None and self.portions >= self.fails_in:
            raise RuntimeError(self.fails)
        if self.portions == 1:
            self.reals.notes.append("the disk is full")
        for metric in {2: self.metrics[:1], 3: self.metrics[1:]}.get(self.portions, []):
            if metric == "is50k":
                self.failures.append("is50k: out of memory")
            else:
                self.measurements.append(measurement(metric, **self.numbers.get(metric, {})))


class Clock:
    now = 0.0


class Files:
    """Of the run: nothing is being written, or a snapshot is."""

    def __init__(self) -> None:
        self.writing, self.sent = False, list[tuple[int, dict[str, float]]]()

    def measured(self, nimg: int, results: dict[str, float], timestamp: float) -> None:
        self.sent.append((nimg, results))


def give_way() -> None:
    """There is nothing to give."""


class Run:
    """A run whose steps take a second."""

    def __init__(self, folder: Path, dataset: Any, world: World = ALONE, **options: Any) -> None:
        self.folder, self.files, self.lines_said = folder, Files(), list[str]()
        self.evaluation = Evaluation(
            config(**options),
            folder,
            dataset,
            torch.device("cpu"),
            self.lines_said.append,
            give_way,
            lambda: self.files,  # type: ignore[arg-type,return-value]
            lambda: self.files.writing,
            world,
        )
        self.evaluation.go_on_from(10**9)

    @property
    def said(self) -> list[str]:
        return [line for line in self.lines_said if "the disk is full" not in line]

    def snapshot(self, kimg: int, G: Any = None) -> str:
        name = f"network-snapshot-{kimg:06d}.pkl"
        (self.folder / name).write_text("a network")
        self.evaluation.add(name, kimg * 1000, G)
        return name

    def steps(self, number: int) -> int:
        """How many portions were done beside so many steps."""
        before = sum(measuring.portions for measuring in Measuring.made)
        for _ in range(number):
            asked = self.evaluation.requests()
            Clock.now += 1
            self.evaluation.follow(asked)
        return sum(measuring.portions for measuring in Measuring.made) - before

    def lines(self, metric: str) -> list[Any]:
        path = self.folder / f"metric-{metric}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def config(**options: Any) -> TrainConfig:
    return resolve(
        TrainOptions(**{"data": "x", "metrics": "swd,diversity", **options}), DataInfo("x", "x", 9, 16, 16, 3)
    )


@pytest.fixture
def begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    monkeypatch.setattr(evaluation, "Measuring", Measuring)
    monkeypatch.setattr(evaluation, "Reals", Reals)
    monkeypatch.setattr(evaluation, "Detectors", lambda folder: Detectors([INCEPTION]))
    monkeypatch.setattr(Clock, "now", 1000.0)
    monkeypatch.setattr(evaluation.time, "monotonic", lambda: Clock.now)
    for name, value in (
        ("made", []),
        ("fails", None),
        ("fails_in", 1),
        ("numbers", {}),
        ("seconds", 2.0),
        ("needs", 3),
    ):
        monkeypatch.setattr(Measuring, name, value)
    return lambda **options: Run(tmp_path, None, **options)


def test_portions_take_their_share_of_the_time_and_no_more(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=25.0)
    run.snapshot(0)
    assert run.steps(1) == 1  # two seconds of three: it waits until eight have gone
    assert run.steps(5) == 0
    assert run.steps(1) == 1
    assert run.steps(5) == 0
    assert run.steps(1) == 1
    assert run.evaluation.requests() == Asked.MEASURED


def test_between_two_steps_there_are_as_many_short_portions_as_the_budget_has_room_for(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Measuring, "seconds", 0.04)
    monkeypatch.setattr(Measuring, "needs", 1000)
    run = begin(metrics_budget=10.0)
    run.snapshot(0)
    assert run.steps(1) == 3  # 0.12 s of 1.12
    portions = run.steps(20)
    assert (3 + portions) * 0.04 == pytest.approx(0.1 * (Clock.now - 1000), abs=0.05)
    run = begin(metrics_budget=100.0)
    run.snapshot(4)
    assert run.steps(10) == 10 * 8  # no portion begins when 0.3 s are over


def test_results_are_written_as_they_come_and_the_best_is_said_when_all_are_there(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    name = run.snapshot(7)
    run.steps(2)
    (line,) = run.lines("swd")
    assert (line["results"], line["snapshot_pkl"], line["num_gpus"]) == ({"swd": 1.5}, name, 1)
    assert (line["num_fakes"], line["resize_filter"], line["nimg"]) == (40, "lanczos", 7000)
    assert line["dataset"] == "that of the images"
    assert not run.lines("diversity")
    assert run.evaluation.in_use() == (name,)
    run.files.writing = True
    run.steps(5)
    assert len(run.lines("diversity")) == 1
    assert not run.said  # the snapshot is not there yet
    run.files.writing = False
    run.steps(1)
    assert run.said == [f"Metrics:   {name}: swd 1.5 (best), diversity 1.5"]
    assert (run.folder / "network-snapshot-best.pkl").read_text() == "a network"
    assert run.files.sent == [(7000, {"swd": 1.5}), (7000, {"diversity": 1.5})]
    assert run.evaluation.in_use() == ()
    assert run.evaluation.requests() == Asked(0)


def test_one_snapshot_waits_and_a_newer_one_takes_its_place(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    networks = [object() for _ in range(4)]
    names = [run.snapshot(kimg, G) for kimg, G in zip((4, 8, 12, 16), networks, strict=True)]
    command = f"python -m gan metrics --network {run.folder}"
    assert run.said == [
        f"Metrics:   {names[1]} is left out, as measuring takes longer than snapshots are apart; "
        f"{command}/{names[1]} measures what is missing"
    ]
    assert run.evaluation.in_use() == (names[0], names[3])
    run.steps(8)
    assert [measuring.G for measuring in Measuring.made] == [networks[0], networks[3]]
    assert [line["snapshot_pkl"] for line in run.lines("diversity")] == [names[0], names[3]]
    assert run.evaluation.in_use() == ()
    run.evaluation.finish(lambda: False)
    assert run.said[-2] == f"Metrics:   2 snapshots were left out for want of time; {command} measures what is missing"


def test_networks_that_have_learned_nothing_do_not_hold_up_the_others(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0, keep=2)
    names = [run.snapshot(0), run.snapshot(4)]
    assert run.evaluation.in_use() == (names[1],)
    (line,) = run.said
    assert line == f"Metrics:   {names[0]} is left out, as measuring takes longer than snapshots are apart"  # --keep
    run.steps(5)  # the first had been asked for before
    name = run.snapshot(0)
    run.steps(2)  # of three portions
    assert run.evaluation.in_use() == (name,)
    run.snapshot(8)
    assert len(run.evaluation.in_use()) == 2


def test_at_the_end_the_newest_comes_before_what_has_just_begun(begin: Callable[..., Run]) -> None:
    run = begin()
    names = [run.snapshot(4), run.snapshot(8)]
    run.steps(1)
    run.evaluation.finish(lambda: False)
    assert [line["snapshot_pkl"] for line in run.lines("diversity")] == [names[1]]
    assert run.said[0].startswith(f"Metrics:   {names[0]} is left out")
    assert run.said[1].startswith(f"Metrics:   finishing {names[1]}; ")


def test_it_is_measured_as_pictures_of_it_are_made(begin: Callable[..., Run]) -> None:
    run = begin(batch=8, batch_gpu=2)
    run.snapshot(4)
    settings = Measuring.made[0].settings
    assert (settings["images_at_once"], settings["force_fp32"], settings["free_memory"]) == (8, True, give_way)


def test_detectors_give_their_memory_back_when_nothing_waits(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    detectors = run.evaluation._detectors
    for kimg in (4, 8):
        run.snapshot(kimg)
    run.steps(4)
    assert not hasattr(detectors, "forgotten")
    run.steps(4)
    assert hasattr(detectors, "forgotten")


def test_a_run_that_is_complete_finishes_whatever_the_budget_is(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begin(metrics_budget=1e-9)
    Measuring.numbers = {"diversity": {"diversity": 0.234}}
    names = [run.snapshot(20), run.snapshot(24)]
    while Measuring.made[0].share < 0.5:
        Measuring.made[0].advance()
    monkeypatch.setattr(Measuring, "seconds", 25.0)
    run.evaluation.finish(lambda: False)
    alike = "fakes are much more alike than the images (diversity 0.23): look at the newest sheet"
    assert run.said[0] == (
        f"Metrics:   finishing {names[0]} and {names[1]}; Ctrl-C ends that, and nothing else is lost"
    )
    assert run.said[1] == f"Metrics:   {names[0]}: swd 1.5 (best), diversity 0.234"
    assert run.said[2].startswith(f"Metrics:   {alike}")
    assert run.said[3] == f"Metrics:   {names[1]}: 67 % done"  # after a minute
    assert len(run.said) == 7
    assert run.said[-1] == f"Best:      {names[1]} by swd 1.5 (network-snapshot-best.pkl)"


def test_ctrl_c_ends_that_and_keeps_what_is_there(begin: Callable[..., Run]) -> None:
    run = begin()
    name = run.snapshot(4)
    run.evaluation.finish(lambda: len(run.lines("swd")) == 1)
    assert (
        f"{name} is left out; python -m gan metrics --network {run.folder / name} measures what is missing"
        in run.said[1]
    )
    assert run.said[2] == f"Best:      {name} by swd 1.5 (network-snapshot-best.pkl)"
    assert not run.lines("diversity")


def test_a_run_that_is_stopped_says_what_is_measured_later(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    names = [run.snapshot(4), run.snapshot(8)]
    run.evaluation.leave(goes_on=True)
    assert run.said[0] == f"Metrics:   {names[1]} is measured when the run goes on"
    assert run.said[1].startswith(f"Metrics:   {names[0]} is left out")
    run = begin(metrics_budget=100.0)
    name = run.snapshot(4)
    run.steps(3)
    run.evaluation.leave(goes_on=True)
    assert run.said == [f"Metrics:   {name}: swd 1.5 (best), diversity 1.5"]


def test_the_newest_snapshot_is_measured_by_what_it_was_not(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Opened:
        def require_generator(self) -> torch.nn.Module:
            return torch.nn.Linear(1, 1).requires_grad_(False)

    opened: list[str] = []
    monkeypatch.setattr(evaluation.models, "load", lambda path: (opened.append(path.name), Opened())[1])
    run = begin(metrics_budget=100.0)
    for kimg in (4, 8, 12):
        (run.folder / f"network-snapshot-{kimg:06d}.pkl").write_text("a network")
    name = "network-snapshot-000008.pkl"
    for metric, snapshot, seed in (
        ("swd", name, 0),
        ("diversity", name, 7),
        ("diversity", "network-snapshot-000004.pkl", 0),
    ):
        like = dataclasses.replace(measurement(metric), seed=seed)
        measurements.append(run.folder, measurements.record_of(like, snapshot, 1, dataset=Reals.fingerprint))
    live = torch.nn.Linear(1, 1)
    run.evaluation.catch_up(0, live)  # type: ignore[arg-type]
    assert not opened
    run.evaluation.catch_up(8500, live)  # type: ignore[arg-type]
    assert opened == [name]
    (measuring,) = Measuring.made
    assert measuring.metrics == ["diversity"]
    assert measuring.G is not live
    run.steps(5)
    assert run.lines("diversity")[-1]["snapshot_pkl"] == name
    run.evaluation.catch_up(8500, live)  # type: ignore[arg-type]
    assert len(opened) == 1
    run.evaluation.catch_up(12000, torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert run.steps(3) == 0
    assert "network-snapshot-000012.pkl: RuntimeError: Error(s) in loading state_dict" in run.said[-2]
    monkeypatch.setattr(evaluation.models, "load", out_of_memory)
    run.evaluation.catch_up(12000, live)  # type: ignore[arg-type]
    assert run.said[-1] == "Metrics:   MemoryError: MemoryError"
    assert run.evaluation.in_use() == ()


def out_of_memory(*_: Any) -> None:
    raise MemoryError


def test_whatever_happens_in_a_metric_the_next_snapshot_is_measured(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    Measuring.fails = "a bug\nin a metric"
    name = run.snapshot(4)
    run.steps(3)
    said = [f"Metrics:   {name}: RuntimeError: a bug in a metric", f"Metrics:   {name} was not measured"]
    assert run.said == said
    Measuring.fails_in = 3
    name = run.snapshot(8)
    run.steps(5)
    assert run.said == [
        *said,
        f"Metrics:   {name}: swd 1.5 (best)",
        f"Metrics:   {name}: RuntimeError: a bug in a metric",
    ]
    Measuring.fails = None
    run.snapshot(12)
    assert run.steps(5) == 3


def test_the_loss_of_other_processes_is_no_matter_of_metrics(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(self: Measuring) -> None:
        raise DistributedError("rank 1 is gone")

    monkeypatch.setattr(Measuring, "advance", lost)
    run = begin(metrics_budget=100.0)
    run.snapshot(4)
    with pytest.raises(DistributedError):
        run.steps(1)


def test_what_happens_to_another_process_is_said(begin: Callable[..., Run]) -> None:
    class Broken(World):
        def gather(self, value: Any, what: str) -> list[Any]:
            return [value, "out of memory" if what == "how the metrics went" else {}]

        def share(self, value: Any, what: str) -> Any:
            return value

        def agree(self, bits: int, what: str) -> int:
            return bits

        def meet(self, what: str) -> None:
            pass

    run = begin(metrics_budget=100.0, world=Broken(Place(0, 2)))
    name = run.snapshot(4)
    run.evaluation.follow(Asked.MEASURED)  # which that one has asked for
    assert run.said == [f"Metrics:   {name}: rank 1: out of memory", f"Metrics:   {name} was not measured"]


def test_files_that_cannot_be_read_are_no_reason_to_stop(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    (run.folder / "metric-swd.jsonl").mkdir()
    (run.folder / BEST).mkdir()
    run.evaluation.go_on_from(1000)
    assert ["metric-swd.jsonl" in line for line in run.said] == [True, False]
    assert run.said[1].endswith(f"{BEST}: is a folder, where the best snapshot is to be; move it away")
    for kimg in (4, 8):
        run.snapshot(kimg)
        run.steps(5)
    assert len([line for line in run.said if "move it away" in line]) == 1
    assert len(run.lines("diversity")) == 2


def test_what_the_disk_does_not_keep_is_said_once(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    for kimg in (4, 8):
        run.snapshot(kimg)
        run.steps(5)
    assert run.lines_said[0] == "Metrics:   the disk is full"
    assert len(run.lines_said) == 3


def test_new_networks_may_all_be_the_same_grey(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    Measuring.numbers = {"diversity": {"diversity": 0.1}}
    for kimg, said in ((19, 1), (20, 3)):
        run.snapshot(kimg)
        run.steps(5)
        assert len(run.said) == said


def test_what_cannot_be_measured_is_said_once(begin: Callable[..., Run]) -> None:
    run = begin(metrics="is50k,swd", metrics_budget=100.0)
    for kimg in (4, 8):
        run.snapshot(kimg)
        run.steps(5)
    assert [line for line in run.said if "is50k" in line] == ["Metrics:   is50k: out of memory"]
    assert [line["results"] for line in run.lines("swd")] == [{"swd": 1.5}] * 2


def test_a_full_disk_costs_the_line_and_nothing_else(
    begin: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise GanError("metric-swd.jsonl: no space left on the device")

    run = begin(metrics="swd", metrics_budget=100.0)
    monkeypatch.setattr(measurements, "append", full)
    name = run.snapshot(4)
    run.steps(5)
    assert run.said == [
        f"Metrics:   {name}: swd WAS NOT WRITTEN: metric-swd.jsonl: no space left on the device",
        f"Metrics:   {name}: swd 1.5",
    ]
    assert run.files.sent == [(4000, {"swd": 1.5})]


def test_lines_of_later_snapshots_are_dropped_when_a_run_goes_on(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    for kimg, swd in ((4, 2.0), (8, 1.0)):
        Measuring.numbers = {"swd": {"swd": swd}}
        run.snapshot(kimg)
        run.steps(5)
    best = run.folder / "network-snapshot-best.pkl"
    assert best.resolve().name == "network-snapshot-000008.pkl"
    run.evaluation.go_on_from(7999)
    assert [line["snapshot_pkl"] for line in run.lines("swd")] == ["network-snapshot-000004.pkl"]
    (run.folder / "network-snapshot-000008.pkl").unlink()
    run.evaluation.go_on_from(7999)
    assert best.resolve().name == "network-snapshot-000004.pkl"


def test_without_metrics_the_best_of_before_is_still_known(begin: Callable[..., Run]) -> None:
    run = begin(metrics_budget=100.0)
    name = run.snapshot(4)
    run.steps(5)
    run = begin(metrics="none")
    assert run.snapshot(8)
    assert run.evaluation.in_use() == ()
    run.evaluation.finish(lambda: False)
    assert run.said == [f"Best:      {name} by swd 1.5 ({BEST})"]


class Others(World):
    """Two processes; the other one finds these detectors missing."""

    def __init__(self, missing: list[str]) -> None:
        super().__init__(Place(0, 2))
        self.missing = missing

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, {name: f"{name} is not here" for name in self.missing}]


@pytest.mark.parametrize(
    ("metrics", "there", "elsewhere", "names", "lines"),
    [
        ("auto", [INCEPTION], [], ["fid50k_full", "kid50k_full"], ["fid50k_full, kid50k_full at each snapshot, in"]),
        ("auto", [VGG], [], ["swd", "diversity"], ["(no detector here: python -m gan metrics --prefetch)"]),
        ("auto", [INCEPTION], [INCEPTION], ["swd", "diversity"], [f"(rank 1: {INCEPTION} is not here)"]),
        ("auto", ["damaged", INCEPTION], [], ["swd", "diversity"], [f"% of the time ({INCEPTION}: is damaged)"]),
        ("none", [INCEPTION], [], [], ["Metrics:   none"]),
        ("swd", [], [], ["swd"], ["Metrics:   swd at each snapshot, in up to 10 % of the time"]),
        (
            "pr50k3_full,swd,is50k",
            [INCEPTION],
            [],
            ["swd", "is50k"],
            ["pr50k3_full left out: vgg16.pt not found", "swd, is50k at each snapshot"],
        ),
        ("fid50k_full", [], [], [], ["fid50k_full left out: inception-2015-12-05.pt not found"]),
        ("fid50k,swd", [INCEPTION], [INCEPTION], ["swd"], ["fid50k left out: rank 1: inception", "swd at each"]),
        ("fid50k,swd", ["damaged", INCEPTION], [], ["swd"], [f"fid50k left out: {INCEPTION}: is damaged", "swd at"]),
    ],
)
def test_what_is_measured_is_what_every_process_can(
    metrics: str,
    there: list[str],
    elsewhere: list[str],
    names: list[str],
    lines: list[str],
) -> None:
    found, said = tracked(config(metrics=metrics), Detectors(there), Others(elsewhere))  # type: ignore[arg-type]
    assert found == names
    assert len(said) == len(lines)
    for line, part in zip(said, lines, strict=True):
        assert line.startswith("Metrics:   ")
        assert part in line
