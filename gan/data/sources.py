"""Opening what a user names as --source: a folder, a zip file, an archive of numbers, or the built-in collection.

To add a kind of source: subclass `Source`, and name it in `open_source`.
"""

from __future__ import annotations

import functools
import hashlib
import io
import os
import posixpath
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO, Any, NamedTuple

from PIL import Image

from gan.data import demo
from gan.data.label_files import LABEL_FILE, MAX_LABEL_FILE, Labels, labels_inside, shown
from gan.data.normalise import upright_size
from gan.errors import GanError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".tif", ".tiff", ".gif"})
# Files of cameras are TIFFs as well, whose first picture is a thumbnail.
RAW_SUFFIXES = frozenset(
    {".3fr", ".arw", ".cr2", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mef", ".mos", ".nef", ".nrw"}
)
RAW_SUFFIXES |= {".orf", ".pef", ".raw", ".rw2", ".sr2", ".srf", ".srw"}
# What Pillow may take a file for. Others have a format of their own that nobody means by .png, or run programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF", "JPEG2000", "PPM")
SNIFFED = 16  # bytes at the start of a file that tell what it is
MAX_ENTRY = 2**30  # bytes of a file in a zip: more than any picture of as many pixels as Pillow reads
MAX_ENTRY_AT_ONCE = 2**26  # larger ones are unpacked while they are decoded


class Header(NamedTuple):
    """What the first bytes of an image file say: Pillow's mode, and the size in pixels once it is the right way up."""

    mode: str
    width: int
    height: int


class Source(ABC):
    """Images in a fixed order. `name` is what the user typed, `names` are the images' paths with '/' between folders.

    `ignored` lists the files inside that are no images. `notes` says in a line each what else a user should know:
    what was left out and why, what was recognised by its content alone.

    A source may be used in processes that are forked off or sent it, by one thread in each.
    """

    def __init__(self, name: str, names: list[str]) -> None:
        self.name = name
        self.names = names
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
            return _header(image)

    def fingerprint(self) -> str:
        """Hex digest of all that tells whether the images are the same as at another time.

        This one suits pictures that are computed: another kind, number or size, another fingerprint.
        """
        return digest(type(self).__name__, self.header(0), *self.names)


class FolderSource(Source):
    """Every image in a folder and the folders below it."""

    def __init__(self, name: str) -> None:
        self._root = Path(name)
        files, notes = _files_below(self._root)
        images, ignored, recognised = _sort_out(files, self._first_bytes)
        super().__init__(name, images)
        self.ignored = ignored
        self.notes = notes + recognised

    def read(self, index: int) -> Image.Image:
        return open_image(self._root / self.names[index])

    def fingerprint(self) -> str:
        labels = [path for path in self.ignored if posixpath.basename(path) == LABEL_FILE]
        return digest(*(part for path in [*self.names, *labels] for part in (path, self._version(path))))

    def _read_labels(self) -> Labels | None:
        return labels_inside(self.name, self.names, self.ignored, self._label_file)

    def _version(self, path: str) -> str:
        try:
            status = os.stat(self._root / path)
        except OSError as error:  # a link that leads nowhere
            return str(error.errno)
        return f"{status.st_size} {status.st_mtime_ns}"

    def _first_bytes(self, path: str) -> bytes:
        try:
            return first_bytes(self._root / path)
        except OSError:
            return b""

    def _label_file(self, path: str) -> bytes:
        where = f"--source {self.name}: {shown(path)}"
        try:
            with open(self._root / path, "rb") as file:
                data = file.read(MAX_LABEL_FILE + 1)
        except OSError as error:
            raise GanError(f"{where} cannot be read ({error.strerror or error}); mend it or delete it") from error
        if len(data) > MAX_LABEL_FILE:
            raise GanError(f"{where} is larger than {MAX_LABEL_FILE >> 20} MB; that is no list of labels")
        return data


class ZipSource(Source):
    """Every image in a zip file. Each process opens the file anew: a position in it must not be shared."""

    def __init__(self, name: str) -> None:
        self._path = name
        self._zip: zipfile.ZipFile | None = None
        self._pid = -1
        self._opened: tuple[int, ...] | None = None
        self._entries: dict[str, zipfile.ZipInfo] = {}
        twice = []
        for info in self._open().infolist():
            path = info.filename.replace("\\", "/")
            if path.endswith("/"):
                continue
            if path in self._entries and not is_hidden(path):
                twice.append(path)
            self._entries[path] = info  # the last one counts, as when the file is unpacked
        images, ignored, notes = _sort_out(self._entries, self._first_bytes)
        super().__init__(name, images)
        self.ignored, self.notes = ignored, notes
        if twice:
            self.notes.append(f"{_count(twice, 'entry', 'entries')} of the zip left out: a later one has the same name")
        inner = [path for path in ignored if path.lower().endswith(".zip")]
        if inner:
            self.notes.append(f"{_count(inner, 'zip file')} inside of the zip not looked into; unpack it first")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None, "_pid": -1}

    def read(self, index: int) -> Image.Image:
        path = self.names[index]
        stream: IO[bytes] = self._stream(path)
        if self._entries[path].file_size <= MAX_ENTRY_AT_ONCE:
            with stream:
                stream = io.BytesIO(stream.read())  # faster, and the whole entry's checksum is compared
        return open_image(stream)

    def header(self, index: int) -> Header:
        with self._stream(self.names[index]) as stream, open_image(stream) as image:
            return _header(image)

    def fingerprint(self) -> str:
        labels = [path for path in self.ignored if posixpath.basename(path) == LABEL_FILE]
        infos = [self._entries[path] for path in [*self.names, *labels]]
        return digest(*(part for info in infos for part in (info.filename, info.file_size, info.CRC)))

    def _read_labels(self) -> Labels | None:
        return labels_inside(self.name, self.names, self.ignored, self._label_file)

    def _open(self) -> zipfile.ZipFile:
        if self._zip is None or self._pid != os.getpid():
            try:
                opened = zipfile.ZipFile(self._path)
            except (OSError, MemoryError):
                raise
            except Exception as error:  # a damaged zip makes zipfile raise almost anything
                what = f"is a damaged zip file ({shown(str(error))[:120]})"
                raise GanError(f"--source {self._path}: {what}; make or copy it again") from error
            status = os.stat(self._path)
            version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
            if self._opened not in (None, version):
                raise GanError(f"--source {self._path}: has been replaced since it was opened; start again")
            self._zip, self._pid, self._opened = opened, os.getpid(), version
        return self._zip

    def _stream(self, path: str, limit: int = MAX_ENTRY) -> IO[bytes]:
        """The unpacked bytes of a file in the zip; never more than it claims, and that is bounded."""
        info = self._entries[path]
        if info.flag_bits & 1:
            raise GanError("encrypted; unpack the zip with its password first")
        if info.file_size > limit:
            raise GanError(f"unpacks to {info.file_size / 1e6:,.0f} MB, more than any image")
        try:
            return self._open().open(info)
        except NotImplementedError as error:
            raise GanError(f"packed in a way that cannot be read here ({error}); unpack the zip first") from error

    def _first_bytes(self, path: str) -> bytes:
        try:
            with self._stream(path) as stream:
                return stream.read(SNIFFED)
        except Exception:  # as above
            return b""

    def _label_file(self, path: str) -> bytes:
        try:
            with self._stream(path, MAX_LABEL_FILE) as stream:
                return stream.read()
        except Exception as error:
            where = f"--source {self.name}: {shown(path)}"
            raise GanError(f"{where} cannot be read ({shown(str(error))[:120]}); mend it or delete it") from error


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
    """Open what a user names: a folder, a zip, an LSUN database, a CIFAR or MNIST archive, or `demo`.

    What a file is, its content tells. Raises GanError where there is no such thing, or where it holds no images.
    """
    if name == "demo":
        return DemoSource()
    try:
        source = _open_path(name)
    except OSError as error:
        raise GanError(f"--source {name}: cannot be read ({error.strerror or error})") from error
    if not source.names:
        raise GanError(f"--source {name}: holds no images ({_describe_ignored(source)}); {_wanted(source)}")
    return source


