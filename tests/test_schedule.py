"""The numbers that change during training."""

import math

import pytest
import torch

from gan import schedule


class TestEma:
    def test_the_old_value_counts_half_after_the_half_life(self):
        remaining = 1.0
        for nimg in range(32, 10_000 + 1, 32):
            remaining *= schedule.ema_beta(32, ema_kimg=9.984, nimg=nimg)
        assert remaining == pytest.approx(0.5)

    def test_rampup_bounds_the_half_life_by_a_share_of_the_images_seen(self):
        assert schedule.ema_beta(32, ema_kimg=10, nimg=1000, rampup=0.05) == pytest.approx(0.5 ** (32 / 50))
        assert schedule.ema_beta(32, ema_kimg=10, nimg=10**6, rampup=0.05) == schedule.ema_beta(32, 10, 10**6)
        assert schedule.ema_beta(32, ema_kimg=10, nimg=1000) == pytest.approx(0.5 ** (32 / 10_000))

    @pytest.mark.parametrize(("ema_kimg", "rampup"), [(0, None), (10, 0), (10, 0.05)])
    def test_a_half_life_of_nothing_takes_the_new_value(self, ema_kimg, rampup):
        assert schedule.ema_beta(32, ema_kimg, nimg=0 if rampup else 1000, rampup=rampup) == 0


class TestLazyAdam:
    def test_a_regularised_network_takes_shorter_steps_with_shorter_memory(self):
        lr, betas = schedule.lazy_adam(0.0025, (0.0, 0.99), interval=16)
        assert lr == pytest.approx(0.0025 * 16 / 17)
        assert betas == pytest.approx((0.0, 0.99 ** (16 / 17)))

    def test_as_much_is_forgotten_in_an_interval_as_without_regularisation(self):
        _, (_, beta) = schedule.lazy_adam(1, (0.0, 0.99), interval=4)
        assert beta**5 == pytest.approx(0.99**4)


@pytest.mark.parametrize("interval", [1, 4, 16])
def test_due_is_the_first_of_every_interval(interval):
    assert [i for i in range(48) if schedule.is_due(i, interval)] == list(range(0, 48, interval))


class TestAda:
    def adjusted(self, p, sign_sum, sign_count, step=0.01, p_max=0.85, target=0.6):
        moved = schedule.adjusted_p(
            torch.tensor(p), torch.tensor(sign_sum), torch.tensor(sign_count), target, step, p_max
        )
        assert moved.shape == ()
        return moved.item()

    def test_p_goes_from_0_to_1_in_ada_kimg(self):
        step = schedule.ada_step(batch=32, interval=4, ada_kimg=500)
        assert step * (500_000 / (32 * 4)) == pytest.approx(1)

    @pytest.mark.parametrize(("mean_sign", "moved"), [(0.61, 0.31), (0.59, 0.29), (-1.0, 0.29), (1.0, 0.31)])
    def test_p_moves_towards_the_target_whatever_the_distance(self, mean_sign, moved):
        assert self.adjusted(0.3, mean_sign * 200, 200.0) == pytest.approx(moved)

    def test_p_stays_on_the_target(self):
        assert self.adjusted(0.3, 0.5 * 128, 128.0, target=0.5) == pytest.approx(0.3)

    def test_p_stays_from_0_to_its_bound_and_comes_back_at_once(self):
        assert self.adjusted(0.005, -10.0, 10.0) == 0
        bounded = self.adjusted(0.845, 10.0, 10.0)
        assert bounded == pytest.approx(0.85)
        assert self.adjusted(bounded, -10.0, 10.0) == pytest.approx(0.84)

    def test_many_adjustments_reach_the_bound_exactly(self):
        p = torch.zeros([])
        for _ in range(200):
            p = schedule.adjusted_p(p, torch.tensor(1.0), torch.tensor(1.0), 0.6, 0.01, 0.85)
        assert p == torch.tensor(0.85)


class TestStepSeed:
    def test_seeds_never_repeat_over_runs_images_and_ranks(self):
        seeds = {schedule.step_seed(s, n * 32, r) for s in range(10) for n in range(1000) for r in range(8)}
        assert len(seeds) == 10 * 1000 * 8

    def test_torch_takes_them(self):
        for nimg in range(100):
            seed = schedule.step_seed(2**40, nimg, 3)
            assert 0 <= seed < 2**63
            torch.Generator().manual_seed(seed)

    def test_neighbouring_seeds_have_nothing_in_common(self):
        flipped = [(schedule.step_seed(0, n) ^ schedule.step_seed(0, n + 1)).bit_count() for n in range(0, 1000)]
        assert sum(flipped) / len(flipped) == pytest.approx(31.5, abs=4 * math.sqrt(63 / 4 / 1000))

    @pytest.mark.parametrize("seed", [0, 1, 2**40])
    def test_the_first_batch_does_not_repeat_the_random_numbers_that_made_the_networks(self, seed):
        assert schedule.step_seed(seed, 0) != seed

    def test_they_stay_what_they_are_so_that_runs_can_continue_under_a_new_version(self):
        assert schedule.step_seed(1, 0) == 3980143261097177850
        assert schedule.step_seed(0, 32) == 1538063564751395564
        assert schedule.step_seed(7, 4096, 3) == 6931405654234640113
