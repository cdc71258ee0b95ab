"""What `prepare` settles for the whole process."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_step import tiny_config
from torch.utils._python_dispatch import TorchDispatchMode

from gan.errors import GanError, UsageError
from gan.training import devices, resources
from torch_utils.distributed import Place
from torch_utils.ops import cuda_kernels, kernels
from torch_utils.ops.kernel_state import KernelState

# What PyTorch computes with MKL's vector functions (ATen/cpu/vml.h).
MKL = ["acos", "asin", "atan", "cos", "erf", "erfc", "erfinv", "exp"]
MKL += ["log", "log10", "log2", "sin", "sqrt", "tan", "tanh", "trunc"]


class FirstCalls(TorchDispatchMode):
    """How many elements each of those functions is called with first."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[tuple[str, torch.dtype], int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.__name__.split(".")[0].rstrip("_")
        if name in MKL and args[0].dtype in (torch.float32, torch.float64):
            self.elements.setdefault((name, args[0].dtype), args[0].numel())
        return func(*args, **(kwargs or {}))


def test_threads_never_share_the_first_call_of_an_mkl_function() -> None:
    # One thread's part of such a call may be wrong in its last 12 bits, too seldom to be provoked here.
    with FirstCalls() as first:
        devices.prepare(tiny_config(device="cpu"))
    assert first.elements == {(name, dtype): 1 for name in MKL for dtype in (torch.float32, torch.float64)}


