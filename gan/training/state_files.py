"""The training states of a run folder: written so that one good one is always there, found again, gone back to.

`training-state.pt` is the newest, `training-state-000004.125.pt` one of 4.125 kimg. The newest few stay, and the newest
one that was healthy. A file is a zip that PyTorch writes: its checksums say whether it is whole.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gan.errors import DiskFullError, GanError
from gan.files import atomic_path, explain_os_error
from gan.training import disk

NEWEST = "training-state.pt"
_OLDER = re.compile(r"training-state-(\d{6,}\.\d{3})\.pt")
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class SavedState:
    """What `StateFiles.save` wrote, on the CPU."""

    state: dict[str, Any]
    """of `TrainingState.state_dict`"""
    tracker: dict[str, Any]
    """of the trackers: plain values"""
    healthy: bool = True
    """whether training was doing well"""

    @property
    def nimg(self) -> int:
        """Images shown so far."""
        return int(self.state["progress"]["nimg"])


@dataclasses.dataclass(frozen=True)
class _Kept:
    path: Path
    nimg: int
    healthy: bool


class StateFiles:
    """Writes and finds the states of `run_dir`, of which the newest `keep` stay. One process at a time may use it."""

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.newest_path = run_dir / NEWEST
        self._run_dir, self._keep = run_dir, keep
        self._kept: list[_Kept] = []  # newest first; those that cannot be read are not ours to remove

    @property
    def newest_nimg(self) -> int | None:
        """Of the newest state that was written or found; None: there is none."""
        return self._kept[0].nimg if self._kept else None

    def load_newest(self, report: Callable[[str], None]) -> SavedState | None:
        """The newest state that is whole; None if none was ever written.

        A line says which ones are damaged; they are put aside. Raises GanError if all are.
        """
        damaged: list[GanError] = []
        for path in self._paths():
            try:
                saved = read_state(path)
            except GanError as error:
                damaged.append(error)
                continue
            for damage in damaged:
                report(f"{damage}; going on from the state before it, {path.name} at {saved.nimg / 1000:g} kimg")
            if damaged and self.newest_path.exists():  # out of the way of the next state, which is to replace it
                os.replace(self.newest_path, self.newest_path.with_suffix(".pt.damaged"))
            self._kept = [_Kept(path, saved.nimg, saved.healthy), *self._readable(than=path)]
            return saved
        if damaged:
            raise GanError(f"{damaged[0]}, and no other one is whole; start a new run from the newest snapshot")
        return None

    def list_kimg(self) -> list[float]:
        """Where there is a state to go back to, in kimg, oldest first."""
        return [kept.nimg / 1000 for kept in reversed(self._readable())]

    def load_at(self, kimg: float) -> SavedState:
        """The newest state that is not beyond `kimg`. Raises GanError, listing those that there are."""
        for kept in self._readable():
            if kept.nimg <= kimg * 1000:
                return read_state(kept.path)
        raise self._no_such_state(f"--at {kimg:g}: {self._run_dir} keeps no state of that time")

    def load_healthy(self) -> SavedState | None:
        """The newest state of a time when training was doing well."""
        found = next((kept for kept in self._readable() if kept.healthy), None)
        return None if found is None else read_state(found.path)

    def set_aside(self, nimg: int, folder: Path) -> None:
        """Move the states of a time after `nimg` images into `folder`."""
        for kept in [kept for kept in self._readable() if kept.nimg > nimg]:
            try:
                os.replace(kept.path, folder / kept.path.name)
            except OSError as error:
                raise explain_os_error(error, folder) from error
        self._kept = self._readable()

    def save(self, saved: SavedState) -> None:
        """Write the newest state. The one before it stays, under its own name.

        Raises GanError, with all states as they were but for the oldest, if there is no room.
        """
        self._make_room(disk.tensor_bytes(saved.state))
        # Given a path, torch.save says nothing of a disk when that is full; with an open file the write itself does.
        with atomic_path(self.newest_path) as temporary:
            with open(temporary, "wb") as file:
                content = {"state": saved.state, "tracker": saved.tracker, "healthy": saved.healthy}
                torch.save({"format": _FORMAT, **content}, file)
            self._step_aside()
        self._kept.insert(0, _Kept(self.newest_path, saved.nimg, saved.healthy))
        for kept in self._superfluous():
            self._remove(kept)

    def _make_room(self, needed: int) -> None:
        """Without room for one more the oldest go first, the newest never."""
        while True:
            try:
                return disk.check_room(self.newest_path, needed)
            except DiskFullError:
                if len(self._kept) < 2:
                    raise
                self._remove(self._kept[-1])

    def _step_aside(self) -> None:
        """Give the newest state its own name: for a moment there is no newest, and then the new one."""
        if self._kept and self._kept[0].path == self.newest_path:
            newest = self._kept[0]
            own = self._run_dir / f"training-state-{newest.nimg / 1000:010.3f}.pt"
            os.replace(newest.path, own)
            self._kept = [dataclasses.replace(newest, path=own), *(k for k in self._kept[1:] if k.path != own)]

    def _superfluous(self) -> list[_Kept]:
        """All but the newest, and the newest healthy one."""
        extra = self._kept[self._keep :]
        if not any(kept.healthy for kept in self._kept[: self._keep]):
            healthy = next((kept for kept in extra if kept.healthy), None)
            return [kept for kept in extra if kept is not healthy]
        return extra

    def _remove(self, kept: _Kept) -> None:
        self._kept.remove(kept)
        with contextlib.suppress(OSError):  # it is only too many
            kept.path.unlink()

    def _paths(self) -> list[Path]:
        """Newest first."""
        older = [path for path in self._run_dir.glob("training-state-*.pt") if _OLDER.fullmatch(path.name)]
        older.sort(key=lambda path: path.name, reverse=True)
        return [self.newest_path, *older] if self.newest_path.exists() else older

    def _readable(self, than: Path | None = None) -> list[_Kept]:
        """The states that can be read, without reading them whole; newest first."""
        found = []
        for path in self._paths():
            if path != than:
                with contextlib.suppress(GanError):
                    saved = _load(path, mmap=True)
                    found.append(_Kept(path, saved.nimg, saved.healthy))
        return found

    def _no_such_state(self, problem: str) -> GanError:
        there = ", ".join(f"{kimg:g}" for kimg in self.list_kimg())
        return GanError(f"{problem}; there are states of {there} kimg" if there else f"{problem}, nor any other")


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
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        raise GanError(f"{path}: damaged or not a training state ({reason})") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise GanError(f"{path}: not a training state that this version can continue")
    return SavedState(content["state"], content["tracker"], content.get("healthy", True))
