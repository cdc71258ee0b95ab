"""All examinations, in the order in which they explain each other."""

from __future__ import annotations

from pathlib import Path

from gan.doctor import surroundings
from gan.doctor.computing import Computing
from gan.doctor.facts import Report, examined

_SECONDS = 15.0  # more than any of them takes on a machine that works
_GPU_SECONDS = 90.0  # a driver that is loaded, or libraries that are read from a slow disk, the first time
_BUILD_SECONDS = 120.0  # the first time on a machine; a compiler that hangs is given up before


def examine(device: str = "auto", outdir: Path = Path("training-runs"), data: str | None = None) -> Report:
    """Look at this machine as a run with these options would.

    Args:
        device: `--device`.
        outdir: where runs would go.
        data: a dataset to look at too.
    """
    computing = Computing(device)
    facts = examined("Program", _SECONDS, surroundings.program)
    facts += examined("Packages", _SECONDS, surroundings.packages)
    facts += examined("PyTorch", 4 * _SECONDS, computing.pytorch)
    if not any(fact.fatal for fact in facts):
        facts += examined("GPU", _GPU_SECONDS, computing.gpu, "the GPU has not answered")
        facts += examined("Device", _SECONDS, computing.choose)
        facts += examined("Kernels", _BUILD_SECONDS, computing.kernels)
        facts += examined("Memory", _SECONDS, surroundings.memory)
        facts += examined("Data", _SECONDS, lambda: surroundings.data(data, computing.gpu_free))
    facts += examined("Disk", _SECONDS, lambda: surroundings.disk(outdir))
    facts += examined("Metrics", _SECONDS, surroundings.metrics)
    facts += examined("MLflow", _SECONDS / 3, lambda: surroundings.mlflow(outdir))
    return Report(facts)
