"""CUDA sources compiled by NVRTC, and kept: by any number of processes, whatever happens to them or to the disk."""

import dataclasses
import importlib.util
import multiprocessing
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fake_cuda
import pytest

from torch_utils.ops import cubins, cuda_kernels, nvrtc
from torch_utils.ops.cubins import Built
from torch_utils.ops.kernel_state import KernelError


def has_nvrtc():
    try:
        return bool(nvrtc.version())
    except KernelError:
        return False


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC: the extra cuda")
REAL = cubins.SOURCES


@pytest.fixture
def sources(monkeypatch, tmp_path):
    """A folder with one small source, and an empty cache."""
    folder = tmp_path / "csrc"
    folder.mkdir()
    fake_cuda.write_source(folder)
    monkeypatch.setattr(cubins, "SOURCES", folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return folder


@pytest.fixture
def compiler(monkeypatch, sources):
    """Stands for NVRTC 13.0 and counts its calls."""
    calls = []

    def build(source, arch):
        calls.append(f"{source} {arch}")
        return Built(b"code %d" % len(calls), "NVRTC", nvrtc.version(), 0.5, 32, 0)

    monkeypatch.setattr(nvrtc, "version", lambda: (13, 0))
    monkeypatch.setattr(nvrtc, "build", build)
    return calls


@pytest.fixture
def no_nvrtc(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)


def files():
    return sorted(path.name for path in cubins.folder().iterdir())


@needs_nvrtc
def test_a_source_compiles_for_what_exists_and_what_is_to_come(sources):
    cubin, ptx = nvrtc.compiled("scale.cu", "sm_90"), nvrtc.compiled("scale.cu", "compute_90")
    assert cubin.code.startswith(b"\x7fELF")
    assert b".entry scale_f32(" in ptx.code
    assert ptx.code.endswith(b"\0")  # as the driver wants it
    assert (cubin.spills, cubin.compiler, cubin.cached) == (0, "NVRTC", False)
    assert 4 < cubin.registers < 64
    again = nvrtc.compiled("scale.cu", "sm_90")
    assert again == dataclasses.replace(cubin, cached=True)
    assert again.digest == cubin.digest != ptx.digest


@needs_nvrtc
def test_every_source_compiles():
    """To PTX, which says all that NVRTC has to say; test_nvcc.py has them assembled."""
    sources = sorted(path.name for path in REAL.glob("*.cu"))
    with ThreadPoolExecutor(len(sources)) as pool:
        built = dict(zip(sources, pool.map(lambda source: nvrtc.build(source, "compute_90"), sources), strict=True))
    assert sources == sorted(kernel.source for kernel in cuda_kernels.kernels.values())
    for kernel in built.values():
        assert kernel.code.count(b".entry ") >= len(cuda_kernels.SUFFIXES)


@needs_nvrtc
def test_what_is_wrong_with_a_source_is_one_line(sources):
    (sources / "scale.cu").write_text('#include "common.cuh"\n__device__ int f() { return nothing; }\n')
    with pytest.raises(KernelError, match=r'^scale.cu does not compile: scale.cu\(2\): error: identifier "nothing" is'):
        nvrtc.compiled("scale.cu", "sm_90")
    with pytest.raises(KernelError, match=r"^scale.cu does not compile: nvrtc: error: invalid value for --gpu-arch"):
        nvrtc.compiled("scale.cu", "sm_10")


@needs_nvrtc
def test_architectures_of_devices():
    assert [nvrtc.arch_of(pair) for pair in ((7, 5), (8, 6), (9, 0))] == ["sm_75", "sm_86", "sm_90"]
    newest = nvrtc.arch_of((99, 0))
    assert newest.startswith("compute_")
    assert nvrtc.arch_of((int(newest[8:-1]), int(newest[-1]))) == newest.replace("compute", "sm")
    with pytest.raises(KernelError, match=r"^NVRTC \d+\.\d+ compiles for sm_\d+ and up, not for sm_20$") as raised:
        nvrtc.arch_of((2, 0))
    assert raised.value.remedy == "install a PyTorch for an older CUDA: https://pytorch.org/get-started/locally"


@pytest.mark.parametrize("arch", ["90", "sm_9", "sm_90a -G", "SM_90", ""])
def test_what_is_no_architecture(arch):
    with pytest.raises(KernelError, match="is no architecture; they are written sm_90"):
        nvrtc.compiled("scale.cu", arch)


def test_a_missing_binding_has_a_remedy(sources, no_nvrtc):
    with pytest.raises(KernelError, match=r"^cuda-bindings is not installed$") as raised:
        nvrtc.compiled("scale.cu", "sm_90")
    assert raised.value.remedy.startswith('python -m pip install "cuda-bindings~=')
    assert nvrtc.arch_of((9, 0)) == "sm_90"


def test_a_missing_library_has_a_remedy(sources, monkeypatch):
    binding = pytest.importorskip("cuda.bindings.nvrtc")

    def missing():
        raise RuntimeError("Failed to find libnvrtc.so\nin many places")

    monkeypatch.setattr(binding, "nvrtcVersion", missing)
    with pytest.raises(KernelError, match=r"^NVRTC cannot be loaded \(Failed to find .* in many places\)$") as raised:
        nvrtc.compiled("scale.cu", "sm_90")
    assert raised.value.remedy.startswith("python -m pip install --force-reinstall ")


def test_a_missing_source_is_named(sources, compiler):
    (sources / "common.cuh").unlink()
    with pytest.raises(KernelError, match=r"^csrc/common.cuh cannot be read \(No such file .*\); install the program"):
        nvrtc.compiled("scale.cu", "sm_90")


def test_a_source_is_compiled_once_until_something_changes(sources, compiler, monkeypatch):
    def again(arch="sm_90"):
        before = len(compiler)
        assert nvrtc.compiled("scale.cu", arch).cached == (len(compiler) == before)
        return len(compiler) - before

    assert [again(), again()] == [1, 0]
    assert [again("sm_80"), again("sm_80"), again()] == [1, 0, 0]
    with open(sources / "common.cuh", "a") as file:
        file.write("\n")
    assert [again(), again()] == [1, 0]
    with open(sources / "scale.cu", "a") as file:
        file.write("\n")
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(cubins, "OPTIONS", ("-std=c++20",))
    assert [again(), again()] == [1, 0]
    monkeypatch.setattr(nvrtc, "version", lambda: (13, 1))
    assert again() == 0  # what an older one made will do
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 9))
    assert [again(), again()] == [1, 0]


