"""What would make it faster, where the measurement shows that something would."""

from __future__ import annotations

import dataclasses
import re

from gan.bench.result import Result
from gan.config import check_division

NOTHING = "Nothing to change: no option that is known to help is left."
_USABLE_MEMORY = 0.85  # of what there is
_WORTH_IT = 1.3  # faster by this factor in the measured rates
_WAIT = 0.02
_SPREAD = 0.1
_LOW_SHARE = 0.1
_BUSY_CORES = 0.5


def advise(result: Result) -> list[str]:
    """Sentences, each with the flag to change and the figures that speak for it; `NOTHING` where there are none."""
    rules = (_reliability, _device, _precision, _tf32, _batch_gpu, _data, _small)
    return [sentence for rule in rules for sentence in rule(result)] or [NOTHING]


def _reliability(result: Result) -> list[str]:
    machine, spread = result.machine, result.ours.spread
    found = []
    busy = machine.busy_cores
    threads = machine.threads if machine.device == "cpu" else 1
    if busy is not None and busy > _BUSY_CORES and threads + busy > machine.cores:
        found.append(
            f"Other programs kept {busy:.1f} of {machine.cores} processor cores busy meanwhile: take these figures "
            f"as too slow, and measure again when they are done."
        )
    if spread is not None and spread > _SPREAD:
        found.append(
            f"The slowest sample took {spread:.0%} of the median longer than the fastest: measure again on a quiet "
            f"machine before comparing."
        )
    return found


def _device(result: Result) -> list[str]:
    machine = result.machine
    if machine.device == "cpu" and machine.threads_limited:
        return [
            f"OMP_NUM_THREADS: it limits training to {machine.threads} of {machine.cores} cores; unset it if they are "
            f"yours to use."
        ]
    return []


def _precision(result: Result) -> list[str]:
    """Half precision is off, and would be faster."""
    rates = result.share.matmul
    half = next((name for name in ("float16", "bfloat16") if name in rates), None)
    now = "tf32" if "tf32" in rates and result.config.tf32 else "float32"
    if result.config.precision != "fp32" or half is None or rates[half] < _WORTH_IT * rates[now]:
        return []
    return [
        f"--precision auto: products in {half} run {rates[half] / rates[now]:.1f} times as fast here "
        f"({_tflops(rates[half])} against {_tflops(rates[now])} TFLOP/s); --precision fp32 does without."
    ]


def _tf32(result: Result) -> list[str]:
    rates = result.share.matmul
    if result.config.tf32 or "tf32" not in rates or rates["tf32"] < _WORTH_IT * rates["float32"]:
        return []
    return [
        f"--tf32: float32 products run {rates['tf32'] / rates['float32']:.1f} times as fast with it "
        f"({_tflops(rates['tf32'])} against {_tflops(rates['float32'])} TFLOP/s); --tf32=0 does without."
    ]


def _batch_gpu(result: Result) -> list[str]:
    """The batch is divided, and there is memory for larger parts."""
    config, memory = result.config, result.memory
    share = config.batch_size // config.gpus
    if memory.total <= 0:
        return []
    for batch_gpu in range(share, config.batch_gpu, -1):
        peak = memory.peak + memory.activations * (batch_gpu / config.batch_gpu - 1)
        allowed = not check_division(dataclasses.replace(config, batch_gpu=batch_gpu))
        if allowed and peak < _USABLE_MEMORY * memory.total:
            rounds = share // config.batch_gpu
            return [
                f"--batch-gpu {batch_gpu}: the batch of {share} is computed in {rounds} rounds of {config.batch_gpu}, "
                f"and there is memory for {share // batch_gpu} of {batch_gpu} (about {peak:.1f} of {memory.total:.1f} "
                f"GB); fewer, larger operations are usually faster, and the result is the same."
            ]
    return []


def _data(result: Result) -> list[str]:
    timing, config = result.ours, result.config
    share = timing.data_wait_ms / timing.median_ms
    if share <= _WAIT:
        return []
    waits = f"the step waits {timing.data_wait_ms:.0f} ms for images, {share:.0%} of its time"
    found = []
    if config.cache == "off":
        found.append(f"--cache auto: {waits}; --cache off decodes every image each time it is shown.")
    workers = config.workers if config.workers is not None else 0 if result.machine.device == "cpu" else 2
    spare = result.machine.cores - workers - (result.machine.threads if result.machine.device == "cpu" else 1)
    if spare >= 1:
        more = workers + min(2, spare)
        found.append(f"--workers {more}: {waits}; {spare} processor cores are free to read ahead (now {workers} do).")
    return found


def _small(result: Result) -> list[str]:
    """A GPU that is hardly used."""
    share = result.share_of_ceiling
    if result.machine.device != "cuda" or share > _LOW_SHARE:
        return []
    batch = result.config.batch_size
    return [
        f"--batch {2 * batch}: only {share:.1%} of the measured matmul rate is reached, so the operations of this "
        f"network are too small for the GPU and starting them takes the time; a larger batch than {batch} costs "
        f"little more a step. It is not the same training: gamma and learning rates may want to follow."
    ]


def _tflops(rate: float) -> str:
    return re.sub(r"\.?0+$", "", f"{rate / 1e12:.2f}") if rate < 1e13 else f"{rate / 1e12:.0f}"
