"""Every CUDA source compiled by nvcc, for the oldest GPUs that it knows and for those of this program's figures.

.ci/run compiles them for all the others too, and prints how many registers they take.
"""

import shutil

import pytest

from torch_utils.ops import cubins, nvcc
from torch_utils.ops.kernel_state import KernelError

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
SOURCES = sorted(path.name for path in cubins.SOURCES.glob("*.cu"))


@needs_nvcc
@pytest.mark.parametrize("arch", ["sm_75", "sm_90"])
@pytest.mark.parametrize("source", SOURCES)
def test_a_source_needs_no_memory_for_want_of_registers(source, arch):
    built = nvcc.build(source, arch)
    assert built.code.startswith(b"\x7fELF")
    assert 0 < built.registers < 256
    assert built.spills == 0


@needs_nvcc
def test_what_is_wrong_is_one_line(monkeypatch, tmp_path):
    (tmp_path / "broken.cu").write_text("__global__ void f() { nothing(); }\n")
    monkeypatch.setattr(cubins, "SOURCES", tmp_path)
    with pytest.raises(KernelError, match=r"^broken.cu does not compile: .*broken.cu\(1\): error: identifier"):
        nvcc.build("broken.cu", "sm_90")
    with pytest.raises(KernelError, match=r"^broken.cu does not compile: nvcc fatal .*Unsupported gpu arch"):
        nvcc.build("broken.cu", "sm_10")


def test_without_nvcc(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(KernelError, match=r"^nvcc, of the CUDA toolkit, was not found$"):
        nvcc.version()


def test_an_nvcc_that_does_not_run(monkeypatch, tmp_path):
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\necho something else\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(KernelError, match=r"^nvcc does not run \(something else\)$"):
        nvcc.version()


def test_an_nvcc_that_hangs(monkeypatch, tmp_path):
    tool = tmp_path / "nvcc"
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.setattr(nvcc, "_ANSWER_SECONDS", 0.1)
    with pytest.raises(KernelError, match=r"^nvcc does not run \(.* timed out after 0.1 seconds\)$"):
        nvcc.version()


@needs_nvcc
def test_what_it_compiles_for():
    assert {75, 90} <= set(nvcc.known())


def test_the_report_of_ptxas():
    log = """ptxas info    : Compiling entry function 'a' for 'sm_90'
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 14 registers, used 1 barriers, 32 bytes smem
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers"""
    assert cubins.usage(log) == (40, 16)
    assert cubins.usage("") == (0, 0)