class TestOps:
    @pytest.fixture
    def calls(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
        """What `kernels.prepare` is asked for; there seems to be a GPU."""
        seen: list[tuple[str, str]] = []
        monkeypatch.setattr(kernels, "prepare", lambda device, mode: seen.append((device.type, mode)))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        return seen

    @pytest.mark.parametrize("device", ["cpu", "cuda"])
    @pytest.mark.parametrize("ops", ["auto", "ref"])
    def test_a_run_prepares_what_it_asks_for(self, ops: str, device: str, calls: list[tuple[str, str]]) -> None:
        config = tiny_config(device=device, ops=ops, precision="fp32")
        devices.check(config)
        assert calls == []  # nothing is built for a command that may be refused
        devices.prepare(config)
        assert calls == [(device, ops)]

    def test_kernels_that_are_a_must_are_had_before_anything_else(self, calls: list[tuple[str, str]]) -> None:
        devices.check(tiny_config(device="cuda", ops="cuda", precision="fp32"))
        assert calls == [("cuda", "cuda")]
        assert {"bias_act", "upfirdn2d"} <= cuda_kernels.kernels.keys()  # the operations were there to be asked

    def test_without_them_the_line_says_why(
        self, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "prepare", refuse)
        with pytest.raises(UsageError) as raised:
            devices.check(tiny_config(device="cuda", ops="cuda", precision="fp32"))
        assert raised.value.problems == [
            "--ops cuda: warp spoils the device; use --ops auto to go on without, and see python -m gan doctor"
        ]

    def test_a_kernel_that_broke_the_device_ends_a_run_that_did_not_insist(
        self, calls: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "prepare", refuse)
        with pytest.raises(GanError, match=r"^warp spoils the device$") as raised:
            devices.prepare(tiny_config(device="cuda", ops="auto", precision="fp32"))
        assert raised.value.exit_code == 1  # starting again helps


class TestKernelsInUse:
    @pytest.mark.parametrize(
        ("asked", "status", "remedy", "hint"),
        [
            (("cuda", "auto"), "CUDA kernels: none, because x", None, True),
            (("cpu", "auto"), "CPU kernels: none, because x", None, False),
            (("cpu", "auto"), "CPU kernels: none, because x", "install it", True),
            (("cuda", "ref"), "no kernels, PyTorch's operations as asked for", None, False),
        ],
    )
    def test_the_doctor_is_named_where_it_knows_more(
        self, asked: tuple[str, str], status: str, remedy: str | None, hint: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(kernels, "_asked", asked)
        missing = [KernelState("warp", kind, False, "x", 0.0, False, "", remedy) for kind in ("cpu", "cuda")]
        monkeypatch.setattr(kernels, "status", lambda: status)
        monkeypatch.setattr(kernels, "states", lambda: missing)
        assert resources.kernels_in_use() == (f"{status}; see python -m gan doctor" if hint else status)

    def test_nothing_is_added_where_all_are_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "_asked", ("cuda", "auto"))
        monkeypatch.setattr(kernels, "status", lambda: "CUDA kernels: warp (built in 1.9 s)")
        monkeypatch.setattr(kernels, "states", lambda: [KernelState("warp", "cuda", True, "", 1.9, False, "now")])
        assert resources.kernels_in_use() == "CUDA kernels: warp (built in 1.9 s)"


def refuse(device: torch.device, mode: str) -> str:
    raise kernels.KernelError("warp spoils the device")


class TestSeveralProcesses:
    @pytest.fixture
    def gpus(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """There seem to be two."""
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)

    @pytest.mark.usefixtures("gpus")
    def test_each_takes_a_gpu_of_its_own(self) -> None:
        places = [Place(rank=2 + i, size=4, local_rank=i, local_size=2) for i in range(2)]
        assert [devices.choose_device("auto", place) for place in places] == [torch.device("cuda", i) for i in range(2)]
        assert devices.choose_device("auto", Place()) == torch.device("cuda")
        assert devices.choose_device("cpu", places[1]) == torch.device("cpu")

    @pytest.mark.usefixtures("gpus")
    def test_more_processes_than_gpus_are_refused_before_any_is_started(self) -> None:
        config = tiny_config(device="cuda", precision="fp32")
        devices.check(dataclasses.replace(config, gpus=2))
        with pytest.raises(UsageError) as raised:
            devices.check(dataclasses.replace(config, gpus=3))
        assert raised.value.problems == [
            "--gpus 3: PyTorch finds 2 GPUs here, one for each process; use --gpus 2, or start processes on several "
            "machines with torchrun (docs/scaling.md)"
        ]
        with pytest.raises(UsageError, match=r"^--gpus 3: "):
            devices.choose_device("cuda", Place(rank=2, size=3, local_rank=2, local_size=3))

    def test_a_batch_system_may_show_each_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        place = Place(rank=3, size=4, local_rank=3, local_size=4)
        assert devices.choose_device("auto", place) == torch.device("cuda", 0)
        with pytest.raises(UsageError, match=r"^--gpus 4: PyTorch finds 1 GPU here"):
            devices.check(tiny_config(device="cuda", precision="fp32", gpus=4))

    @pytest.mark.usefixtures("gpus")
    def test_everything_in_a_process_happens_on_its_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        taken: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "set_device", taken.append)
        monkeypatch.setattr(devices, "prepare_kernels", lambda ops, device: taken.append(device))
        place = Place(rank=1, size=2, local_rank=1, local_size=2)
        devices.prepare(tiny_config(device="cuda", precision="fp32"), place)
        assert taken == [torch.device("cuda", 1)] * 2  # before kernels are built for it

    def test_two_on_one_gpu_and_different_kinds_are_refused(self) -> None:
        assert devices.problems_together(["cpu", "cpu"], [None, None]) == []
        assert devices.problems_together(["cuda", "cuda"], ["GPU-a", "GPU-b"]) == []
        (same,) = devices.problems_together(["cuda"] * 3, ["GPU-a", "GPU-b", "GPU-a"])
        assert same.startswith("rank 0 and rank 2 would compute on the same GPU (GPU-a); start at most one process")
        (mixed,) = devices.problems_together(["cuda", "cpu"], ["GPU-a", None])
        assert mixed.startswith("--device: rank 0 would compute on cuda, rank 1 on cpu; name one")

    def test_cores_are_shared_unless_the_user_says_how_many(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        monkeypatch.setattr(torch, "set_num_threads", seen.append)
        monkeypatch.setattr(devices, "_threads_of_one", lambda: 7)
        place = Place(rank=0, size=2, local_rank=0, local_size=2)
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        devices.share_cores(place)
        monkeypatch.delenv("OMP_NUM_THREADS")
        devices.share_cores(Place())
        assert seen == []
        devices.share_cores(place)
        devices.share_cores(Place(rank=0, size=8, local_rank=0, local_size=8))
        assert seen == [3, 1]
