from __future__ import annotations

import contextlib
import http.server
import json
import os
import socket
import sqlite3
import sys
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import write_dataset

import gan.augment
import gan.networks  # noqa: F401  all operations that have kernels
from gan import files, memory
from gan.doctor import computing, nvidia, speed, surroundings
from gan.doctor.computing import Computing
from gan.doctor.examine import examine
from gan.doctor.facts import Fact, Report, examined, unset
from gan.doctor.nvidia import Nvidia
from gan.metric_names import INCEPTION, VGG
from torch_utils.ops import cpu_kernels as compiled
from torch_utils.ops import cuda_kernels, kernels
from torch_utils.ops.kernel_state import KernelError, KernelState, installing

CPU = torch.device("cpu")
CU126 = "python -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/cu126"
CU130 = CU126.replace("cu126", "cu130")
DRIVERS = "(https://www.nvidia.com/drivers; on a cluster ask its administrators)"
NEWER = f"install a driver from 580 on {DRIVERS}"
AMPERE = Nvidia(("NVIDIA GeForce RTX 3090",), "580.65.06", (8, 6))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there is no constraints.txt, and nothing that another test left in the environment."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)


def only(facts: Iterator[Fact]) -> Fact:
    (fact,) = facts
    return fact


class TestFacts:
    def test_what_hangs_is_left_behind_with_what_it_had_found(self) -> None:
        forever = threading.Event()

        def hang() -> Iterator[Fact]:
            yield Fact("GPU", "a card")
            forever.wait()

        assert examined("GPU", 0.05, hang) == [
            Fact("GPU", "a card"),
            Fact("GPU", "no answer in 0.05 s; the rest was left out", good=False),
        ]
        forever.set()

    def test_what_fails_is_a_fact_to_be_reported(self) -> None:
        def fail() -> Iterator[Fact]:
            yield Fact("Disk", "one")
            raise ZeroDivisionError("by\nzero")

        first, second = examined("Disk", 5, fail)
        assert first == Fact("Disk", "one")
        assert second.text.startswith("could not be examined (ZeroDivisionError: by zero, test_doctor.py line ")
        assert second.remedy is not None
        assert second.remedy.startswith("report this")

    def test_what_fails_for_want_of_a_package_is_no_fault_of_the_program(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "numpy", None)

        def fail() -> Iterator[Fact]:
            import numpy as np

            yield Fact("Disk", np.__version__)

        assert examined("Disk", 5, fail) == [Fact("Disk", "not examined, for want of numpy", good=False)]

    def test_lines_are_aligned_and_commands_stay_whole(self) -> None:
        command = f"python -m pip install {'x' * 120}"
        report = Report([Fact("GPU", "word " * 30, command), Fact("GPU", "more"), Fact("Disk", "a\x1b[31m")])
        lines = report.lines()
        assert [line[:11].strip() for line in lines] == ["GPU:", "", "", "", "", "Disk:", "Next:", ""]
        assert all(len(line) <= 80 and line[10] == " " for line in lines if "pip" not in line)
        assert lines[3] == f"{'':11}-> {command}"
        assert lines[5] == "Disk:      a?[31m"
        assert lines[6:] == [
            'Next:      training runs; "->" makes it better, then python -m gan doctor again.',
            "           To go on: python -m gan demo",
        ]

    @pytest.mark.parametrize(
        ("facts", "can_train", "next_step"),
        [
            ([Fact("GPU", "none")], True, "all is well: python -m gan demo, or python train.py --data DATASET"),
            (
                [Fact("GPU", "fine"), Fact("Kernels", "warp: wrong results", good=False)],
                True,
                "training runs, but not everything is as it should be: see above. To go on: python -m gan demo",
            ),
            (
                [Fact("GPU", "idle", "reboot"), Fact("Disk", "full", "free some"), Fact("Disk", "x", good=False)],
                True,
                'training runs; "->" makes it better, then python -m gan doctor again. To go on: python -m gan demo',
            ),
            (
                [Fact("GPU", "idle", "reboot"), Fact("PyTorch", "none", "install", fatal=True)],
                False,
                'training cannot run yet: do what stands behind "->", then python -m gan doctor again',
            ),
        ],
    )
    def test_the_last_line_says_what_to_do(self, facts: list[Fact], can_train: bool, next_step: str) -> None:
        report = Report(facts)
        assert report.can_train is can_train
        assert " ".join(" ".join(report.lines()).split()).endswith(f" Next: {next_step}")
        printed = json.loads(json.dumps(report.to_dict()))
        assert printed["next"] == next_step
        assert all(fact["good"] for fact in printed["facts"]) is next_step.startswith("all is well")


