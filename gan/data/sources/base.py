"""What every kind of source is, and what several of them share."""

from __future__ import annotations

import functools
import hashlib
import os
import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from gan.data.image_files import IMAGE_SUFFIXES, RAW_SUFFIXES, UNREAD_SUFFIXES, is_hidden, is_image
from gan.data.label_matching import Labels
from gan.data.normalise import upright_size
from gan.errors import GanError, printable


class Header(NamedTuple):
    """What the first bytes of an image file say: Pillow's mode, and the size in pixels once it is the right way up."""

    mode: str
    width: int
    height: int


class Source(ABC):
    """Images in a fixed order. `name` is what the user typed, `names` are the images' paths with '/' between folders.

    `lost` lists images that are there and cannot be had, each as (name, why); a folder that cannot be read stands for
    those in it. `ignored` lists the files inside that are no images. `notes` says in a line each what else a user
    should know: what was not looked into, what was recognised by its content alone.

    A source may be used in processes that are forked off or sent it, by one thread in each.
    """

    def __init__(self, name: str, names: list[str]) -> None:
        self.name = name
        self.names = names
        self.lost: list[tuple[str, str]] = []
        self.ignored: list[str] = []
        self.notes: list[str] = []

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def own_labels(self) -> Labels | None:
        """The labels that come with the images. Raises GanError where there is something that is no list of labels."""
        return self._read_labels()

    def _read_labels(self) -> Labels | None:
        return None

    @abstractmethod
    def read(self, index: int) -> Image.Image:
        """Open image `index`; pixels may be decoded only when they are used. Raises whatever the decoder raises, and
        GanError for what only this source knows."""

    def header(self, index: int) -> Header:
        """Mode and size of image `index` without decoding its pixels. Raises like `read`."""
        with self.read(index) as image:
            return header_of(image)

    def check(self) -> None:  # noqa: B027 (what is computed is always there)
        """Raise GanError if the source itself is not there any more, as when a disk was taken out."""

    def fingerprint(self) -> str:
        """Hex digest of all that tells whether the images are the same as at another time.

        This one suits pictures that are computed: another kind, number or size, another fingerprint.
        """
        return digest(type(self).__name__, self.header(0), *self.names)


class FileSource(Source):
    """Images in a file or folder, whose path is the source's name."""

    def check(self) -> None:
        if not os.path.exists(self.name):
            raise GanError(f"--source {self.name}: is gone; bring it back, and the same command goes on from there")


class ArraySource(FileSource):
    """Images that are held in memory. A process that is sent the source reads them again."""

    def __init__(self, name: str, names: list[str], images: Sequence[np.ndarray]) -> None:
        super().__init__(name, names)
        self._images: Sequence[np.ndarray] | None = images

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_images": None}

    @abstractmethod
    def _load(self) -> Sequence[np.ndarray]:
        """The images, uint8 [H, W] or [H, W, 3]."""

    def _image(self, index: int) -> np.ndarray:
        if self._images is None:
            self._images = self._load()
        return self._images[index]

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(np.ascontiguousarray(self._image(index)))

    def fingerprint(self) -> str:
        return digest(type(self).__name__, *file_version(self.name))


def header_of(image: Image.Image) -> Header:
    """Of an image whose pixels need not be decoded."""
    return Header(image.mode, *upright_size(image))


def digest(*parts: object) -> str:
    """Hex digest of the parts, in their order."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{part}\0".encode(errors="surrogatepass"))
    return sha.hexdigest()


def file_version(path: str | Path) -> tuple[int, int]:
    """What changes with a file: its size, and the time at which it was written."""
    status = os.stat(path)
    return status.st_size, status.st_mtime_ns


class Sorted(NamedTuple):
    """The files of a source: paths of images and of others, and what is to be said, as in `Source`."""

    images: list[str]
    lost: list[tuple[str, str]]
    ignored: list[str]
    notes: list[str]


def sort_out(paths: Iterable[str], start: Callable[[str], bytes]) -> Sorted:
    """What the files are, in sorted order; what the system hides is nothing, but pictures among it are counted.

    `start` reads the first bytes of a file: one without an image's extension may be an image all the same.
    """
    found = Sorted([], [], [], [])
    hidden: list[str] = []
    recognised: list[str] = []
    for path in sorted(paths):
        suffix = posixpath.splitext(path)[1].lower()
        if is_hidden(path):
            if _may_be_meant(path) and suffix in IMAGE_SUFFIXES | UNREAD_SUFFIXES:
                hidden.append(path)
        elif suffix in IMAGE_SUFFIXES:
            found.images.append(path)
        elif suffix not in RAW_SUFFIXES and is_image(start(path)):
            found.images.append(path)
            recognised.append(path)
        elif suffix in UNREAD_SUFFIXES:
            found.lost.append((path, "kind not read; convert it to png or jpg first"))
        else:
            found.ignored.append(path)
    if hidden:
        found.notes.append(f"{counted(hidden, 'hidden image')} not looked at: the name begins with a dot")
    if recognised:
        found.notes.append(f"{counted(recognised, 'image')} recognised by the content, not by the name")
    return found


def _may_be_meant(hidden: str) -> bool:
    """Whether only the file's own name hides it, and it is not what macOS leaves beside a file (`._a.png`)."""
    folder, base = posixpath.split(hidden)
    return not is_hidden(folder) and not base.startswith("._")


def counted(paths: list[str], one: str, many: str | None = None) -> str:
    """How many there are, and the first of them: `3 images (a, b, ...)`."""
    first = ", ".join(printable(path) for path in paths[:2]) + (", ..." if paths[2:] else "")
    return f"{len(paths):,} {one if len(paths) == 1 else many or one + 's'} ({first})"
