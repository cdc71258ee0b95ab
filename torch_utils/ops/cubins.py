"""Compiled CUDA sources, kept on disk: a file each, whose name says of what it was made.

A file appears complete, under its name, or not at all, and is believed only with the checksum that stands in it: so
any number of processes may write and read at once, and be killed at any moment. Without a folder that can be written
everything works and nothing is kept.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch_utils.ops.kernel_state import KernelError
from torch_utils.user_cache import user_cache

SOURCES = Path(__file__).with_name("csrc")
OPTIONS = ("-std=c++17",)  # of NVRTC and nvcc
CACHE = "XDG_CACHE_HOME"  # the variable that moves the folder, see user_cache
Version = tuple[int, ...]
_INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.MULTILINE)
_LEFTOVER_SECONDS = 3600  # then whoever was to rename a temporary file has been killed


@dataclasses.dataclass(frozen=True)
class Built:
    """A source, compiled for an architecture."""

    code: bytes = dataclasses.field(repr=False)
    """a cubin, or PTX"""
    compiler: str
    """NVRTC or nvcc"""
    version: Version
    """of the compiler"""
    seconds: float
    """what compiling it took, whenever that was"""
    registers: int
    """the most that an entry point needs a thread; 0 for PTX"""
    spills: int
    """bytes that all entry points move to memory for want of registers"""
    cached: bool = False
    """it was there"""
    not_kept: str = ""
    """why it will not be there for the next process; empty: it will"""

    @property
    def by(self) -> str:
        """Compiler and version: NVRTC 13.0."""
        return f"{self.compiler} {'.'.join(map(str, self.version))}"

    @property
    def digest(self) -> str:
        """Of the code."""
        return hashlib.sha256(self.code).hexdigest()[:16]


def texts(source: str) -> dict[str, str]:
    """The text of csrc/`source`, which comes first, and of all that it includes, by file name. Raises KernelError."""
    found: dict[str, str] = {}
    waiting = [source]
    while waiting:
        name = waiting.pop(0)
        if name not in found:
            try:
                found[name] = (SOURCES / name).read_text(encoding="utf-8")
            except OSError as error:
                why = error.strerror or error
                raise KernelError(f"csrc/{name} cannot be read ({why}); install the program again") from error
            waiting += _INCLUDE.findall(found[name])
    return found


def folder() -> Path:
    """Where they are kept."""
    return user_cache("kernels")


def keep(source: str, arch: str, built: Built) -> Path:
    """Write a compiled source to where `kept` finds it. Raises KernelError if it cannot be written."""
    about = dataclasses.asdict(built) | {"code": hashlib.sha256(built.code).hexdigest()}
    version = ".".join(map(str, built.version))
    name = f"{_stem(source, arch)}-{built.compiler.lower()}{version}.cubin"
    with _writing():
        return _write(name, json.dumps(about).encode() + b"\n" + built.code)


def check_folder() -> None:
    """Raises KernelError if nothing can be kept."""
    with _writing():
        _write(".try", b"").unlink(missing_ok=True)


def kept(source: str, arch: str, compiler: str, version: Version | None) -> Built | None:
    """The newest that a compiler, of at most this version, made of a source as it is now."""
    found = []
    with contextlib.suppress(OSError, RuntimeError):  # RuntimeError: there is no home
        for path in folder().glob(f"{_stem(source, arch)}-{compiler.lower()}*.cubin"):
            built = _read(path)
            if built is not None and (version is None or built.version <= version):
                found.append(built)
    return max(found, key=lambda built: built.version, default=None)


def note(name: str, text: str) -> Path | None:
    """Keep a line under a name; None if it cannot be written."""
    try:
        return _write(name, text.encode())
    except (OSError, RuntimeError):
        return None


def noted(name: str, within: float = math.inf) -> str | None:
    """The line that is kept under a name, if it was written within so many seconds."""
    try:
        path = folder() / name
        return path.read_text(encoding="utf-8") if time.time() - path.stat().st_mtime < within else None
    except (OSError, RuntimeError, ValueError):
        return None


def usage(log: str) -> tuple[int, int]:
    """The registers and the bytes of spills in what `ptxas -v` prints."""
    registers = max(map(int, re.findall(r"Used (\d+) registers", log)), default=0)
    return registers, sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", log)))


def _stem(source: str, arch: str) -> str:
    """The part of a file's name that any compiler gives it."""
    parts = [part for pair in texts(source).items() for part in pair]
    digest = hashlib.sha256("\0".join([*parts, *OPTIONS]).encode()).hexdigest()
    return f"{Path(source).stem}-{digest[:16]}-{arch}"


def _read(path: Path) -> Built | None:
    """A file that is as it was written; half a cubin may do anything."""
    try:
        line, _, code = path.read_bytes().partition(b"\n")
        about = json.loads(line)
        if about["code"] != hashlib.sha256(code).hexdigest():
            return None
        return Built(**{**about, "code": code, "version": tuple(about["version"]), "cached": True})
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Says what cannot be written, why, and what to do."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise KernelError(f"{folder()} cannot be written ({why})", f"set {CACHE} to a folder that can") from error
    except RuntimeError as error:
        raise KernelError("there is no home to keep kernels in", f"set {CACHE} to a folder") from error


def _write(name: str, content: bytes) -> Path:
    """Raises OSError, or RuntimeError if there is no home."""
    path = folder().absolute() / name
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_leftovers(path.parent)
    handle, temporary = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    return path


def _remove_leftovers(cache: Path) -> None:
    for path in cache.glob(".*.tmp"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _LEFTOVER_SECONDS:
                path.unlink()
