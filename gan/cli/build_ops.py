"""The command that compiles the CUDA kernels ahead of time: `python -m gan build-ops`."""

from __future__ import annotations

import os
import re
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from gan.cli.command import Command, Option, problems_of
from gan.errors import GanError, UsageError

if TYPE_CHECKING:
    import types

    from torch_utils.ops.cubins import Built
    from torch_utils.ops.kernel_state import KernelError

_COMPILERS = ("nvrtc", "nvcc")


@click.command("build-ops", cls=Command, context_settings={"max_content_width": 120})
@click.option(
    "--arch",
    "archs",
    cls=Option,
    multiple=True,
    metavar="sm_XX",
    help="Architecture, such as sm_90; any number of times  [default: those of the GPUs here]",
)
@click.option(
    "--compiler",
    cls=Option,
    type=click.Choice(_COMPILERS),
    help="What compiles: NVRTC comes with PyTorch for CUDA, nvcc with the CUDA toolkit  [default: nvrtc if it is here]",
)
@click.pass_context
def build_ops(ctx: click.Context, archs: tuple[str, ...] | None, compiler: str | None) -> None:
    """Compile the CUDA kernels now, for machines that have no compiler or images that are made elsewhere.

    Nobody needs this: training compiles them itself when it first runs, in a few seconds.

    \b
    python -m gan build-ops                            for the GPUs of this machine
    python -m gan build-ops --arch sm_80 --arch sm_90  for others
    """
    problems = [*problems_of(ctx), *(f"--arch {arch}: {_mistake(arch)}" for arch in archs or () if _mistake(arch))]
    if problems:
        raise UsageError(problems)

    from torch_utils.ops import cubins, kernels
    from torch_utils.ops.cuda_kernels import kernels as announced

    typed = archs is not None and len(archs) > 0
    try:
        archs = tuple(dict.fromkeys(archs or _present()))
        chosen = _chosen(compiler)
        _check_known(chosen, archs, "--arch " if typed else "")
        cubins.check_folder()
    except kernels.KernelError as error:
        raise GanError(error.in_full) from error
    wanted = [(kernel.source, arch) for arch in archs for kernel in announced.values()]
    failed: dict[str, list[str]] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = [(pair, pool.submit(_build, chosen, *pair)) for pair in wanted]
        try:
            for (source, arch), future in futures:
                try:
                    click.echo(f"{source} for {arch}: {_described(future.result())}")
                except kernels.KernelError as error:
                    failed.setdefault(_cause(error, chosen), []).append(f"{source} for {arch}")
        except BaseException:  # Ctrl-C: only what is being compiled is waited for
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if failed:
        raise GanError("\n".join(f"{', '.join(names)}: {cause}" for cause, names in failed.items()))
    click.echo(f"kept in {cubins.folder()}")
    if _is_newer(chosen):
        click.echo("this PyTorch's NVRTC is older, so it does not use them here; --compiler nvrtc makes what it uses")


def _mistake(arch: str) -> str | None:
    """What is wrong with an architecture as it was typed."""
    if re.fullmatch(r"(sm|compute)_\d{2,3}", arch):
        return None
    several = [part for part in re.split(r"[,;\s]+", arch) if part]
    if len(several) > 1:
        return f"is more than one; write {' '.join(f'--arch {_meant(part) or part}' for part in several)}"
    meant = _meant(arch)
    return f"is no architecture; write {meant}" if meant else "is no architecture; they are written sm_90"


def _meant(arch: str) -> str | None:
    """sm_90 for 9.0, 90, SM_90 or sm90."""
    found = re.fullmatch(r"(?:sm|compute)?[_-]?(\d{1,2})\.?(\d)a?", arch, re.IGNORECASE)
    return f"sm_{found[1]}{found[2]}" if found else None


def _present() -> list[str]:
    """The architectures of the GPUs of this machine."""
    import torch

    from torch_utils.ops import nvrtc

    found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not found:
        raise UsageError(["no CUDA device is here; name what to compile for, such as --arch sm_90"])
    return [nvrtc.arch_of(torch.cuda.get_device_capability(index)) for index in found]


def _module(compiler: str) -> types.ModuleType:
    from torch_utils.ops import nvcc, nvrtc

    return nvrtc if compiler == "nvrtc" else nvcc


def _other(compiler: str) -> str:
    return _COMPILERS[1 - _COMPILERS.index(compiler)]


def _works(compiler: str) -> bool:
    from torch_utils.ops.kernel_state import KernelError

    try:
        _module(compiler).version()
    except KernelError:
        return False
    return True


def _chosen(compiler: str | None) -> str:
    """The compiler that was asked for, or one that is here. Raises KernelError if it is not."""
    from torch_utils.ops.kernel_state import KernelError

    if compiler is None:
        compiler = "nvcc" if _works("nvcc") and not _works("nvrtc") else "nvrtc"
        _module(compiler).version()
        return compiler
    try:
        _module(compiler).version()
    except KernelError as error:
        other = f"--compiler {_other(compiler)} works here" if _works(_other(compiler)) else error.remedy
        raise KernelError(f"--compiler {compiler}: {error}", other) from error
    return compiler


def _check_known(compiler: str, archs: tuple[str, ...], option: str) -> None:
    """Raises UsageError for what the compiler does not know."""
    known = _module(compiler).known()
    unknown = [arch for arch in archs if int(arch.partition("_")[2]) not in known]
    if known and unknown:
        names = ", ".join(f"sm_{arch}" for arch in known)
        raise UsageError([f"{option}{arch}: {compiler} here compiles for {names}" for arch in unknown])


def _build(compiler: str, source: str, arch: str) -> Built:
    """Compile a source and keep it. Raises KernelError."""
    from torch_utils.ops import cubins

    built: Built = _module(compiler).build(source, arch)
    cubins.keep(source, arch, built)
    return built


def _cause(error: KernelError, compiler: str) -> str:
    """The error without the name of its source, and what to try."""
    _, _, complaint = error.reason.partition(" does not compile: ")
    if not complaint:
        return error.in_full
    return f"{complaint}; try --compiler {_other(compiler)}" if _works(_other(compiler)) else complaint


def _is_newer(compiler: str) -> bool:
    """Whether it is newer than NVRTC, which then takes nothing of it."""
    return compiler == "nvcc" and _works("nvrtc") and _module("nvcc").version() > _module("nvrtc").version()


def _described(built: Built) -> str:
    spills = f"spills of {built.spills} bytes" if built.spills else "no spills"
    usage = f"{built.registers} registers at most, {spills}, " if built.registers else ""
    return f"{usage}{len(built.code) / 1e3:.0f} kB in {built.seconds:.1f} s ({built.by})"
