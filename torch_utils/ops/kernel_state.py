"""What kernels of all kinds share: how they stand, and the words for what went wrong."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable

import torch


class KernelError(Exception):
    """Why there is no kernel, in words that fit behind "because".

    Args:
        reason: the words, which are the exception's text.
        remedy: what to type, or to do about it; None: nothing is known to help.
    """

    def __init__(self, reason: str, remedy: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy

    @property
    def in_full(self) -> str:
        """Reason and remedy."""
        return f"{self.reason}; {self.remedy}" if self.remedy else self.reason


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
    verified: str
    """when it was compared with its reference: now, or before, by another process on this machine; empty: not in use"""
    remedy: str | None = None
    """what to type, or to do about the reason; None: nothing is known to help"""
    compiler: str = ""
    """and its version: NVRTC 13.0; empty: none compiled it, or it is for CPUs"""


def installing(again: bool = False) -> str:
    """The command that installs the binding and the NVRTC that this PyTorch's CUDA goes with.

    Args:
        again: in place of what is there, which is broken.
    """
    cuda = torch.version.cuda or "13.0"
    major = cuda.partition(".")[0]
    suffix = "" if int(major) >= 13 else f"-cu{major}"
    force = "--force-reinstall " if again else ""
    return f'python -m pip install {force}"cuda-bindings~={major}.0" "nvidia-cuda-nvrtc{suffix}=={cuda}.*"'


def by_reason(states: Iterable[KernelState]) -> dict[str, list[str]]:
    """The names of kernels that are not in use, by what keeps them from it."""
    found: dict[str, list[str]] = {}
    for state in states:
        if not state.in_use:
            found.setdefault(state.reason, []).append(state.name)
    return found


def said(error: Exception, length: int = 200) -> str:
    """What an error says on one line, without what PyTorch adds to those of CUDA for programmers."""
    text = re.split(r"\s(?:Search for `cu|CUDA kernel errors might)", str(error))[0]
    return brief(text, length) or type(error).__name__


def brief(text: str, length: int = 200) -> str:
    """Text on one line, cut to `length`."""
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[: length - 3]}..."


def complaint(output: str) -> str:
    """The line of a failed build that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line or "error  " in line or line.startswith("ptxas fatal")]
    return brief((errors or lines[-1:] or ["no message"])[0])
