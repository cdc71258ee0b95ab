"""LMDB databases of images, such as LSUN's."""

from __future__ import annotations

import io
import struct
from pathlib import Path
from typing import Any

from PIL import Image

from gan.data.image_files import open_image
from gan.data.sources.base import FileSource, digest, file_version
from gan.errors import GanError, one_line

LMDB_FILE = "data.mdb"

_META = 152  # bytes of a page's and a meta page's header


def is_lmdb(start: bytes) -> bool:
    """Whether a file that begins like this is an LMDB database."""
    return start[16:20] == b"\xde\xc0\xef\xbe"


class LmdbSource(FileSource):
    """The images in an LMDB database, such as LSUN's, by sorted key. `file` is its data.mdb.

    The database is opened for each image, which costs 0.1 ms: what is open does not survive a fork.
    """

    def __init__(self, name: str, file: Path) -> None:
        self._file = str(file)
        try:
            import lmdb
        except ImportError:
            raise GanError(f"--source {name}: is an LMDB database; to read it: pip install lmdb") from None
        missing = _missing(file)
        if missing:
            raise GanError(f"--source {name}: {missing}")
        try:
            with self._open() as database, database.begin() as transaction:
                names = [_key_name(key) for key in transaction.cursor().iternext(values=False)]
        except lmdb.Error as error:
            raise GanError(f"--source {name}: is damaged ({one_line(error)}); copy or download it again") from error
        super().__init__(name, names)

    def read(self, index: int) -> Image.Image:
        with self._open() as database, database.begin() as transaction:
            data = transaction.get(_key(self.names[index]))
        if data is None:
            raise GanError("gone: the database has been replaced")
        return open_image(io.BytesIO(data))

    def fingerprint(self) -> str:
        return digest("lmdb", *file_version(self._file))

    def _open(self) -> Any:
        import lmdb

        return lmdb.open(self._file, subdir=False, readonly=True, lock=False, readahead=False, create=False)


def _missing(file: Path) -> str | None:
    """What is wrong with a database that is shorter than it says. LMDB maps it: reading it would end the process."""
    length = file.stat().st_size
    with open(file, "rb") as opened:
        start = opened.read(_META)
        page_size = int.from_bytes(start[40:44], "little")
        if page_size.bit_count() != 1 or not 256 <= page_size <= 65536:
            return "is a damaged LMDB database; copy or download it again"
        opened.seek(page_size)
        metas = [meta for meta in (start, opened.read(_META)) if len(meta) == _META and is_lmdb(meta)]
    # The last page in use and the number of the transaction; the later one of two counts.
    _, last_page = max((struct.unpack_from("<QQ", meta, 136)[::-1] for meta in metas), default=(0, 2**63))
    if (last_page + 1) * page_size <= length:
        return None
    return (
        f"is a truncated LMDB database: it has {length / 1e6:,.1f} MB of {(last_page + 1) * page_size / 1e6:,.1f}; "
        "copy or download it again (or, if it is whole, make a compact copy: mdb_copy -c)"
    )


def _key_name(key: bytes) -> str:
    """A key as the name of an image: its text, or 0x and its hexadecimal digits."""
    try:
        text = key.decode()
    except UnicodeDecodeError:
        text = ""
    return text if text.isprintable() and text and not text.startswith("0x") else f"0x{key.hex()}"


def _key(name: str) -> bytes:
    return bytes.fromhex(name[2:]) if name.startswith("0x") else name.encode()
