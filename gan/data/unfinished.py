"""A dataset in the making, which survives whatever ends its process, and is continued by the next one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import threading
import time
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gan.data.journal import Journal, encoded
from gan.errors import GanError
from gan.files import explain_os_error, flush, publish

# Zip entries carry a time; one that never changes makes equal input give equal bytes. It is the oldest a zip can hold.
ZIP_TIME = (1980, 1, 1, 0, 0, 0)

FORMAT = 1  # of what the journal says
_NOTE_EVERY = 1.0  # seconds, or
_NOTES = 100  # files, after which what was done is noted
_SYNC_EVERY = 10.0  # seconds: what a power failure may cost


class Entry(NamedTuple):
    """A file that was added: where it begins in the zip (0 in a folder), its bytes, and their CRC32."""

    name: str
    offset: int
    size: int
    crc: int


def open_unfinished(dest: str | Path, key: str) -> Unfinished:
    """Begin `dest`, a zip file by its suffix or else a folder, or go on with it."""
    path = Path(dest)
    return UnfinishedZip(path, key) if path.suffix.lower() == ".zip" else UnfinishedFolder(path, key)


class Unfinished(ABC):
    """The files of a dataset, added one by one, which get their final name all together in the end.

    Until then they are in `.NAME.unfinished` beside it, and `.NAME.unfinished.journal` tells what they are, so that
    the next process goes on behind the last file that is whole. The journal has a line for each call of `add`, and is
    written after the file. However often it was interrupted, the result has the same bytes.

    Args:
        dest: replaced in the end only: a file, or a folder that is empty or not there.
        key: whatever makes what is added what it is. What was left behind under another key is not continued.

    Raises GanError if the same dataset is being made already, or if it cannot be written, here and in all methods.
    """

    records: list[dict[str, Any]]
    """what `add` was given by those who were interrupted, in order"""
    started_over: str | None
    """a line for people if something was left behind that is of no use"""
    unlocked: str | None
    """a line for people if nothing keeps another process from making the same dataset now"""

    def __init__(self, dest: Path, key: str) -> None:
        self.dest, self.records, self.started_over = dest, [], None
        self._entries: list[Entry] = []
        self._lines: list[bytes] = []  # that the journal does not have yet
        self._noted = self._synced = time.monotonic()
        self._syncing: threading.Thread | None = None
        self._problem: OSError | None = None  # of the thread that syncs
        self._closed = False
        self._files = contextlib.ExitStack()
        with self._explained():
            dest.parent.mkdir(parents=True, exist_ok=True)
            self._path = dest.parent / _hidden_name(dest, ".unfinished")
            self._journal = Journal(dest.parent / _hidden_name(dest, ".unfinished.journal"), dest)
            self.unlocked = self._journal.unlocked
            try:
                self._recover(key)
            except BaseException:
                self._release()
                self._journal.close()
                raise

    def add(self, record: Mapping[str, Any], name: str | None = None, data: bytes | None = None) -> None:
        """Add a file, or none, and what the next process should know of it, which JSON can hold."""
        with self._explained():
            entry = None
            if name is not None and data is not None:
                entry = self._write(name, data)
                self._entries.append(entry)
            self._lines.append(encoded([entry, record]))
            if len(self._lines) >= _NOTES or time.monotonic() - self._noted >= _NOTE_EVERY:
                self._note()

    def finish(self, extra: Mapping[str, bytes]) -> None:
        """Add the last files, and give everything its final name."""
        with self._explained():
            self._note()
            self._wait_for_sync()
            self._complete(extra)
            self._closed = True
            self._journal.remove()  # at once: one that is left behind tells of nothing
            flush(self.dest.parent)

    def close(self) -> None:
        """Leave it to the next process, unless it is finished."""
        if self._closed:
            return
        self._closed = True
        with contextlib.suppress(OSError):  # a disk that is full: an error tells of it, and what is there is good
            self._note()
        with contextlib.suppress(OSError):
            self._wait_for_sync()
        self._release()
        self._journal.close()

    def discard(self) -> None:
        """Remove everything."""
        self._closed = True
        with contextlib.suppress(OSError):
            self._wait_for_sync()
        self._release()
        with self._explained(), contextlib.closing(self._journal):
            self._remove()
            self._journal.remove()

    def __enter__(self) -> Unfinished:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @abstractmethod
    def _open(self) -> bool:
        """Make what is to hold the files. Was there anything?"""

    @abstractmethod
    def _holds(self, entry: Entry) -> bool:
        """Whether the file is there, whole, and behind those in `_entries`."""

    @abstractmethod
    def _cut(self) -> None:
        """Remove all but `_entries`."""

    @abstractmethod
    def _write(self, name: str, data: bytes) -> Entry: ...

    @abstractmethod
    def _hand_over(self) -> None:
        """Give what was written to the system."""

    @abstractmethod
    def _sync(self) -> None:
        """Have what the system was given survive a power failure, as far as that is cheap."""

    @abstractmethod
    def _complete(self, extra: Mapping[str, bytes]) -> None:
        """Add the last files, and rename it all."""

    @abstractmethod
    def _remove(self) -> None: ...

    def _recover(self, key: str) -> None:
        left = self._open()
        head = {"format": FORMAT, "key": key}
        lines = self._journal.lines()
        first, end = next(lines, (None, 0))
        if first != head:
            if left:  # otherwise nothing is lost: such as after a kill when all was done but for removing the journal
                other = "it was begun with other images, other settings or another version"
                self._start_over("its journal is damaged" if first is None else other)
            self._journal.cut(0)
            self._cut()
            self._journal.write(encoded(head))
            return
        for (fields, record), behind in lines:
            if fields is not None:
                entry = Entry(*fields)
                if not self._holds(entry):
                    if left and not self.records:
                        self._start_over("it is damaged")
                    break
                self._entries.append(entry)
            self.records.append(record)
            end = behind
        self._journal.cut(end)
        self._cut()

    def _start_over(self, why: str) -> None:
        self.started_over = f"{self.dest}: what an earlier run has left cannot be continued ({why}); starting over"

    def _note(self) -> None:
        """Files first, then the lines on them: a line tells of what is there."""
        if self._problem is not None:
            raise self._problem
        self._hand_over()
        lines, self._lines = self._lines, []
        self._journal.write(b"".join(lines))
        self._noted = time.monotonic()
        if self._noted - self._synced >= _SYNC_EVERY and (self._syncing is None or not self._syncing.is_alive()):
            self._synced = self._noted
            self._syncing = threading.Thread(target=self._sync_both, daemon=True)  # a slow disk takes seconds
            self._syncing.start()

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # a disk that is full, of which an error tells
            self._files.close()

    def _sync_both(self) -> None:
        try:
            self._sync()
            self._journal.sync()
        except OSError as error:
            self._problem = error

    def _wait_for_sync(self) -> None:
        if self._syncing is not None:
            self._syncing.join()
        if self._problem is not None:
            raise self._problem

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise explain_os_error(error, self.dest) from error


class UnfinishedZip(Unfinished):
    """Its entries are stored, not compressed. The directory, which makes it a zip file, comes last."""

    def _open(self) -> bool:
        self._path.touch()
        self._file = self._files.enter_context(open(self._path, "r+b"))  # noqa: SIM115
        self._end = 0
        return self._path.stat().st_size > 0

    def _holds(self, entry: Entry) -> bool:
        header = _zip_info(entry).FileHeader()
        self._file.seek(self._end)
        if entry.offset != self._end or self._file.read(len(header)) != header:
            return False
        data = self._file.read(entry.size)
        self._end += len(header) + entry.size
        return len(data) == entry.size and zlib.crc32(data) == entry.crc

    def _cut(self) -> None:
        last = self._entries[-1] if self._entries else None
        self._end = 0 if last is None else last.offset + len(_zip_info(last).FileHeader()) + last.size
        self._file.seek(self._end)
        self._file.truncate()

    def _write(self, name: str, data: bytes) -> Entry:
        entry = Entry(name, self._end, len(data), zlib.crc32(data))
        self._end += self._file.write(_zip_info(entry).FileHeader() + data)
        return entry

    def _hand_over(self) -> None:
        self._file.flush()

    def _sync(self) -> None:
        os.fsync(self._file.fileno())

    def _complete(self, extra: Mapping[str, bytes]) -> None:
        self._cut()
        with zipfile.ZipFile(self._file, "w") as archive:  # goes on where the file stands
            for entry in self._entries:
                info = _zip_info(entry)
                archive.filelist.append(info)
                archive.NameToInfo[info.filename] = info
            for name, data in extra.items():
                archive.writestr(_zip_info(Entry(name, 0, 0, 0)), data)
        self._release()
        publish(self._path, self.dest, flush_folder=False)

    def _remove(self) -> None:
        self._path.unlink(missing_ok=True)


class UnfinishedFolder(Unfinished):
    """Its files are in a hidden folder, which is renamed. The system writes them out when it likes until the end."""

    def _open(self) -> bool:
        self._path.mkdir(exist_ok=True)
        self._made = {self._path}  # folders
        return any(self._path.iterdir())

    def _holds(self, entry: Entry) -> bool:
        try:
            data = (self._path / entry.name).read_bytes()
        except OSError:
            return False
        return len(data) == entry.size and zlib.crc32(data) == entry.crc

    def _cut(self) -> None:
        names = {entry.name for entry in self._entries}
        for folder, _, files in os.walk(self._path, topdown=False):
            for file in files:
                path = Path(folder, file)
                if path.relative_to(self._path).as_posix() not in names:
                    path.unlink()
            if Path(folder) != self._path:
                with contextlib.suppress(OSError):  # there are files in it
                    os.rmdir(folder)

    def _write(self, name: str, data: bytes) -> Entry:
        path = self._path / name
        if path.parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(path.parent)
        path.write_bytes(data)
        return Entry(name, 0, len(data), zlib.crc32(data))

    def _hand_over(self) -> None:
        pass

    def _sync(self) -> None:
        pass

    def _complete(self, extra: Mapping[str, bytes]) -> None:
        for name, data in extra.items():
            self._write(name, data)
        if hasattr(os, "sync"):
            os.sync()  # one by one, thousands of files take minutes
        if self.dest.is_dir():
            self.dest.rmdir()  # it is empty, and not every system replaces an empty folder
        os.replace(self._path, self.dest)

    def _remove(self) -> None:
        shutil.rmtree(self._path)


def _zip_info(entry: Entry) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(entry.name, ZIP_TIME)
    info.create_system = 3  # the same on every system, for equal bytes; 3 makes the next line's meaning Unix
    info.external_attr = 0o644 << 16
    info.header_offset, info.CRC = entry.offset, entry.crc
    info.compress_size = info.file_size = entry.size
    return info


def _hidden_name(dest: Path, suffix: str) -> str:
    """`.NAME` with a suffix; where the file system takes no name of that length, with a digest for its end."""
    limit = 255
    with contextlib.suppress(AttributeError, OSError, ValueError):
        limit = os.pathconf(dest.parent, "PC_NAME_MAX")
    name = os.fsencode(dest.name)
    if len(name) > limit:
        raise GanError(f"{dest}: this name is too long; choose one of at most {limit} bytes")
    room = limit - len(".") - len(suffix)
    if len(name) > room:
        digest = "-" + hashlib.sha256(name).hexdigest()[:8]
        return f".{name[: room - len(digest)].decode(errors='ignore')}{digest}{suffix}"
    return f".{dest.name}{suffix}"
