from __future__ import annotations

import pytest
import torch

from gan.bench.ceiling import copy_rate, matmul_rate, measure_ceiling, precision_name

CPU = torch.device("cpu")


def test_rates_are_those_of_a_computer() -> None:
    assert 1e8 < matmul_rate(CPU, torch.float32, seconds=0.01) < 1e15
    assert 1e8 < copy_rate(CPU, seconds=0.01) < 1e13


def test_every_precision_in_question_is_measured_once() -> None:
    ceiling = measure_ceiling(CPU, {torch.float32, torch.bfloat16}, tf32=True, seconds=0.01)
    assert set(ceiling.matmul) == {"float32", "bfloat16"}


@pytest.mark.parametrize(
    ("dtype", "device", "tf32", "name"),
    [
        (torch.float32, "cuda", True, "tf32"),
        (torch.float32, "cuda", False, "float32"),
        (torch.float32, "cpu", True, "float32"),
        (torch.float16, "cuda", True, "float16"),
    ],
)
def test_tf32_is_a_precision_of_its_own(dtype: torch.dtype, device: str, tf32: bool, name: str) -> None:
    assert precision_name(dtype, torch.device(device), tf32) == name


@pytest.mark.gpu
def test_tf32_is_left_as_it_was() -> None:
    ceiling = measure_ceiling(torch.device("cuda"), {torch.float16}, tf32=False, seconds=0.01)
    assert set(ceiling.matmul) == {"float32", "tf32", "float16"}
    assert not torch.backends.cuda.matmul.allow_tf32
