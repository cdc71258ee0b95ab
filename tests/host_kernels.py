"""The CUDA kernels, compiled for the host and run on the CPU behind the same calls that launch them on a GPU."""

from __future__ import annotations

import contextlib
import ctypes
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

SHIM = Path(__file__).with_name("host_cuda.h")
CSRC = Path(__file__).parents[1] / "torch_utils" / "ops" / "csrc"
Size = tuple[int, int, int]


@contextlib.contextmanager
def alone(path: Path) -> Iterator[None]:
    """One process at a time makes `path`; the others find it made. The lock is the system's, which outlives nobody."""
    try:
        import fcntl
    except ImportError:  # Windows, where nothing is compiled
        yield
        return
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class HostLaunch:
    """Launches entry points of csrc/`source`, which g++ compiles into `folder` when the first one is launched.

    Unless it is there: the folder belongs to one run of pytest, all processes of it.
    """

    def __init__(self, source: str, folder: Path) -> None:
        self._source, self._path = CSRC / source, folder / f"{source}.so"
        self._library: ctypes.CDLL | None = None
        self.launched: list[str] = []

    def __call__(self, entry: str, grid: Size, block: Size, params: bytes, device: torch.device) -> None:
        assert device.type == "cpu"
        # The limits of every CUDA device.
        assert all(0 < side < limit for side, limit in zip(grid, (2**31, 2**16, 2**16), strict=True)), grid
        assert all(0 < side <= limit for side, limit in zip(block, (1024, 1024, 64), strict=True)), block
        library = self._loaded()
        threads = ctypes.c_uint.in_dll(library, f"{entry}_threads").value
        assert block[0] * block[1] * block[2] <= threads, f"{entry} is compiled for blocks of {threads} threads"
        size = ctypes.c_uint.in_dll(library, f"{entry}_size").value
        assert len(params) == size, f"{entry} takes {size} bytes of parameters, not {len(params)}"
        getattr(library, entry)(params, (ctypes.c_uint * 6)(*grid, *block))
        self.launched.append(entry)

    def _loaded(self) -> ctypes.CDLL:
        if self._library is None:
            compiler = shutil.which("g++")
            if compiler is None:
                pytest.skip("no g++ to compile the kernels for the host")
            made = self._path.with_suffix(".made")
            command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
            # A GPU reads and writes packs at multiples of their size only; a CPU would not mind.
            command += ["-fsanitize=alignment", "-fno-sanitize-recover=alignment"]
            command += ["-DGAN_HOST", "-include", str(SHIM), "-x", "c++", str(self._source), "-o", str(made)]
            with alone(self._path):
                if not self._path.exists():
                    subprocess.run(command, check=True)
                    made.replace(self._path)
            self._library = ctypes.CDLL(str(self._path))
        return self._library
