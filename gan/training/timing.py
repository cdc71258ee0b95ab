"""How long the phases of a step take, without waiting for the device inside the step."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch


class PhaseTimer:
    """Mean milliseconds per named phase since the last flush."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextlib.contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Time the body."""
        start = self._mark()
        yield
        self._spans.setdefault(name, []).append((start, self._mark()))

    def flush(self) -> dict[str, float]:
        """{name: milliseconds}; waits for the device once."""
        if self._cuda:
            torch.cuda.synchronize()
        means = {name: sum(map(self._span_ms, spans)) / len(spans) for name, spans in self._spans.items()}
        self._spans.clear()
        return means

    def _mark(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _span_ms(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) if self._cuda else (end - start) * 1000
