from __future__ import annotations

import copy
import functools
import os
import subprocess
import sys
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from runs import RUN, assert_same, run_train

from gan import models
from gan.config import DataInfo
from gan.errors import GanError
from gan.latent.sampling import tile
from gan.resolve import resolve
from gan.train_options import TrainOptions
from gan.training import outputs as outputs_module
from gan.training.grid import SampleGrid
from gan.training.outputs import Output, Outputs
from gan.training.state import TrainingState
from gan.training.state_files import StateFiles
from torch_utils.distributed import DistributedError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def lines() -> list[str]:
    return []


@pytest.fixture
def outputs(lines: list[str]) -> Iterator[Outputs]:
    made = Outputs(torch.device("cpu"), lines.append, lambda output, error: lines.append(f"{output.name}: {error}"))
    yield made
    made.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "outputs"]


@pytest.mark.parametrize(("error", "written"), [(RuntimeError, ["state"]), (DistributedError, [])])
def test_a_sheet_that_fails_is_left_out_and_what_is_due_after_it_is_not(
    outputs: Outputs, error: type[Exception], written: list[str]
) -> None:
    """But for other processes that are gone: a state on disk says that all sheets before it are there."""
    done: list[str] = []

    def fail() -> None:
        raise error("broken")

    outputs.add(Output("fakes.png", "sheet", lambda: done.append("sheet"), deque([lambda: None, fail])))
    outputs.add(Output("state.pt", "state", lambda: done.append("state")))
    outputs.advance()
    with pytest.raises(error):
        outputs.advance()
    outputs.finish_alone()
    assert done == written


def test_files_are_written_in_the_order_in_which_they_fell_due(outputs: Outputs) -> None:
    done: list[str] = []
    portions = deque([lambda: done.append("part"), lambda: done.append("part")])
    outputs.add(Output("fakes.png", "sheet", lambda: done.append("sheet"), portions))
    outputs.add(Output("net.pkl", "snapshot", lambda: done.append("snapshot")))
    outputs.add(Output("state.pt", "state", lambda: done.append("state")))
    assert done == []
    outputs.advance()
    assert done == ["part"]  # one portion a step, and nothing overtakes the sheet
    outputs.make_room("snapshot")
    assert done[:4] == ["part", "part", "sheet", "snapshot"]
    outputs.finish()
    assert done[4:] == ["state"]


def test_a_sheet_for_which_nobody_has_to_wait_is_computed_between_the_steps(outputs: Outputs) -> None:
    done: list[str] = []
    outputs.add(Output("reals.png", "sheet", lambda: None))
    outputs.add(Output("fakes.png", "sheet", lambda: None, deque([lambda: done.append("portion")] * 3)))
    outputs.add(Output("net.pkl", "snapshot", lambda: None))
    outputs.make_room("state")
    assert done == []
    for step in (1, 2):
        outputs.advance()
        assert len(done) == step  # with the first step too, as on a process that has no other files
    outputs.make_room("snapshot")
    assert len(done) == 3


def test_an_error_is_raised_in_training_and_nothing_after_it_is_written(outputs: Outputs) -> None:
    done: list[str] = []

    def fail() -> None:
        raise RuntimeError("a bug")

    outputs.add(Output("net.pkl", "snapshot", fail))
    outputs.add(Output("state.pt", "state", lambda: done.append("state")))
    with pytest.raises(RuntimeError, match="a bug"):
        outputs.finish()
    with pytest.raises(RuntimeError, match="a bug"):
        outputs.advance()
    assert done == []


def test_a_file_that_cannot_be_written_is_left_out_until_it_can(outputs: Outputs, lines: list[str]) -> None:
    done: list[str] = []
    full = [True]

    def write() -> None:
        if full:
            raise GanError("no space left")
        done.append("net")

    outputs.add(Output("net.pkl", "snapshot", write))
    outputs.add(Output("state.pt", "state", lambda: done.append("state")))
    outputs.finish()
    assert (done, lines) == (["state"], ["net.pkl: no space left"])
    assert list(outputs.missing) == ["net.pkl"]
    full.clear()
    outputs.add(Output("net.pkl", "snapshot", write))
    outputs.finish()
    assert done == ["state", "net"]
    assert outputs.missing == {}


def test_what_was_written_is_not_kept_in_memory(outputs: Outputs) -> None:
    tensor = torch.zeros(3)
    gone = weakref.ref(tensor)
    outputs.add(Output("net.pkl", "snapshot", lambda tensor=tensor: None))
    del tensor
    outputs.finish()
    outputs.add(Output("next", "sheet", lambda: None))
    outputs.finish()
    assert gone() is None


