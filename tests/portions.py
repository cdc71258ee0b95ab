"""Measurements to their end."""

from __future__ import annotations

from collections.abc import Generator
from typing import TypeVar

import torch

Value = TypeVar("Value")


def finished(measurement: Generator[None, None, Value]) -> Value:
    """What it returns."""
    return in_portions(measurement)[0]


def in_portions(measurement: Generator[None, None, Value]) -> tuple[Value, int]:
    """What it returns, and how often it gave way; that training goes on there as precisely as it did before."""
    matmul, cudnn, portions = torch.backends.cuda.matmul, torch.backends.cudnn, 0
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = True
    try:
        while True:
            try:
                next(measurement)
            except StopIteration as end:
                return end.value, portions
            assert matmul.allow_tf32
            assert cudnn.allow_tf32
            portions += 1
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before
