"""A folder of images."""

from __future__ import annotations

import os
import posixpath
import stat
from pathlib import Path

from PIL import Image

from gan.data.dataset_files import LABEL_FILE
from gan.data.image_files import first_bytes, is_hidden, open_image
from gan.data.label_files import MAX_LABEL_FILE, labels_inside
from gan.data.label_matching import Labels
from gan.data.sources.base import FileSource, counted, digest, file_version, sort_out
from gan.errors import GanError, printable

# What --scan-only writes: a sheet of images is none itself. Other programs name notes on an image scan.png alike.
SCAN_FILE, SHEET_FILE, _SCAN_START = "scan.json", "scan.png", b'{\n "source": "'


class FolderSource(FileSource):
    """Every image in a folder and the folders below it."""

    def __init__(self, name: str) -> None:
        self._root = Path(name)
        files, unread, notes = _files_below(self._root)
        found = sort_out(files, self._first_bytes)
        sheets = {path for path in found.images if posixpath.basename(path) == SHEET_FILE and self._is_sheet(path)}
        super().__init__(name, [path for path in found.images if path not in sheets])
        self.lost = sorted(unread + found.lost)
        self.ignored = sorted([*found.ignored, *sheets])
        self.notes = notes + found.notes

    def read(self, index: int) -> Image.Image:
        return open_image(self._root / self.names[index])

    def fingerprint(self) -> str:
        labels = [path for path in self.ignored if posixpath.basename(path) == LABEL_FILE]
        return digest(*(part for path in [*self.names, *labels] for part in (path, self._version(path))))

    def _read_labels(self) -> Labels | None:
        return labels_inside(self.name, self.names, self.ignored, self._label_file)

    def _is_sheet(self, path: str) -> bool:
        return self._first_bytes(posixpath.join(posixpath.dirname(path), SCAN_FILE)).startswith(_SCAN_START)

    def _version(self, path: str) -> str:
        try:
            return "{} {}".format(*file_version(self._root / path))
        except OSError as error:  # a link that leads nowhere
            return str(error.errno)

    def _first_bytes(self, path: str) -> bytes:
        try:
            return first_bytes(self._root / path)
        except OSError:
            return b""

    def _label_file(self, path: str) -> bytes:
        where = f"--source {self.name}: {printable(path)}"
        try:
            with open(self._root / path, "rb") as file:
                data = file.read(MAX_LABEL_FILE + 1)
        except OSError as error:
            raise GanError(f"{where} cannot be read ({error.strerror or error}); mend it or delete it") from error
        if len(data) > MAX_LABEL_FILE:
            raise GanError(f"{where} is larger than {MAX_LABEL_FILE >> 20} MB; that is no list of labels")
        return data


def _files_below(root: Path) -> tuple[list[str], list[tuple[str, str]], list[str]]:
    """Paths of all files below `root`, relative to it, with '/' between folders; folders that cannot be read, and why;
    and notes of what else was not read.

    Nothing in hidden folders. A folder is read once: links to folders are followed last, so that it goes by its own
    name.
    """
    files: list[str] = []
    unread: list[tuple[str, str]] = []
    notes: list[str] = []
    special: list[str] = []
    folders = [""]
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    while folders or links:
        if not folders:
            links.sort(reverse=True)
        folder = (folders or links).pop()
        try:
            status = os.stat(root / folder)
            if (status.st_dev, status.st_ino) in seen:
                notes.append(f"{printable(folder)}: leads to a folder that is read already; not followed")
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as found:
                entries = list(found)
        except OSError as error:
            if not folder:
                raise
            unread.append((folder, f"cannot be read ({error.strerror or error}); what is in it is left out"))
            continue
        for entry in entries:
            path = posixpath.join(folder, entry.name)
            kind = _kind(entry)
            if kind != "file" and is_hidden(entry.name):
                continue
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(path)
            else:
                (files if kind == "file" else special).append(path)
    if special:
        notes.append(f"{counted(special, 'entry', 'entries')} left out: no file, but a pipe, socket or device")
    return files, unread, sorted(notes)


def _kind(entry: os.DirEntry[str]) -> str:
    """ "file", "folder" or "special". A link that leads nowhere, or to itself, is a file that cannot be read."""
    try:
        mode = entry.stat().st_mode if entry.is_symlink() else None
        if mode is None:
            return "folder" if entry.is_dir() else "file" if entry.is_file() else "special"
    except OSError:
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"
