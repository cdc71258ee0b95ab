"""A run from its start, or from where it was, to its end: which state to go on from, and what if training fails."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.errors import GanError, LostProcessError
from gan.files import remove_leftovers
from gan.tracking import jsonl
from gan.train_options import check_resume_name
from gan.training import retention, run_folder
from gan.training.branch import finish_going_back, go_back
from gan.training.micro_batch import release_memory
from gan.training.run_folder import in_kimg
from gan.training.signals import Signals
from gan.training.state_files import SavedState, StateFiles, states_in
from gan.training.trainer import Outcome, Trainer
from torch_utils.world import ALONE, DistributedError, World

_RATE_AFTER_FAILURE = 0.5
_SURELY_SAVED_SECONDS = 600


def train(
    config: TrainConfig,
    run_dir: Path,
    dataset: ImageDataset,
    *,
    start: models.Snapshot | None = None,
    continued: bool = False,
    at: float | None = None,
    notes: Sequence[str] = (),
    world: World = ALONE,
    begun: Callable[[], None] = lambda: None,
) -> bool:
    """Train in `run_dir`. Returns whether the run is complete (False: it was asked to stop, and can be continued).

    Args:
        start: weights to start from, for a new run.
        continued: go on from the newest training state.
        at: go back to the state of so many kimg first.
        notes: lines to say at the start.
        world: the processes that train together; only for the first need there be a run folder and a start.
        begun: called, by every process, when the run has gone back as far as it is to.

    Raises GanError if another process trains there, if no state can be read, and if training has failed for good;
    LostProcessError if other processes of the run are gone.
    """
    said = list(notes)
    states = StateFiles(run_dir, config.keep_states)
    saved = None
    with _lost_processes(), contextlib.ExitStack() as stack:
        if world.is_first:
            stack.enter_context(run_folder.locked(run_dir, said.append))
        signals = stack.enter_context(Signals())
        if world.is_first:
            remove_leftovers(run_dir)
            if continued:
                saved = _state_to_go_on_from(states, run_dir, config, at, said.append)
            if saved is None and config.init_from and start is None:
                start = _source(config.init_from, config)
            if continued:
                run_folder.write_options(run_dir, config)
        else:
            start = None
        while True:
            trainer = Trainer(
                config,
                run_dir,
                dataset,
                states,
                signals,
                start=start,
                saved=saved,
                continued=continued,
                notes=said,
                world=world,
            )
            begun()
            if trainer.complete:
                trainer.settle()
                return True
            outcome = trainer.run()
            if outcome is not Outcome.FAILED:
                return outcome is Outcome.COMPLETE
            if world.is_first:
                said = [f"Health:    training had failed: {trainer.ticks.health.word}"]
                saved = _roll_back(trainer, states, said.append)
            config, device, start, continued = trainer.config, trainer.device, None, True
            del trainer
            release_memory(device)  # of its networks, before there are new ones


@contextlib.contextmanager
def _lost_processes() -> Iterator[None]:
    """That others are gone is an error for people, after which starting again is worth while."""
    try:
        yield
    except DistributedError as error:
        raise LostProcessError(str(error)) from error


def begins_anew_from(run_dir: Path, config: TrainConfig) -> str | None:
    """The model file that a run needs once more when it continues, as it has no state yet; None: it needs none.

    Raises GanError if that is gone, or states are.
    """
    if states_in(run_dir):
        return None
    _check_that_none_was_lost(run_dir, config)
    if config.init_from is None:
        return None
    if check_resume_name(config.init_from) is not None:
        raise _cannot_begin(f"{config.init_from}: no such file", config)
    return config.init_from


def _source(init_from: str, config: TrainConfig) -> models.Snapshot:
    """What a run begins anew from."""
    try:
        return models.load(init_from, base=config.pretrained_base)
    except GanError as error:
        raise _cannot_begin(str(error), config) from error


def _cannot_begin(problem: str, config: TrainConfig) -> GanError:
    return GanError(
        f"{problem}; the run was stopped before its first training state was written and begins anew from this file: "
        f"put it back, or start again with --data {config.data.path} --resume FILE"
    )


def _state_to_go_on_from(
    states: StateFiles, run_dir: Path, config: TrainConfig, at: float | None, say: Callable[[str], None]
) -> SavedState | None:
    """None for a run that was stopped before its first state was written."""
    newest = states.load_newest(say)
    if newest is not None:
        finish_going_back(run_dir, states, newest)
    if at is not None:
        older = states.load_at(at)
        if newest is not None and older.nimg < newest.nimg:
            newest, aside = go_back(run_dir, states, older, above=newest.branch)
            say(f"Run:       gone back to {in_kimg(newest.nimg)} kimg; what came after it is in {aside}")
    if newest is None:
        _check_that_none_was_lost(run_dir, config)
        say("Run:       it was stopped before its first training state was written, so it begins anew")
    return newest


def _check_that_none_was_lost(run_dir: Path, config: TrainConfig) -> None:
    """A run has a state soon after its first snapshot, unless that could not be written, and then it stops at once."""
    later = any(retention.snapshots_in(run_dir))  # beyond the first, at 0 kimg
    seconds = max(
        (jsonl.mean_of(record, "Timing/total_sec") or 0 for record in jsonl.read_records(run_dir / jsonl.FILE_NAME)),
        default=0,
    )
    if later or seconds > max(60 * config.save_every, _SURELY_SAVED_SECONDS):
        raise GanError(
            f"{run_dir}: its training states are gone, so it cannot be continued; start a new run from its newest "
            f"snapshot with --data {config.data.path} --resume SNAPSHOT"
        )


def _roll_back(trainer: Trainer, states: StateFiles, say: Callable[[str], None]) -> SavedState:
    """The last healthy state, as the newest of a new branch."""
    healthy = states.load_healthy(trainer.ticks.healthy_until)
    if healthy is None:
        raise GanError(f"{trainer.run_dir}: its last healthy state cannot be read any more; start a new run")
    branch = trainer.state.progress.branch
    saved, aside = go_back(trainer.run_dir, states, healthy, above=branch, rate=_RATE_AFTER_FAILURE)
    say(f"Run:       gone back to {in_kimg(saved.nimg)} kimg, where it was healthy; what came after it is in {aside}")
    return saved
