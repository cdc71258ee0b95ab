"""The training states of a run folder: written so that one good one is always there, found again, gone back to.

`training-state.pt` is the newest, `training-state-000004.125.pt` one of 4.125 kimg. The newest few stay, and the newest
one that was healthy. A file is a zip that PyTorch writes: its checksums say whether it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gan.errors import GanError
from gan.files import atomic_path
from gan.training import disk
from gan.training.micro_batch import is_out_of_memory
from gan.training.run_folder import in_kimg

NEWEST = "training-state.pt"
_OLDER = re.compile(r"training-state-(\d{6,}\.\d{3})\.pt")
_FORMAT = 2


@dataclasses.dataclass(frozen=True)
class SavedState:
    """What `StateFiles.save` wrote, on the CPU."""

    state: dict[str, Any]
    """of `TrainingState.state_dict`"""
    tracker: dict[str, Any]
    """of the trackers: plain values"""
    healthy_until: int
    """images at the end of the last tick that showed training to be well"""

    @property
    def nimg(self) -> int:
        """Images shown so far."""
        return int(self.state["progress"]["nimg"])

    @property
    def branch(self) -> int:
        """See `Progress.branch`."""
        return int(self.state["progress"]["branch"])

    def branched(self, branch: int, rate: float) -> SavedState:
        """The same moment on another branch; another `rate` than 1 multiplies the learning rates, for a rollback."""
        progress, state = {**self.state["progress"], "branch": branch}, {**self.state}
        if rate != 1:
            progress["rollbacks"] += 1
            for name in ("G_opt", "D_opt"):
                groups = [{**group, "lr": group["lr"] * rate} for group in state[name]["param_groups"]]
                state[name] = {**state[name], "param_groups": groups}
        return SavedState({**state, "progress": progress}, tracker={}, healthy_until=self.healthy_until)


@dataclasses.dataclass(frozen=True)
class _Kept:
    path: Path
    nimg: int


class StateFiles:
    """Writes and finds the states of `run_dir`, of which the newest `keep` stay. One process at a time may use it."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.newest_path = run_dir / NEWEST
        self._run_dir, self._keep = run_dir, keep
        self._kept: list[_Kept] = []  # newest first; those that cannot be read are not ours to remove

    @property
    def newest_nimg(self) -> int | None:
        """Of the newest state that was written or found; None: there is none."""
        return self._kept[0].nimg if self._kept else None

    def healthy_nimg(self, healthy_until: int) -> int | None:
        """Of the newest state after which a tick showed training to be well; None: there is none."""
        return next((kept.nimg for kept in self._kept if kept.nimg <= healthy_until), None)

    def load_newest(self, report: Callable[[str], None]) -> SavedState | None:
        """The newest state that is whole; None if none was ever written.

        A line says which ones are damaged. Raises GanError if all are.
        """
        damaged: list[GanError] = []
        for path in states_in(self._run_dir):
            try:
                saved = read_state(path)
            except GanError as error:
                damaged.append(error)
                continue
            for damage in damaged:
                kimg = in_kimg(saved.nimg)
                report(f"WARNING:   {damage}; going on from the one before it, {path.name} at {kimg} kimg")
            if damaged and self.newest_path.exists():  # out of the way of the next state, which is to replace it
                os.replace(self.newest_path, self.newest_path.with_suffix(".pt.damaged"))
            self._kept = [_Kept(path, saved.nimg), *self._others(path)]
            return saved
        if damaged:
            raise GanError(f"{damaged[0]}, and no other one is whole; start a new run from the newest snapshot")
        return None

    def load_at(self, kimg: float) -> SavedState:
        """The newest whole state that is not beyond `kimg`. Raises GanError, listing those that there are."""
        saved = self._load([kept for kept in self._kept if kept.nimg <= round(kimg * 1000)])
        if saved is None:
            there = ", ".join(in_kimg(kept.nimg) for kept in reversed(self._kept))
            others = f"; there are states of {there} kimg" if there else ", nor any other"
            raise GanError(f"--at {kimg:g}: {self._run_dir} keeps no state of that time{others}")
        return saved

    def load_healthy(self, healthy_until: int) -> SavedState | None:
        """The newest whole state after which a tick showed training to be well."""
        return self._load([kept for kept in self._kept if kept.nimg <= healthy_until])

    def set_aside(self, nimg: int, folder: Path) -> None:
        """Move the states of a time after `nimg` images into `folder`. Raises OSError."""
        for kept in [kept for kept in self._kept if kept.nimg > nimg]:
            os.replace(kept.path, folder / kept.path.name)
            self._kept.remove(kept)

    def save(self, saved: SavedState) -> list[str]:
        """Write the newest state. The one before it stays, under its own name, if it is of another moment.

        Returns the names of those that had to go for want of room: the oldest, the newest never. Raises GanError if
        even that would not be enough; then all are as they were.
        """
        removed = self._make_room(disk.tensor_bytes(saved.state), saved.healthy_until)
        same_moment = self.newest_nimg == saved.nimg
        self._write(saved, before_publishing=None if same_moment else self._step_aside)
        for kept in self._superfluous(saved.healthy_until):
            self._remove(kept)
        return removed

    def replace_newest(self, saved: SavedState) -> None:
        """Write the newest state in place of the one that is. Raises GanError."""
        self._write(saved, before_publishing=None)

    def _write(self, saved: SavedState, before_publishing: Callable[[], None] | None) -> None:
        # Given a path, torch.save says nothing of a disk when that is full; with an open file the write itself does.
        with atomic_path(self.newest_path) as temporary:
            with open(temporary, "wb") as file:
                content = {"state": saved.state, "tracker": saved.tracker, "healthy_until": saved.healthy_until}
                torch.save({"format": _FORMAT, **content}, file)
            if before_publishing is not None:
                before_publishing()
        others = [kept for kept in self._kept if kept.path != self.newest_path]
        self._kept = [_Kept(self.newest_path, saved.nimg), *others]

    def _make_room(self, needed: int, healthy_until: int) -> list[str]:
        older = self._kept[:0:-1]
        disk.check_room(self.newest_path, needed - disk.size_of(kept.path for kept in older))
        removed = []
        healthy = self.healthy_nimg(healthy_until)
        for kept in sorted(older, key=lambda kept: kept.nimg == healthy):  # the last healthy one last
            if disk.has_room(self.newest_path, needed):
                break
            self._remove(kept)
            removed.append(kept.path.name)
        return removed

    def _step_aside(self) -> None:
        """Give the newest state its own name: for a moment there is no newest, and then the new one."""
        if self._kept and self._kept[0].path == self.newest_path:
            newest = self._kept[0]
            own = self._run_dir / f"training-state-{newest.nimg / 1000:010.3f}.pt"
            os.replace(newest.path, own)
            self._kept = [_Kept(own, newest.nimg), *(kept for kept in self._kept[1:] if kept.path != own)]

    def _superfluous(self, healthy_until: int) -> list[_Kept]:
        """All but the newest, and the newest healthy one."""
        healthy = self.healthy_nimg(healthy_until)
        return [kept for kept in self._kept[self._keep :] if kept.nimg != healthy]

    def _remove(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        with contextlib.suppress(OSError):  # it is only too many
            kept.path.unlink()

    def _others(self, besides: Path) -> list[_Kept]:
        """The other states that can be read, without reading them whole; newest first."""
        found = []
        for path in states_in(self._run_dir):
            if path != besides:
                with contextlib.suppress(GanError):
                    found.append(_Kept(path, _load(path, mmap=True).nimg))
        return found

    def _load(self, kept: list[_Kept]) -> SavedState | None:
        """The first of these that is whole."""
        for one in kept:
            with contextlib.suppress(GanError):
                return read_state(one.path)
        return None


def states_in(run_dir: Path) -> list[Path]:
    """The files of all states of a run, newest first."""
    older = [path for path in run_dir.glob("training-state-*.pt") if _OLDER.fullmatch(path.name)]
    older.sort(key=lambda path: path.name, reverse=True)
    newest = run_dir / NEWEST
    return [newest, *older] if newest.exists() else older


def read_state(path: Path) -> SavedState:
    """A state, checked to be whole, with nothing executed. Raises GanError naming the file."""
    try:
        with zipfile.ZipFile(path) as archive:
            torn = archive.testzip()
    except FileNotFoundError as error:
        raise GanError(f"{path}: no such file") from error
    except (OSError, ValueError, EOFError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise GanError(f"{path}: damaged or not a training state ({error})") from error
    if torn is not None:
        raise GanError(f"{path}: damaged (the checksum of {torn} does not agree)")
    return _load(path)


def _load(path: Path, mmap: bool = False) -> SavedState:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        if content["format"] != _FORMAT:
            raise GanError(f"{path}: not a training state that this version can continue")
        saved = SavedState(content["state"], content["tracker"], content["healthy_until"])
        _ = saved.nimg, saved.branch
    except GanError:
        raise
    except Exception as error:  # damaged bytes raise all sorts
        if is_out_of_memory(error):
            raise
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise GanError(f"{path}: damaged or not a training state ({reason})") from error
    return saved
