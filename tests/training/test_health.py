"""Health on recorded curves, and on what is made of them.

curves/*.jsonl hold runs of this program on the 32 px clothes of tests/golden/training_curve_clothing32.jsonl, made by

    python train.py --data clothing32.zip --precision fp32 --snap 1000 --map-depth 2 OPTIONS

and reduced to what health looks at. OPTIONS of each:

healthy     --cbase 1024 --cmax 32 --kimg 12 --tick 0.5
runaway     --cbase 1024 --cmax 32 --kimg 5 --tick 0.25 --glr 0.05 --dlr 0.5
shaken      --cbase 1024 --cmax 32 --kimg 6 --tick 0.25 --glr 0.05
bound       --cbase 1024 --cmax 32 --kimg 6 --tick 0.5 --subset 50 --p-max 0.005 --target -0.5
collapsed   --cbase 256 --cmax 8 --kimg 6 --tick 0.25 --subset 50 --glr 0.02 --gamma 0 --mbstd-group 1
not_finite  --cbase 256 --cmax 8 --kimg 1 --tick 0.1 --glr 1e6 --dlr 1e6
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gan.training.health import Health, Vitals, assess

TESTS = Path(__file__).parents[1]
P_MAX = 0.85
SHORT_NAMES = {"kimg": "Progress/kimg", "augment": "Progress/augment"}


def curve(name: str) -> list[Vitals]:
    path = TESTS / "golden" / name if name.startswith("training_curve") else TESTS / "training" / "curves" / name
    ticks = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    return [Vitals.of({SHORT_NAMES.get(key, key): {"mean": x} for key, x in tick.items()}) for tick in ticks]


def longer(history: list[Vitals], factor: float) -> list[Vitals]:
    """As if the same had happened in so many times the images."""
    return [dataclasses.replace(vitals, kimg=vitals.kimg * factor) for vitals in history]


def course(history: list[Vitals], p_max: float | None = P_MAX) -> list[Health]:
    """The health of each tick, as training would have seen it."""
    return [assess(history[: i + 1], p_max) for i in range(len(history))]


WELL = Vitals(100.0, 0.3, 0.0, real=1.5, fake=-1.2, distance_real=0.6, distance_fake=0.5, bad_losses=False)


def ticks(number: int, kimg: float = 4, start: float = 100, **changes: Any) -> list[Vitals]:
    return [dataclasses.replace(WELL, kimg=start + i * kimg, **changes) for i in range(1, number + 1)]


class TestRecordedCurves:
    @pytest.mark.parametrize("factor", [1, 40])
    @pytest.mark.parametrize("name", ["healthy", "training_curve_clothing32"])
    def test_of_runs_that_are_well(self, name: str, factor: float) -> None:
        found = course(longer(curve(name), factor))
        assert len(found) > 20
        assert set(found) == {Health("ok", failing=False, failed=False)}

    def test_scores_that_run_away(self) -> None:
        found = course(curve("runaway"))
        assert not found[0].failing
        assert all(health.failing for health in found[1:])
        assert found[1].word == "scores of D run away: -8e+07 on reals, -8e+08 on fakes"
        assert found[1].advice == "lower --glr and --dlr, or raise --gamma"
        assert not any(health.failed for health in found)  # 5 kimg are too few to say so
        history = longer(curve("runaway"), 10)
        failed = [v.kimg for v, health in zip(history, course(history), strict=True) if health.failed]
        assert failed == pytest.approx([v.kimg for v in history if v.kimg >= 0.32 + 20])

    def test_losses_that_are_not_finite(self) -> None:
        """Stopped after a few hundred images: nothing that follows could change it."""
        found = course(curve("not_finite"))
        assert [health.word for health in found] == ["50% non-finite gradients"] + ["100% non-finite gradients"] * 8
        assert all(health.failing for health in found)
        assert [health.failed for health in found] == [False] * 3 + [True] * 6
        assert found[-1].advice == "lower --glr and --dlr, or take --precision fp32"

    def test_samples_that_are_one_picture(self) -> None:
        """They never came out of the fall that all new networks begin with, which is too early to say at 6 kimg."""
        assert {health.word for health in course(curve("collapsed"))} == {"ok"}
        history = longer(curve("collapsed"), 40)
        found = course(history)
        assert {health.word for v, health in zip(history, found, strict=True) if v.kimg < 100} == {"ok"}
        assert found[-1].word == "samples collapsing: pairwise distance fell 67%"
        assert not any(health.failing for health in found)

    def test_augmentation_at_its_bound(self) -> None:
        """From 3.1 kimg on, which at a tenth of the speed are 31."""
        history = longer(curve("bound"), 10)
        words = {round(v.kimg): health.word for v, health in zip(history, course(history, 0.005), strict=True)}
        assert {kimg for kimg, word in words.items() if word != "ok"} == {52, 57, 60}
        assert words[57] == "augment at its bound for 26 kimg: the data set may be too small"
        assert {health.word for health in course(history, 0.006)} == {"ok"}

    @pytest.mark.parametrize("factor", [1, 40])
    def test_what_training_recovers_from_does_not_stop_it(self, factor: float) -> None:
        history = longer(curve("shaken"), factor)
        found = course(history)
        named = [
            (round(v.kimg / factor, 3), health.word)
            for v, health in zip(history, found, strict=True)
            if health.word != "ok"
        ]
        assert named == [
            (1.824, "D overpowers G: scores +0/-150"),
            (2.08, "D overpowers G: scores +0/-24"),
        ]
        assert [health.failing for health in found].count(True) == 1
        assert not any(health.failed for health in found)


class TestRecords:
    def test_in_memory_and_in_the_file(self) -> None:
        record: dict[str, Any] = {
            "Progress/kimg": {"num": 1, "mean": 8, "std": 0.0},
            "Progress/augment": {"num": 1, "mean": 0.25, "std": 0.0},
            "Health/nonfinite_gradients": {"num": 8, "mean": 0.5, "std": 0.5},
            "Loss/scores/real": {"num": 8, "mean": math.nan, "std": math.nan},
            "Loss/scores/fake": {"num": 8, "mean": -1.0, "std": 0.0},
            "Health/distance/real": {"num": 8, "mean": 0.6, "std": 0.1},
            "Health/distance/fake": {"num": 8, "mean": 0.4, "std": 0.1},
            "timestamp": 1.0,
            "health": "ok",
        }
        vitals = Vitals.of(record)
        assert repr(vitals) == repr(Vitals(8.0, 0.25, 0.5, math.nan, -1.0, 0.6, 0.4, bad_losses=True))
        for unlike_json in (None, math.inf):
            record["Loss/scores/real"] = {"num": 8, "mean": unlike_json, "std": None}
            assert repr(Vitals.of(record)) == repr(vitals)

    def test_entries_may_be_missing(self) -> None:
        vitals = Vitals.of({"Progress/kimg": {"mean": 8}, "Loss/D/loss": {"mean": 0.7}})
        assert not vitals.bad_losses
        assert assess([vitals] * 30, P_MAX) == Health("ok", failing=False, failed=False)

    def test_nothing_is_known_before_the_first_tick(self) -> None:
        assert assess([], None) == Health("ok", failing=False, failed=False)


class TestGradients:
    @pytest.mark.parametrize(
        ("share", "word"), [(0.0004, "<1%"), (0.01, "1%"), (0.129, "12%"), (0.5, "50%"), (0.999, "99%"), (1.0, "100%")]
    )
    def test_share(self, share: float, word: str) -> None:
        health = assess(ticks(1, bad_gradients=share), P_MAX)
        assert health.word == f"{word} non-finite gradients"
        assert health.failing == (share >= 0.5)

    def test_losses_alone(self) -> None:
        """As in a record of which the gradients are not known."""
        health = assess(ticks(1, bad_losses=True, bad_gradients=math.nan), P_MAX)
        assert (health.word, health.failing) == ("non-finite losses", True)

    @pytest.mark.parametrize(("share", "failing"), [(0.002, False), (0.027, True)])
    def test_a_rare_lost_step_is_none_but_losing_all_of_r1_is(self, share: float, failing: bool) -> None:
        found = course(ticks(20, bad_losses=True, bad_gradients=share))
        assert [health.failing for health in found] == [failing] * 20
        assert found[-1].failed == failing

    @pytest.mark.parametrize(("share", "failed"), [(0.7, False), (0.87, True), (1.0, True)])
    def test_a_network_without_finite_values_fails_after_three_ticks(self, share: float, failed: bool) -> None:
        broken = {"bad_losses": True, "bad_gradients": share, "real": math.nan, "fake": math.nan}
        found = course(ticks(2) + ticks(4, kimg=0.1, start=110, **broken))
        assert [health.failed for health in found] == [False, False, False, False, failed, failed]


class TestScores:
    @pytest.mark.parametrize(
        ("real", "fake", "word", "failing"),
        [
            (9.0, -10.0, "ok", False),
            (-40.0, -35.0, "ok", False),  # fakes above reals: D loses
            (12.0, -15.0, "D overpowers G: scores +12/-15", False),
            (41.2, -39.4, "D overpowers G: scores +41/-39", True),
            (2e4, 2e4, "scores of D run away: +20000 on reals, +20000 on fakes", True),
            (-3.0, -2.2e7, "scores of D run away: -3 on reals, -2e+07 on fakes", True),
        ],
    )
    def test_scores(self, real: float, fake: float, word: str, failing: bool) -> None:
        health = assess(ticks(1, real=real, fake=fake), P_MAX)
        assert (health.word, health.failing, bool(health.advice)) == (word, failing, failing)


class TestAugmentation:
    WORD = "augment at its bound for 120 kimg: the data set may be too small"

    @pytest.mark.parametrize("p", [P_MAX, 0.8499999642372131, P_MAX - 0.005])
    def test_at_its_bound(self, p: float) -> None:
        history = [*ticks(10), *ticks(31, start=140, p=p)]
        assert assess(history, P_MAX) == Health(self.WORD, failing=False, failed=False)
        assert assess(history[:15], P_MAX).word == "ok"  # 16 kimg
        assert assess(history[:16], P_MAX).word == self.WORD.replace("120", "20")

    def test_time_before_it_left_does_not_count(self) -> None:
        history = [*ticks(30, p=P_MAX), *ticks(1, start=220, p=0.8), *ticks(5, start=224, p=P_MAX)]
        assert assess(history, P_MAX).word == "ok"

    @pytest.mark.parametrize("p_max", [None, 0.0, 0.9])
    def test_without_a_bound_or_under_it(self, p_max: float | None) -> None:
        assert assess(ticks(40, p=0.0 if p_max == 0 else P_MAX), p_max).word == "ok"


class TestCollapse:
    def test_fall_from_the_peak(self) -> None:
        history = [*ticks(10, distance_fake=0.5), *ticks(3, start=140, distance_fake=0.18)]
        assert assess(history, P_MAX).word == "samples collapsing: pairwise distance fell 64%"
        history += ticks(8, start=152, distance_fake=0.05)
        found = course(history)
        assert found[-1].word == "samples collapsing: pairwise distance fell 90%"
        assert [health.failing for health in found] == [False] * 14 + [True] * 7
        assert [health.failed for health in found] == [False] * 18 + [True] * 3

    def test_a_single_tick_is_not_enough(self) -> None:
        history = [*ticks(10), *ticks(1, start=140, distance_fake=0.01), *ticks(3, start=144)]
        assert {health.word for health in course(history)} == {"ok"}

    def test_fakes_further_apart_than_reals_may_come_closer(self) -> None:
        history = [*ticks(10, distance_fake=3.0), *ticks(10, start=140, distance_fake=0.4)]
        assert {health.word for health in course(history)} == {"ok"}

    def test_new_networks_first_turn_grey(self) -> None:
        opening = [Vitals(0.5 * i, 0, 0, 1, -1, 0.6, d, False) for i, d in enumerate([1.3, 0.9, 0.4, 0.2, 0.1, 0.09])]
        shape = [Vitals(3 + 0.5 * i, 0, 0, 1, -1, 0.6, 0.1 + 0.05 * i, False) for i in range(8)]
        assert {health.word for health in course(opening + shape)} == {"ok"}
        stuck = [Vitals(100 + i, 0, 0, 1, -1, 0.6, 0.09, False) for i in range(3)]
        assert {health.word for health in course(longer(opening, 10))} == {"ok"}
        assert assess(opening + stuck, P_MAX).word == "samples collapsing: pairwise distance fell 85%"

    @pytest.mark.parametrize("missing", ["distance_fake", "distance_real"])
    def test_without_distances(self, missing: str) -> None:  # one image at a time has no neighbour
        assert assess([*ticks(10), *ticks(9, start=140, **{missing: math.nan})], P_MAX).word == "ok"

    def test_equal_reals_say_nothing(self) -> None:
        assert assess([*ticks(10), *ticks(9, start=140, distance_real=0.0, distance_fake=0.0)], P_MAX).word == "ok"


class TestSustained:
    BAD: Callable[..., list[Vitals]] = staticmethod(lambda *args, **kwargs: ticks(*args, **kwargs, real=41, fake=-39))

    def test_enough_ticks_and_enough_images(self) -> None:
        assert [health.failed for health in course(self.BAD(7))] == [False] * 5 + [True] * 2
        after_well = [*ticks(1), *self.BAD(6, start=104)]
        assert [health.failed for health in course(after_well)] == [False] * 5 + [True] * 2

    def test_many_small_ticks_wait_for_the_images(self) -> None:
        found = course([*ticks(1), *self.BAD(100, kimg=0.25, start=104)])
        assert [health.failed for health in found].index(True) == 80

    def test_few_large_ticks_wait_for_the_ticks(self) -> None:
        found = course([*ticks(1), *self.BAD(6, kimg=50, start=104)])
        assert [health.failed for health in found].index(True) == 5

    def test_one_tick_that_is_well_starts_anew(self) -> None:
        history = [*ticks(1), *self.BAD(4, start=104), *ticks(1, start=120), *self.BAD(4, start=124)]
        assert not any(health.failed for health in course(history))

    def test_different_failures_go_on_together(self) -> None:
        history = [*ticks(1), *self.BAD(3, start=104), *ticks(2, start=116, bad_gradients=0.6)]
        assert assess(history, P_MAX).failed

    def test_what_is_well_again_has_not_failed(self) -> None:
        assert assess([*self.BAD(20), *ticks(1, start=180)], P_MAX) == Health("ok", failing=False, failed=False)


def test_findings_are_joined() -> None:
    history = ticks(20, p=P_MAX, bad_gradients=0.125, real=41, fake=-39)
    health = assess(history, P_MAX)
    assert health.word == (
        "12% non-finite gradients; D overpowers G: scores +41/-39; "
        "augment at its bound for 76 kimg: the data set may be too small"
    )
    assert health.advice == "raise --gamma, lower --dlr, or give it more images (--mirror doubles them)"


@pytest.mark.parametrize(
    ("vitals", "healthy"),
    [
        ({}, True),
        ({"p": 0.85}, True),  # many images or few: the weights are fine
        ({"bad_gradients": 0.005}, True),  # half precision has one now and then
        ({"bad_gradients": 0.02}, False),
        ({"bad_losses": True, "bad_gradients": 1.0}, False),
        ({"real": 15.0, "fake": -15.0}, False),  # a warning, on the way to failing
    ],
)
def test_what_a_rollback_may_go_back_to(vitals: dict[str, Any], healthy: bool) -> None:
    usual: dict[str, Any] = {"p": 0.1, "bad_gradients": 0.0, "real": 1.0, "fake": -1.0, "bad_losses": False}
    usual |= {"distance_real": 0.5, "distance_fake": 0.5}
    history = [Vitals(kimg=4.0 * i, **{**usual, **vitals}) for i in range(1, 20)]
    assert assess(history, p_max=0.85).healthy is healthy