@pytest.fixture
def no_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine without a trace of NVIDIA, in a folder."""
    for name in ("proc", "cards", "pci", "bin"):
        (tmp_path / name).mkdir()
    monkeypatch.setattr(nvidia, "_DRIVER_NOTE", tmp_path / "proc/version")
    monkeypatch.setattr(nvidia, "_DRIVER_CARDS", tmp_path / "cards")
    monkeypatch.setattr(nvidia, "_DEVICE_NODE", tmp_path / "nvidiactl")
    monkeypatch.setattr(nvidia, "_PCI", tmp_path / "pci")
    monkeypatch.setattr(nvidia, "_CONTAINERS", (tmp_path / ".dockerenv",))
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}/bin")
    return tmp_path


def add_nvidia_smi(machine: Path, script: str) -> None:
    program = machine / "bin/nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


def add_driver(machine: Path) -> None:
    (machine / "proc/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35.03  Fri Aug 16 21:39:15 UTC 2024\nGCC version: 13.2.0\n"
    )
    card = machine / "cards/0000:01:00.0"
    card.mkdir()
    (card / "information").write_text("Model: \t\t NVIDIA GeForce RTX 3090\nIRQ:   \t\t 16\n")


@pytest.mark.skipif(os.name != "posix", reason="scripts stand in for nvidia-smi")
class TestWhatTheSystemSays:
    def test_nothing(self, no_card: Path) -> None:
        assert nvidia.find() is None
        fact = nvidia.unused(None, None, "", None)
        assert (fact.text, fact.remedy) == ("no NVIDIA GPU or driver was found on this machine", None)

    def test_nvidia_smi_is_believed(self, no_card: Path) -> None:
        add_nvidia_smi(no_card, "echo 'NVIDIA H200, 580.65.06, 9.0'; echo 'NVIDIA H200, 580.65.06, 9.0'")
        found = nvidia.find()
        assert found == Nvidia(("NVIDIA H200", "NVIDIA H200"), "580.65.06", (9, 0))
        assert found.named == "NVIDIA H200 and 1 more, driver 580.65.06"

    def test_the_driver_is_asked_where_nvidia_smi_is_not(self, no_card: Path) -> None:
        add_driver(no_card)
        (no_card / "nvidiactl").touch()
        assert nvidia.find() == Nvidia(("NVIDIA GeForce RTX 3090",), "560.35.03", None)

    def test_a_driver_that_was_updated_in_use(self, no_card: Path) -> None:
        add_driver(no_card)
        add_nvidia_smi(no_card, "echo 'Failed to initialize NVML: Driver/library version mismatch'; exit 18")
        fact = nvidia.unused(nvidia.find(), "13.0", "CUDA unknown error", None)
        assert "was updated while it was in use (nvidia-smi: Failed to initialize NVML" in fact.text
        assert fact.remedy == "reboot"

    def test_nvidia_smi_that_hangs_is_not_waited_for(self, no_card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        add_driver(no_card)
        add_nvidia_smi(no_card, "exec sleep 30")
        monkeypatch.setattr(nvidia, "_SECONDS", 0.2)
        found = nvidia.find()
        assert found is not None
        assert found.complaint == "nvidia-smi does not answer"

    def test_nvidia_smi_alone_that_finds_nothing(self, no_card: Path) -> None:
        add_nvidia_smi(no_card, "echo 'No devices were found'; exit 6")
        fact = nvidia.unused(nvidia.find(), "13.0", "", None)
        assert fact.text == "an NVIDIA GPU, is not used: nvidia-smi: No devices were found"
        assert fact.remedy == f"reboot; if that does not help, install the newest driver {DRIVERS}"

    @pytest.mark.parametrize(("built_for", "then"), [("13.0", ""), (None, f", then: {CU130}")])
    def test_a_card_without_a_driver(self, built_for: str | None, then: str, no_card: Path) -> None:
        for address, vendor, kind in (("01", "0x10de", "0x030000"), ("02", "0x10de", "0x040300"), ("03", "0x8086", "")):
            device = no_card / "pci" / address
            device.mkdir()
            (device / "vendor").write_text(f"{vendor}\n")
            (device / "class").write_text(f"{kind}\n")
        fact = nvidia.unused(nvidia.find(), built_for, "", None)
        assert fact.text == "an NVIDIA GPU, no driver, is not used: its driver is not loaded"
        assert fact.remedy == f"install the newest driver {DRIVERS} and reboot{then}"

    def test_a_container_that_was_given_no_gpu(self, no_card: Path) -> None:
        add_driver(no_card)
        (no_card / ".dockerenv").touch()
        fact = nvidia.unused(nvidia.find(), "12.6", "No CUDA GPUs are available", None)
        assert fact.text.endswith("560.35.03, is not used: this container was given no GPU")
        assert fact.remedy is not None
        assert "docker run --gpus all" in fact.remedy


class TestWhyNoGpu:
    @pytest.mark.parametrize(
        ("driver", "capability", "remedy"),
        [
            ("580.65.06", (8, 6), CU130),
            ("580.65.06", None, CU130),
            ("580.65.06", (6, 1), CU126),  # Pascal: CUDA 13 knows it no longer
            ("560.35.03", (8, 6), CU126),
            ("570.86.10", (12, 0), f"{NEWER}, then: {CU130}"),
            ("470.57.02", (8, 6), f"{NEWER}, then: {CU130}"),
            ("580.65.06", (3, 5), f"{NEWER}, then: {CU130}"),  # no build knows it any more
        ],
    )
    def test_pytorch_for_cpus_is_replaced_by_one_that_goes_with_the_driver(
        self, driver: str, capability: tuple[int, int] | None, remedy: str
    ) -> None:
        fact = nvidia.unused(Nvidia(("a card",), driver, capability), None, "", None)
        assert fact.text == f"a card, driver {driver}, is not used: the installed PyTorch is built for CPUs only"
        assert (fact.remedy, fact.fatal) == (remedy, False)

    def test_the_tested_versions_are_installed_where_they_are_known(self, tmp_path: Path) -> None:
        (tmp_path / "constraints.txt").touch()
        remedy = nvidia.unused(AMPERE, None, "", None).remedy
        assert remedy is not None
        assert remedy.startswith("python -m pip install -c constraints.txt --force-reinstall torch --index-url ")

    @pytest.mark.parametrize(
        ("driver", "capability", "built_for", "said", "remedy"),
        [
            ("535.104.05", (8, 6), "13.0", "", CU126),
            ("570.86.10", (12, 0), "13.2", "", NEWER),
            ("470.57.02", (8, 6), "12.6", "", NEWER),
            ("535.104.05", (8, 6), "14.0", "The NVIDIA driver on your system is too old", CU126),
        ],
    )
    def test_a_driver_too_old(
        self, driver: str, capability: tuple[int, int], built_for: str, said: str, remedy: str
    ) -> None:
        fact = nvidia.unused(Nvidia(("a card",), driver, capability), built_for, said, None)
        assert f"the driver is too old for PyTorch's CUDA {built_for}" in fact.text
        assert fact.remedy == remedy

    @pytest.mark.parametrize("visible", ["", "-1"])
    def test_a_card_that_is_hidden(self, visible: str) -> None:
        fact = nvidia.unused(AMPERE, "13.0", "", visible)
        assert f"CUDA_VISIBLE_DEVICES={visible!r} hides it" in fact.text
        assert fact.remedy == unset("CUDA_VISIBLE_DEVICES")

    def test_a_cluster_is_asked_for_a_gpu(self, no_card: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        srun = no_card / "bin/srun"
        srun.touch(mode=0o755)
        monkeypatch.setattr(nvidia, "shutil", SimpleNamespace(which=lambda name: srun))
        login = nvidia.unused(None, "13.0", "", None)
        assert login.remedy == "ask Slurm for a GPU: srun --gres=gpu:1 python -m gan doctor"
        monkeypatch.setenv("SLURM_JOB_ID", "1")
        assert nvidia.unused(None, "13.0", "", None).remedy is None
        hidden = nvidia.unused(AMPERE, "13.0", "", "")
        assert hidden.remedy == "ask Slurm for a GPU: srun --gres=gpu:1"

    def test_whatever_else_pytorch_says(self) -> None:
        assert (
            "is not used: Error 802: system not yet"
            in nvidia.unused(AMPERE, "13.0", "Error 802: system not yet", "0").text
        )
        assert "does not say why" in nvidia.unused(AMPERE, "13.0", "", "0").text

    @pytest.mark.parametrize(
        ("problem", "capability", "built_for", "remedy"),
        [
            ("CUDA error: no kernel image is available for execution", (6, 1), "13.0", CU126),
            ("CUDA error: no kernel image is available for execution", (12, 1), "12.6", CU130),
            ("CUDA out of memory", (8, 6), "13.0", "nvidia-smi names the programs that hold it: end them"),
            ("cuDNN error", (8, 6), "12.6", f"reboot; if that does not help: {CU126}"),
        ],
    )
    def test_a_card_that_fails(self, problem: str, capability: tuple[int, int], built_for: str, remedy: str) -> None:
        assert nvidia.when_it_fails(problem, capability, built_for) == remedy


class TestComputing:
    def test_no_pytorch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        fact = only(Computing("auto").pytorch())
        assert fact == Fact("PyTorch", "is not installed", "python -m pip install torch", fatal=True)

    def test_a_pytorch_that_cannot_be_imported(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open shared object file')")
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "torch")
        fact = only(Computing("auto").pytorch())
        assert fact.text == "is installed, but cannot be imported (libcudart.so.13: cannot open shared object file)"
        assert (fact.remedy, fact.fatal) == ("python -m pip install --force-reinstall torch", True)

    def test_a_pytorch_too_old(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(computing.importlib.metadata, "requires", lambda name: ["click>=8.1", "torch>=99.1"])
        fact = only(Computing("auto").pytorch())
        assert fact.text.endswith("; this program is made for 99.1 and newer")
        assert (fact.remedy, fact.fatal) == ("python -m pip install --upgrade torch", False)

    def test_pytorch_s_warning_reaches_the_reason(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def too_old() -> bool:
            warnings.warn(
                "CUDA initialization: The NVIDIA driver on your system is too old (found 12020)", stacklevel=2
            )
            return False

        monkeypatch.setattr(torch.cuda, "is_available", too_old)
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(nvidia, "find", lambda: Nvidia(("a card",), "590.1", (8, 6)))
        fact = only(Computing("auto").gpu())
        assert "the driver is too old for PyTorch's CUDA 13.0, which needs 580 or newer" in fact.text
        assert not fact.fatal

    def test_a_driver_that_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        forever = threading.Event()
        monkeypatch.setattr(torch.cuda, "is_available", lambda: forever.wait() or False)
        found = Computing("cpu")
        facts = examined("GPU", 0.05, found.gpu, "the GPU has not answered")
        assert facts == [Fact("GPU", "the GPU has not answered in 0.05 s; the rest was left out", good=False)]
        fact = only(found.choose())
        assert (fact.remedy, fact.fatal) == ("run it once more; if it stays so, reboot", True)
        assert list(found.kernels()) == []
        forever.set()

    @pytest.mark.parametrize(("wanted", "fatal"), [("auto", True), ("cpu", False)])
    def test_a_card_that_does_not_compute(self, wanted: str, fatal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(nvidia, "find", lambda: AMPERE)
        monkeypatch.setattr(computing, "_cannot_compute", lambda device: "CUDA error: unknown error")
        found = Computing(wanted)
        fact = only(found.gpu())
        assert "RTX 3090, driver 580.65.06: PyTorch sees it, but cannot compute there (" in fact.text
        assert fact.fatal is fatal
        assert any(fact.fatal for fact in found.choose()) is fatal

    def test_a_card_that_works(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts, found = facts_of_a_card(monkeypatch, free=120)
        assert [fact.text for fact in facts] == [
            "NVIDIA H200, compute capability 9.0, driver 580.65.06; 7 more, which training uses with --gpus 8",
            "120.0 GB free of 139.8",
            "cuda (--device auto): NVIDIA H200, float16 in the high resolutions",
        ]
        assert [fact.remedy for fact in facts] == [None] * 3
        assert (str(found.device), found.gpu_free) == ("cuda", 120 * 2**30)

    def test_a_card_that_others_have_filled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        facts, _ = facts_of_a_card(monkeypatch, free=1)
        assert facts[1].text == "1.0 GB free of 139.8, which is little"
        assert facts[1].remedy is not None
        assert "nvidia-smi names" in facts[1].remedy

    def test_a_device_that_is_not_there(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("it is")
        fact = only(Computing("cuda").choose())
        assert fact.text.startswith("--device cuda: PyTorch ")
        assert fact.fatal

    def test_a_cpu_says_its_precision_and_what_limits_it(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("gan.training.devices._cpu_has_bf16", lambda: False)
        monkeypatch.setattr("gan.bench.machine.usable_cores", lambda: list(range(8)))
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        first, second = Computing("cpu").choose()
        assert first.text == "cpu: CPU with 1 thread, float32 throughout"
        assert second.text.endswith("8 cores to use, but OMP_NUM_THREADS=1 allows 1")
        assert second.remedy == unset("OMP_NUM_THREADS")

    def test_a_cpu_computes(self) -> None:
        assert computing._cannot_compute(CPU) is None


def facts_of_a_card(monkeypatch: pytest.MonkeyPatch, free: int) -> tuple[list[Fact], Computing]:
    """What is said of an H200 with so many GB free."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * 2**30, int(139.8 * 2**30)))
    monkeypatch.setattr(nvidia, "find", lambda: Nvidia(("NVIDIA H200",), "580.65.06", (9, 0)))
    monkeypatch.setattr(computing, "_cannot_compute", lambda device: None)
    found = Computing("auto")
    return [*found.gpu(), *found.choose()], found


