"""Micro-batches that are found, and that get smaller where memory runs out."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_step import batch_of, make_step, tiny_config

from gan.config import TrainConfig, usable_batch_gpu
from gan.errors import GanError
from gan.loss import PhaseOutput
from gan.networks import set_half_dtype
from gan.training import fit
from gan.training.fit import by_estimate, by_trial
from gan.training.micro_batch import is_out_of_memory
from gan.training.plan import MemoryEstimate, describe_plan
from gan.training.state import TrainingState
from gan.training.step import TrainStep
from torch_utils.distributed import Place
from torch_utils.world import World

CPU = torch.device("cpu")


def run_out_of_memory() -> None:
    torch.empty([2**58])  # as PyTorch says it on a CPU


def adaptive_step(config: TrainConfig) -> tuple[TrainStep, list[str], list[int]]:
    """A step that goes on where memory runs out, what it says, and what its owner is told."""
    step, lines, told = make_step(config), [], []
    return TrainStep(step.state, config, step.labels, lines.append, told.append), lines, told


def fail_once(step: TrainStep, name: str, fail: Callable[[], None] = run_out_of_memory, call: int = 2) -> None:
    """Have the `call`-th micro-batch of a phase fail after its forward pass, which draws random numbers."""
    (phase,) = [phase for phase in step.phases if phase.name == name]
    calls = []

    def compute(*args: Any) -> PhaseOutput:
        output = phase.compute(*args)
        calls.append(name)
        if len(calls) == call:
            fail()
        return output

    step.phases[step.phases.index(phase)] = dataclasses.replace(phase, compute=compute)


@pytest.mark.parametrize("name", ["Gmain", "Greg", "Dmain", "Dreg"])
def test_a_phase_that_ran_out_of_memory_is_as_if_it_had_begun_with_less(name: str) -> None:
    images, indices = batch_of(tiny_config())
    weights, stats, signs = [], [], []
    for batch_gpu in (8, 4):
        step, _, told = adaptive_step(tiny_config(batch_gpu=batch_gpu, augpipe="bgc", aug="fixed", p=0.5))
        if batch_gpu == 8:
            fail_once(step, name)
        phase = next(phase for phase in step.phases if phase.name == name)
        torch.manual_seed(7)
        step._run(phase, images.float() / 127.5 - 1, step.labels.take(indices))
        assert step.batch_gpu == 4
        assert told == ([4] if batch_gpu == 8 else [])
        weights.append(torch.cat([p.detach().flatten() for p in phase.network.parameters()]))
        stats.append(step.state.stats.flush())
        signs.append((step.state.ada_signs.tolist(), float(step.state.pl_mean), step.state.G.mapping.w_avg.tolist()))
    assert torch.equal(*weights)
    assert stats[0] == stats[1]
    assert signs[0] == signs[1]


def test_a_step_that_ran_out_of_memory_says_so_and_goes_on() -> None:
    batch = batch_of(tiny_config())
    step, lines, told = adaptive_step(tiny_config())
    fail_once(step, "Gmain", call=1)
    other = make_step(tiny_config(batch_gpu=8))
    for _ in range(2):
        step(*batch)
        other(*batch)
    assert lines == ["Memory:    out of memory in Gmain with 16 images at a time; going on with 8 (the batch stays 16)"]
    assert told == [8]
    for a, b in zip(step.state.G.parameters(), other.state.G.parameters(), strict=True):
        assert torch.equal(a, b)
    assert step.state.stats.flush() == other.state.stats.flush()


def test_it_gets_smaller_again_and_again_and_ends_with_advice() -> None:
    step, lines, told = adaptive_step(tiny_config(batch=12, mbstd_group=4))

    def never(*args: Any) -> PhaseOutput:
        run_out_of_memory()
        raise AssertionError

    step.phases = [dataclasses.replace(step.phases[0], compute=never)]
    with pytest.raises(GanError, match=r"^out of memory in Gmain with 1 image at a time, .* --cbase and --cmax"):
        step(*batch_of(step.config))
    assert told == [4, 2, 1]
    assert "going on with 4 (the batch stays 12)" in lines[0]
    assert "going on with 2 (the batch stays 12, but minibatch-stddev sees groups of 2 instead of 4)" in lines[1]


def test_nothing_of_the_failed_attempt_is_left_when_the_next_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    step, _, _ = adaptive_step(tiny_config(batch_gpu=8))
    (phase,) = step.phases[:1]
    outputs: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []

    def compute(*args: Any) -> PhaseOutput:
        output = phase.compute(*args)
        outputs.append(weakref.ref(output.loss))
        if len(outputs) == 2:
            run_out_of_memory()
        return output

    def release(device: torch.device) -> None:
        left.extend(loss() is not None for loss in outputs)

    monkeypatch.setattr("gan.training.micro_batch.release_memory", release)
    step.phases = [dataclasses.replace(phase, compute=compute)]
    step(*batch_of(step.config))
    assert left == [False, False]


def test_other_errors_and_owners_who_want_the_error_get_it() -> None:
    def broken() -> None:
        raise RuntimeError("sizes do not match")

    step, lines, told = adaptive_step(tiny_config())
    fail_once(step, "Dmain", broken, call=1)
    with pytest.raises(RuntimeError, match="sizes do not match"):
        step(*batch_of(step.config))
    assert lines == told == []
    step = make_step(tiny_config())
    fail_once(step, "Dmain", call=1)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        step(*batch_of(step.config))


def test_an_optimiser_without_memory_ends_with_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    step, lines, _ = adaptive_step(tiny_config())
    monkeypatch.setattr(step.state.D_opt, "step", run_out_of_memory)
    with pytest.raises(GanError, match=r"out of memory in the optimiser after Dmain, .* --cbase and --cmax"):
        step(*batch_of(step.config))
    assert lines == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True),
        (MemoryError(), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("MPS backend out of memory (MPS allocated: 9 GB)"), True),
        (RuntimeError("could not create a primitive"), False),  # oneDNN does not recover from it
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("could not infer dtype"), False),
        (ValueError("out of memory"), False),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_counts_as_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) == expected


LIMITED = """
import resource, sys
sys.path[:0] = [".", "tests/training"]
from test_step import *
from gan.training.devices import keep_freed_memory
keep_freed_memory()
torch.backends.mkldnn.set_flags(False)  # oneDNN may be the first to run out, and it does not recover
config = tiny_config(batch=256, cbase=512, cmax=16, aug="noaug")
state = TrainingState(config, torch.device("cpu"))
labels = LabelTable(torch.zeros([1, 0]), torch.zeros([IMAGES], dtype=torch.long))
step = TrainStep(state, config, labels, on_smaller=lambda size: None)
step.phases = step.phases[:1]
images = batch_of(config)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]) * 2**20,) * 2)
step(*images)
print("trained", step.state.progress.nimg)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs a limit of memory that is kept")
def test_training_goes_on_where_memory_really_runs_out() -> None:
    command = [sys.executable, "-c", LIMITED]
    result = subprocess.run([*command, "90"], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, *_, last = result.stdout.splitlines()
    assert first.startswith("Memory:    out of memory in ")
    assert "with 256 images at a time; going on with 128 (the batch stays 256)" in first
    assert last == "trained 256"


# --batch-gpu auto


@pytest.mark.parametrize(
    ("room", "size", "reason", "tried"),
    [
        (99, 16, "16 images at a time fit", [16]),
        (11, 8, "8 images at a time fit, 16 do not", [16, 8]),
        (1, 1, "1 image at a time fits, 2 do not", [16, 8, 4, 2, 1]),
        (0, 1, "not even 1 image at a time fits; trying nevertheless", [16, 8, 4, 2, 1]),
    ],
)
def test_the_largest_that_fits_is_found_by_trial(room: int, size: int, reason: str, tried: list[int]) -> None:
    attempts: list[int] = []

    def attempt(images: int) -> None:
        attempts.append(images)
        if images > room:
            raise torch.OutOfMemoryError("CUDA out of memory")

    assert by_trial([1, 2, 4, 8, 16], attempt, CPU) == (size, reason)
    assert attempts == tried


def test_what_else_goes_wrong_in_a_trial_is_raised() -> None:
    def attempt(images: int) -> None:
        raise RuntimeError("an illegal instruction")

    with pytest.raises(RuntimeError, match="illegal"):
        by_trial([1, 2], attempt, CPU)


@pytest.mark.parametrize("expected", [1, 2, 16, 32])
def test_the_largest_within_the_budget_is_taken_on_a_cpu(expected: int) -> None:
    config = tiny_config(batch=32)
    estimate = MemoryEstimate.of(config)
    size, reason = by_estimate(config, estimate.total(expected) / 0.7 + 1e-6)
    assert size == expected
    need = f"{estimate.total(expected):.1f} GB of the budget of {estimate.total(expected):.1f} GB"
    assert f"need{'s' * (expected == 1)} about {need} (70 % of what is free)" in reason
    assert by_estimate(config, 1000)[0] == 32


def test_without_room_for_one_image_it_says_so_and_tries() -> None:
    size, reason = by_estimate(tiny_config(), 0.1)
    assert size == 1
    assert reason.startswith("not even 1 image at a time, about 0.5 GB, is within the budget of 0.1 GB (70 %")


def test_a_configuration_is_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config(batch=32, batch_gpu="auto", mbstd_group=4)
    dataset: Any = None  # only a GPU may hold it
    assert (config.batch_gpu, config.fit_batch_gpu) == (32, True)
    assert any("as many at a time as fit, at most 32" in line for line in describe_plan(config))
    available = round((MemoryEstimate.of(config).total(2) / 0.7 + 1e-6) * 2**30)
    monkeypatch.setattr(fit, "available_bytes", lambda: available)
    found, line = fit.fitted(config, CPU, torch.float32, dataset)
    assert found == dataclasses.replace(config, batch_gpu=2, fit_batch_gpu=False)
    assert line is not None
    assert line.startswith("--batch-gpu auto: 2 images at a time need about ")
    assert line.endswith(", but minibatch-stddev sees groups of 2 instead of 4")
    assert fit.fitted(found, CPU, torch.float32, dataset) == (found, None)


class Both(World):
    """Stands in for two processes of one machine."""

    def __init__(self, other: object) -> None:
        super().__init__(Place(rank=0, size=2, local_size=2))
        self.other = other

    def gather(self, value: Any, what: str) -> list[Any]:
        return [value, self.other]


@pytest.mark.parametrize(("other", "expected"), [([4, "that of rank 1"], 4), ([16, "more"], 8)])
def test_several_processes_share_memory_and_take_what_fits_them_all(
    other: list[Any], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dataclasses.replace(tiny_config(batch=32, batch_gpu="auto"), gpus=2, batch_gpu=16)
    available = round((MemoryEstimate.of(config).total(8) / 0.7 + 1e-6) * 2**30)
    monkeypatch.setattr(fit, "available_bytes", lambda: 2 * available)
    dataset: Any = None
    found, line = fit.fitted(config, CPU, torch.float32, dataset, Both(other))
    assert (found.batch_gpu, found.fit_batch_gpu) == (expected, False)
    assert line is not None
    assert ("that of rank 1" in line) == (expected == 4)


def test_only_what_divides_into_whole_groups_is_tried() -> None:
    assert usable_batch_gpu(tiny_config(batch=24, mbstd_group=4)) == [1, 2, 3, 4, 8, 12, 24]
    assert usable_batch_gpu(tiny_config(batch=18, mbstd_group=4, batch_gpu=1)) == [1, 2, 3]


@pytest.mark.gpu
def test_a_trial_on_a_gpu_finds_the_most_and_leaves_nothing(tiny_dataset: Path) -> None:
    from gan.data.dataset import ImageDataset

    device, dataset = torch.device("cuda"), ImageDataset(str(tiny_dataset))
    config = tiny_config(batch=32, batch_gpu="auto", device="cuda")
    fit.fitted(config, device, torch.float16, dataset)  # libraries take their workspaces
    before = torch.cuda.memory_allocated()
    found, line = fit.fitted(config, device, torch.float16, dataset)
    assert (found.batch_gpu, line) == (32, "--batch-gpu auto: 32 images at a time fit")
    assert torch.cuda.memory_allocated() - before < 2**27  # another stream, another workspace


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", ["off", "auto", "on"])
def test_a_gpu_step_goes_on_with_fewer(graphs: str) -> None:
    device = torch.device("cuda")
    config = tiny_config(cuda_graphs=graphs)
    base, lines, told = make_step(config), [], []
    labels = dataclasses.replace(base.labels, rows=base.labels.rows.cuda(), index=base.labels.index.cuda())
    step = TrainStep(TrainingState(config, device), config, labels, lines.append, told.append)

    def fail() -> None:
        torch.empty([2**50], device=device)

    fail_once(step, "Dreg", fail, call=1)
    batch = tuple(tensor.cuda() for tensor in batch_of(config))
    for _ in range(18):
        step(*batch)
    assert told == [8]
    assert "out of memory in Dreg with 16 images at a time; going on with 8" in lines[-1]
    assert all(torch.isfinite(p).all() for p in step.state.G.parameters())


def test_half_precision_goes_on_too() -> None:
    step, _, told = adaptive_step(tiny_config(precision="bf16"))
    for network in (step.state.G, step.state.D):
        set_half_dtype(network, torch.bfloat16)
    fail_once(step, "Dreg", call=1)
    step(*batch_of(step.config))
    assert told == [8]
