"""MNIST's arrays: a file of images, a file of labels beside it, compressed or not."""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Sequence

import numpy as np

from gan.data.label_files import labels_in_order
from gan.data.label_matching import Labels
from gan.data.sources.base import ArraySource, digest, file_version
from gan.data.sources.compressed import DAMAGED, damaged, unpacked
from gan.errors import GanError, printable

MAX_IDX = 2**30  # bytes; the largest of the kind, EMNIST, has 640 MB

_TYPES = (b"\x08", b"\x09", b"\x0b", b"\x0c", b"\x0d", b"\x0e")


def is_idx(start: bytes) -> bool:
    """Whether a file that begins like this is an array in MNIST's format."""
    return start[:2] == b"\0\0" and start[2:3] in _TYPES and start[3:4] in (b"\1", b"\2", b"\3", b"\4")


class IdxSource(ArraySource):
    """A file of images as MNIST's: grey, all of one size. Those of 28x28 get a black border, to 32x32."""

    def __init__(self, name: str) -> None:
        images = _read_idx(name, f"--source {name}", 3)
        digits = max(5, len(str(len(images) - 1)))
        super().__init__(name, [f"{index:0{digits}d}.png" for index in range(len(images))], list(images))

    def _load(self) -> Sequence[np.ndarray]:
        return list(_read_idx(self.name, f"--source {self.name}", 3))

    def _image(self, index: int) -> np.ndarray:
        image = super()._image(index)
        return np.pad(image, 2) if image.shape == (28, 28) else image

    def fingerprint(self) -> str:
        labels = _idx_labels(self.name)
        return digest(super().fingerprint(), *(file_version(labels) if labels else ()))

    def _read_labels(self) -> Labels | None:
        path = _idx_labels(self.name)
        if path is None:
            return None
        where = f"--source {self.name}: its labels, {printable(os.path.basename(path))}"
        labels = _read_idx(path, where, 1)
        if len(labels) != len(self.names):
            raise GanError(
                f"{where}: are {len(labels):,} for {len(self.names):,} images; get the file that belongs to it"
            )
        return labels_in_order(self.names, labels.tolist(), None, os.path.basename(path), where)


def _read_idx(path: str, where: str, dims: int) -> np.ndarray:
    """The uint8 array of `dims` dimensions in an IDX file. Raises GanError, beginning with `where`, for another."""
    try:
        with unpacked(path) as file:
            start = file.read(4)
            if start != bytes([0, 0, 8, dims]):
                raise GanError(f"{where}: {_describe_idx(start)}; name a file such as train-images-idx3-ubyte.gz")
            shape = struct.unpack(f">{dims}I", file.read(4 * dims))
            size = math.prod(shape)
            if size > MAX_IDX or (0 in shape[1:]):
                raise GanError(f"{where}: says that it holds {' x '.join(map(str, shape))} bytes; its start is damaged")
            data = file.read(size + 1)
    except (struct.error, *DAMAGED) as error:
        raise damaged(where, error) from error
    if len(data) != size:
        found = "more" if len(data) > size else f"only {len(data):,}"
        raise GanError(f"{where}: says that it holds {size:,} bytes, but has {found}; copy or download it again")
    return np.frombuffer(data, np.uint8).reshape(shape)


def _describe_idx(start: bytes) -> str:
    if not is_idx(start):
        return "is no array as MNIST's are"
    if start[2:] == b"\x08\x01":
        return "holds labels, not images"
    return f"holds an array of {start[3]} dimensions of type {start[2]:#04x}, not grey images of 8 bits"


def _idx_labels(path: str) -> str | None:
    """The file of labels that lies beside a file of images, packed or not."""
    folder, base = os.path.split(path)
    for images, labels in (("images-idx3", "labels-idx1"), ("images.idx3", "labels.idx1"), ("images", "labels")):
        if images in base:
            name = os.path.join(folder, base.replace(images, labels))
            for candidate in (name, name.removesuffix(".gz"), f"{name}.gz"):
                if os.path.isfile(candidate):
                    return candidate
    return None
