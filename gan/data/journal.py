"""What a program has done, line by line, for the next one to read after whatever ended it."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from gan.errors import GanError
from gan.files import Locked, lock


class Journal:
    """Lines of JSON, each behind its own CRC32. One program at a time has it open, and in it one user.

    Args:
        path: made if it is not there.
        dest: what it tells of, to be named in messages.

    Raises GanError if it is open already; OSError, as all methods do, where the system refuses.
    """

    unlocked: str | None
    """a line for people if nothing keeps another process from opening it"""

    def __init__(self, path: Path, dest: Path) -> None:
        self._path = path
        with _changing:
            # Before it is opened: the lock does not refuse its own process, and ends when that closes it once.
            if any(journal._is_at(path) for journal in _journals):
                message = f"{dest}: is being made by this process already; wait for it, or choose another name"
                raise GanError(message)
            self._open(dest)
            _journals.add(self)

    def lines(self) -> Iterator[tuple[Any, int]]:
        """What is in the lines before the first one that is torn, each with the position behind it."""
        self._file.seek(0)
        end = 0
        for line in self._file:
            content = _decoded(line)
            if content is None:
                return
            end += len(line)
            yield content, end

    def cut(self, end: int) -> None:
        """Remove what is behind a position."""
        self._file.seek(end)
        self._file.truncate()

    def write(self, lines: bytes) -> None:
        """Give the system what `encoded` has made."""
        self._file.write(lines)
        self._file.flush()

    def sync(self) -> None:
        """Have what was written survive a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Leave it to the next one."""
        with _changing, contextlib.suppress(OSError):
            self._file.close()

    def remove(self) -> None:
        """It tells of nothing any more."""
        if os.name != "posix":
            self.close()  # no open file can be removed there
        try:
            self._path.unlink(missing_ok=True)  # while it is locked
        finally:
            self.close()

    def _open(self, dest: Path) -> None:
        while True:
            self._path.touch()
            self._file = open(self._path, "r+b")  # noqa: SIM115
            try:
                self.unlocked = _locked(self._file, dest)
                if self.unlocked is not None or self._is_at(self._path):
                    return
            except BaseException:
                self._file.close()
                raise
            self._file.close()  # the process that held it has finished and removed it

    def _is_at(self, path: Path) -> bool:
        """Whether it is open, and `path` is a name of it."""
        try:
            return not self._file.closed and os.path.samestat(os.fstat(self._file.fileno()), path.stat())
        except FileNotFoundError:
            return False


_journals: weakref.WeakSet[Journal] = weakref.WeakSet()  # of this process; some are closed
_changing = threading.Lock()  # which of them are open


def encoded(content: Any) -> bytes:
    """A line that holds what JSON can hold."""
    text = json.dumps(content, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _decoded(line: bytes) -> Any:
    """None: the line is torn."""
    checksum, _, text = line.rpartition(b"\n")[0].partition(b" ")
    return json.loads(text) if text and checksum == b"%08x" % zlib.crc32(text) else None


def _locked(file: IO[bytes], dest: Path) -> str | None:
    try:
        problem = lock(file)
    except Locked as error:
        message = f"{dest}: is being made by another process; wait for it, or choose another name"
        raise GanError(message) from error
    if problem is None:
        return None
    return f"{dest}: cannot be locked ({problem}); take care that no other process makes it"
