"""How training is doing, in plain words, from the numbers of its ticks."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gan.tracking.jsonl import mean_of
from gan.training.run_folder import in_kimg, resume_command

# Runs that are well stay within 6 between the mean scores of reals and fakes (tests/golden, tests/training/curves);
# one with a rate of G that is 20 times too high came back from 24 and, in a single tick, from 150. At 60 the gradient
# of D's loss is e^-30 of what it was: D stands still where it has won.
_APART, _FAR_APART = 20, 60
# Scores this far from zero, on either side, are no judgement any more: learning rates that are far too high bring
# them to 1e10 and more within 300 images, with finite gradients and with a sign that changes all the time.
_RUNAWAY = 1000
# A step whose gradients are not finite is lost and no more than that: half precision has one now and then.
_LOST_STEPS, _FEW_LOST_STEPS = 0.5, 0.01
# R1 is 3 of 100 steps: when losses are not finite and this share of the gradients, it may be all of R1.
_LOST_REGULARISATION = 0.01
# Both main phases go through both networks, so that one network without finite values spoils at least 33 of 37 steps,
# and 3 of 4 in a tick of a single batch. Their gradients become zeros: nothing moves that could heal it.
_NOTHING_LEFT = 0.75
# Fakes of runs that are well lie at most 37 % below their reference. Those of a run that ended in one picture
# (curves/collapsed.jsonl) lay 65 % below: G's noise inputs still tell them apart. That is said, but two thirds are no
# proof to stop a run on.
_FALLEN, _COLLAPSED = 0.6, 0.8
_OPENING_KIMG = 100  # in which new networks, large ones too, go from bright noise to grey pictures to varied ones
_RISEN = 1.1  # more than what the distance wavers by from tick to tick
_AT_BOUND = 0.99  # of p_max: the controller goes on trying a few steps down
_BOUND_KIMG = 20
# Sustained: long enough in images for training to find back, and in ticks for no single one to decide.
_TICKS, _KIMG = 5, 20
_HOPELESS_TICKS = 3  # for what cannot find back, however few images they hold


@dataclasses.dataclass(frozen=True, slots=True)
class Vitals:
    """The numbers of one tick that its health is read from; NaN where the record has no finite one."""

    kimg: float
    p: float
    """augmentation probability at the end of the tick"""
    bad_gradients: float
    """share 0..1 of the steps of all phases whose gradients were not finite"""
    real: float
    """mean score of D on reals"""
    fake: float
    distance_real: float
    """mean distance between neighbours in a batch of reals, see `gan.loss`"""
    distance_fake: float
    bad_losses: bool
    """whether the mean of any loss was not finite"""

    @staticmethod
    def of(record: Mapping[str, Any]) -> Vitals:
        """Those of a record as trackers get it, or of a line of stats.jsonl, where null stands for not finite."""
        losses = [name for name in record if name.startswith("Loss/")]
        return Vitals(
            kimg=_mean(record, "Progress/kimg"),
            p=_mean(record, "Progress/augment"),
            bad_gradients=_mean(record, "Health/nonfinite_gradients"),
            real=_mean(record, "Loss/scores/real"),
            fake=_mean(record, "Loss/scores/fake"),
            distance_real=_mean(record, "Health/distance/real"),
            distance_fake=_mean(record, "Health/distance/fake"),
            bad_losses=any(mean_of(record, name) is None for name in losses),
        )


@dataclasses.dataclass(frozen=True)
class Health:
    """How training is doing at the end of a tick."""

    word: str
    """`ok`, or what was found, joined by `; `"""
    failing: bool
    """this tick shows something that training does not recover from by itself"""
    failed: bool
    """failing has been sustained: stop, or roll back"""
    advice: str = ""
    """what to change against what is failing; empty when nothing is"""
    healthy: bool = True
    """nothing was found that speaks against going back to this moment"""


@dataclasses.dataclass(frozen=True)
class _Finding:
    word: str
    failing: bool = False
    hopeless: bool = False
    advice: str = ""
    harmless: bool = False


def assess(history: Sequence[Vitals], p_max: float | None) -> Health:
    """The health at the last tick of `history`, which holds all ticks so far.

    Args:
        p_max: bound of the augmentation probability; None if that is not adaptive.
    """
    if not history:
        return Health("ok", failing=False, failed=False)
    falls = _falls(history)
    findings = _findings(history[-1], falls[-1])
    failing = [finding for finding in findings if finding.failing]
    words = [finding.word for finding in findings] + _augmentation(history, p_max)
    return Health(
        word="; ".join(words) or "ok",
        failing=bool(failing),
        failed=bool(failing) and _is_sustained(history, falls),
        advice="; ".join(dict.fromkeys(finding.advice for finding in failing)),
        healthy=all(finding.harmless for finding in findings),
    )


def what_can_be_done(health: Health, run_dir: Path, healthy_nimg: int | None, went_back: bool) -> list[str]:
    """Lines for a run that is given up.

    Args:
        healthy_nimg: of the newest healthy state; None: there is none.
        went_back: the run has gone back once.
    """
    lines = [f"Health:    training has failed: {health.word}"]
    if healthy_nimg is None:
        lines.append("           no healthy state is kept")
    elif went_back:
        lines.append("           it had gone back once already")
    else:
        back = resume_command(run_dir, "--on-divergence", "rollback")
        kimg = in_kimg(healthy_nimg)
        lines.append(f"           back to {kimg} kimg, where it was healthy, at half the rates: {back}")
    lines.append(f"           on as it is: {resume_command(run_dir, '--on-divergence', 'ignore')}")
    lines.append(f"           in a new run: {health.advice or 'lower --glr and --dlr'}")
    return lines


def _is_sustained(history: Sequence[Vitals], falls: Sequence[float]) -> bool:
    """Whether the failing of the last ticks has gone on for so long that it will not end."""
    streak: list[list[_Finding]] = []  # what the unbroken row of failing ticks showed, the last tick first
    for vitals, fall in zip(reversed(history), reversed(falls), strict=True):
        findings = _findings(vitals, fall)
        if not any(finding.failing for finding in findings):
            break
        streak.append(findings)
    last = streak[:_HOPELESS_TICKS]
    if len(last) == _HOPELESS_TICKS and all(any(finding.hopeless for finding in findings) for findings in last):
        return True
    before = history[max(len(history) - len(streak) - 1, 0)]  # its end is where the first failing tick begins
    return len(streak) >= _TICKS and history[-1].kimg - before.kimg >= _KIMG


def _findings(vitals: Vitals, fall: float) -> list[_Finding]:
    return [f for f in (_gradients(vitals), _scores(vitals), _collapse(fall)) if f is not None]


def _gradients(vitals: Vitals) -> _Finding | None:
    share = vitals.bad_gradients
    if not share > 0 and not vitals.bad_losses:  # an unknown share (NaN) is not above 0
        return None
    lost_regularisation = vitals.bad_losses and not share < _LOST_REGULARISATION
    return _Finding(
        f"{_percent(share)} non-finite gradients" if share > 0 else "non-finite losses",
        failing=share >= _LOST_STEPS or lost_regularisation,
        hopeless=vitals.bad_losses and share >= _NOTHING_LEFT,
        harmless=share < _FEW_LOST_STEPS,
        advice="lower --glr and --dlr, or take --precision fp32",
    )


def _scores(vitals: Vitals) -> _Finding | None:
    real, fake = vitals.real, vitals.fake
    if max(abs(real), abs(fake)) >= _RUNAWAY:
        word = f"scores of D run away: {_score(real)} on reals, {_score(fake)} on fakes"
        return _Finding(word, failing=True, advice="lower --glr and --dlr, or raise --gamma")
    if real - fake > _APART:
        word = f"D overpowers G: scores {_score(real)}/{_score(fake)}"
        advice = "raise --gamma, lower --dlr, or give it more images (--mirror doubles them)"
        return _Finding(word, failing=real - fake >= _FAR_APART, advice=advice)
    return None


def _collapse(fall: float) -> _Finding | None:
    if fall < _FALLEN:
        return None
    return _Finding(
        f"samples collapsing: pairwise distance fell {math.floor(fall * 100)}%",
        failing=fall >= _COLLAPSED,
        advice="lower --glr, or raise --gamma",
    )


def _falls(history: Sequence[Vitals]) -> list[float]:
    """Per tick, the share that the distance between fakes has lost; 0 where nothing can be said.

    It falls from its peak or, where fakes were further apart than that, from the distance between reals. New networks
    make bright noise, far apart, which turns grey before it takes shape: in the opening the peak counts only from
    where that first fall ends.
    """
    falls: list[float] = []
    recent: list[float] = []
    lowest, peak, early_peak = math.inf, 0.0, 0.0
    for vitals in history:
        if math.isfinite(vitals.distance_fake):
            recent = [*recent[-2:], vitals.distance_fake]
            now = statistics.median(recent)  # a single tick decides nothing
            lowest, peak = min(lowest, now), max(peak, now)
            if early_peak or now > lowest * _RISEN:
                early_peak = max(early_peak, now)
            reference = min(early_peak if vitals.kimg < _OPENING_KIMG else peak, vitals.distance_real)
            falls.append(1 - now / reference if reference > 0 else 0.0)
        else:
            falls.append(falls[-1] if falls else 0.0)
    return falls


def _augmentation(history: Sequence[Vitals], p_max: float | None) -> list[str]:
    if not p_max:  # a bound of 0 is no augmentation
        return []
    since = None
    for vitals in reversed(history):
        if not vitals.p >= p_max * _AT_BOUND:
            break
        since = vitals.kimg
    if since is None or history[-1].kimg - since < _BOUND_KIMG:
        return []
    kimg = history[-1].kimg - since
    return [f"augment at its bound for {kimg:.0f} kimg: the data set may be too small"]


def _percent(share: float) -> str:
    return "<1%" if share < 0.01 else f"{math.floor(share * 100)}%"


def _score(score: float) -> str:
    return f"{score:+.0f}" if abs(score) < 1e5 else f"{score:+.0e}"


def _mean(record: Mapping[str, Any], name: str) -> float:
    mean = mean_of(record, name)
    return math.nan if mean is None else mean
