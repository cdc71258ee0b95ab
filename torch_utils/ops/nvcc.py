"""CUDA sources compiled by the CUDA toolkit's nvcc, ahead of time: for `gan build-ops`, and where there is no NVRTC."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from torch_utils.ops import cubins
from torch_utils.ops.cubins import Built, Version
from torch_utils.ops.kernel_state import KernelError, brief, complaint

COMPILER = "nvcc"
_SECONDS = 300.0  # a source takes one or two; more than this is no compiler
_ANSWER_SECONDS = 10.0


def build(source: str, arch: str) -> Built:
    """Compile csrc/`source` for an architecture, such as sm_90. Raises KernelError."""
    newest, begin = version(), time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="gan-nvcc-") as folder:
        path = Path(folder) / "code"
        kind = "-ptx" if arch.startswith("compute_") else "-cubin"
        command = [kind, f"-arch={arch}", *cubins.OPTIONS, "-Xptxas=-v", "-o", str(path), str(cubins.SOURCES / source)]
        returncode, output = _run(command)
        if returncode != 0:
            raise KernelError(f"{source} does not compile: {complaint(output)}")
        code = path.read_bytes()
    return Built(code, COMPILER, newest, round(time.perf_counter() - begin, 3), *cubins.usage(output))


def version() -> Version:
    """(13, 0). Raises KernelError if nvcc is not there."""
    returncode, output = _run(["--version"], _ANSWER_SECONDS)
    found = re.search(r"release (\d+)\.(\d+)", output)
    if returncode != 0 or found is None:
        raise KernelError(f"nvcc does not run ({brief(output)})")
    return int(found[1]), int(found[2])


def known() -> list[int]:
    """The architectures that it compiles for: 75, 80, ... Raises KernelError."""
    _, output = _run(["--list-gpu-arch"], _ANSWER_SECONDS)
    return sorted(map(int, re.findall(r"compute_(\d+)$", output, re.MULTILINE)))


def _run(arguments: list[str], seconds: float = _SECONDS) -> tuple[int, str]:
    """The exit code, and what was printed."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise KernelError("nvcc, of the CUDA toolkit, was not found")
    try:
        result = subprocess.run(
            [nvcc, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=seconds,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"nvcc does not run ({brief(str(error))})") from error
    return result.returncode, result.stdout.decode(errors="replace")
