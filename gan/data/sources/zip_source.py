"""A zip file of images."""

from __future__ import annotations

import io
import posixpath
import zipfile
from typing import IO

from PIL import Image

from gan.data.dataset_files import LABEL_FILE
from gan.data.image_files import SNIFFED, is_hidden, open_image
from gan.data.label_files import MAX_LABEL_FILE, labels_inside
from gan.data.label_matching import Labels
from gan.data.sources.base import FileSource, Header, counted, digest, header_of, sort_out
from gan.data.zip_file import SharedZip
from gan.errors import GanError, one_line, printable

MAX_ENTRY = 2**30  # bytes of a file in a zip: more than any picture of as many pixels as Pillow reads
MAX_ENTRY_AT_ONCE = 2**26  # larger ones are unpacked while they are decoded


class ZipSource(FileSource):
    """Every image in a zip file."""

    def __init__(self, name: str) -> None:
        self._zip = SharedZip(name, f"--source {name}")
        self._entries: dict[str, zipfile.ZipInfo] = {}
        twice = []
        for info in self._zip.opened().infolist():
            path = info.filename.replace("\\", "/")
            if path.endswith("/"):
                continue
            if path in self._entries and not is_hidden(path):
                twice.append(path)
            self._entries[path] = info  # the last one counts, as when the file is unpacked
        found = sort_out(self._entries, self._first_bytes)
        super().__init__(name, found.images)
        images = set(found.images)
        covered = [(path, "a later entry of the zip has the same name") for path in twice if path in images]
        self.lost = sorted(covered + found.lost)
        self.ignored, self.notes = found.ignored, found.notes
        if others := [path for path in twice if path not in images]:
            left_out = counted(others, "entry", "entries")
            self.notes.append(f"{left_out} of the zip left out: a later one has the same name")
        inner = [path for path in found.ignored if path.lower().endswith(".zip")]
        if inner:
            self.notes.append(f"{counted(inner, 'zip file')} inside of the zip not looked into; unpack it first")

    def read(self, index: int) -> Image.Image:
        path = self.names[index]
        stream: IO[bytes] = self._stream(path)
        if self._entries[path].file_size <= MAX_ENTRY_AT_ONCE:
            with stream:
                stream = io.BytesIO(stream.read())  # faster, and the whole entry's checksum is compared
        return open_image(stream)

    def header(self, index: int) -> Header:
        with self._stream(self.names[index]) as stream, open_image(stream) as image:
            return header_of(image)

    def fingerprint(self) -> str:
        labels = [path for path in self.ignored if posixpath.basename(path) == LABEL_FILE]
        infos = [self._entries[path] for path in [*self.names, *labels]]
        return digest(*(part for info in infos for part in (info.filename, info.file_size, info.CRC)))

    def _read_labels(self) -> Labels | None:
        return labels_inside(self.name, self.names, self.ignored, self._label_file)

    def _stream(self, path: str, limit: int = MAX_ENTRY) -> IO[bytes]:
        """The unpacked bytes of a file in the zip; never more than it claims, and that is bounded."""
        info = self._entries[path]
        if info.flag_bits & 1:
            raise GanError("encrypted; unpack the zip with its password first")
        if info.file_size > limit:
            raise GanError(f"unpacks to {info.file_size / 1e6:,.0f} MB, more than any image")
        try:
            return self._zip.opened().open(info)
        except NotImplementedError as error:
            raise GanError(f"packed in a way that cannot be read here ({error}); unpack the zip first") from error

    def _first_bytes(self, path: str) -> bytes:
        try:
            with self._stream(path) as stream:
                return stream.read(SNIFFED)
        except Exception:  # a damaged entry, which is named when it is read
            return b""

    def _label_file(self, path: str) -> bytes:
        try:
            with self._stream(path, MAX_LABEL_FILE) as stream:
                return stream.read()
        except Exception as error:
            where = f"--source {self.name}: {printable(path)}"
            raise GanError(f"{where} cannot be read ({one_line(error)}); mend it or delete it") from error
