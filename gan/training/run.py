"""A run from its start, or from where it was, to its end: which state to go on from, and what if training fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.errors import GanError
from gan.files import remove_leftovers
from gan.training import run_folder
from gan.training.state_files import SavedState, StateFiles
from gan.training.trainer import Outcome, Trainer

_RATE_AFTER_FAILURE = 0.5


def train(
    config: TrainConfig,
    run_dir: Path,
    dataset: ImageDataset,
    *,
    start: models.Snapshot | None = None,
    continued: bool = False,
    at: float | None = None,
    notes: Sequence[str] = (),
) -> bool:
    """Train in `run_dir`. Returns whether the run is complete (False: it was asked to stop, and can be continued).

    Args:
        start: weights to start from, for a new run.
        continued: go on from the newest training state.
        at: go back to the state of so many kimg first.
        notes: lines to say at the start.

    Raises GanError if another process trains there, if no state can be read, and if training has failed for good.
    """
    with run_folder.locked(run_dir):
        remove_leftovers(run_dir)
        states, said = StateFiles(run_dir, config.keep_states), list(notes)
        saved = _newest(states, config, run_dir, said) if continued else None
        if saved is not None and at is not None:
            older = states.load_at(at)
            if older.nimg != saved.nimg:
                saved = _go_back(run_dir, states, older, saved.state["progress"].get("branch", 0), said)
        if saved is None and config.init_from and start is None:
            start = models.load(config.init_from)
        if continued:
            run_folder.write_options(run_dir, config)
        while True:
            trainer = Trainer(
                config, run_dir, dataset, states, start=start, saved=saved, continued=continued, notes=said
            )
            if trainer.complete:
                trainer.settle()
                return True
            outcome = trainer.run()
            if outcome is not Outcome.FAILED:
                return outcome is Outcome.COMPLETE
            saved, said, continued = *_roll_back(trainer, states), True
            start = None
            config = trainer.config
            del trainer  # its networks, before there are new ones


def _newest(states: StateFiles, config: TrainConfig, run_dir: Path, said: list[str]) -> SavedState | None:
    """The state to go on from; None for a run that was stopped before its first one was written."""
    saved = states.load_newest(said.append)
    if saved is None:
        if any(run_dir.glob("network-snapshot-*.pkl")):
            raise GanError(
                f"{run_dir}: its training states are gone, so it cannot be continued; start a new run from its newest "
                f"snapshot with --data {config.data.path} --resume SNAPSHOT"
            )
        said.append("Run:       it was stopped before its first training state was written, so it begins anew")
    return saved


def _go_back(
    run_dir: Path, states: StateFiles, older: SavedState, branch: int, said: list[str], rate: float = 1.0
) -> SavedState:
    """Make `older` the newest state of the run, with learning rates times `rate`; what came after it is moved aside."""
    aside = run_folder.new_set_aside(run_dir, above=branch)
    states.set_aside(older.nimg, aside)
    run_folder.set_aside(run_dir, older.nimg, aside)
    progress = {**older.state["progress"], "branch": run_folder.set_aside_number(aside)}
    state = {**older.state, "progress": progress}
    if rate != 1:
        progress["rollbacks"] = progress.get("rollbacks", 0) + 1
        for name in ("G_opt", "D_opt"):
            groups = [{**group, "lr": group["lr"] * rate} for group in state[name]["param_groups"]]
            state[name] = {**state[name], "param_groups": groups}
    older = dataclasses.replace(older, state=state, tracker={})  # for MLflow it is another run
    states.save(older)
    said.append(f"Run:       gone back to {older.nimg / 1000:g} kimg; what came after it is in {aside}")
    return older


def _roll_back(trainer: Trainer, states: StateFiles) -> tuple[SavedState, list[str]]:
    """The state to go on from after a failure. Raises GanError if the run is to stop."""
    problem = f"training has failed: {trainer.health.word}"
    healthy = states.load_healthy()
    wanted = trainer.config.on_divergence == "rollback"
    if wanted and healthy is not None and not trainer.state.progress.rollbacks:
        said = [f"Health:    {problem}"]
        branch = trainer.state.progress.branch
        saved = _go_back(trainer.run_dir, states, healthy, branch, said, rate=_RATE_AFTER_FAILURE)
        return saved, [*said, "Rates:     halved from here on"]
    resume = f"python train.py --resume {trainer.run_dir}"
    if healthy is None:
        advice = "no healthy state is kept"
    elif trainer.state.progress.rollbacks:
        advice = "it had gone back once already"
    else:
        kimg = healthy.nimg / 1000
        advice = (
            f"{resume} --on-divergence rollback goes back to {kimg:g} kimg, where it was healthy, at half the rates"
        )
    raise GanError(
        f"{problem}; {advice}; for a new run: {trainer.health.advice or 'lower --glr and --dlr'}; {resume} "
        f"--on-divergence ignore goes on as it is"
    )
