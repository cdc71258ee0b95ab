"""CUDA sources compiled by NVRTC, the compiler library that PyTorch's CUDA wheels bring along.

It needs no toolkit, no host compiler and no GPU, takes tenths of a second a source, and any number of threads may use
it at once. `cuda.bindings`, NVIDIA's own Python binding, comes with the same wheels.
"""

from __future__ import annotations

import dataclasses
import re
import time
from typing import Any

from torch_utils.ops import cubins
from torch_utils.ops.cubins import Built, Version
from torch_utils.ops.kernel_state import KernelError, complaint, installing, said

COMPILER = "NVRTC"


def compiled(source: str, arch: str) -> Built:
    """csrc/`source`, compiled for an architecture such as sm_90; compute_90 gives PTX.

    Kept on disk. What nvcc made of the same source serves as well, unless its version is above NVRTC's: the driver
    need not know that. Without NVRTC whatever is there serves. Raises KernelError.
    """
    check_arch(arch)
    try:
        newest: Version | None = version()
    except KernelError:
        prebuilt = cubins.kept(source, arch, "nvcc", None) or cubins.kept(source, arch, COMPILER, None)
        if prebuilt is None:
            raise
        return prebuilt
    built = cubins.kept(source, arch, COMPILER, newest) or cubins.kept(source, arch, "nvcc", newest)
    if built is not None:
        return built
    built = build(source, arch)
    try:
        cubins.keep(source, arch, built)
    except KernelError as error:
        return dataclasses.replace(built, not_kept=error.reason)
    return built


def build(source: str, arch: str) -> Built:
    """Compile a source, whatever is kept. Raises KernelError."""
    newest, texts, begin = version(), cubins.texts(source), time.perf_counter()
    included = {name: text for name, text in texts.items() if name != source}
    options = [f"--gpu-architecture={arch}", *cubins.OPTIONS]
    if arch.startswith("sm_"):
        options.append("--ptxas-options=-v")  # registers and spills
    code, log = _compile(source, texts[source], included, options, ptx=arch.startswith("compute_"))
    return Built(code, COMPILER, newest, round(time.perf_counter() - begin, 3), *cubins.usage(log))


def version() -> Version:
    """(13, 0). Raises KernelError if NVRTC is not there."""
    major, minor = _call("nvrtcVersion")
    return major, minor


def known() -> list[int]:
    """The architectures that it compiles for: 75, 80, ... Raises KernelError."""
    (archs,) = _call("nvrtcGetSupportedArchs")
    return sorted(archs)


def arch_of(capability: tuple[int, int]) -> str:
    """What to compile for: sm_90; for a device that is newer than NVRTC knows, the newest compute_XX, PTX that the
    driver compiles. Raises KernelError for a device that NVRTC knows no longer.
    """
    device = 10 * capability[0] + capability[1]
    try:
        archs, name = known(), f"NVRTC {'.'.join(map(str, version()))}"
    except KernelError:  # there may be something prebuilt
        return f"sm_{device}"
    older = [arch for arch in archs if arch <= device]
    if not older:
        remedy = "install a PyTorch for an older CUDA: https://pytorch.org/get-started/locally"
        raise KernelError(f"{name} compiles for sm_{min(archs)} and up, not for sm_{device}", remedy)
    return f"sm_{device}" if device in archs else f"compute_{max(older)}"


def check_arch(arch: str) -> None:
    """Raises KernelError for what no compiler could know."""
    if not re.fullmatch(r"(sm|compute)_\d{2,3}", arch):
        raise KernelError(f"{arch} is no architecture; they are written sm_90")


def _compile(name: str, text: str, included: dict[str, str], options: list[str], ptx: bool) -> tuple[bytes, str]:
    """The code and the log."""
    headers = [header.encode() for header in included.values()]
    names = [header.encode() for header in included]
    (program,) = _call("nvrtcCreateProgram", text.encode(), name.encode(), len(headers), headers, names)
    try:
        try:
            _call("nvrtcCompileProgram", program, len(options), [option.encode() for option in options])
        except KernelError as error:
            raise KernelError(f"{name} does not compile: {complaint(_log(program) or str(error))}") from error
        log = _log(program)
        kind = "PTX" if ptx else "CUBIN"
        (size,) = _call(f"nvrtcGet{kind}Size", program)
        code = bytearray(size)
        _call(f"nvrtcGet{kind}", program, code)
        return bytes(code), log
    finally:
        _call("nvrtcDestroyProgram", program)


def _log(program: Any) -> str:
    (size,) = _call("nvrtcGetProgramLogSize", program)
    log = bytearray(size)
    _call("nvrtcGetProgramLog", program, log)
    return log.rstrip(b"\0").decode(errors="replace")


def _call(name: str, *args: Any) -> tuple[Any, ...]:
    """What a function of NVRTC returns behind its error code. Raises KernelError, also where there is no NVRTC."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise KernelError("cuda-bindings is not installed", installing()) from error
    try:
        result, *values = getattr(nvrtc, name)(*args)
    except RuntimeError as error:  # the binding loads the library when it is first called
        raise KernelError(f"NVRTC cannot be loaded ({said(error, 100)})", installing(again=True)) from error
    if result.value != 0:
        raise KernelError(f"NVRTC fails ({result.name})")
    return tuple(values)
