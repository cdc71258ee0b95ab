"""Going back: an older state of a run becomes its newest, and what came after it is moved aside, never deleted.

The new state is in its place before anything is moved: a process that is killed in between has gone back, and whoever
continues the run finishes the moving.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path

from gan.files import atomic_path, explain_os_error
from gan.tracking import jsonl
from gan.training.run_folder import OPTIONS_FILE
from gan.training.state_files import NEWEST, SavedState, StateFiles

_FOLDER = re.compile(r"set-aside-(\d{2,})")
_NUMBERED = re.compile(r"(?:network-snapshot-|fakes)(\d{6,})\.(?:pkl|png)")


def go_back(
    run_dir: Path, states: StateFiles, older: SavedState, above: int, rate: float = 1.0
) -> tuple[SavedState, Path]:
    """Make `older`, with learning rates times `rate`, the newest state of a run.

    For MLflow, which cannot take metrics back, the run is another one from there on: a branch.

    Args:
        above: the branch that the run is on; the new one has a higher number.

    Returns the new state, and the folder that holds what came after it.
    """
    branch = max([above, *_taken(run_dir)]) + 1
    aside, state = _folder(run_dir, branch), older.branched(branch, rate)
    try:
        aside.mkdir()
        for name in (jsonl.FILE_NAME, OPTIONS_FILE, NEWEST):
            _copy(run_dir / name, aside)
        for path in run_dir.glob("metric-*.jsonl"):
            if os.access(path, os.R_OK) and path.is_file():  # one that cannot be read keeps no run from going on
                _copy(path, aside)
        states.replace_newest(state)
    except OSError as error:
        raise explain_os_error(error, aside) from error
    finish_going_back(run_dir, states, state)
    return state, aside


def finish_going_back(run_dir: Path, states: StateFiles, newest: SavedState) -> None:
    """Move what is later than the newest state of a branch aside, as far as that was not done when it was made."""
    aside = _folder(run_dir, newest.branch)
    if newest.branch == 0 or not aside.is_dir():
        return
    try:
        states.set_aside(newest.nimg, aside)
        for path, kimg in _sheets_and_snapshots(run_dir).items():
            if (aside / path.name).exists():
                continue  # made anew since then
            if kimg > newest.nimg // 1000:
                os.replace(path, aside / path.name)
            elif kimg == newest.nimg // 1000:  # may be of either side of that moment
                _copy(path, aside)
    except OSError as error:
        raise explain_os_error(error, aside) from error


def _folder(run_dir: Path, branch: int) -> Path:
    return run_dir / f"set-aside-{branch:02d}"


def _taken(run_dir: Path) -> list[int]:
    return [int(match[1]) for path in run_dir.iterdir() if (match := _FOLDER.fullmatch(path.name))]


def _sheets_and_snapshots(run_dir: Path) -> dict[Path, int]:
    """Those with a number in their names, with that number, kimg."""
    return {path: int(match[1]) for path in run_dir.iterdir() if (match := _NUMBERED.fullmatch(path.name))}


def _copy(path: Path, folder: Path) -> None:
    """Whole or not at all; without taking room where files are replaced and never changed."""
    if not path.exists():
        return
    if path.suffix in (".pkl", ".png", ".pt"):
        with contextlib.suppress(OSError):  # a file system without links
            os.link(path, folder / path.name)
            return
    with atomic_path(folder / path.name) as temporary:
        shutil.copyfile(path, temporary)