@pytest.mark.parametrize("damage", ["cut", "empty", "another's", "no note", "not a file"])
def test_a_damaged_file_is_made_anew(damage, sources, compiler):
    nvrtc.compiled("scale.cu", "sm_90")
    (path,) = cubins.folder().iterdir()
    content = path.read_bytes()
    damaged = {"cut": content[:-1], "empty": b"", "another's": content + b"x", "no note": b"[]\n" + content}
    path.unlink()
    if damage == "not a file":
        path.mkdir()
    else:
        path.write_bytes(damaged[damage])
    assert not nvrtc.compiled("scale.cu", "sm_90").cached
    if damage != "not a file":
        assert nvrtc.compiled("scale.cu", "sm_90").cached
        assert files() == [path.name]


@pytest.mark.parametrize("what", ["a file", "read-only", "no home"])
def test_without_a_cache_everything_is_compiled(what, sources, compiler, monkeypatch, tmp_path):
    if what == "a file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    elif what == "read-only":
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(PermissionError(13, "denied")))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", staticmethod(lambda: (_ for _ in ()).throw(RuntimeError("no home"))))
    found = [nvrtc.compiled("scale.cu", "sm_90") for _ in range(2)]
    assert [built.cached for built in found] == [False, False]
    why = {
        "a file": "cannot be written (Not a",
        "read-only": "cannot be written (denied",
        "no home": "there is no home",
    }
    assert why[what] in found[0].not_kept
    if what == "read-only":
        assert files() == []


def test_what_nvcc_made_serves_without_nvrtc(sources, no_nvrtc):
    for version in ((12, 8), (13, 0)):
        cubins.keep("scale.cu", "sm_90", Built(b"code %d" % version[1], "nvcc", version, 2.0, 20, 0))
    found = nvrtc.compiled("scale.cu", "sm_90")
    assert (found.code, found.compiler, found.version, found.cached) == (b"code 0", "nvcc", (13, 0), True)
    assert found.by == "nvcc 13.0"
    cubins.keep("scale.cu", "sm_86", Built(b"by NVRTC", "NVRTC", (13, 1), 2.0, 20, 0))
    assert nvrtc.compiled("scale.cu", "sm_86").code == b"by NVRTC"
    with pytest.raises(KernelError, match="is not installed"):
        nvrtc.compiled("scale.cu", "sm_80")


def test_what_nvcc_made_serves_if_it_is_not_newer_than_nvrtc(compiler):
    cubins.keep("scale.cu", "sm_90", Built(b"newer", "nvcc", (13, 1), 2.0, 20, 0))
    assert nvrtc.compiled("scale.cu", "sm_90").code == b"code 1"
    cubins.keep("scale.cu", "sm_80", Built(b"older", "nvcc", (12, 9), 2.0, 20, 0))
    assert nvrtc.compiled("scale.cu", "sm_80").code == b"older"


def test_what_killed_processes_left_is_removed(sources, compiler):
    cubins.folder().mkdir(parents=True)
    old, young = cubins.folder() / ".old.cubin.1.tmp", cubins.folder() / ".young.cubin.2.tmp"
    old.touch()
    young.touch()  # somebody may be writing it
    long_ago = time.time() - 2 * cubins._LEFTOVER_SECONDS
    os.utime(old, (long_ago, long_ago))
    nvrtc.compiled("scale.cu", "sm_90")
    assert [name for name in files() if name.endswith(".tmp")] == [young.name]


def _keep_for_ever(code):
    while True:
        cubins.keep("scale.cu", "sm_90", Built(code, "NVRTC", (13, 0), 0.5, 32, 0))


def test_processes_that_write_and_are_killed_leave_nothing_that_is_wrong(sources):
    """Two write without end and are killed; what is read meanwhile and afterwards is one of theirs, whole."""
    if "fork" not in multiprocessing.get_all_start_methods():
        pytest.skip("needs fork")
    codes = [letter * 100_000 for letter in (b"a", b"b")]
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_keep_for_ever, args=(code,)) for code in codes]
    for writer in writers:
        writer.start()
    seen = set()
    deadline = time.monotonic() + 20
    while len(seen) < 2 and time.monotonic() < deadline:
        built = cubins.kept("scale.cu", "sm_90", "NVRTC", (13, 0))
        if built is not None:
            seen.add(built.code)
    for writer in writers:
        writer.kill()
        writer.join()
    assert seen == set(codes)
    left = cubins.kept("scale.cu", "sm_90", "NVRTC", (13, 0))
    assert left is not None
    assert left.code in codes


def test_the_sources_are_part_of_the_package():
    """What pyproject.toml has setuptools install."""
    text = (REAL.parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    for pattern in {f"csrc/*{path.suffix}" for path in REAL.iterdir()}:
        assert f'"{pattern}"' in text
    assert importlib.util.find_spec("torch_utils") is not None
