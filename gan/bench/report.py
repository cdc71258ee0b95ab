"""A measurement as text."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from gan.bench.result import Result, Timing

_WIDTH = 110


def table(result: Result, advice: Sequence[str]) -> str:
    """Everything a person wants to know, in aligned lines."""
    ours, share, memory = result.ours, result.share, result.memory
    lines = [f"Measured:  {line}" for line in textwrap.wrap(result.method.what, _WIDTH)[:1]]
    lines += [f"           {line}" for line in textwrap.wrap(result.method.what, _WIDTH)[1:]]
    for text in result.method.left_out:
        lines.append(f"Left out:  {text}")
    lines += ["", *_phases(result), ""]
    lines.append(f"Speed      {_speed(ours)}")
    if result.plain is not None and result.ratio is not None:
        lines.append(f"Plain      {_speed(result.plain)}")
        lines.append(f"Ratio      {result.ratio:.2f} (plain / ours, medians)")
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in share.matmul.items())
    lines.append(f"Ceiling    matmul {rates}; copy {share.copy / 1e9:.3g} GB/s (measured)")
    needed = sum(share.flop_per_step.values()) / 1e12
    lines.append(
        f"           a step needs {needed:.3g} TFLOP, {share.ideal_ms:.4g} ms at these rates: "
        f"{result.share_of_ceiling:.0%} of the ceiling"
    )
    fixed = f"weights {memory.weights:.2f}, gradients {memory.gradients:.2f}, optimisers {memory.optimizer:.2f}"
    of = f" of {memory.total:.1f}" if memory.total else ""
    program = f", program {memory.before:.2f}" if memory.before else ""
    lines.append(f"Memory     peak {memory.peak:.2f}{of} GB: {fixed}, at work {memory.activations:.2f}{program}")
    if result.plain_peak is not None:
        lines.append(f"           plain {result.plain_peak:.2f} GB")
    lines.append("")
    for i, sentence in enumerate(advice):
        first, *rest = textwrap.wrap(sentence, _WIDTH)
        lines += [f"{'Advice' if i == 0 else '':11s}{first}", *(f"{'':11s}{line}" for line in rest)]
    return "\n".join(lines)


def _phases(result: Result) -> list[str]:
    """A row for every phase, and for what is between them."""
    ours, plain = result.ours, result.plain
    header = f"{'':11s}{'ms a call':>10s}{'every':>7s}{'ms a step':>11s}{'share':>8s}{'of ceiling':>12s}"
    rows = [header + (f"{'plain ms':>11s}{'ratio':>7s}" if plain else "")]
    for name, phase in ours.phases.items():
        row = (
            f"{name:11s}{phase.ms:10.1f}{1 / phase.calls_per_step:7.0f}{phase.ms_per_step:11.1f}"
            f"{phase.ms_per_step / ours.median_ms:8.1%}{result.share.phases[name] / phase.ms:12.1%}"
        )
        if plain:
            row += f"{plain.phases[name].ms:11.1f}{plain.phases[name].ms / phase.ms:7.2f}"
        rows.append(row)
    for name, ms in (("data wait", ours.data_wait_ms), ("other", ours.other_ms)):
        rows.append(f"{name:11s}{ms:10.1f}{1:7d}{ms:11.1f}{ms / ours.median_ms:8.1%}")
    whole = f"{'step':11s}{'':17s}{ours.median_ms:11.1f}{1:8.1%}{result.share_of_ceiling:12.1%}"
    if plain:
        whole += f"{plain.median_ms:11.1f}{plain.median_ms / ours.median_ms:7.2f}"
    return [*rows, whole]


def _speed(timing: Timing) -> str:
    spread = f" ({timing.min_ms:.1f} to {timing.max_ms:.1f})" if timing.samples > 1 else " (one sample)"
    return (
        f"{timing.median_ms:.1f} ms a step{spread}, {timing.images_per_second:.4g} images/s, "
        f"{timing.sec_per_kimg:.4g} sec/kimg"
    )