def _open_path(name: str) -> Source:
    from gan.data import archives  # here, because it builds on this module

    path = Path(name)
    if path.is_dir():
        database = path / archives.LMDB_FILE
        is_lmdb = database.is_file() and archives.is_lmdb(first_bytes(database, archives.RECOGNISED))
        return archives.LmdbSource(name, database) if is_lmdb else FolderSource(name)
    if not path.exists():
        raise GanError(f"--source {name}: no such file or folder; name a folder or a .zip of images, or demo")
    if not path.is_file():
        raise GanError(f"--source {name}: is neither a file nor a folder; name a folder or a .zip of images")
    start = first_bytes(path, archives.RECOGNISED)
    if path.suffix.lower() in IMAGE_SUFFIXES or is_image(start):
        raise GanError(f"--source {name}: is a single image; name the folder that holds your images")
    archive = archives.open_archive(name, start)
    if archive is not None:
        return archive
    if zipfile.is_zipfile(path):
        return ZipSource(name)
    is_part = start.startswith(b"PK") or path.suffix.lower() == ".zip"
    remedy = "make or copy it again" if is_part else "name a folder or a .zip of images"
    raise GanError(f"--source {name}: is not a zip file, or a part of one; {remedy}")


def first_bytes(path: Path, count: int = SNIFFED) -> bytes:
    """What a file begins with."""
    with open(path, "rb") as file:
        return file.read(count)


