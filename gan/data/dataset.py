"""Reading a packed dataset: a zip (or a folder) of images of one size, with labels in dataset.json."""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.util
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from gan.data.cache_file import Content, stored_shape
from gan.data.sources import is_hidden
from gan.data.store import Store
from gan.errors import GanError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MAX_CLASSES = 10_000  # each is a column of every label
_PACK_HINT = "pack it with: python dataset_tool.py --source {path} --dest {stem}.zip --resolution 256x256"


class ImageDataset:
    """Square images of one size, a power of two, grey or RGB, in the order of their sorted names.

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
        self._files = _Files(self.path)
        self._names = self._files.image_names()
        if not self._names:
            raise GanError(f"{self.path}: holds no images ({', '.join(s[1:] for s in IMAGE_SUFFIXES)})")
        known = None
        if cache_folder is not None:
            known = stored_shape(self.path, self.fingerprint, len(self._names), cache_folder)
        self.resolution, self.channels = (known[2], known[0]) if known else self._check_images()
        self._labels = self._read_labels() if use_labels else None
        self.label_dim = 0 if self._labels is None else self._labels[0].shape[1]
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
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.resolution, self.resolution

    @property
    def num_unflipped(self) -> int:
        """Images without their mirror images. Image i is the unflipped one of i % num_unflipped."""
        return len(self._indices)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Hex digest of all images in the dataset: other images, another fingerprint."""
        return self._files.fingerprint(self._names)

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
            raise GanError(f"{self.path}: {name} is {_describe(image.shape)}, not {_describe(self.image_shape)}")
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
        rows, index = self._labels
        chosen = index[self._indices]
        return rows, np.concatenate([chosen, chosen]) if self.mirror else chosen

    def _check_images(self) -> tuple[int, int]:
        """Resolution and channels, from the header of every image."""
        first: tuple[int, int, int] | None = None
        for name in self._names:
            shape = self._files.image_shape(name)
            if first is None:
                first = shape
            elif shape != first:
                raise GanError(
                    f"{self.path}: {name} is {_describe(shape)}, but {self._names[0]} is {_describe(first)}; "
                    + _PACK_HINT.format(path=self.path, stem=f"{self.path.stem}-packed")
                )
        assert first is not None
        channels, height, width = first
        if height != width or width < 8 or width & (width - 1):
            raise GanError(
                f"{self.path}: the images are {width}x{height}; training takes squares of a power of two from 8 on; "
                + _PACK_HINT.format(path=self.path, stem=f"{self.path.stem}-packed")
            )
        if channels not in (1, 3):
            raise GanError(
                f"{self.path}: {self._names[0]} has {channels} channels; training takes grey and RGB images; "
                + _PACK_HINT.format(path=self.path, stem=f"{self.path.stem}-packed")
            )
        return width, channels

    def _read_labels(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct label rows float32 `[K, label_dim]` and each image's row int64 `[images]`."""
        listed = self._files.read_json("dataset.json").get("labels")
        if not listed:
            raise GanError(
                f"{self.path}: has no labels (dataset.json says none); leave out --cond, or pack it with labels"
            )
        try:
            by_name = {str(name).replace("\\", "/"): label for name, label in listed}
        except (TypeError, ValueError) as error:
            raise GanError(f'{self.path}: "labels" of dataset.json is not a list of [file name, label]') from error
        missing = [name for name in self._names if name not in by_name]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise GanError(f"{self.path}: dataset.json has no label for {missing[0]}{more}")
        return _label_rows([by_name[name] for name in self._names], self._names, self.path)


def _label_rows(labels: list[Any], names: list[str], path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Classes become one-hot rows; float vectors stay as they are."""
    wants_class = isinstance(labels[0], int)
    for name, label in zip(names, labels, strict=True):
        is_class = isinstance(label, int) and not isinstance(label, bool) and label >= 0
        is_vector = isinstance(label, list) and len(label) > 0 and all(isinstance(v, (int, float)) for v in label)
        if is_class is not wants_class or not (is_class or is_vector):
            kind = "a class number from 0 on" if wants_class else "a list of numbers"
            raise GanError(f"{path}: the label of {name} in dataset.json is {label!r}, not {kind} as the others are")
        if is_vector and len(label) != len(labels[0]):
            raise GanError(
                f"{path}: the label of {name} in dataset.json has {len(label)} numbers, not {len(labels[0])}"
            )
    if wants_class:
        largest = max(labels)
        if largest >= MAX_CLASSES:
            name = names[labels.index(largest)]
            raise GanError(
                f"{path}: the label of {name} is class {largest}; number the classes from 0 on, without gaps"
            )
        index = np.asarray(labels, dtype=np.int64)
        return np.eye(int(index.max()) + 1, dtype=np.float32), index
    rows, index = np.unique(np.asarray(labels, dtype=np.float32), axis=0, return_inverse=True)
    return rows, index.reshape(-1).astype(np.int64)


class _Files:
    """The files of a zip or a folder. Safe to use from processes forked or spawned off this one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip: zipfile.ZipFile | None = None
        self._pid = -1
        self._version: tuple[int, ...] | None = None
        if path.is_dir():
            found = (Path(base) / name for base, _, files in os.walk(path) for name in files)
            self.names = {file.relative_to(path).as_posix() for file in found}
        elif path.is_file():
            self.names = {info.filename for info in self._open().infolist() if not info.filename.endswith("/")}
        else:
            raise GanError(f"{path}: no such file or folder; pack your images with dataset_tool.py first")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None, "_pid": -1}

    def image_names(self) -> list[str]:
        return sorted(n for n in self.names if n.lower().endswith(IMAGE_SUFFIXES) and not is_hidden(n))

    def fingerprint(self, names: list[str]) -> str:
        """Hex digest of the files' names and sizes, and their checksums in a zip, their times in a folder."""
        digest, is_folder = hashlib.sha256(), self.path.is_dir()
        try:
            for name in names:
                if is_folder:
                    status = os.stat(self.path / name)
                    version = f"{status.st_size} {status.st_mtime_ns}"
                else:
                    info = self._open().getinfo(name)
                    version = f"{info.file_size} {info.CRC}"
                digest.update(f"{name}\0{version}\0".encode(errors="surrogateescape"))
        except OSError as error:
            raise GanError(f"{self.path}: {name} cannot be read ({error})") from error
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        try:
            if self.path.is_dir():
                return (self.path / name).read_bytes()
            return self._open().read(name)
        except (GanError, MemoryError):
            raise
        except Exception as error:  # a damaged zip makes zipfile raise almost anything
            reason = (isinstance(error, OSError) and error.strerror) or error
            raise GanError(f"{self.path}: {name} cannot be read ({reason}); restore it, or pack again") from error

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON object; empty if there is no such file."""
        if name not in self.names:
            return {}
        try:
            content = json.loads(self.read(name))
        except ValueError as error:
            raise GanError(f"{self.path}: {name} is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise GanError(f"{self.path}: {name} is not a JSON object")
        return content

    def image_shape(self, name: str) -> tuple[int, int, int]:
        """(C, H, W) out of the header alone."""
        try:
            if self.path.is_dir():
                with open(self.path / name, "rb") as file:
                    return _header_shape(file)
            with self._open().open(name) as member:
                return _header_shape(member)
        except (GanError, MemoryError):
            raise
        except Exception as error:
            raise GanError(f"{self.path}: {name} is not a readable image ({error})") from error

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None or self._pid != os.getpid():  # a file position must not be shared with another process
            try:
                file = open(self.path, "rb")  # noqa: SIM115
                opened, status = zipfile.ZipFile(file), os.fstat(file.fileno())
            except MemoryError:
                raise
            except Exception as error:
                raise GanError(f"{self.path}: not a readable zip file ({error})") from error
            version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._version not in (None, version):  # its images would pass for those that were there
                raise GanError(f"{self.path}: has been replaced since it was opened; start again")
            self._zip, self._pid, self._version = opened, os.getpid(), version
        return self._zip


def decode(data: bytes, where: str) -> np.ndarray:
    """An encoded image as uint8 `[C, H, W]`, C = 1 or 3. `where` names it in errors."""
    if data[:8] == _PNG and not _png_is_intact(data):
        raise GanError(f"{where} is damaged (a checksum in it is wrong); remove it and pack again")
    image = _decode_own_png(data) if _is_own_png(data) else None
    if image is None:
        try:
            with PIL.Image.open(io.BytesIO(data)) as file:
                image = np.asarray(file.convert("L" if file.mode in ("1", "L") else "RGB"))
        except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
            raise GanError(f"{where} is damaged or not an image ({error}); remove it and pack again") from error
    return image[None] if image.ndim == 2 else image.transpose(2, 0, 1)


def decoder() -> str:
    """What decodes PNGs of our own kind, for the start of a run's log."""
    if importlib.util.find_spec("pyspng") is not None:
        return "pyspng"
    return "Pillow, slower, because pyspng is not installed"


def _is_own_png(data: bytes) -> bool:
    """Whether it is what dataset_tool.py writes: an 8-bit grey or RGB PNG, not interlaced, nothing transparent."""
    bit_depth, colour, interlace = data[24:25], data[25:26], data[28:29]
    own = data[:8] == _PNG and bit_depth == b"\x08" and colour in (b"\x00", b"\x02") and interlace == b"\x00"
    return own and b"tRNS" not in data[:128]


def _png_is_intact(data: bytes) -> bool:
    """Whether all chunks are there with the right checksums, at which pyspng does not look, nor Pillow at all."""
    position = len(_PNG)
    while position + 12 <= len(data):
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if zlib.crc32(data[position + 4 : end]) != int.from_bytes(data[end : end + 4], "big") or end + 4 > len(data):
            return False
        if data[position + 4 : position + 8] == b"IEND":
            return True
        position = end + 4
    return False


def _decode_own_png(data: bytes) -> np.ndarray | None:
    """Decode with pyspng, several times faster than Pillow. None without it, or if it cannot."""
    try:
        import pyspng
    except ImportError:
        return None
    try:
        image = pyspng.load(data)
    except RuntimeError:
        return None  # Pillow says better what is wrong
    return image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image


_CHANNELS = {"1": 1, "L": 1, "P": 3, "RGB": 3, "LA": 2, "RGBA": 4}
_PNG = b"\x89PNG\r\n\x1a\n"


def _header_shape(file: Any) -> tuple[int, int, int]:
    header = file.read(26)
    if header[:8] == _PNG and header[24:26] in (b"\x08\x00", b"\x08\x02"):
        width, height = int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")
        return (3 if header[25] == 2 else 1), height, width
    file.seek(0)
    with PIL.Image.open(file) as image:
        if image.mode not in _CHANNELS:
            raise ValueError(f"its pixels are {image.mode}, not 8-bit grey or RGB; pack it with dataset_tool.py")
        return _CHANNELS[image.mode], image.height, image.width


def _describe(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]} with {shape[0]} channel{'s' if shape[0] > 1 else ''}"
