"""`gan build-ops`: what it compiles, with what, and what it says."""

import os
import threading

import click
import pytest
import torch
from click.testing import CliRunner

from gan.cli import main
from torch_utils.ops import cubins, cuda_kernels, nvcc, nvrtc
from torch_utils.ops.cubins import Built
from torch_utils.ops.kernel_state import KernelError


@pytest.fixture
def compilers(monkeypatch, tmp_path):
    """Two kernels, and compilers that note what they are asked for."""
    calls = []
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cuda_kernels, "kernels", {})
    for name in ("bias_act", "upfirdn2d"):
        cuda_kernels.register(name, f"{name}.cu", lambda device: None)
    for module in (nvcc, nvrtc):

        def build(source, arch, compiler=module.COMPILER):
            calls.append((compiler, source, arch))
            return Built(b"code", compiler, (13, 0), 1.5, 40, 8 * (source == "upfirdn2d.cu"))

        monkeypatch.setattr(module, "build", build)
        monkeypatch.setattr(module, "version", lambda: (13, 0))
        monkeypatch.setattr(module, "known", lambda: [80, 90])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return calls


def missing():
    raise KernelError("it is not here", "pip install it")


def build_ops(*args):
    return CliRunner().invoke(main, ["build-ops", *args])


def test_every_kernel_is_compiled_for_every_architecture(compilers):
    result = build_ops("--arch", "sm_80", "--arch", "sm_90", "--arch", "sm_80")
    assert result.exit_code == 0, result.output
    pairs = [(source, arch) for arch in ("sm_80", "sm_90") for source in ("bias_act.cu", "upfirdn2d.cu")]
    assert sorted(compilers) == sorted(("NVRTC", *pair) for pair in pairs)
    lines = result.stdout.splitlines()
    assert lines[0] == "bias_act.cu for sm_80: 40 registers at most, no spills, 0 kB in 1.5 s (NVRTC 13.0)"
    assert lines[3].startswith("upfirdn2d.cu for sm_90: 40 registers at most, spills of 8 bytes, ")
    assert lines[4:] == [f"kept in {cubins.folder()}"]
    for source, arch in pairs:
        kept = nvrtc.compiled(source, arch)
        assert (kept.cached, kept.compiler) == (True, "NVRTC")


def test_nvcc_compiles_where_there_is_no_nvrtc(compilers, monkeypatch):
    monkeypatch.setattr(nvrtc, "version", missing)
    assert build_ops("--arch", "sm_90").exit_code == 0
    assert {compiler for compiler, *_ in compilers} == {"nvcc"}
    monkeypatch.setattr(nvcc, "version", missing)
    result = build_ops("--arch", "sm_90")
    assert (result.exit_code, result.stderr) == (1, "error: it is not here; pip install it\n")


def test_a_compiler_that_was_asked_for(compilers, monkeypatch):
    assert build_ops("--arch", "sm_90", "--compiler", "nvcc").exit_code == 0
    assert {compiler for compiler, *_ in compilers} == {"nvcc"}
    monkeypatch.setattr(nvcc, "version", missing)
    result = build_ops("--arch", "sm_90", "--compiler", "nvcc")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: --compiler nvcc: it is not here; --compiler nvrtc works here\n"
    monkeypatch.setattr(nvrtc, "version", missing)
    result = build_ops("--arch", "sm_90", "--compiler", "nvcc")
    assert result.stderr == "error: --compiler nvcc: it is not here; pip install it\n"


def test_what_will_not_be_used_is_said(compilers, monkeypatch):
    said = "NVRTC is older, so it does not use them here"
    assert said not in build_ops("--arch", "sm_90", "--compiler", "nvcc").output
    monkeypatch.setattr(nvcc, "version", lambda: (13, 1))
    assert said in build_ops("--arch", "sm_90", "--compiler", "nvcc").output
    assert said not in build_ops("--arch", "sm_90").output
    monkeypatch.setattr(nvrtc, "version", missing)
    assert said not in build_ops("--arch", "sm_90", "--compiler", "nvcc").output


