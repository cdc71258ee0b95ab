"""The networks that look at pictures for metrics: TorchScript files, found on this machine or fetched. No torch.

A TorchScript file is a program, which PyTorch executes: take it from where it comes from, as any program.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gan.errors import GanError, one_line
from gan.files import atomic_path
from gan.metric_names import INCEPTION, VGG
from gan.presets import PRETRAINED_BASE
from torch_utils.user_cache import user_cache

if TYPE_CHECKING:
    import torch

    from gan.metrics.detector import Detector

VARIABLE = "GAN_DETECTORS"
BASE_VARIABLE = "GAN_PRETRAINED_BASE"
_SUBFOLDER = "metrics"  # of the public models
_OTHERS = (
    (b"<", "it is a web page; the download went wrong"),
    (b"version https://git-lfs", "it is a Git LFS pointer; fetch the file itself with: git lfs pull"),
    (b"\x80", "it is a pickle, not a TorchScript file"),
)
_FETCH = "fetch it again with python -m gan metrics --prefetch, or give the folder of another one with --detectors"


class Detectors:
    """Where detectors are looked for, and those that were loaded.

    Args:
        folder: looked into first (--detectors), then that of $GAN_DETECTORS, then the user's cache.
    """

    def __init__(self, folder: str | None = None) -> None:
        given = [folder, os.environ.get(VARIABLE)]
        cache = cache_folder()
        self.folders = [*(Path(name) for name in given if name), *([cache] if cache is not None else [])]
        self._loaded: dict[tuple[str, str], Detector] = {}
        self._digests: dict[tuple[Path, int, int], str] = {}

    def path(self, name: str) -> Path | None:
        """The file of a detector; None: it is not here."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                if (folder / name).is_file():
                    return folder / name
        return None

    def missing_line(self, names: Iterable[str]) -> str:
        """What is not here, where it was looked for, and what to do."""
        missing = [name for name in names if self.path(name) is None]
        are = "is" if len(missing) == 1 else "are"
        looked = ", ".join(map(str, dict.fromkeys(self.folders))) or "no folder, as there is no home folder"
        return (
            f"{' and '.join(missing)} {are} not here (looked in {looked}): python -m gan metrics --prefetch fetches "
            "what is missing where there is a network, --detectors DIR names a folder that has it"
        )

    def problem_with(self, name: str) -> str | None:
        """Why a detector cannot be used: it is not here, or damaged. Reads all of it, and executes nothing."""
        path = self.path(name)
        if path is None:
            return self.missing_line([name])
        try:
            check_file(path)
        except GanError as error:
            return str(error)
        return None

    def sha256(self, name: str) -> str | None:
        """Of the file of a detector, None if it is not here. Raises GanError if it cannot be read."""
        path = self.path(name)
        if path is None:
            return None
        try:
            status = path.stat()
            key = (path, status.st_size, status.st_mtime_ns)
            if key not in self._digests:
                self._digests[key] = _sha256(path)
        except OSError as error:
            raise GanError(f"{path}: cannot be read ({error.strerror or error})") from error
        return self._digests[key]

    def load(self, name: str, device: torch.device) -> Detector:
        """A detector on a device, kept for the next time.

        Raises GanError if it is not here, or is no detector: its answer to a trial is looked at.
        """
        key = (name, str(device))
        if key not in self._loaded:
            from gan.metrics.detector import Detector

            path, digest = self.path(name), self.sha256(name)
            if path is None or digest is None:
                raise GanError(self.missing_line([name]))
            check_file(path)
            self._loaded[key] = Detector(name, path, digest, device)
        return self._loaded[key]

    def forget(self) -> None:
        """Drop what is loaded, to have its memory back."""
        self._loaded.clear()


def cache_folder() -> Path | None:
    """Where detectors are put that were fetched; None where there is no home folder."""
    try:
        return user_cache("detectors")
    except RuntimeError:
        return None


def check_file(path: Path) -> None:
    """Raises GanError, in one line, for a file that cannot be TorchScript or is damaged. Executes nothing."""
    try:
        with open(path, "rb") as file:
            start = file.read(64).lstrip()
        for beginning, what in _OTHERS:
            if start.startswith(beginning):
                raise GanError(f"{path}: {what}; {_FETCH}")
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            if not any(name.endswith("/constants.pkl") for name in names) or not any("/code/" in n for n in names):
                raise GanError(f"{path}: is no TorchScript file; {_FETCH}")
            damaged = archive.testzip()
    except GanError:
        raise
    except OSError as error:
        raise GanError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged zip makes zipfile raise almost anything
        raise GanError(f"{path}: is no TorchScript file, or cut short ({one_line(error)}); {_FETCH}") from error
    if damaged is not None:
        raise GanError(f"{path}: is damaged (a checksum in it is wrong); {_FETCH}")


def prefetch(
    names: Sequence[str],
    folder: str | None = None,
    base: str | None = None,
    progress: Callable[[int, int | None], None] | None = None,
) -> list[Path]:
    """Have detectors on this machine, or in a folder to be carried elsewhere; where they are.

    What is there already, and whole, is not fetched.

    Args:
        folder: where they are put (--detectors); else in the user's cache.
        base: address or folder of the public models, which has them in `metrics/`; else $GAN_PRETRAINED_BASE.
        progress: called while a file is fetched.

    Raises GanError.
    """
    detectors = Detectors(folder)
    dest = Path(folder) if folder else cache_folder()
    if dest is None:
        raise GanError("there is no home folder to keep detectors in; set XDG_CACHE_HOME, or give --detectors DIR")
    found = []
    for name in names:
        path = detectors.path(name)
        if path is None or detectors.problem_with(name) is not None:
            path = _fetch(name, dest / name, base, progress)
        elif folder and path.parent != dest:
            path = _copy(path, dest / name)
        found.append(path)
    return found


def _copy(source: Path, dest: Path) -> Path:
    check_file(source)
    with atomic_path(dest) as path:
        shutil.copyfile(source, path)
    return dest


def _fetch(name: str, dest: Path, base: str | None, progress: Callable[[int, int | None], None] | None) -> Path:
    from gan.models import download  # not for who only looks whether they are there

    base = base or os.environ.get(BASE_VARIABLE) or PRETRAINED_BASE
    if "://" in base:
        address = f"{base.rstrip('/')}/{_SUBFOLDER}/{name}"
    else:  # a folder, with or without those of the zoo
        inside = Path(base) / _SUBFOLDER / name
        address = str(inside if inside.exists() else Path(base) / name)
    try:
        source = download.local_path(address, progress=progress)
    except GanError as error:
        problem = str(error).partition(";")[0]
        raise GanError(
            f"{problem}; fetch {INCEPTION} and {VGG} elsewhere, put them into a folder, and name that with "
            f"--detectors DIR or {VARIABLE}"
        ) from error
    try:
        _copy(source, dest)
    except GanError:
        download.forget(address, source)  # a web page under its address
        raise
    if source.parent == download.cache_folder():
        with contextlib.suppress(OSError):  # it would only take room
            source.unlink()
    return dest


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