def test_waiting_is_said_once(outputs: Outputs, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(100))
    monkeypatch.setattr(outputs_module.time, "monotonic", lambda: next(seconds))
    outputs.add(Output("fakes.png", "sheet", lambda: None, deque([lambda: None] * 5)))
    outputs.finish()
    assert lines == ["Finishing fakes.png"]


def test_what_needs_processes_that_are_gone_is_left_out_with_all_that_is_due_after_it(outputs: Outputs) -> None:
    done: list[str] = []
    outputs.add(Output("net.pkl", "snapshot", lambda: done.append("snapshot")))
    outputs.add(Output("fakes.png", "sheet", lambda: done.append("sheet"), deque([lambda: None] * 2)))
    outputs.add(Output("state.pt", "state", lambda: done.append("state")))
    outputs.advance()
    outputs.finish_alone()
    assert done == ["snapshot"]
    assert not outputs.has("state")


def test_who_writes_nothing_computes_and_waits_for_the_others() -> None:
    done: list[str] = []
    others_wait = [True, True, False]

    def any_waits(waits: bool) -> bool:
        done.append(f"asked, {waits}")
        return others_wait.pop(0)

    made = Outputs(torch.device("cpu"), print, lambda output, error: None, any_waits)
    made.add(Output("fakes.png", "sheet", None, deque([lambda: done.append("portion")] * 2)))
    made.finish()
    assert done == ["asked, True", "portion", "asked, True", "portion", "asked, False"]
    made.close()


def test_closing_drops_what_is_in_line(outputs: Outputs) -> None:
    done: list[str] = []
    outputs.add(Output("fakes.png", "sheet", lambda: done.append("sheet"), deque([lambda: None] * 5)))
    outputs.advance()
    outputs.close()
    assert done == []


def tiny_state() -> TrainingState:
    options = TrainOptions(data="x", cbase=64, cmax=8, map_depth=1, batch=8)
    return TrainingState(resolve(options, DataInfo("x", "x", 10, 16, 16, 3)), torch.device("cpu"))


def test_a_sheet_shows_the_weights_of_its_moment(tmp_path: Path) -> None:
    state = tiny_state()
    z = torch.randn(10, state.G.z_dim)
    grid = SampleGrid(4, 3, np.arange(10), z)
    networks = state.copy_networks()
    sheet = grid.fakes(networks["G_ema"], torch.zeros(10, 0), 4)
    with torch.no_grad():
        images = torch.cat([state.G_ema(part, None, noise_mode="const") for part in z.split(4)])
        for parameter in state.G_ema.parameters():
            parameter.mul_(2)
    for portion in sheet.portions:
        portion()
    sheet.write(tmp_path / "fakes.png")
    expected = tile((images * 127.5 + 128).clamp(0, 255).to(torch.uint8).numpy(), 4)
    assert np.array_equal(np.asarray(PIL.Image.open(tmp_path / "fakes.png")), expected.transpose(1, 2, 0))


def test_a_copied_state_stays_as_it_was() -> None:
    state = tiny_state()
    for networks in (None, state.copy_networks()):
        copy = state.copy(networks)
        before = {name: tensor.clone() for name, tensor in copy["G"].items()}
        with torch.no_grad():
            for parameter in state.G.parameters():
                parameter.add_(1)
            state.ada_signs.add_(1)
        assert all(torch.equal(copy["G"][name], tensor) for name, tensor in before.items())
        assert copy["ada_signs"].tolist() != state.ada_signs.tolist()
        assert copy.keys() == state.state_dict().keys()


