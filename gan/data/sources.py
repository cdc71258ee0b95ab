"""Opening what a user names as --source: a folder, a zip file, or the built-in demo collection.

To add a kind of source: subclass `Source`, and name it in `open_source`.
"""

from __future__ import annotations

import json
import math
import os
import posixpath
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from gan.data import demo
from gan.data.transforms import upright_size
from gan.errors import GanError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
LABEL_FILE = "dataset.json"

Label = int | list[float]


class Header(NamedTuple):
    """What the first bytes of an image file say: Pillow's mode, and the size in pixels once it is the right way up."""

    mode: str
    width: int
    height: int


class Source(ABC):
    """Images in a fixed order. `name` is what the user typed, `names` are the images' paths with '/' between folders.

    `labels` holds the rows of the source's dataset.json by image name, or is None where there are no labels.
    `ignored` lists the files inside that are no images by their name.
    """

    def __init__(self, name: str, names: list[str]) -> None:
        self.name = name
        self.names = names
        self.labels: dict[str, Label] | None = None
        self.ignored: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Open image `index`; pixels may be decoded only when they are used. Raises whatever the decoder raises."""

    def header(self, index: int) -> Header:
        """Mode and size of image `index` without decoding its pixels. Raises whatever the decoder raises."""
        with self.read(index) as image:
            return Header(image.mode, *upright_size(image))


class FolderSource(Source):
    """Every image in a folder and the folders below it."""

    def __init__(self, name: str) -> None:
        self._root = Path(name)
        images, ignored = _split_names(_files_below(self._root))
        super().__init__(name, images)
        self.ignored = ignored
        self.labels = _labels_by_name(name, ignored, lambda path: (self._root / path).read_bytes())

    def read(self, index: int) -> Image.Image:
        return Image.open(self._root / self.names[index])


class ZipSource(Source):
    """Every image in a zip file. May be read by several threads."""

    def __init__(self, name: str) -> None:
        try:
            self._archive = zipfile.ZipFile(name)
        except zipfile.BadZipFile:
            raise GanError(f"--source {name}: is not a zip file, or a part of one; make or copy it again") from None
        entries = {info.filename.replace("\\", "/"): info for info in self._archive.infolist() if not info.is_dir()}
        images, ignored = _split_names(entries)
        super().__init__(name, images)
        self.ignored = ignored
        self._entries = entries
        self.labels = _labels_by_name(name, ignored, lambda path: self._archive.read(entries[path]))

    def read(self, index: int) -> Image.Image:
        return Image.open(self._archive.open(self._entries[self.names[index]]))


class DemoSource(Source):
    """The built-in landscapes of `gan.data.demo`, drawn when they are read."""

    def __init__(self, name: str = "demo", count: int = demo.DEMO_COUNT, size: int = 64) -> None:
        super().__init__(name, [f"{name}/{index:05d}.png" for index in range(count)])
        self._size = size

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(demo.draw(index, self._size))

    def header(self, index: int) -> Header:
        return Header("RGB", self._size, self._size)


def open_source(name: str) -> Source:
    """Open the folder, the zip file or the built-in collection `demo` that a user names.

    Raises GanError where there is no such thing, where it holds no images, or where its dataset.json is wrong.
    """
    if name == "demo":
        return DemoSource()
    try:
        source = _open_path(name)
    except OSError as error:
        raise GanError(f"--source {name}: cannot be read ({error.strerror or error})") from error
    if not source.names:
        raise GanError(f"--source {name}: holds no images ({_describe_ignored(source)}); {_wanted()}")
    return source


def _open_path(name: str) -> Source:
    path = Path(name)
    if path.is_dir():
        return FolderSource(name)
    if not path.exists():
        raise GanError(f"--source {name}: no such file or folder; name a folder or a .zip of images, or demo")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise GanError(f"--source {name}: is a single image; name the folder that holds your images")
    return ZipSource(name)


def count_by_suffix(names: Iterable[str]) -> dict[str, int]:
    """How many of the file names end in which suffix (lower case, with the dot), the most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        suffix = posixpath.splitext(name)[1].lower() or posixpath.basename(name)
        counts[suffix] = counts.get(suffix, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _describe_ignored(source: Source) -> str:
    if not source.ignored:
        return "it is empty"
    kinds = list(count_by_suffix(source.ignored).items())
    return "only " + ", ".join(f"{count} x {suffix}" for suffix, count in kinds[:3]) + (", ..." if kinds[3:] else "")


def _wanted() -> str:
    return "wanted are " + ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES)) + " files"


def _files_below(root: Path) -> list[str]:
    """Paths of all files below `root`, relative to it, with '/' between folders."""
    found = []
    for folder, _, files in os.walk(root):
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files]
    return found


def _split_names(paths: Iterable[str]) -> tuple[list[str], list[str]]:
    """Sorted image paths, and sorted other paths; what the system hides belongs to neither."""
    visible = sorted(path for path in paths if not is_hidden(path))
    images = [path for path in visible if posixpath.splitext(path)[1].lower() in IMAGE_SUFFIXES]
    return images, [path for path in visible if posixpath.splitext(path)[1].lower() not in IMAGE_SUFFIXES]


def is_hidden(path: str) -> bool:
    """Whether a path with '/' between its parts is nothing a user put there: hidden, or an archiver's leftovers."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in path.split("/"))


def _labels_by_name(source: str, paths: list[str], read: Callable[[str], bytes]) -> dict[str, Label] | None:
    """The labels in the dataset.json among `paths`: the outermost one, whose rows are relative to its own folder."""
    found = [path for path in paths if posixpath.basename(path) == LABEL_FILE]
    if not found:
        return None
    path = min(found, key=lambda path: (path.count("/"), path))
    where = f"--source {source}: {path}"
    try:
        content = json.loads(read(path))
    except (ValueError, zipfile.BadZipFile, RuntimeError, NotImplementedError) as error:
        raise GanError(f"{where} is not valid JSON ({error}); mend it or delete it") from error
    rows = content.get("labels") if isinstance(content, dict) else content
    if rows is None:
        return None
    folder = posixpath.dirname(path)
    return {posixpath.join(folder, name): label for name, label in _checked_rows(rows, where)}


def _checked_rows(rows: Any, where: str) -> list[tuple[str, Label]]:
    """The [name, label] rows with tidied names. Raises GanError that names the first bad row."""
    if not isinstance(rows, list):
        raise GanError(f'{where}: "labels" is not a list; wanted is {{"labels": [["name.png", 0], ...]}}')
    checked: list[tuple[str, Label]] = []
    for number, row in enumerate(rows):
        if not (isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and _is_label(row[1])):
            wanted = '["name.png", 3] or ["name.png", [0.5, 1.0]]'
            raise GanError(f"{where}: row {number} of labels is {json.dumps(row)[:80]}; wanted is {wanted}")
        checked.append((posixpath.normpath(row[0].replace("\\", "/")), row[1]))
    for number, (name, label) in enumerate(checked):
        if _label_width(label) != _label_width(checked[0][1]):
            raise GanError(
                f"{where}: row {number} of labels ({name}) is {json.dumps(label)[:80]}, unlike row 0; "
                "make all of them whole numbers, or all of them lists of one length"
            )
    return checked


def _is_label(label: Any) -> bool:
    if isinstance(label, list):
        return bool(label) and all(_is_number(value) for value in label)
    return isinstance(label, int) and not isinstance(label, bool) and label >= 0


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _label_width(label: Label) -> int | None:
    return len(label) if isinstance(label, list) else None
