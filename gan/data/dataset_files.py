"""The files of a packed dataset, in a zip or a folder, and what is said of those that cannot be used."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from pathlib import Path
from typing import Any

from gan.data import decode
from gan.data.image_files import is_hidden
from gan.data.zip_file import SharedZip
from gan.errors import GanError
from gan.image_size import Size, largest_trainable

LABEL_FILE = "dataset.json"
DATASET_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class DatasetFiles:
    """The files of a zip or a folder. Safe to use from processes forked or spawned off this one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._zip = SharedZip(path, str(path))
        if path.is_dir():
            found = (Path(base) / name for base, _, files in os.walk(path) for name in files)
            self.names = {file.relative_to(path).as_posix() for file in found}
        elif path.is_file():
            self.names = {info.filename for info in self._zip.opened().infolist() if not info.filename.endswith("/")}
        else:
            raise GanError(f"{path}: no such file or folder; pack your images with dataset_tool.py first")

    def image_names(self) -> list[str]:
        """Sorted names of all images. Raises GanError if there are none."""
        names = sorted(n for n in self.names if n.lower().endswith(DATASET_SUFFIXES) and not is_hidden(n))
        if not names:
            wanted = ", ".join(suffix[1:] for suffix in DATASET_SUFFIXES)
            raise GanError(f"{self.path}: holds no images ({wanted}); {self.pack_hint()}")
        return names

    def pack_hint(self, size: Size | None = None) -> str:
        """How to make a dataset of these files that can be trained on. `size`: of an image, if sizes are to change."""
        dest = f"{self.path.stem}-packed.zip"
        command = f"python dataset_tool.py --source {shlex.quote(str(self.path))} --dest {shlex.quote(dest)}"
        return f"pack it with: {command}" + (" --resolution {}x{}".format(*largest_trainable(size)) if size else "")

    def fingerprint(self, names: list[str], times: bool = True) -> str:
        """Hex digest of the files' names and sizes, and their checksums in a zip, their times in a folder."""
        digest, is_folder = hashlib.sha256(), self.path.is_dir()
        try:
            for name in names:
                if is_folder:
                    status = os.stat(self.path / name)
                    version = f"{status.st_size} {status.st_mtime_ns if times else ''}"
                else:
                    info = self._zip.opened().getinfo(name)
                    version = f"{info.file_size} {info.CRC}"
                digest.update(f"{name}\0{version}\0".encode(errors="surrogateescape"))
        except OSError as error:
            raise GanError(f"{self.path}: {name} cannot be read ({error})") from error
        return digest.hexdigest()

    def read(self, name: str) -> bytes:
        """The content of a file."""
        try:
            if self.path.is_dir():
                return (self.path / name).read_bytes()
            return self._zip.opened().read(name)
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
        except (ValueError, RecursionError) as error:
            raise GanError(f"{self.path}: {name} is not valid JSON ({error}); mend it, or pack again") from error
        if not isinstance(content, dict):
            raise GanError(f"{self.path}: {name} is not a JSON object; mend it, or pack again")
        return content

    def image_shape(self, name: str) -> decode.Shape:
        """(C, H, W) out of the header alone."""
        try:
            if self.path.is_dir():
                with open(self.path / name, "rb") as file:
                    return decode.shape_of(file)
            with self._zip.opened().open(name) as member:
                return decode.shape_of(member)
        except (GanError, MemoryError):
            raise
        except decode.UnsuitableImage as error:
            raise GanError(
                f"{self.path}: {name} is {error}; training takes 8-bit grey, RGB and RGBA; {self.pack_hint()}"
            ) from error
        except Exception as error:
            raise GanError(f"{self.path}: {name} is not a readable image ({error}); {self.pack_hint()}") from error
