"""Compiled CPU kernels: built once with the machine's own compiler, kept, and checked before they are used.

Nothing happens until `kernels.prepare` is called. What then cannot be built, loaded or trusted is left to PyTorch's
operations; that is never an error, and `status` has the reason. `GAN_CPU_KERNELS=0` switches the kernels off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torch_utils.ops.kernel_state import KernelError, KernelState, brief, complaint
from torch_utils.user_cache import user_cache

SWITCH = "GAN_CPU_KERNELS"
NAMESPACE = "gan_cpu"  # of the operators, torch.ops.gan_cpu
BUILD_SECONDS = 60.0
_SOURCES = Path(__file__).with_name("csrc")
_RETRY_SECONDS = 24 * 3600  # a build that failed is not tried at every start
# Comparisons become vector instructions only when the compiler may ignore floating-point exceptions. NaN stays NaN.
_FLAGS = ("-O3", "-fno-math-errno", "-fno-trapping-math")
_ABOUT = "about.json"
# Loading it right there shows in a process of its own that it can be loaded at all.
_BUILD = "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"


@dataclasses.dataclass
class CpuKernel:
    """One compiled source, and whether it is in use."""

    name: str
    source: str
    """file in csrc/"""
    check: Callable[[Any], str | None]
    """compares the operators with their reference; what is wrong, or None"""
    ops: Any = None
    """`torch.ops.gan_cpu` while the kernel is in use, otherwise None: the test that each call makes"""
    seconds: float = 0.0
    """what building it took, now or when it was cached"""
    cached: bool = False
    """it was built before"""
    reason: str = "kernels.prepare was not called"
    """why `ops` is None"""
    remedy: str | None = None
    """what to type, or to do about the reason, if something is known to help"""
    prepared: bool = False


kernels: dict[str, CpuKernel] = {}


def register(name: str, source: str, check: Callable[[Any], str | None]) -> CpuKernel:
    """Announce a kernel to `kernels.prepare`; done by the module of the operation that may use it."""
    kernels[name] = CpuKernel(name, source, check)
    return kernels[name]


def prepare(timeout: float = BUILD_SECONDS) -> None:
    """Build (once on a machine, in seconds), load and check the kernels. The first answer holds for the process."""
    for kernel in kernels.values():
        if not kernel.prepared:
            _prepare(kernel, timeout)


def unbuilt() -> list[str]:
    """The kernels that `prepare` would have to compile; this does not."""
    return [kernel.name for kernel in kernels.values() if not kernel.prepared and _is_unbuilt(kernel)]


def status() -> str:
    """Which kernels are in use, or why none: "CPU kernels: bias_act (built in 4.2 s)"."""
    used = [kernel for kernel in kernels.values() if kernel.ops is not None]
    if used:
        return f"CPU kernels: {', '.join(f'{k.name} ({_when(k)})' for k in used)}"
    reasons = dict.fromkeys(brief(kernel.reason, 100) for kernel in kernels.values())
    return f"CPU kernels: none, because {'; '.join(reasons) or 'no operation has one'}"


def _when(kernel: CpuKernel) -> str:
    return "built before" if kernel.cached else f"built in {kernel.seconds:.1f} s"


def states() -> list[KernelState]:
    """Every kernel, as it stands in this process."""
    return [_state(kernel) for kernel in kernels.values()]


def _state(kernel: CpuKernel) -> KernelState:
    if kernel.ops is None:
        return KernelState(kernel.name, "cpu", False, kernel.reason, kernel.seconds, kernel.cached, "", kernel.remedy)
    return KernelState(kernel.name, "cpu", True, "", kernel.seconds, kernel.cached, "now")


def cache_folder() -> Path:
    """Where built kernels are kept."""
    return user_cache("kernels")


def _prepare(kernel: CpuKernel, timeout: float) -> None:
    kernel.prepared = True
    try:
        _check_whether_wanted()
        library, kernel.seconds = _library(kernel, timeout)
        ops = _load(library, kernel.name)
        wrong = kernel.check(ops)
        if wrong:
            raise KernelError(f"results are wrong here ({wrong})")
        kernel.ops = ops
    except KernelError as error:
        kernel.reason, kernel.remedy = error.reason, error.remedy
    except Exception as error:  # whatever it is, PyTorch can do without, and the reason is printed
        kernel.reason = f"the library could not be loaded ({type(error).__name__}: {brief(str(error))})"


def _check_whether_wanted() -> None:
    if sys.platform == "win32":
        raise KernelError("they are not built on Windows")
    if os.environ.get(SWITCH, "").lower() in ("0", "false", "no", "off"):
        raise KernelError(f"{SWITCH}={os.environ[SWITCH]}", f"unset {SWITCH}")


def _is_unbuilt(kernel: CpuKernel) -> bool:
    try:
        _check_whether_wanted()
        folder, failure = _places(kernel)
        return _intact(folder) is None and not _is_recent(failure)
    except (KernelError, OSError, RuntimeError):  # `prepare` says why
        return False


def _places(kernel: CpuKernel) -> tuple[Path, Path]:
    """The folder of a kernel's library, and the note that it could not be built."""
    cache, name = cache_folder().absolute(), f"{kernel.name}-{_key(_SOURCES / kernel.source)}"
    return cache / name, cache / f"{name}.failed"