def in_another_process(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run train.py's command with some code before it, and without MLflow."""
    start = f"import sys, threading; sys.modules['mlflow'] = None; sys.argv[0] = 'train.py'\n{code}\n"
    start += "from gan.cli.train import train; train()"
    command = [sys.executable, "-c", start, *(str(a) for a in arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)


# Dies when the second training state is about to get its name.
KILL = """
import os, signal
count = []
def replace(source, target, rename=os.replace):
    count.append(str(target).endswith("training-state.pt"))
    if sum(count) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(source, target)
os.replace = replace
"""


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "mlflow", None)
    arguments = ["--data", tiny_dataset, *RUN, "--keep-states", 2, "--metrics", "none"]
    assert run_train(*arguments).exit_code == 0
    assert in_another_process(KILL, *arguments).returncode == -9
    whole, killed = sorted((tmp_path / "training-runs").glob("0*"))

    newest = StateFiles(killed, 2).load_newest(print)
    assert newest is not None
    assert 0 < newest.nimg < 1000
    for path in killed.iterdir():  # everything before the second state is there, and no final name holds half a file
        if path.suffix == ".png":
            assert path.read_bytes() == (whole / path.name).read_bytes()
        elif path.suffix == ".pkl":
            models.load(path)
    names = {path.name for path in killed.iterdir()}
    assert {"reals.png", "fakes_init.png", "fakes000000.png", "network-snapshot-000000.pkl"} <= names

    assert run_train("--resume", killed).exit_code == 0
    assert {p.name for p in killed.iterdir()} == {p.name for p in whole.iterdir()}
    assert_same(whole, killed)
    assert not [thread for thread in threading.enumerate() if thread.name == "outputs"]


@pytest.mark.usefixtures("light_runs")
def test_a_snapshot_that_cannot_be_written_stops_nothing_and_no_success_is_claimed(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(path: Path, **content: object) -> None:
        raise GanError(f"{path}: no space left on the device")

    with monkeypatch.context() as patch:
        patch.setattr(models, "save", full)
        result = run_train("--data", tiny_dataset, *RUN)
    (run_dir,) = (tmp_path / "training-runs").glob("0*")
    assert result.exit_code == 1
    assert f"network-snapshot-000000.pkl WAS NOT WRITTEN: {Path(*run_dir.parts[-2:])}" in result.output
    assert "error: training-runs/00000-" in result.output
    assert "the run is saved at 1 kimg: python train.py --resume" in result.output
    assert (run_dir / "fakes000001.png").exists()
    assert not list(run_dir.glob("*.pkl"))

    result = run_train("--resume")
    assert result.exit_code == 0
    assert "Done: 1 kimg" in result.output
    assert [path.name for path in run_dir.glob("*.pkl")] == ["network-snapshot-000001.pkl"]
    models.load(run_dir / "network-snapshot-000001.pkl")


@pytest.mark.usefixtures("light_runs")
def test_a_run_whose_first_state_cannot_be_written_ends_at_once(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def full(self: StateFiles, saved: object) -> None:
        raise GanError("training-state.pt: no space left on the device")

    monkeypatch.setattr(StateFiles, "save", full)
    result = run_train("--data", tiny_dataset, *RUN)
    assert result.exit_code == 1
    assert "error: training-state.pt: no space left" in result.output
    assert "tick 4" not in result.output


# What is loaded when the first tick ends.
FIRST_TICK = """
del sys.modules["mlflow"]
from gan.training import trainer
def end(self):
    heavy = ["mlflow", "scipy", "matplotlib", "pandas", "sympy", "torch._dynamo", "torch._inductor", "torchvision"]
    print("loaded:", *(name for name in heavy if name in sys.modules))
    print("threads:", *(thread.name for thread in threading.enumerate()))
    raise KeyboardInterrupt
trainer.Trainer._end_tick = end
from gan.tracking import MlflowTracker
MlflowTracker.close = lambda self, status: None
"""


def test_nothing_heavy_is_imported_before_the_first_tick(
    tiny_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = in_another_process(FIRST_TICK, "--data", tiny_dataset, *RUN)
    assert "loaded:\n" in result.stdout, result.stdout + result.stderr
    assert "outputs" not in result.stdout.split("threads:")[1]


def test_the_thread_ends_when_everything_is_written_and_begins_again_for_more() -> None:
    outputs = Outputs(torch.device("cpu"), lambda line: None, lambda output, error: None)
    written: list[str] = []
    for name in ("a", "b"):
        outputs.add(Output(name, "sheet", functools.partial(written.append, name)))
        outputs.finish()
        assert outputs._thread is not None
        outputs._thread.join(timeout=10)  # one that stayed would keep the training's threads from waiting actively
        assert not outputs._thread.is_alive()
    outputs.close()
    assert written == ["a", "b"]


def test_a_sheet_for_which_memory_is_short_is_made_of_smaller_parts(tmp_path: Path) -> None:
    state = tiny_state()
    z = torch.randn(10, state.G.z_dim)
    grid, labels = SampleGrid(5, 2, np.arange(10), z), torch.zeros(10, 0)
    whole = grid.fakes(copy.deepcopy(state.G_ema), labels, 5)
    short = grid.fakes(copy.deepcopy(state.G_ema), labels, 5)
    sizes: list[int] = []

    def no_room(module: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(arguments[0]))
        if len(arguments[0]) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert short._G is not None
    short._G.synthesis.register_forward_pre_hook(no_room)
    for sheet, name in ((whole, "whole.png"), (short, "short.png")):
        for portion in sheet.portions:
            portion()
        sheet.write(tmp_path / name)
    assert sizes == [10, 5, 3, 2, 5, 3, 2]
    one, other = (np.asarray(PIL.Image.open(tmp_path / name)).astype(int) for name in ("whole.png", "short.png"))
    assert np.abs(one - other).max() <= 1
