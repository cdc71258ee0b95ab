"""The files of a run: sheets, snapshots, training states; what is in each, and what if one cannot be written."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch

from gan import models
from gan.config import TrainConfig
from gan.data.dataset import ImageDataset
from gan.data.labels import LabelTable
from gan.errors import GanError, one_line, printable
from gan.files import flush
from gan.networks import Generator
from gan.snapshot_names import name_of
from gan.tracking import Console, JsonlTracker, MlflowTracker, Trackers, jsonl
from gan.training import disk, resources, retention, run_folder, state_files
from gan.training.grid import SampleGrid
from gan.training.outputs import Output, Outputs
from gan.training.run_folder import in_kimg
from gan.training.state import TrainingState
from gan.training.state_files import SavedState, StateFiles
from torch_utils.world import ALONE, World


class RunFiles:
    """Asks `outputs` for the files of a run; what is in them is as of the moment of asking.

    With several processes all ask for the same sheets, of which each computes its part; rank 0 writes everything.

    Args:
        console: takes lines for people, on any thread.
        any_waits: see `Outputs`.
        in_use: names of snapshots that are not to be removed now; called on any thread.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_dir: Path,
        dataset: ImageDataset,
        labels: LabelTable,
        state: TrainingState,
        states: StateFiles,
        console: Console,
        world: World = ALONE,
        any_waits: Callable[[bool], bool] = bool,
        in_use: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._config, self._run_dir, self._dataset = config, run_dir, dataset
        self._state, self._states, self._console = state, states, console
        self._report, self._in_use = console.print, in_use
        self._labels, self._world = labels, world
        self._grid = SampleGrid.choose(dataset, config.network.z_dim, config.seed)
        self._tracker_state: dict[str, Any] = {}
        self._said: set[str] = set()
        self.trackers = Trackers([])
        self.outputs = Outputs(state.device, self._report, self._not_written, any_waits)

    def open_trackers(self, saved: dict[str, Any], continued: bool) -> None:
        """Begin to track the run; `saved`: what they gave for the state that it goes on from."""
        progress = self._state.progress
        stats = JsonlTracker(self._run_dir, progress.nimg, saved.get("unwritten_ticks"))
        mlflow = MlflowTracker(
            self._run_dir,
            experiment=self._config.data.name,
            params=dataclasses.asdict(self._config),
            tags=resources.versions(self._state.device),
            run_id=saved.get("run_id"),
            nimg=progress.nimg,
            continued=continued,
            branch=progress.branch,
            report=self._report,
        )
        self.trackers = Trackers([self._console, stats, mlflow], self._report)
        self.remember(saved)

    def remember(self, tracker_state: dict[str, Any]) -> None:
        """What the trackers gave for the training state; what they do not know this time stays."""
        self._tracker_state.update({name: value for name, value in tracker_state.items() if value is not None})

    def add_reals(self) -> None:
        """The sheet of real images."""
        path = self._run_dir / "reals.png"

        def write() -> None:
            disk.check_room(path, disk.sheet_bytes(self._config))
            self._grid.save_reals(self._dataset, path)
            self.trackers.image("reals", path, 0)

        self.outputs.add(Output(path.name, "sheet", write))

    def add_fakes(self, name: str, G: Generator, batch_gpu: int) -> None:
        """The sheet of what G, changed by nobody, generates. Every process asks for it, with the same numbers."""
        path, nimg = self._run_dir / name, self._state.progress.nimg
        labels = self._labels.take(torch.from_numpy(self._grid.indices).to(self._state.device))
        sheet = self._grid.fakes(G, labels, batch_gpu, self._world)

        def write() -> None:
            disk.check_room(path, disk.sheet_bytes(self._config))
            sheet.write(path)
            self.trackers.image("fakes", path, nimg)

        self.outputs.add(Output(name, "sheet", write if self._world.is_first else None, sheet.portions))

    def add_snapshot(self, networks: dict[str, Any]) -> None:
        """The snapshot, in place of older ones that are not to stay."""
        data, path = self._config.data, self._run_dir / self.snapshot_name
        kwargs = {
            "path": data.path,
            "use_labels": data.cond,
            "max_size": data.subset,
            "xflip": data.mirror,
            "resolution": data.img_resolution,
        }
        if self._dataset.label_kind is not None:
            kwargs["label_kind"] = self._dataset.label_kind
        if self._dataset.class_names is not None:
            kwargs["class_names"] = self._dataset.class_names
        needed = disk.tensor_bytes([networks[name].state_dict() for name in ("G", "D", "G_ema")])

        def write() -> None:
            disk.check_room(path, needed)
            models.save(path, **networks, training_set_kwargs=kwargs)
            self.prune()

        self.outputs.add(Output(path.name, "snapshot", write))

    def prune(self) -> None:
        """Remove the snapshots that are not to stay. One too many is no reason to stop; what is wrong is said once."""
        config = self._config
        try:
            for name in retention.prune_snapshots(self._run_dir, config.keep, config.keep_every, self._in_use()):
                self._report(f"Removed {name}: --keep {config.keep}")
        except Exception as error:
            text = str(error) if isinstance(error, GanError) else f"{type(error).__name__}: {one_line(error)}"
            if text not in self._said:
                self._said.add(text)
                self._report(f"WARNING:   --keep {config.keep}: {printable(text)}")

    @property
    def snapshot_name(self) -> str:
        """The snapshot of this moment."""
        return name_of(self._state.progress.nimg // 1000)

    @property
    def sheet_name(self) -> str:
        """The sheet of fakes that goes with it."""
        return f"fakes{self._state.progress.nimg // 1000:06d}.png"

    def add_state(self, state: dict[str, Any], healthy_until: int, said: bool = False) -> None:
        """The training state, a copy for which there is room in `outputs`; `said`: say when it is there."""
        self.remember(self.trackers.state())
        saved = SavedState(state, dict(self._tracker_state), healthy_until)

        def write() -> None:
            flush(self._run_dir / jsonl.FILE_NAME)  # a state on disk implies the ticks before it
            for name in self._states.save(saved):
                self._report(f"WARNING:   {name} had to go: there was no room for another state")
            if said:
                self._report(f"Saved at {in_kimg(saved.nimg)} kimg")

        self.outputs.add(Output(state_files.NEWEST, "state", write))

    def problem_with(self, *names: str) -> str | None:
        """What kept one of these files from being written, and what there is instead; None: they are there."""
        missing = [self.outputs.missing[name] for name in names if name in self.outputs.missing]
        return f"{missing[0]}; {self._newest_state()}" if missing else None

    def _newest_state(self) -> str:
        nimg = self._states.newest_nimg
        if nimg is None:
            return "no state of the run was ever saved"
        command = run_folder.resume_command(self._run_dir)
        return f"the run is saved at {in_kimg(nimg)} kimg: {command} goes on from there"

    def _not_written(self, output: Output, error: GanError) -> None:
        """Training goes on: the space may come back, and what it has learned since the last state is not on disk."""
        if output.kind == "state" and self._states.newest_nimg is None:
            raise error  # nothing can be kept here: better said now than after days
        self._report(f"WARNING:   {output.name} WAS NOT WRITTEN: {error}")
        self._report(f"WARNING:   training goes on, the next one is tried when it is due; {self._newest_state()}")
