"""CIFAR's archives of batches: pickles, of which nothing is executed, in a compressed tar."""

from __future__ import annotations

import itertools
import posixpath
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any

import numpy as np

from gan.data.image_files import is_hidden
from gan.data.label_files import labels_in_order
from gan.data.label_matching import Labels, are_class_names
from gan.data.sources.base import ArraySource, Header
from gan.data.sources.compressed import damaged, unpacked
from gan.data.sources.plain_pickle import load_plain
from gan.errors import GanError, printable
from torch_utils.stored_array import StoredArray

MAX_TAR = 400_000_000  # bytes unpacked; CIFAR has 180 MB
MAX_MEMBERS = 100  # of a tar that are looked at
CIFAR10_BATCHES = [f"data_batch_{number}" for number in range(1, 6)]

_TRAINING = re.compile(r"data_batch_[0-9]+|train")
_CLASS_NAMES = {"batches.meta": "label_names", "meta": "fine_label_names"}


def is_tar(start: bytes) -> bool:
    """Whether a file that begins like this, in 512 bytes, is a tar archive."""
    try:
        tarfile.TarInfo.frombuf(start, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError):
        return False
    return True


class CifarSource(ArraySource):
    """The training images of CIFAR-10 (or CIFAR-100, with its fine labels), batch by batch: RGB, 32x32."""

    def __init__(self, name: str) -> None:
        found = _read_cifar(name)
        names = [f"{batch}-{row:05d}.png" for batch, part in found.batches.items() for row in range(len(part))]
        super().__init__(name, names, found.images())
        self._labels, self._class_names = found.labels, found.class_names
        self.lost, self.ignored, self.notes = found.lost, found.ignored, found.notes

    def header(self, index: int) -> Header:
        return Header("RGB", 32, 32)

    def _load(self) -> Sequence[np.ndarray]:
        return _read_cifar(self.name).images()

    def _read_labels(self) -> Labels:
        return labels_in_order(self.names, self._labels, self._class_names, "its batches", f"--source {self.name}")


@dataclass
class _Cifar:
    """What was found in a CIFAR archive: batch -> uint8 [N, 32, 32, 3], and a label for each image in their order."""

    batches: dict[str, np.ndarray] = field(default_factory=dict)
    labels: list[Any] = field(default_factory=list)
    class_names: list[str] | None = None
    lost: list[tuple[str, str]] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def images(self) -> list[np.ndarray]:
        return [image for batch in self.batches.values() for image in batch]


def _read_cifar(name: str) -> _Cifar:
    """Raises GanError if the tar holds no training batches, or one of them is damaged."""
    found = _Cifar()
    test: list[str] = []
    labels: dict[str, list[Any]] = {}
    batches: dict[str, np.ndarray] = {}
    for member, data in _tar_members(name):
        base = posixpath.basename(member)
        try:
            if _TRAINING.fullmatch(base):
                batches[base], labels[base] = _read_batch(load_plain(data))
            elif base in _CLASS_NAMES:
                found.class_names = _read_class_names(load_plain(data), _CLASS_NAMES[base])
            else:
                (test if base in ("test_batch", "test") else found.ignored).append(member)
        except ValueError as error:
            what = f"{printable(member)} is no batch of CIFAR ({error})"
            raise GanError(f"--source {name}: {what}; download it again") from None
    if not batches:
        what = "is a tar archive without the batches of CIFAR"
        raise GanError(f"--source {name}: {what}; unpack it first and name the folder")
    for batch in sorted(batches, key=lambda batch: (len(batch), batch)):
        found.batches[batch] = batches[batch]
        found.labels += labels[batch]
    if test:
        found.notes.append(f"{printable(test[0])} is left out: its images are for testing")
    lacking = [batch for batch in CIFAR10_BATCHES if batch not in batches]
    if "train" not in batches:
        found.lost += [(batch, "not in the archive; download it again for all images") for batch in lacking]
    return found


def _read_batch(batch: Any) -> tuple[np.ndarray, list[Any]]:
    """Images uint8 [N, 32, 32, 3] and labels of a batch. Raises ValueError if it is none."""
    values = batch if isinstance(batch, dict) else {}
    stored, labels = values.get("data"), values.get("labels", values.get("fine_labels"))
    if not isinstance(stored, StoredArray) or not isinstance(labels, list):
        raise ValueError("it does not hold images of 32x32 with labels")
    images = np.asarray(stored)
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3 * 32 * 32:
        raise ValueError("it does not hold images of 32x32 with labels")
    if any(type(label) is not int for label in labels):
        raise ValueError("its labels are not whole numbers")
    if len(labels) != len(images):
        raise ValueError(f"it holds {len(labels):,} labels for {len(images):,} images")
    return images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), labels


def _read_class_names(meta: Any, key: str) -> list[str]:
    names = meta.get(key) if isinstance(meta, dict) else None
    if not isinstance(names, list) or not are_class_names(names):
        raise ValueError("it does not hold the names of the classes")
    return names


def _tar_members(name: str) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files in a tar, as far as CIFAR's could reach; only CIFAR's own are read.

    Raises GanError where the tar is damaged.
    """
    try:
        with unpacked(name) as file:
            limited: Any = _Limited(file)
            with tarfile.open(fileobj=limited, mode="r|") as archive:
                for member in itertools.islice(archive, MAX_MEMBERS):
                    base = posixpath.basename(member.name)
                    if not member.isreg() or is_hidden(member.name):
                        continue
                    content = archive.extractfile(member) if _TRAINING.fullmatch(base) or base in _CLASS_NAMES else None
                    yield member.name, content.read() if content else b""
    except (GanError, MemoryError):
        raise
    except _TooLong:
        return
    except Exception as error:  # damaged archives raise almost anything
        raise damaged(f"--source {name}", error) from error


class _TooLong(Exception):
    pass


class _Limited:
    """A file of which no more than MAX_TAR bytes are read, whatever it unpacks to."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._left = MAX_TAR

    def read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise _TooLong
        return data
