"""Opening what a user names as --source: a folder, a zip file, an archive of numbers, or the built-in collection.

What a file is, its content tells. Nothing in an archive is executed, and headers are not believed. To add a kind of
source: subclass `Source` in a module of its own, and choose it here.
"""

from __future__ import annotations

import posixpath
import zipfile
from pathlib import Path

from gan.data.image_files import IMAGE_SUFFIXES, count_by_suffix, first_bytes, is_image
from gan.data.sources.base import Header, Source
from gan.data.sources.cifar import CifarSource, is_tar
from gan.data.sources.compressed import DAMAGED, damaged, is_compressed, unpacked
from gan.data.sources.demo import DemoSource
from gan.data.sources.folder import FolderSource
from gan.data.sources.idx import IdxSource, is_idx
from gan.data.sources.lmdb import LMDB_FILE, LmdbSource, is_lmdb
from gan.data.sources.zip_source import ZipSource
from gan.errors import GanError, printable

__all__ = ["DemoSource", "Header", "Source", "open_source"]

_RECOGNISED = 512  # bytes at the start of a file that tell what it is: the first block of a tar
_UNPACK = "unpack it first and name the folder"
_OTHERS = {
    b"7z\xbc\xaf\x27\x1c": f"a 7z archive; {_UNPACK}",
    b"Rar!\x1a\x07": f"a RAR archive; {_UNPACK}",
    b"\x28\xb5\x2f\xfd": f"a zstd archive; {_UNPACK}",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself; fetch it with: git lfs pull",
    b"<": "a web page; the download went wrong",
}


def open_source(name: str) -> Source:
    """Open what a user names: a folder, a zip, an LSUN database, a CIFAR or MNIST archive, or `demo`.

    Raises GanError where there is no such thing, or where it holds no images.
    """
    if name == "demo":
        return DemoSource()
    path = Path(name)
    try:
        source = _open_folder(name, path) if path.is_dir() else _open_file(name, path)
    except OSError as error:
        raise GanError(f"--source {name}: cannot be read ({error.strerror or error})") from error
    if not source.names:
        what = "holds no images that can be read" if source.lost else "holds no images"
        raise GanError(f"--source {name}: {what} ({_describe_contents(source)}); {_wanted(source)}")
    return source


def _open_folder(name: str, folder: Path) -> Source:
    database = folder / LMDB_FILE
    is_database = database.is_file() and is_lmdb(first_bytes(database, _RECOGNISED))
    return LmdbSource(name, database) if is_database else FolderSource(name)


def _open_file(name: str, path: Path) -> Source:
    where = f"--source {name}"
    if not path.exists():
        raise GanError(f"{where}: no such file or folder; name a folder or a .zip of images, or demo")
    if not path.is_file():
        raise GanError(f"{where}: is neither a file nor a folder; name a folder or a .zip of images")
    start = first_bytes(path, _RECOGNISED)
    if path.suffix.lower() in IMAGE_SUFFIXES or is_image(start):
        raise GanError(f"{where}: is a single image; name the folder that holds your images")
    if is_lmdb(start):
        return LmdbSource(name, path)
    content = _unpacked_start(path, where) if is_compressed(start) else start
    if is_idx(content):
        return IdxSource(name)
    if is_tar(content):
        return CifarSource(name)
    if is_compressed(start):
        raise GanError(f"{where}: is a compressed file, but none of CIFAR or MNIST; {_UNPACK}")
    other = next((text for magic, text in _OTHERS.items() if start.lstrip().startswith(magic)), None)
    if other is not None:
        raise GanError(f"{where}: is {other}")
    if zipfile.is_zipfile(path):
        return ZipSource(name)
    is_part = start.startswith(b"PK") or path.suffix.lower() == ".zip"
    remedy = "make or copy it again" if is_part else "name a folder or a .zip of images"
    raise GanError(f"{where}: is not a zip file, or a part of one; {remedy}")


def _unpacked_start(path: Path, where: str) -> bytes:
    try:
        with unpacked(path) as file:
            return file.read(_RECOGNISED)
    except DAMAGED as error:
        raise damaged(where, error) from error


def _describe_contents(source: Source) -> str:
    if source.lost:
        name, why = source.lost[0]
        return f"{printable(name)}: {why}" + (f"; and {len(source.lost) - 1:,} more" if source.lost[1:] else "")
    if not source.ignored:
        return source.notes[0] if source.notes else "it is empty"
    kinds = list(count_by_suffix(source.ignored).items())
    first = ", ".join(f"{count} x {printable(kind)}" for kind, count in kinds[:3])
    return f"only {first}" + (", ..." if kinds[3:] else "")


def _wanted(source: Source) -> str:
    database = next((path for path in source.ignored if posixpath.basename(path) == LMDB_FILE), None)
    if database == LMDB_FILE:
        return "its data.mdb is no LMDB database, or damaged at its start; copy or download it again"
    if database is not None:
        folder = posixpath.join(source.name, posixpath.dirname(database))
        return f"if you want the database in it, name {printable(folder)}"
    return "wanted are " + ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES)) + " files"
