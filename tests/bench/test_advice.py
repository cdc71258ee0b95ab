"""Advice is given where the figures speak for it, and not where they do not."""

from __future__ import annotations

from typing import Any

import pytest
from bench.results import result_of

from gan.bench.advice import NOTHING, advise

TENSOR_CORES = {"float32": 6e13, "tf32": 4e14, "float16": 8e14}


def test_where_there_is_nothing_to_gain_nothing_is_advised() -> None:
    assert advise(result_of()) == [NOTHING]
    assert advise(result_of(device="cuda", matmul=TENSOR_CORES)) == [NOTHING]


@pytest.mark.parametrize(
    ("changes", "start", "figures"),
    [
        ({"precision": "fp32"}, "--precision auto", ["bfloat16", "10.0 times", "1 against 0.1 TFLOP/s"]),
        ({"fp32": True, "device": "cuda", "matmul": TENSOR_CORES}, "--precision auto", ["float16", "2.0 times"]),
        ({"tf32": False, "device": "cuda", "matmul": TENSOR_CORES}, "--tf32", ["6.7 times", "400 against 60 TFLOP/s"]),
        ({"batch_gpu": 8}, "--batch-gpu 32", ["4 rounds of 8", "1 of 32", "of 16.0 GB"]),
        ({"batch_gpu": 8, "memory": {"total": 10.0}}, "--batch-gpu 16", ["2 of 16", "about 7.0 of 10.0 GB"]),
        ({"cache": "off", "ours": {"data_wait_ms": 50}}, "--cache auto", ["50 ms", "5%"]),
        ({"ours": {"data_wait_ms": 50}, "machine": {"cores": 8}}, "--workers 2", ["50 ms", "4 processor cores"]),
        ({"device": "cuda", "matmul": TENSOR_CORES, "ideal_ms": 20}, "--batch 64", ["2.0%", "not the same training"]),
        ({"machine": {"busy_cores": 1.5}}, "Other programs", ["1.5 of 4"]),
        ({"ours": {"max_ms": 1200}}, "The slowest sample", ["21%"]),
        ({"machine": {"threads": 1, "threads_limited": True}}, "OMP_NUM_THREADS", ["1 of 4 cores"]),
    ],
)
def test_one_thing_to_gain_is_one_sentence_with_its_figures(
    changes: dict[str, Any], start: str, figures: list[str]
) -> None:
    (sentence,) = advise(result_of(**changes))
    assert sentence.startswith(start)
    for figure in figures:
        assert figure in sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": "fp32", "matmul": {"float32": 1e11}},  # no hardware for it
        {"precision": "fp32", "matmul": {"float32": 1e11, "bfloat16": 1.1e11}},
        {"tf32": False},  # no NVIDIA
        {"tf32": False, "device": "cuda", "matmul": {**TENSOR_CORES, "tf32": 6e13}},  # older than TF32
        {"batch_gpu": 8, "memory": {"total": 5.0}},
        {"batch_gpu": 8, "memory": {"total": 0.0}},  # nobody knows
        {"ours": {"data_wait_ms": 50}},  # no core is free to read ahead
        {"cache": "off", "ours": {"data_wait_ms": 15}},
        {"ideal_ms": 20},  # a CPU: nothing is launched
        {"machine": {"busy_cores": 1.5, "cores": 8}},
        {"machine": {"busy_cores": None}},
        {"ours": {"max_ms": 1200, "samples": 2}},  # says little
    ],
)
def test_nothing_that_is_not_true(changes: dict[str, Any]) -> None:
    assert advise(result_of(**changes)) == [NOTHING]
