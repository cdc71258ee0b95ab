"""A measurement that was never made, to be changed in one place or another."""

from __future__ import annotations

import dataclasses

from gan.bench.result import Machine, Memory, Method, PhaseTime, Result, Share, Timing
from gan.config import DataInfo, TrainConfig
from gan.resolve import resolve
from gan.train_options import TrainOptions


def config_of(**options: object) -> TrainConfig:
    return resolve(TrainOptions(data="x", **options), DataInfo("x", "x", 1000, 64, 64, 3))  # type: ignore[arg-type]


def result_of(
    device: str = "cpu",
    matmul: dict[str, float] | None = None,
    machine: dict[str, object] | None = None,
    ours: dict[str, object] | None = None,
    memory: dict[str, float] | None = None,
    ideal_ms: float = 500.0,
    **options: object,
) -> Result:
    """A quiet machine of 4 cores on which nothing is to be gained, apart from what is given."""
    phases = {"Gmain": PhaseTime(400, 1), "Greg": PhaseTime(200, 1 / 4), "Dmain": PhaseTime(500, 1)}
    phases["Dreg"] = PhaseTime(320, 1 / 16)
    return Result(
        config=config_of(**options),
        machine=dataclasses.replace(Machine("A machine", device, 4, 4, False, 0.1), **(machine or {})),  # type: ignore[arg-type]
        computing="with something",
        method=Method("5 periods of 16 whole steps"),
        ours=dataclasses.replace(Timing(1000, 990, 1020, 5, phases, 10, 20, 32), **(ours or {})),  # type: ignore[arg-type]
        plain=None,
        share=Share(
            matmul or {"float32": 1e11, "bfloat16": 1e12},
            1e10,
            {"bfloat16": 5e11},
            dict.fromkeys(phases, 100.0),
            ideal_ms,
        ),
        memory=dataclasses.replace(Memory(4.0, 0.5, 0.3, 0.1, 0.1, 16.0), **(memory or {})),
        plain_peak=None,
    )
