"""Reading a packed dataset: a zip (or a folder) of images of one size, with labels in dataset.json."""

from __future__ import annotations

import copy
import functools
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from gan.data.cache_file import Content, stored_shape
from gan.data.dataset_files import LABEL_FILE, DatasetFiles
from gan.data.dataset_labels import LabelRows, read_labels
from gan.data.decode import Shape, decode
from gan.data.store import Store
from gan.errors import GanError
from gan.image_size import MAX_BASE_AREA, MIN_BASE, describe_image, is_trainable

_LONGEST_NAME = 100  # characters


class ImageDataset:
    """Images of one size that can be trained on, grey, RGB or RGBA, in the order of their sorted names.

    Args:
        path: zip or folder.
        use_labels: read the labels of dataset.json; otherwise label_dim is 0.
        subset: keep a random choice of this many images, the same for the same seed.
        mirror: append a horizontally flipped copy of every image.
        seed: of the subset.
        cache_folder: where the cache of an earlier run may be. All its images were good: none is looked at again.

    Raises GanError, naming the file, if anything is missing, unreadable, or of differing size or mode.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        use_labels: bool = False,
        subset: int | None = None,
        mirror: bool = False,
        seed: int = 0,
        cache_folder: Path | None = None,
    ) -> None:
        self.path = Path(path)
        self._files = DatasetFiles(self.path)
        self._names = self._files.image_names()
        known = None
        if cache_folder is not None:
            known = stored_shape(self.path, self.fingerprint, len(self._names), cache_folder)
        self.channels, self.height, self.width = known or self._check_images()
        self._labels = self._read_labels() if use_labels else None
        self.label_dim = 0 if self._labels is None else self._labels.rows.shape[1]
        self._choose(subset, mirror, seed)

    def view(self, *, subset: int | None = None, mirror: bool = False, seed: int = 0) -> ImageDataset:
        """The same dataset with another choice of images, without opening or reading anything."""
        other = copy.copy(self)
        other._choose(subset, mirror, seed)
        return other

    def _choose(self, subset: int | None, mirror: bool, seed: int) -> None:
        indices = np.arange(len(self._names))
        if subset is not None and subset < len(indices):
            np.random.RandomState(seed).shuffle(indices)  # RandomState: the reference's choice of images
            indices = np.sort(indices[:subset])
        self._indices, self.mirror = indices, mirror
        self._store: Store | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}  # other processes are there to decode

    @property
    def name(self) -> str:
        """The file's name without its ending, as it appears in run descriptions."""
        return self.path.stem if self.path.suffix.lower() == ".zip" else self.path.name

    @property
    def image_shape(self) -> Shape:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    @property
    def label_kind(self) -> str | None:
        """`classes`, `multi-hot` or `vectors`; None without labels."""
        return None if self._labels is None else self._labels.kind

    @property
    def class_names(self) -> list[str] | None:
        """What the columns of a label mean, if dataset.json says so."""
        return None if self._labels is None else self._labels.class_names

    @property
    def num_unflipped(self) -> int:
        """Images without their mirror images. Image i is the unflipped one of i % num_unflipped."""
        return len(self._indices)

    @functools.cached_property
    def resize_filter(self) -> str | None:
        """What the images were scaled with; None: they were not, or the dataset does not say."""
        try:
            packed = self._files.read_json(LABEL_FILE).get("packed")
        except GanError:  # who needs the labels is told
            return None
        found = packed.get("resize_filter") if isinstance(packed, dict) else None
        return found if isinstance(found, str) and len(found) <= _LONGEST_NAME else None

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all images in the dataset: other images, another fingerprint."""
        return self._files.fingerprint(self._names)

    @property
    def fingerprint_anywhere(self) -> str:
        """Hex digest of all images and labels that a copy has too; of a folder by names and sizes alone."""
        labels = [LABEL_FILE] if self.label_dim else []
        return self._files.fingerprint([*self._names, *labels], times=False)

    def contents(self) -> list[tuple[Content, np.ndarray | None]]:
        """What a cache may hold: these images, or the whole dataset, with where they are in it."""
        path, shape = Path(os.path.abspath(self.path)), self.image_shape
        whole = Content(path, self.fingerprint, (len(self._names), *shape))
        if len(self._indices) == len(self._names):
            return [(whole, None)]
        choice = hashlib.sha256(self._indices.astype("<i8").tobytes()).hexdigest()
        part = Content(path, f"{self.fingerprint}-{choice}", (len(self._indices), *shape))
        return [(part, None), (whole, self._indices)]

    def content(self) -> Content:
        """What a cache of these images holds."""
        return self.contents()[0][0]

    def serve_from(self, store: Store) -> None:
        """Take images from a complete store of this content from now on."""
        self._store = store

    def __len__(self) -> int:
        return len(self._indices) * (2 if self.mirror else 1)

    def unflipped(self, row: int) -> np.ndarray:
        """One image as it is in the file, uint8 `[C, H, W]`; row: 0 to num_unflipped."""
        if self._store is not None:
            image = np.empty((1, *self.image_shape), dtype=np.uint8)
            try:
                self._store.take(np.array([row]), image)
                return image[0]
            except OSError:
                self._store = None  # whoever opened it says so
        name = self._names[self._indices[row]]
        image = decode(self._files.read(name), f"{self.path}: {name}")
        if image.shape != self.image_shape:
            raise GanError(f"{self.path}: {name} is {_described(image.shape)}, not {_described(self.image_shape)}")
        return image

    def image(self, index: int) -> np.ndarray:
        """One image, uint8 `[C, H, W]`."""
        flipped, row = divmod(int(index), len(self._indices))
        image = self.unflipped(row)
        return image[:, :, ::-1] if flipped else image

    def images(self, indices: np.ndarray) -> np.ndarray:
        """Several images, uint8 `[N, C, H, W]`."""
        return np.stack([self.image(i) for i in indices])

    def label_table(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct labels, float32 `[K, label_dim]`, and which of them each image has, int64 `[len]`."""
        if self._labels is None:
            return np.zeros([1, 0], dtype=np.float32), np.zeros(len(self), dtype=np.int64)
        rows, chosen = self._labels.rows, self._labels.index[self._indices]
        return rows, np.concatenate([chosen, chosen]) if self.mirror else chosen

    def _check_images(self) -> Shape:
        """The shape of all images, from their headers."""
        first = self._files.image_shape(self._names[0])
        _, height, width = first
        for name in self._names[1:]:
            shape = self._files.image_shape(name)
            if shape != first:
                size = (width, height) if shape[1:] != first[1:] else None
                raise GanError(
                    f"{self.path}: {name} is {_described(shape)}, but {self._names[0]} is {_described(first)}; "
                    + self._files.pack_hint(size)
                )
        if not is_trainable((width, height)):
            raise GanError(
                f"{self.path}: {self._names[0]} and all others are {width}x{height}; training takes a * 2^n by b * 2^n "
                f"pixels, n from 1, a and b from {MIN_BASE}, a * b up to {MAX_BASE_AREA}; "
                + self._files.pack_hint((width, height))
            )
        return first

    def _read_labels(self) -> LabelRows:
        return read_labels(self._files.read_json(LABEL_FILE), self._names, f"{self.path}: {LABEL_FILE}")


def _described(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return describe_image(height, width, channels)