def test_what_was_interrupted_stops_and_keeps_what_is_finished(compilers, monkeypatch):
    """One worker, which is at its second source of four when Ctrl-C is pressed."""
    build, echo, entered, go_on = nvrtc.build, click.echo, threading.Event(), threading.Event()

    def slow(source, arch):
        if compilers:
            entered.set()
            go_on.wait(30)
        return build(source, arch)

    def interrupt(text, **kwargs):
        if "bias_act.cu for sm_80" in text:
            assert entered.wait(30)
            threading.Timer(0.05, go_on.set).start()
            raise KeyboardInterrupt
        echo(text, **kwargs)

    monkeypatch.setattr(nvrtc, "build", slow)
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(click, "echo", interrupt)
    result = build_ops("--arch", "sm_80", "--arch", "sm_90")
    assert (result.exit_code, result.stderr) == (130, "interrupted\n")
    assert [arch for _, _, arch in compilers] == ["sm_80", "sm_80"]
    assert [nvrtc.compiled(source, "sm_80").cached for source in ("bias_act.cu", "upfirdn2d.cu")] == [True, True]


def test_the_gpus_here_are_what_is_compiled_for(compilers, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(8, 0), (9, 0), (8, 0)][index])
    monkeypatch.setattr(nvrtc, "arch_of", lambda capability: "sm_{}{}".format(*capability))
    assert build_ops().exit_code == 0
    assert {arch for *_, arch in compilers} == {"sm_80", "sm_90"}
    assert len(compilers) == 4


@pytest.mark.parametrize(
    ("args", "problem"),
    [
        ([], "no CUDA device is here; name what to compile for, such as --arch sm_90"),
        (["--arch", "hopper"], "--arch hopper: is no architecture; they are written sm_90"),
        (["--arch", "9.0"], "--arch 9.0: is no architecture; write sm_90"),
        (["--arch", "SM120"], "--arch SM120: is no architecture; write sm_120"),
        (["--arch", "sm_80,sm_90"], "--arch sm_80,sm_90: is more than one; write --arch sm_80 --arch sm_90"),
        (["--arch", "80 90"], "--arch 80 90: is more than one; write --arch sm_80 --arch sm_90"),
        (["--arch", "sm_75"], "--arch sm_75: nvrtc here compiles for sm_80, sm_90"),
        (["--archs", "sm_90"], "--archs: no such option; did you mean --arch?"),
        (["--arch", "sm_90", "--compiler", "gcc"], "--compiler gcc: 'gcc' is not one of 'nvrtc', 'nvcc'."),
    ],
)
def test_what_is_wrong_with_the_command_line_is_said(args, problem, compilers):
    result = build_ops(*args)
    assert (result.exit_code, result.stdout) == (2, "")
    assert problem.removeprefix("--compiler gcc: 'gcc' ") in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert compilers == []


def test_what_does_not_compile_does_not_stop_the_rest(compilers, monkeypatch):
    build = nvcc.build

    def fails(source, arch):
        if source == "bias_act.cu":
            raise KernelError("bias_act.cu does not compile: x")
        return build(source, arch)

    monkeypatch.setattr(nvcc, "build", fails)
    result = build_ops("--arch", "sm_90", "--compiler", "nvcc")
    expected = "error: bias_act.cu for sm_90: x; try --compiler nvrtc\n"
    assert (result.exit_code, result.stderr) == (1, expected)
    assert result.stdout.startswith("upfirdn2d.cu for sm_90: ")


def test_a_cause_is_said_once(compilers, monkeypatch):
    def fails(source, arch):
        raise KernelError(f"{source} does not compile: no host compiler")

    monkeypatch.setattr(nvrtc, "version", missing)
    monkeypatch.setattr(nvcc, "build", fails)
    result = build_ops("--arch", "sm_90")
    expected = "error: bias_act.cu for sm_90, upfirdn2d.cu for sm_90: no host compiler\n"
    assert (result.exit_code, result.stderr) == (1, expected)


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_compiled(compilers, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = build_ops("--arch", "sm_90")
    folder = cubins.folder()
    expected = f"error: {folder} cannot be written (Not a directory); set XDG_CACHE_HOME to a folder that can\n"
    assert (result.exit_code, result.stderr) == (1, expected)
    assert compilers == []


def test_a_disk_that_fills_up(compilers, monkeypatch):
    def full(name, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cubins, "check_folder", lambda: None)
    monkeypatch.setattr(cubins, "_write", full)
    result = build_ops("--arch", "sm_90")
    (line,) = result.stderr.splitlines()
    assert line.endswith(" cannot be written (No space left on device); set XDG_CACHE_HOME to a folder that can")
    assert result.exit_code == 1
