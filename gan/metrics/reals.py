"""The real images of a dataset to measure against, and what is known of them, which is kept for the next time."""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections.abc import Generator
from pathlib import Path

import numpy as np
import torch

from gan.data.dataset import ImageDataset
from gan.errors import GanError
from gan.files import atomic_path
from gan.metrics.collected import Key
from gan.metrics.detectors import Detectors
from gan.metrics.fakes import Labels
from gan.metrics.frechet import Gaussian
from gan.metrics.parts import BLOCK
from torch_utils.user_cache import user_cache

_FORMAT = 1  # to be raised when what is kept would come out otherwise
_SECONDS = 0.1  # of decoding, after which training may go on


class Reals:
    """All images of a dataset, as they are: no subset, no mirror images.

    What is found out about them is kept in memory, and on disk what a detector took long for: under a name of images,
    detector and choice, so it holds until one of these changes.

    Args:
        seed: of the choice where fewer than all are to be taken.
        cache: folder for what is kept; else in the user's cache, or nowhere if there is none.
    """

    def __init__(self, dataset: ImageDataset, detectors: Detectors, seed: int = 0, cache: Path | None = None) -> None:
        self.dataset = dataset.view()
        # That of a run reads from its cache as soon as there is one.
        self._images = dataset if dataset.num_unflipped == self.dataset.num_unflipped else self.dataset
        self.detectors, self.seed = detectors, seed
        self.folder = cache or _users_folder()
        self.notes: list[str] = []
        """what could not be kept on disk, and why"""
        self._known: dict[tuple[Key, str | None], torch.Tensor | Gaussian] = {}
        # A choice of n images is the first n: the same ones for all metrics, and those that a `--subset` of n has.
        order = np.arange(len(self.dataset))
        np.random.RandomState(seed).shuffle(order)
        self._order = order

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of the images and labels, wherever they are."""
        return self.dataset.fingerprint_anywhere

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def labels(self) -> Labels:
        """Distinct labels, and which of them each image has."""
        return self.dataset.label_table()

    def indices(self, block: int) -> np.ndarray:
        """Which images of the dataset are in a block."""
        return self._order[block * BLOCK : (block + 1) * BLOCK]

    def block(self, block: int, device: torch.device) -> Generator[None, None, torch.Tensor]:
        """The images of a block, uint8 `[N, C, H, W]`; N is 32 but for the last. Raises GanError, naming the file."""
        images, begun = [], time.monotonic()
        for index in self.indices(block):
            if time.monotonic() - begun > _SECONDS:
                yield
                begun = time.monotonic()
            images.append(self._images.unflipped(int(index)))
        return torch.from_numpy(np.stack(images)).to(device)

    def known(self, key: Key, detector_sha256: str | None) -> torch.Tensor | Gaussian | None:
        """What is known of the images, from memory or disk."""
        file = self._file(key, detector_sha256)
        if (key, detector_sha256) not in self._known and file is not None:
            found = _read(file, key)
            if found is not None:
                self._known[key, detector_sha256] = found
        return self._known.get((key, detector_sha256))

    def keep(self, key: Key, detector_sha256: str | None, content: torch.Tensor | Gaussian) -> None:
        """Have it known, here and if a detector made it on disk. What the disk does not take is made again."""
        self._known[key, detector_sha256] = content
        file = self._file(key, detector_sha256)
        if file is None:
            return
        try:
            _write(file, content)
        except (GanError, OSError) as error:
            self.notes.append(f"the statistics of the real images are not kept for the next time: {error}")

    def _file(self, key: Key, detector_sha256: str | None) -> Path | None:
        """Where it is kept; None: nowhere."""
        if self.folder is None or detector_sha256 is None:
            return None
        chosen = self.seed if key.number < len(self) else None
        identity = [_FORMAT, self.dataset.fingerprint, key.view, key.form, key.number, chosen, detector_sha256]
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
        return self.folder / f"{self.dataset.name}-{key.form}-{digest[:16]}.npz"


def _users_folder() -> Path | None:
    try:
        return user_cache("metrics")
    except RuntimeError:  # there is no home folder
        return None


def _write(path: Path, content: torch.Tensor | Gaussian) -> None:
    if isinstance(content, Gaussian):
        assert content.half is not None
        number = torch.tensor(content.number)
        arrays = {"number": number, "mean": content.mean, "cov": content.cov, "half": content.half}
    else:
        arrays = {"rows": content}
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, allow_pickle=False, **{name: tensor.cpu().numpy() for name, tensor in arrays.items()})


def _read(path: Path, key: Key) -> torch.Tensor | Gaussian | None:
    """What a file holds; None if it is not there, damaged, or not what it is called."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: torch.from_numpy(file[name]) for name in file.files}
        if key.form == "rows":
            rows = arrays["rows"]
            return rows if rows.ndim == 2 and len(rows) == key.number else None
        mean, cov, half = arrays["mean"], arrays["cov"], arrays["half"]
        square = (len(mean), len(mean))
        if int(arrays["number"]) != key.number or cov.shape != square or half.shape != square:
            return None
        return Gaussian(key.number, mean, cov, half)
    except Exception:  # a damaged file makes zipfile and NumPy raise almost anything; it is made again
        return None