def _is_recent(failure: Path) -> bool:
    return failure.exists() and 0 <= time.time() - failure.stat().st_mtime < _RETRY_SECONDS


def _load(library: Path, name: str) -> Any:
    """The operators. Once in a process: registering them a second time, from another file, would end it."""
    ops = getattr(torch.ops, NAMESPACE)
    if not hasattr(ops, name):
        torch.ops.load_library(str(library))
    return ops


def _library(kernel: CpuKernel, timeout: float) -> tuple[Path, float]:
    """The library of a kernel, from the cache or built, and the seconds that building it took."""
    try:
        folder, failure = _places(kernel)
        about = _intact(folder)
        kernel.cached = about is not None
        if about is None:
            if _is_recent(failure):
                raise KernelError(f"{failure.read_text(encoding='utf-8')} (tried before)", f"delete {failure}")
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            about = _build(_SOURCES / kernel.source, folder, failure, timeout)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        remedy = "set XDG_CACHE_HOME to a folder that can be written to"
        raise KernelError(f"the cache cannot be used ({brief(str(error))})", remedy) from error
    return folder / about["library"], float(about["seconds"])


def _build(source: Path, folder: Path, failure: Path, timeout: float) -> dict[str, Any]:
    """Build a library into `folder`, which appears complete or not at all. Returns what is noted about it."""
    work = Path(tempfile.mkdtemp(prefix=".build-", dir=folder.parent))
    try:
        begin = time.monotonic()
        try:
            built = _compile(source, work, timeout)
        except KernelError as error:
            with contextlib.suppress(OSError):
                failure.write_text(str(error), encoding="utf-8")
            raise
        seconds = time.monotonic() - begin
        complete = work / "complete"
        complete.mkdir()
        library = complete / built.name
        shutil.copyfile(built, library)
        about = {"library": library.name, "sha256": _sha256(library), "seconds": round(seconds, 2)}
        (complete / _ABOUT).write_text(json.dumps(about), encoding="utf-8")
        return _publish(complete, folder, about)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _compile(source: Path, work: Path, timeout: float) -> Path:
    """Compile and load in another process, which is killed with all that it started when the time is over."""
    arguments = {
        "name": NAMESPACE,
        "sources": [str(source)],
        "extra_cflags": _flags(),
        "build_directory": str(work),
        "is_python_module": False,
        "with_cuda": False,
    }
    environment = {**os.environ, "PATH": search_path(), "MAX_JOBS": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", _BUILD, json.dumps(arguments)],
        cwd=work,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        raise KernelError(f"building {source.name} took longer than {timeout:g} s") from None
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    if process.returncode != 0:
        raise KernelError(f"building {source.name} failed: {complaint(output.decode(errors='replace'))}")
    libraries = [path for path in work.glob(f"{NAMESPACE}.*") if path.suffix in (".so", ".dylib")]
    if len(libraries) != 1:
        raise KernelError(f"building {source.name} left no library")
    return libraries[0]


def _publish(complete: Path, folder: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Give a complete folder its final name, unless another process was faster."""
    for _ in range(2):
        try:
            os.rename(complete, folder)  # fails if there is one that is not empty
            return about
        except OSError:
            theirs = _intact(folder)
            if theirs is not None:
                return theirs
        with contextlib.suppress(OSError):  # a damaged one
            os.rename(folder, complete.with_name("damaged"))
    raise OSError(f"{folder} cannot be written")


def _intact(folder: Path) -> dict[str, Any] | None:
    """What is noted about a cached library that is as it was built; loading half a file would kill the process."""
    try:
        about = json.loads((folder / _ABOUT).read_text(encoding="utf-8"))
        return about if _sha256(folder / about["library"]) == about["sha256"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(source: Path) -> str:
    """Of everything that the library depends on. The compiler is asked for its version."""
    compiler = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if shutil.which(compiler[0], path=search_path()) is None:
        remedy = (
            "xcode-select --install"
            if sys.platform == "darwin"
            else "sudo apt install g++, or the like; on a cluster: module load gcc"
        )
        raise KernelError(f"no C++ compiler ({compiler[0]}) was found", remedy)
    if shutil.which("ninja", path=search_path()) is None:
        raise KernelError("ninja was not found", "python -m pip install ninja")
    try:
        version = subprocess.run([*compiler, "--version"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise KernelError(f"the C++ compiler ({compiler[0]}) does not run ({brief(str(error))})") from error
    parts = [source.read_text(encoding="utf-8"), torch.__version__, str(torch.version.git_version)]
    parts += [*compiler, version, *_flags(), sys.platform, platform.machine(), _cpu_features()]
    parts += [os.environ.get(name, "") for name in ("CFLAGS", "CXXFLAGS", "LDFLAGS")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _flags() -> list[str]:
    if platform.machine().lower() in ("x86_64", "amd64", "i386", "i686"):
        return [*_FLAGS, "-march=native", "-mprefer-vector-width=512"]
    return [*_FLAGS, "-mcpu=native"]


def _cpu_features() -> str:
    """What tells processors apart whose programs the other cannot run: their flags, or else the machine's name."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
        lines = {line for line in file if line.startswith(("flags", "Features", "model name", "CPU part"))}
        if lines:
            return "".join(sorted(lines))
    return f"{platform.processor()} of {platform.node()}"


def search_path() -> str:
    """PATH with the folder of installed scripts, where pip puts ninja even if no environment was activated."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")])


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