def is_image(start: bytes) -> bool:
    """Whether a file that begins like this is a PNG, JPEG, WebP, GIF or TIFF."""
    magic = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF87a", b"GIF89a", b"II*\0", b"MM\0*")
    return start.startswith(magic) or (start[:4] == b"RIFF" and start[8:12] == b"WEBP")


def is_hidden(path: str) -> bool:
    """Whether a path with '/' between its parts is nothing a user put there: hidden, or an archiver's leftovers."""
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in path.split("/"))


def count_by_suffix(names: Iterable[str]) -> dict[str, int]:
    """How many of the file names end in which suffix (lower case, with the dot), the most frequent first."""
    counts: dict[str, int] = {}
    for name in names:
        suffix = posixpath.splitext(name)[1].lower() or posixpath.basename(name)
        counts[suffix] = counts.get(suffix, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def digest(*parts: object) -> str:
    """Hex digest of the parts, in their order."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{part}\0".encode(errors="surrogatepass"))
    return sha.hexdigest()


def open_image(file: Path | IO[bytes]) -> Image.Image:
    """An image of one of FORMATS, its pixels not yet decoded. Raises whatever the decoder raises."""
    return Image.open(file, formats=_formats())


def _header(image: Image.Image) -> Header:
    return Header(image.mode, *upright_size(image))


@functools.cache
def _formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def _describe_ignored(source: Source) -> str:
    if not source.ignored:
        return source.notes[0] if source.notes else "it is empty"
    kinds = list(count_by_suffix(source.ignored).items())
    return "only " + ", ".join(f"{count} x {shown(kind)}" for kind, count in kinds[:3]) + (", ..." if kinds[3:] else "")


def _wanted(source: Source) -> str:
    database = next((path for path in source.ignored if posixpath.basename(path) == "data.mdb"), None)
    if database == "data.mdb":
        return "its data.mdb is no LMDB database, or damaged at its start; copy or download it again"
    if database is not None:
        return f"if you want the database in it, name {shown(posixpath.join(source.name, posixpath.dirname(database)))}"
    return "wanted are " + ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES)) + " files"


def _files_below(root: Path) -> tuple[list[str], list[str]]:
    """Paths of all files below `root`, relative to it, with '/' between folders; and what was not read and why.

    Nothing hidden. A folder is read once: links to folders are followed last, so that it goes by its own name.
    """
    files: list[str] = []
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
                notes.append(f"{shown(folder)}: leads to a folder that is read already; not followed")
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(root / folder) as found:
                entries = list(found)
        except OSError as error:
            if not folder:
                raise
            notes.append(f"{shown(folder)}: cannot be read ({error.strerror or error}); what is in it is left out")
            continue
        for entry in entries:
            path = posixpath.join(folder, entry.name)
            kind = _kind(entry)
            if is_hidden(entry.name):
                continue
            if kind == "folder":
                (links if entry.is_symlink() else folders).append(path)
            else:
                (files if kind == "file" else special).append(path)
    if special:
        notes.append(f"{_count(special, 'entry', 'entries')} left out: no file, but a pipe, socket or device")
    return files, sorted(notes)


def _kind(entry: os.DirEntry[str]) -> str:
    """ "file", "folder" or "special". A link that leads nowhere, or to itself, is a file that cannot be read."""
    try:
        mode = entry.stat().st_mode if entry.is_symlink() else None
        if mode is None:
            return "folder" if entry.is_dir() else "file" if entry.is_file() else "special"
    except OSError:
        return "file"
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "special"


def _sort_out(paths: Iterable[str], start: Callable[[str], bytes]) -> tuple[list[str], list[str], list[str]]:
    """Sorted paths of images and of others, and notes; what the system hides belongs to neither.

    `start` reads the first bytes of a file: one without an image's extension may be an image all the same.
    """
    images: list[str] = []
    ignored: list[str] = []
    recognised: list[str] = []
    for path in sorted(path for path in paths if not is_hidden(path)):
        suffix = posixpath.splitext(path)[1].lower()
        if suffix in IMAGE_SUFFIXES:
            images.append(path)
        elif suffix not in RAW_SUFFIXES and is_image(start(path)):
            images.append(path)
            recognised.append(path)
        else:
            ignored.append(path)
    notes = [f"{_count(recognised, 'image')} recognised by the content, not by the name"] if recognised else []
    return images, ignored, notes


def _count(paths: list[str], one: str, many: str | None = None) -> str:
    """How many there are, and the first of them: `3 images (a, b, ...)`."""
    first = ", ".join(shown(path) for path in paths[:2]) + (", ..." if paths[2:] else "")
    return f"{len(paths):,} {one if len(paths) == 1 else many or one + 's'} ({first})"
