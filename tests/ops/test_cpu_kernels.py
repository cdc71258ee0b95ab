"""How compiled kernels come to be, and that whatever goes wrong leaves PyTorch's operations and a reason."""

import dataclasses
import os
import shutil
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import torch

from torch_utils.ops import bias_act, cpu_kernels, kernels

unix = pytest.mark.skipif(sys.platform == "win32", reason="kernels are not built on Windows")


@pytest.fixture
def kernel(monkeypatch, tmp_path):
    """A kernel that nobody has prepared, alone in the register, switched on, with an empty cache."""
    fresh = cpu_kernels.CpuKernel("bias_act", "bias_act_cpu.cpp", lambda ops: None)
    monkeypatch.setattr(cpu_kernels, "kernels", {"bias_act": fresh})
    monkeypatch.delenv(cpu_kernels.SWITCH, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return fresh


@pytest.fixture
def compiler(monkeypatch, kernel):
    """Stands for compiler and ninja, whether there are any or not: counts its calls and writes a file for a library."""
    calls = []

    def compile_(source, work, timeout):
        calls.append(work)
        library = work / "gan_cpu.so"
        library.write_bytes(b"library %d" % len(calls))
        return library

    monkeypatch.setattr(cpu_kernels, "_compile", compile_)
    monkeypatch.setattr(cpu_kernels, "_key", lambda source: "key")
    return calls


@pytest.fixture
def loaded(monkeypatch):
    """The libraries that would have been loaded."""
    paths = []
    monkeypatch.setattr(cpu_kernels, "_load", lambda library, name: paths.append(library) or torch.ops.gan_cpu)
    return paths


def again(kernel):
    """What the next process makes of it."""
    cpu_kernels.kernels["bias_act"] = dataclasses.replace(
        kernel, prepared=False, ops=None, reason="kernels.prepare was not called"
    )
    return kernels.prepare()


def test_nothing_happens_before_prepare(kernel, compiler):
    assert kernels.status() == "CPU kernels: none, because kernels.prepare was not called"
    assert bias_act.bias_act(torch.ones(2, 3), act="lrelu").shape == (2, 3)
    assert compiler == []


def test_a_gpu_needs_no_cpu_kernels(kernel, compiler):
    kernels.prepare("cuda")
    kernels.prepare(torch.device("mps"))
    assert (kernel.prepared, compiler) == (False, [])


@unix
def test_whether_it_is_built_is_known_without_building_it(kernel, compiler, loaded, monkeypatch):
    assert cpu_kernels.unbuilt() == ["bias_act"]
    assert not cpu_kernels.cache_folder().exists()
    with monkeypatch.context() as patch:
        patch.setenv(cpu_kernels.SWITCH, "0")
        assert cpu_kernels.unbuilt() == []
    kernels.prepare()
    assert len(compiler) == 1
    kernel.prepared = False  # as in the next process
    assert cpu_kernels.unbuilt() == []
    (about,) = cpu_kernels.cache_folder().glob("*/about.json")
    about.write_text("half a fi")
    assert cpu_kernels.unbuilt() == ["bias_act"]
    (cpu_kernels.cache_folder() / "bias_act-key.failed").write_text("it does not build")
    assert cpu_kernels.unbuilt() == []


@unix
def test_a_library_is_built_once(kernel, compiler, loaded):
    assert kernels.prepare() == "CPU kernels: bias_act (built in 0.0 s)"
    assert kernel.ops is torch.ops.gan_cpu
    assert kernels.prepare() == "CPU kernels: bias_act (built in 0.0 s)"
    assert again(kernel) == "CPU kernels: bias_act (built before)"
    assert [(state.in_use, state.cached, state.verified) for state in cpu_kernels.states()] == [(True, True, "now")]
    assert len(compiler) == 1
    assert loaded == [cpu_kernels.cache_folder() / "bias_act-key" / "gan_cpu.so"] * 2
    assert [path.name for path in cpu_kernels.cache_folder().iterdir()] == ["bias_act-key"]  # nothing else was left


@unix
@pytest.mark.parametrize("damage", ["truncated", "missing", "no note", "a note of something else"])
def test_a_damaged_library_is_built_anew_and_never_loaded(damage, kernel, compiler, loaded):
    kernels.prepare()
    folder = cpu_kernels.cache_folder() / "bias_act-key"
    if damage == "truncated":
        (folder / "gan_cpu.so").write_bytes(b"lib")
    elif damage == "missing":
        (folder / "gan_cpu.so").unlink()
    else:
        (folder / "about.json").write_text("" if damage == "no note" else "[]")
    assert again(kernel).startswith("CPU kernels: bias_act")
    assert len(compiler) == 2
    assert (folder / "gan_cpu.so").read_bytes() == b"library 2"
    assert again(kernel).startswith("CPU kernels: bias_act")
    assert len(compiler) == 2


@unix
def test_a_library_that_cannot_be_loaded_is_left(kernel, compiler, monkeypatch):
    monkeypatch.setattr(cpu_kernels, "_load", lambda library, name: torch.ops.load_library(str(library)))
    assert kernels.prepare().startswith("CPU kernels: none, because the library could not be loaded (OSError: ")
    assert kernel.ops is None


@unix
def test_wrong_results_are_found(kernel, compiler, loaded):
    kernel.check = lambda ops: "dx of lrelu in float32"
    reason = "CPU kernels: none, because results are wrong here (dx of lrelu in float32)"
    assert kernels.prepare() == reason
    assert kernel.ops is None


def test_the_check_finds_what_is_wrong(cpu_kernels):
    def broken(name, breaking):
        def call(*args):
            result = getattr(cpu_kernels, name).default(*args)
            return breaking(*result) if isinstance(result, tuple) else breaking(result)

        names = ("bias_act", "bias_act_grad")
        parts = {n: getattr(cpu_kernels, n) for n in names} | {name: types.SimpleNamespace(default=call)}
        return types.SimpleNamespace(**parts)

    assert bias_act._check_kernel(cpu_kernels) is None
    assert bias_act._check_kernel(broken("bias_act", lambda y: y * 1.01)) == "y of lrelu in float32"
    assert bias_act._check_kernel(broken("bias_act", lambda y: y.nan_to_num(0))) == "NaN and infinity"
    assert bias_act._check_kernel(broken("bias_act_grad", lambda dx, db: (dx * 1.01, db))) == "dx of lrelu in float32"
    assert bias_act._check_kernel(broken("bias_act_grad", lambda dx, db: (dx, db * torch.nan))).startswith(
        "db of lrelu"
    )


@unix
@pytest.mark.parametrize("damaged", [False, True])
def test_two_that_build_at_once_are_both_right(damaged, kernel, compiler, loaded, monkeypatch):
    if damaged:
        kernels.prepare()
        (cpu_kernels.cache_folder() / "bias_act-key" / "gan_cpu.so").write_bytes(b"lib")
    meeting, compile_, found = threading.Barrier(2, timeout=10), cpu_kernels._compile, []

    def together(*args):
        library = compile_(*args)
        meeting.wait()
        return library

    monkeypatch.setattr(cpu_kernels, "_compile", together)
    threads = [threading.Thread(target=lambda: found.append(cpu_kernels._library(kernel, 60))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folder = cpu_kernels.cache_folder() / "bias_act-key"
    assert [path for path, _ in found] == [folder / "gan_cpu.so"] * 2
    assert cpu_kernels._intact(folder)
    assert list(cpu_kernels.cache_folder().iterdir()) == [folder]


@pytest.mark.parametrize("value", ["0", "off", "False"])
def test_the_switch(value, kernel, compiler, monkeypatch):
    monkeypatch.setenv(cpu_kernels.SWITCH, value)
    assert kernels.prepare() == f"CPU kernels: none, because GAN_CPU_KERNELS={value}"
    assert compiler == []


def test_windows_is_left_to_pytorch(kernel, compiler, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    assert kernels.prepare() == "CPU kernels: none, because they are not built on Windows"


@unix
def test_a_missing_compiler(kernel, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler -v")
    assert kernels.prepare() == "CPU kernels: none, because no C++ compiler (no-such-compiler) was found"


@unix
def test_a_missing_ninja(kernel, monkeypatch, tmp_path):
    tool = tmp_path / "c++"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    monkeypatch.setattr(cpu_kernels, "search_path", lambda: str(tmp_path))
    assert kernels.prepare() == "CPU kernels: none, because ninja was not found"
    (state,) = cpu_kernels.states()
    assert (state.in_use, state.remedy) == (False, "python -m pip install ninja")


@unix
@pytest.mark.parametrize("what", ["file", "no home"])
def test_a_cache_that_cannot_be_used(what, kernel, compiler, monkeypatch, tmp_path):
    if what == "file":
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", staticmethod(lambda: (_ for _ in ()).throw(RuntimeError("no home"))))
    assert kernels.prepare().startswith("CPU kernels: none, because the cache cannot be used (")


@unix
def test_a_slow_build_is_stopped_with_all_that_it_started(kernel, monkeypatch, tmp_path):
    note = tmp_path / "pid"
    script = "import subprocess; p = subprocess.Popen(['sleep', '60']); "
    script += f"open({str(note)!r}, 'w').write(str(p.pid)); p.wait()"
    monkeypatch.setattr(cpu_kernels, "_BUILD", script)
    monkeypatch.setattr(cpu_kernels, "_key", lambda source: "key")
    begin = time.monotonic()
    reason = "CPU kernels: none, because building bias_act_cpu.cpp took longer than 1.5 s"
    assert kernels.prepare(timeout=1.5) == reason
    assert time.monotonic() - begin < 20
    assert not is_running(int(note.read_text()))
    # The next start does not wait for it again, until somebody wants it to, or a day has passed.
    failure = cpu_kernels.cache_folder() / "bias_act-key.failed"
    assert list(cpu_kernels.cache_folder().iterdir()) == [failure]
    assert again(kernel) == f"{reason} (tried before)"
    assert cpu_kernels.states()[0].remedy == f"delete {failure}"
    os.utime(failure, (0, 0))
    monkeypatch.setattr(
        cpu_kernels, "_BUILD", "print('lots'); print('x.cpp:1: error: no such thing'); raise SystemExit(1)"
    )
    assert again(kernel) == (
        "CPU kernels: none, because building bias_act_cpu.cpp failed: x.cpp:1: error: no such thing"
    )


def is_running(pid):
    for _ in range(50):  # a killed process is there until its new parent has looked
        try:
            state = Path(f"/proc/{pid}/stat").read_text().split()[2] if Path("/proc/self").exists() else None
            os.kill(pid, 0)
        except (ProcessLookupError, FileNotFoundError):
            return False
        if state == "Z":
            return False
        time.sleep(0.02)
    return True


@unix
def test_the_key_is_that_of_source_flags_and_compiler(kernel, monkeypatch, tmp_path):
    if shutil.which("c++") is None or shutil.which("ninja", path=cpu_kernels.search_path()) is None:
        pytest.skip("no C++ compiler or no ninja")
    source = tmp_path / "a.cpp"
    source.write_text("int a;")
    keys = {cpu_kernels._key(source), cpu_kernels._key(source)}
    assert len(keys) == 1
    for name, value in (("_flags", ["-O2"]), ("_cpu_features", "flags: another")):
        with monkeypatch.context() as patch:
            patch.setattr(cpu_kernels, name, lambda value=value: value)
            keys.add(cpu_kernels._key(source))
    source.write_text("int b;")
    keys.add(cpu_kernels._key(source))
    assert len(keys) == 4


def test_operators_are_registered_once(built_kernel, tmp_path):
    assert cpu_kernels._load(tmp_path / "another.so", "bias_act") is built_kernel.ops


def test_without_kernels_for_a_while(cpu_kernels):
    with kernels.disabled():
        assert bias_act._kernel.ops is None
    assert bias_act._kernel.ops is cpu_kernels


def test_what_was_built_is_kept_where_it_belongs(built_kernel):
    assert built_kernel.seconds > 0
    assert built_kernel.prepared
