"""`gan build-ops`: what it compiles, with what, and what it says."""

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
    return calls


def missing():
    raise KernelError("it is not here; pip install it")


def build_ops(*args):
    return CliRunner().invoke(main, ["build-ops", *args])


def test_every_kernel_is_compiled_for_every_architecture(compilers):
    result = build_ops("--arch", "sm_80", "--arch", "sm_90", "--arch", "sm_80")
    assert result.exit_code == 0, result.output
    pairs = [(source, arch) for arch in ("sm_80", "sm_90") for source in ("bias_act.cu", "upfirdn2d.cu")]
    assert sorted(compilers) == sorted(("nvcc", *pair) for pair in pairs)
    lines = result.stdout.splitlines()
    assert lines[0] == "bias_act.cu for sm_80: 40 registers at most, no spills, 0 kB in 1.5 s (nvcc 13.0)"
    assert lines[3].startswith("upfirdn2d.cu for sm_90: 40 registers at most, spills of 8 bytes, ")
    assert lines[4:] == [f"kept in {cubins.folder()}"]
    for source, arch in pairs:
        kept = nvrtc.cubin(source, arch)
        assert (kept.cached, kept.compiler) == (True, "nvcc")


def test_nvrtc_compiles_where_there_is_no_nvcc(compilers, monkeypatch):
    monkeypatch.setattr(nvcc, "version", missing)
    assert build_ops("--arch", "sm_90").exit_code == 0
    assert {compiler for compiler, *_ in compilers} == {"NVRTC"}


def test_a_compiler_that_was_asked_for(compilers, monkeypatch):
    assert build_ops("--arch", "sm_90", "--compiler", "nvrtc").exit_code == 0
    assert {compiler for compiler, *_ in compilers} == {"NVRTC"}
    monkeypatch.setattr(nvcc, "version", missing)
    result = build_ops("--arch", "sm_90", "--compiler", "nvcc")
    assert (result.exit_code, result.stderr) == (1, "error: nothing can be compiled: it is not here; pip install it\n")


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
        ([], "--arch: no CUDA device is here; name what to compile for, such as --arch sm_90"),
        (["--arch", "hopper"], "--arch: hopper is no architecture; they are written sm_90"),
        (["--archs", "sm_90"], "--archs: no such option; did you mean --arch?"),
        (["--arch", "sm_90", "--compiler", "gcc"], "--compiler gcc: 'gcc' is not one of 'nvcc', 'nvrtc'."),
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
    result = build_ops("--arch", "sm_90")
    assert (result.exit_code, result.stderr) == (1, "error: sm_90: bias_act.cu does not compile: x\n")
    assert result.stdout.startswith("upfirdn2d.cu for sm_90: ")


def test_a_cache_that_cannot_be_written(compilers, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    result = build_ops("--arch", "sm_90")
    expected = f"error: {cubins.folder()}: cannot be written; set XDG_CACHE_HOME to a folder that can\n"
    assert (result.exit_code, result.stderr) == (1, expected)
