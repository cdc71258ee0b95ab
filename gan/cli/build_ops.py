"""The command that compiles the CUDA kernels ahead of time: `python -m gan build-ops`."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import click

from gan.cli.command import Command, Option, problems_of
from gan.errors import GanError, UsageError

if TYPE_CHECKING:
    from torch_utils.ops.cubins import Built

_COMPILERS = ("nvcc", "nvrtc")


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
    "--compiler", cls=Option, type=click.Choice(_COMPILERS), help="What compiles  [default: nvcc if it is here]"
)
@click.pass_context
def build_ops(ctx: click.Context, archs: tuple[str, ...] | None, compiler: str | None) -> None:
    """Compile the CUDA kernels now, for machines that have no compiler or images that are made elsewhere.

    Nobody needs this: training compiles them itself when it first runs, in a few seconds.

    \b
    python -m gan build-ops                            for the GPUs of this machine
    python -m gan build-ops --arch sm_80 --arch sm_90  for others
    """
    problems = list(problems_of(ctx))
    if problems:
        raise UsageError(problems)

    from torch_utils.ops import cubins, kernels, nvcc, nvrtc
    from torch_utils.ops.cuda_kernels import kernels as announced

    assert kernels.OPERATIONS  # it is their import that announces
    try:
        archs = tuple(dict.fromkeys(archs or _present()))
        for arch in archs:
            nvrtc.check_arch(arch)
    except kernels.KernelError as error:
        raise UsageError([f"--arch: {error}"]) from error
    build, which = (nvrtc.build, nvrtc.version) if _chosen(compiler) == "nvrtc" else (nvcc.build, nvcc.version)
    try:
        which()
    except kernels.KernelError as error:
        raise GanError(f"nothing can be compiled: {error}") from error
    failed = []
    wanted = [(kernel.source, arch) for arch in archs for kernel in announced.values()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (source, arch), future in [(pair, pool.submit(build, *pair)) for pair in wanted]:
            try:
                built = future.result()
            except kernels.KernelError as error:
                failed.append(f"{arch}: {error}")
                continue
            if cubins.keep(source, arch, built) is None:
                failed.append(f"{cubins.folder()}: cannot be written; set XDG_CACHE_HOME to a folder that can")
            click.echo(f"{source} for {arch}: {_described(built)}")
    if failed:
        raise GanError("\n".join(dict.fromkeys(failed)))
    click.echo(f"kept in {cubins.folder()}")


def _present() -> list[str]:
    """The architectures of the GPUs of this machine."""
    import torch

    from torch_utils.ops import nvrtc
    from torch_utils.ops.kernel_state import KernelError

    found = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if not found:
        raise KernelError("no CUDA device is here; name what to compile for, such as --arch sm_90")
    return [nvrtc.arch_of(torch.cuda.get_device_capability(index)) for index in found]


def _chosen(compiler: str | None) -> str:
    from torch_utils.ops import nvcc
    from torch_utils.ops.kernel_state import KernelError

    if compiler is None:
        try:
            nvcc.version()
        except KernelError:
            return "nvrtc"
    return compiler or "nvcc"


def _described(built: Built) -> str:
    spills = f"spills of {built.spills} bytes" if built.spills else "no spills"
    usage = f"{built.registers} registers at most, {spills}, " if built.registers else ""
    version = ".".join(map(str, built.version))
    return f"{usage}{len(built.code) / 1e3:.0f} kB in {built.seconds:.1f} s ({built.compiler} {version})"
