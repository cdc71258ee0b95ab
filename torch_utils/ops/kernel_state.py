"""What kernels of all kinds share: how they stand, and the words for what went wrong."""

from __future__ import annotations

import dataclasses

import torch


class KernelError(Exception):
    """Why there is no kernel, in words that fit behind "because"."""


@dataclasses.dataclass(frozen=True)
class KernelState:
    """One kernel, as it stands in this process."""

    name: str
    kind: str
    """cpu or cuda"""
    in_use: bool
    reason: str
    """why it is not in use; empty if it is"""
    seconds: float
    """what building it took, now or when it was cached"""
    cached: bool
    """it was built before"""
    verified: bool
    """it computes what its reference computes, on this machine"""


def installing() -> str:
    """How to get the binding and NVRTC that this PyTorch's CUDA goes with."""
    major = (torch.version.cuda or "13").partition(".")[0]
    suffix = "" if int(major) >= 13 else f"-cu{major}"
    return f"pip install cuda-bindings~={major}.0 nvidia-cuda-nvrtc{suffix}~={major}.0"


def brief(text: str, length: int = 200) -> str:
    """Text on one line, cut to `length`."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def complaint(output: str) -> str:
    """The line of a failed build that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or "error  " in line or line.startswith("ptxas fatal")]
    return brief((errors or lines[-1:] or ["no message"])[0])
