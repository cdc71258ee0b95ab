"""A zip file that several processes read."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

from gan.errors import GanError, one_line


class SharedZip:
    """A zip that is opened anew in each process that is forked off or sent it: a position in it must not be shared.

    Args:
        where: begins every error, such as the file's name.
    """

    def __init__(self, path: str | Path, where: str) -> None:
        self._path = path
        self._where = where
        self._zip: zipfile.ZipFile | None = None
        self._pid = -1
        self._version: tuple[int, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_zip": None, "_pid": -1}

    def opened(self) -> zipfile.ZipFile:
        """The zip, open in this process.

        Raises GanError if it cannot be read, or is not the one that it was: its images would pass for those.
        """
        if self._zip is None or self._pid != os.getpid():
            opened, version = self._open()
            if self._version not in (None, version):
                opened.close()
                raise GanError(f"{self._where}: has been replaced since it was opened; start again")
            self._zip, self._pid, self._version = opened, os.getpid(), version
        return self._zip

    def _open(self) -> tuple[zipfile.ZipFile, tuple[int, ...]]:
        """The zip, and what tells whether it is the same file at another time."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115
        except OSError as error:
            raise GanError(f"{self._where}: cannot be read ({error.strerror or error})") from error
        try:
            status = os.fstat(file.fileno())
            return zipfile.ZipFile(file), (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)
        except Exception as error:  # a damaged zip makes zipfile raise almost anything
            file.close()
            if isinstance(error, MemoryError):
                raise
            what = f"not a readable zip file ({one_line(error)})"
            raise GanError(f"{self._where}: {what}; make or copy it again") from error