def state(
    name: str,
    kind: str = "cuda",
    reason: str = "",
    remedy: str | None = None,
    seconds: float = 0.0,
    cached: bool = False,
    compiler: str = "NVRTC 13.0",
) -> KernelState:
    return KernelState(name, kind, not reason, reason, seconds, cached, "" if reason else "now", remedy, compiler)


class TestKernels:
    @pytest.fixture
    def facts_of(self, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Fact]]:
        """What is said of kernels in these states, with a speed of 2.5."""

        def facts(*states: KernelState, device: str = "cuda") -> list[Fact]:
            monkeypatch.setattr(kernels, "prepare", lambda device, mode: "")
            monkeypatch.setattr(kernels, "states", lambda: list(states))
            monkeypatch.setattr(compiled, "unbuilt", list)
            monkeypatch.setattr(speed, "times_as_fast", lambda name, device: None if name == "warp" else 2.5)
            found = Computing(device)
            found.device = torch.device(device)
            return list(found.kernels())

        return facts

    def test_those_in_use(self, facts_of: Callable[..., list[Fact]]) -> None:
        states = [
            state("bias_act", "cpu", "x"),
            state("bias_act", seconds=0.4),
            state("warp", seconds=1.9, cached=True, compiler="nvcc 12.8"),
        ]
        assert facts_of(*states) == [
            Fact("Kernels", "compiled by NVRTC 13.0, nvcc 12.8"),
            Fact(
                "Kernels", "bias_act: in use, verified now, built in 0.4 s, 2.5 times as fast as PyTorch's operations"
            ),
            Fact("Kernels", "warp: in use, verified now, built earlier (1.9 s)"),
        ]

    def test_one_that_is_slow_is_no_good(
        self, facts_of: Callable[..., list[Fact]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(computing, "_SLOW", 2.6)
        fact = facts_of(state("bias_act"))[1]
        assert ", but only 2.50 times as fast as PyTorch's operations in a layer taken alone" in fact.text
        assert fact.remedy is not None
        assert "gan bench --ops auto, and the same with --ops ref" in fact.remedy

    def test_those_that_are_not_are_listed_by_reason(self, facts_of: Callable[..., list[Fact]]) -> None:
        missing, wrong = ("cuda-bindings is not installed", installing()), ("warp computes wrong results here", None)
        first, second = facts_of(
            *(state(name, "cuda", *why) for name, why in (("bias_act", missing), ("warp", wrong), ("up", missing)))
        )
        assert first.text == "bias_act, up: PyTorch's operations run instead, because cuda-bindings is not installed"
        assert first.remedy == installing()
        text = "warp: PyTorch's operations run instead, because warp computes wrong results here"
        assert second == Fact("Kernels", text, good=False)

    @pytest.mark.parametrize("reason", ["device kernel image is invalid", "PTX compiled with an unsupported toolchain"])
    def test_a_driver_older_than_the_compiler(self, reason: str, facts_of: Callable[..., list[Fact]]) -> None:
        (fact,) = facts_of(state("warp", reason=f"CUDA error: {reason} (cuLibraryLoadData)"))
        assert fact.remedy == f"{NEWER}, or go back: {CU126}"

    def test_cpu_kernels_are_not_built_here(
        self, facts_of: Callable[..., list[Fact]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        found = Computing("cpu")
        found.device = CPU
        monkeypatch.setattr(compiled, "unbuilt", lambda: ["bias_act"])
        monkeypatch.setattr(kernels, "prepare", lambda *args: pytest.fail("built"))
        fact = only(found.kernels())
        assert fact == Fact("Kernels", "bias_act: not built yet; the first run builds it, in seconds")

    def test_none_on_windows_is_as_it_should_be(
        self, facts_of: Callable[..., list[Fact]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        missing = state("bias_act", "cpu", "they are not built on Windows")
        monkeypatch.setattr(computing, "sys", SimpleNamespace(platform="win32"))
        assert [fact.good for fact in facts_of(missing, device="cpu")] == [True]
        monkeypatch.undo()
        assert [fact.good for fact in facts_of(missing, device="cpu")] == [False]

    def test_a_device_without_kernels(self, facts_of: Callable[..., list[Fact]]) -> None:
        (fact,) = facts_of(state("bias_act", "cpu"), device="mps")
        assert fact.good
        assert fact.text == "none for mps: PyTorch's operations run instead"

    def test_a_kernel_that_breaks_the_device(
        self, facts_of: Callable[..., list[Fact]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(device: torch.device, mode: str) -> str:
            raise KernelError("warp fails on this device; start again, and it is left out")

        found = Computing("cuda")
        found.device = torch.device("cuda")
        monkeypatch.setattr(kernels, "prepare", broken)
        assert only(found.kernels()) == Fact(
            "Kernels", "warp fails on this device; start again, and it is left out", "python -m gan doctor"
        )

    def test_no_compiler(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(KernelError) as raised:
            compiled._key(Path("x.cpp"))
        assert (raised.value.remedy or "").startswith(("xcode-select --install", "sudo apt install g++"))


class TestSpeed:
    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(speed._LAYER, "cpu", [1, 4, 8, 8])
        monkeypatch.setattr(speed, "_PICTURES", [1, 3, 16, 16])

    def test_every_kernel_has_its_sample(self) -> None:
        names = {*compiled.kernels, *cuda_kernels.kernels}
        assert names >= {"bias_act"}
        for name in names:
            times = speed.times_as_fast(name, CPU)
            assert times is not None, f"gan/doctor/speed.py has no sample of {name}"
            assert times > 0
        assert speed.times_as_fast("no such", CPU) is None

    def test_without_memory_there_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def out_of_memory(*args: object) -> float:
            raise torch.OutOfMemoryError

        monkeypatch.setattr(speed, "_seconds", out_of_memory)
        assert speed.times_as_fast("bias_act", CPU) is None

    def test_it_is_the_ratio_of_times_taken_in_turn(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ours = iter([1.0, 1.2, 9.0, 1.1, 1.2])
        plain = iter([50.0, 3.0, 3.6, 3.6, 20.0, 3.6])  # the first prepares
        is_plain = False

        @contextlib.contextmanager
        def disabled() -> Iterator[None]:
            nonlocal is_plain
            is_plain = True
            yield
            is_plain = False

        monkeypatch.setattr(kernels, "disabled", disabled)
        monkeypatch.setattr(speed, "_seconds", lambda *args: next(plain if is_plain else ours))
        assert speed.times_as_fast("bias_act", CPU) == pytest.approx(3.0)


def without(*modules: str) -> Callable[[str], bool]:
    return lambda module: module not in modules


class TestSurroundings:
    def test_packages_that_are_useful(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings, "is_there", without("pyspng", "psutil", "imageio_ffmpeg", "lmdb"))
        missing, present = surroundings.packages()
        assert missing.text.startswith(
            "not installed: pyspng (PNGs are decoded by Pillow, more slowly); psutil (memory"
        )
        assert missing.remedy == "python -m pip install pyspng psutil imageio-ffmpeg"
        assert not missing.fatal
        assert present.text.endswith("; without lmdb, which only gan convert and LSUN need")
        assert present.remedy is None

    def test_packages_that_nothing_goes_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings, "is_there", without("PIL"))
        fact = next(surroundings.packages())
        assert fact == Fact("Packages", "pillow is not installed", "python -m pip install pillow", fatal=True)

    @pytest.mark.parametrize(
        ("free", "text", "helped"),
        [(8 << 30, "8.0 GB free", False), (1 << 30, "1.0 GB free", True), (0, "not known, because psutil", False)],
    )
    def test_memory(self, free: int, text: str, helped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "available_bytes", lambda: free)
        fact = only(surroundings.memory())
        assert fact.text.startswith(text)
        assert (fact.remedy is not None) is helped

    def test_disks_with_room(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(files, "free_bytes", lambda folder: 3e11)
        runs, cache = surroundings.disk(Path("runs"))
        assert runs == Fact("Disk", "300.0 GB free in runs, for runs")
        assert cache == Fact("Disk", f"300.0 GB free in {tmp_path}/stylegan2-ada-trainer, for kernels and downloads")

    def test_disks_without(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(files, "free_bytes", lambda folder: 3e9)
        runs, cache = surroundings.disk(Path("runs"))
        assert runs.text == "3.0 GB free in runs, for runs, which is little"
        assert runs.remedy == "free some, or give --outdir FOLDER"
        assert cache.remedy == "free some, or set XDG_CACHE_HOME to a folder that can be written to"

    def test_folders_that_cannot_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "file").touch()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        runs, cache = surroundings.disk(tmp_path / "file/runs")
        assert "file/runs cannot be written to (runs)" in runs.text
        assert runs.remedy == "give --outdir FOLDER"
        assert cache.remedy == "set XDG_CACHE_HOME to a folder that can be written to"

    def test_no_home(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def homeless() -> Path:
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(Path, "home", homeless)
        _, cache = surroundings.disk(Path("runs"))
        assert cache.text.startswith("there is no home folder")
        assert cache.remedy == "set XDG_CACHE_HOME to a folder that can be written to"
        monkeypatch.delenv("GAN_DETECTORS", raising=False)
        (fact,) = surroundings.metrics()
        assert fact.text.startswith(f"no {INCEPTION} for")

    def test_a_dataset_and_its_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        data = write_dataset(tmp_path / "pets.zip", 4)  # of its own: others leave a cache beside theirs
        first, second = surroundings.data(str(data), None)
        assert first.text == f"{data}: 4 images of 16x16"
        assert second.text.startswith("cache: disk, ")
        assert second.remedy is None
        monkeypatch.setattr("gan.data.cache.free_bytes", lambda folder: 10)
        monkeypatch.setattr("gan.data.cache.available_bytes", lambda: 10)
        _, second = surroundings.data(str(data), None)
        assert second.text.startswith("cache: off, ")
        assert second.text.count("--cache-dir") == 1
        assert not second.good

    def test_a_dataset_that_does_not_open(self, tmp_path: Path) -> None:
        (tmp_path / "x.zip").write_bytes(b"no zip")
        fact = only(surroundings.data(str(tmp_path / "x.zip"), None))
        assert fact.fatal
        assert fact.remedy is not None
        assert fact.remedy not in fact.text
        assert only(surroundings.data("gone.zip", None)) == Fact(
            "Data", "gone.zip: no such file or folder", "pack your images with dataset_tool.py first", fatal=True
        )


class TestMlflow:
    def test_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings, "is_there", without("mlflow"))
        assert only(surroundings.mlflow(Path("runs"))).remedy == "python -m pip install mlflow"

    def test_a_database(self) -> None:
        fact = only(surroundings.mlflow(Path("runs")))
        assert fact.text.endswith("; records in sqlite:///runs/mlflow.db")
        assert fact.remedy is None

    @pytest.mark.parametrize(
        ("status", "body", "says", "remedy"),
        [
            (200, "OK", "answers", None),
            (200, "<html>", "does not answer as MLflow does (HTTP 200 for /health)", "look at the address; or "),
            (404, "", "does not answer as MLflow does (HTTP 404 for /health)", "look at the address; or "),
            (401, "", "refuses us (HTTP 401)", "set MLFLOW_TRACKING_USERNAME"),
            (502, "", "fails (HTTP 502)", "look at its log; or "),
        ],
    )
    def test_a_server(
        self, status: int, body: str, says: str, remedy: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        paths = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                paths.append(self.path)
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *args: object) -> None:
                pass

        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.server_port}/")
            fact = only(surroundings.mlflow(Path("runs")))
            server.shutdown()
        assert paths == ["/health"]
        assert f"; MLFLOW_TRACKING_URI is http://127.0.0.1:{server.server_port}, which {says}" in fact.text
        assert "secret" not in fact.text
        assert (fact.remedy or "").startswith(remedy or "")
        assert (fact.remedy is None) is (remedy is None)

    def test_a_server_that_is_down_or_hangs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(surroundings, "_SERVER_SECONDS", 0.2)
        with socket.create_server(("127.0.0.1", 0)) as silent:
            address = f"http://127.0.0.1:{silent.getsockname()[1]}"
            monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
            hangs = only(surroundings.mlflow(Path("runs")))
        down = only(surroundings.mlflow(Path("runs")))
        assert f"MLFLOW_TRACKING_URI is {address}, which does not answer (" in hangs.text
        assert "does not answer (Connection refused)" in down.text
        assert "training does without" in down.text
        assert down.remedy in (
            f"start it; or {command} to record in a file beside the runs" for command in [unset("MLFLOW_TRACKING_URI")]
        )

    @pytest.mark.parametrize(("content", "good"), [(b"", True), (b"no database" * 99, False)])
    def test_a_file_that_is_no_database(self, content: bytes, good: bool) -> None:
        Path("runs").mkdir()
        Path("runs/mlflow.db").write_bytes(content)
        fact = only(surroundings.mlflow(Path("runs")))
        assert ("which is no database (file is not a database)" in fact.text) is not good
        assert fact.remedy == (None if good else f"move {Path('runs/mlflow.db')} away: a new one is made")
        assert Path("runs/mlflow.db").read_bytes() == content

    def test_a_database_in_use(self) -> None:
        Path("runs").mkdir()
        with contextlib.closing(sqlite3.connect("runs/mlflow.db")) as connection:
            connection.execute("CREATE TABLE x (y)")
            assert only(surroundings.mlflow(Path("runs"))).remedy is None

    @pytest.mark.parametrize(
        ("uri", "known"),
        [("foo://x", False), ("runs", True), ("postgresql+psycopg2://u@h/d", True), ("databricks", True)],
    )
    def test_schemes(self, uri: str, known: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        fact = only(surroundings.mlflow(Path("runs")))
        assert ("which is no address that MLflow knows (" in fact.text) is not known
        assert (fact.remedy is None) is known

    def test_an_address_that_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://")
        assert "does not answer" in only(surroundings.mlflow(Path("runs"))).text


class TestExamine:
    def test_a_cpu(self, tmp_path: Path) -> None:
        report = examine("cpu", tmp_path / "runs")
        topics = list(dict.fromkeys(fact.topic for fact in report.facts))
        assert topics == [
            "Program",
            "Packages",
            "PyTorch",
            "GPU",
            "Device",
            "Kernels",
            "Memory",
            "Data",
            "Disk",
            "Metrics",
            "MLflow",
        ]
        assert report.can_train
        assert not any("could not be examined" in fact.text for fact in report.facts)
        assert not (tmp_path / "runs").exists()

    def test_detectors(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        monkeypatch.setenv("GAN_DETECTORS", str(tmp_path))
        (fact,) = surroundings.metrics()
        assert fact.text.startswith(f"no {INCEPTION} for FID, KID and IS; no {VGG} for")
        assert fact.text.endswith("python -m gan metrics --prefetch fetches what is missing")
        assert fact.remedy is None  # nothing is wrong
        with zipfile.ZipFile(tmp_path / INCEPTION, "w") as archive:
            archive.writestr("net/constants.pkl", b"")
            archive.writestr("net/code/__torch__.py", "")
        there, missing = surroundings.metrics()
        assert there.text == f"FID, KID and IS by {tmp_path / INCEPTION}"
        assert missing.text.startswith(f"no {VGG} for")
        (tmp_path / VGG).write_bytes(b"<html>")
        _, damaged = surroundings.metrics()
        assert damaged.text.startswith(f"no precision, recall and PPL: {tmp_path / VGG}: it is a web page")
        assert not damaged.good

    @pytest.mark.gpu
    def test_a_gpu(self, tmp_path: Path) -> None:
        report = examine("cuda", tmp_path / "runs")
        assert report.can_train
        assert not any("could not be examined" in fact.text or "no answer" in fact.text for fact in report.facts)
        lines = [fact.text for fact in report.facts if fact.topic == "Kernels"]
        assert lines[0].startswith("compiled by ")
        assert [line.split(":")[0] for line in lines[1:]] == list(cuda_kernels.kernels)
        assert all(": in use, verified " in line and " times as fast as " in line for line in lines[1:])

    def test_without_pytorch_the_rest_is_examined(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "torch", None)
        report = examine()
        topics = list(dict.fromkeys(fact.topic for fact in report.facts))
        assert topics == ["Program", "Packages", "PyTorch", "Disk", "Metrics", "MLflow"]
        assert not report.can_train
        assert not any("could not be examined" in fact.text for fact in report.facts)
