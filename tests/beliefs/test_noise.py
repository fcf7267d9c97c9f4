"""How noisy rewards are: fields against sums written out, and when they begin anew."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch

from kalman_rl.beliefs import RegressionBelief
from kalman_rl.beliefs.change import FAR, MAX_WAIT, MIN_JUDGED, Change, core_variance
from kalman_rl.beliefs.groups import group_rewards
from kalman_rl.beliefs.noise import AdvantageScale, RewardNoise

DOUBLE = torch.float64


def batch(
    rng: np.random.Generator, size: int, spread: float, prompts: int = 20
) -> tuple[list[int], torch.Tensor]:
    ids = [i for i in range(prompts) for _ in range(size)]
    return ids, torch.from_numpy(spread * rng.normal(size=len(ids)))


def test_sums_fade_per_batch_and_are_those_of_the_rewards() -> None:
    rng, noise = np.random.default_rng(0), RewardNoise(rate=0.2)
    want = dict.fromkeys(
        ("squares", "freedom", "fourth", "second", "samples", "surprise", "innovations"), 0.0
    )
    want["surprises"] = 0.0
    mean, variance = torch.full((6,), 0.4, dtype=DOUBLE), torch.full((6,), 0.3, dtype=DOUBLE)
    for _ in range(3):
        ids = [0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 4, 5]
        reward = torch.from_numpy(rng.normal(size=12))
        noise.learn(group_rewards(ids, reward), mean, variance)
        groups = [reward[torch.tensor(ids) == i].numpy() for i in range(6)]
        several, single = (
            [g for g in groups if len(g) > 1],
            np.concatenate([g for g in groups if len(g) == 1]),
        )
        residual = np.concatenate([(g - g.mean()) * np.sqrt(len(g) / (len(g) - 1)) for g in several])
        fresh = {
            "squares": sum(((g - g.mean()) ** 2).sum() for g in several),
            "freedom": sum(len(g) - 1 for g in several),
            "fourth": (residual**4).sum(),
            "second": (residual**2).sum(),
            "samples": len(residual),
            "surprise": ((single - 0.4) ** 2 - 0.3).sum(),
            "innovations": ((single - 0.4) ** 2).sum(),
            "surprises": 3,
        }
        want = {name: 0.8 * want[name] + value for name, value in fresh.items()}
        for name, value in want.items():
            assert getattr(noise, name) == pytest.approx(value), name
    moments = want["fourth"] * want["samples"] / want["second"] ** 2 - 3
    assert noise.excess_kurtosis == pytest.approx(moments)
    squares = noise.clipped_squares if noise.robust else noise.squares
    assert noise.pooled == pytest.approx(squares / want["freedom"])


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("spread", [0.1, 10.0])
def test_noise_of_another_size_is_learned_anew(size: int, spread: float) -> None:
    """The sums hold no batch of the old size then; of a size that is not so far, they do."""
    ids, one = [i for i in range(20) for _ in range(size)], torch.ones(20 * size, dtype=DOUBLE)
    one[::2] = -1.0
    mean, variance = torch.zeros(20, dtype=DOUBLE), torch.zeros(20, dtype=DOUBLE)
    for factor, anew in ((spread, True), (spread**0.2, False)):
        noise = RewardNoise()
        for _ in range(2):
            noise.learn(group_rewards(ids, one), mean, variance)
        known = noise.pooled
        noise.learn(group_rewards(ids, factor * one), mean, variance)
        number, fresh = (noise.freedom, 60) if size > 1 else (noise.surprises, 20)
        assert (number == fresh) == anew
        assert (noise.pooled == pytest.approx(factor**2 * known)) == anew


@pytest.mark.parametrize(("agreed", "wait"), [(0, 1), (1, 1), (MAX_WAIT, MAX_WAIT), (30, MAX_WAIT)])
@pytest.mark.parametrize("side", [-1, 1])
def test_a_change_takes_batches_in_a_row_on_one_side(agreed: int, wait: int, side: int) -> None:
    far, near = (1.01 * FAR) ** side, (0.99 * FAR) ** side
    change = Change()
    for _ in range(agreed):
        assert not change.seen(1.0, near, MIN_JUDGED)
    for other in (near, 1 / far) if wait > 1 else ():  # both begin the row again
        assert not any(change.seen(1.0, far, MIN_JUDGED) for _ in range(wait - 1))
        assert not change.seen(1.0, other, MIN_JUDGED)
    assert [change.seen(1.0, far, MIN_JUDGED) for _ in range(wait)] == [False] * (wait - 1) + [True]
    assert change == Change(wait + 1, 0)


def test_what_is_no_evidence_of_a_change() -> None:
    for known, variance, count in (
        (1.0, 9.0, MIN_JUDGED - 1),
        (0.0, 9.0, 99),
        (-1.0, 9.0, 99),
        (1.0, 0.0, 99),
    ):
        change = Change()
        assert not change.seen(known, variance, count, core=99.0)
        assert change == Change()
    assert Change(5).seen(1.0, 1.01 * FAR, MIN_JUDGED, core=1.01 * FAR)  # outliers do not explain it
    assert not Change(5).seen(1.0, 1.01 * FAR, MIN_JUDGED, core=0.99 * FAR)


@pytest.mark.parametrize("n", range(1, 45))
def test_the_core_is_what_is_left_without_a_twentieth_on_either_side(n: int) -> None:
    values = np.random.default_rng(n).normal(size=n)
    cut = n // 20 + 1
    rest = np.sort(values)[cut : n - cut]
    want = rest.var(ddof=1) if len(rest) > 1 else 0.0
    assert core_variance(torch.from_numpy(values)) == pytest.approx(want, abs=1e-12)


def test_the_scale_of_advantages_is_the_root_of_fading_sums() -> None:
    rng, scale, squares, count = np.random.default_rng(2), AdvantageScale(), 0.0, 0.0
    assert scale.value == 1.0
    for k in range(4):
        advantage = torch.from_numpy(rng.normal(size=30))
        known = torch.from_numpy(rng.random(30) < 0.8)
        scale.learn(advantage, known)
        squares, count = (
            0.97 * squares + float(advantage[known].square().sum()),
            0.97 * count + int(known.sum()),
        )
        assert scale.value == pytest.approx((squares / count) ** 0.5) and scale.batches == k + 1
    scale.learn(advantage, torch.zeros(30, dtype=torch.bool))
    assert scale.batches == 4 and scale.value == pytest.approx((squares / count) ** 0.5)


@pytest.mark.parametrize(("batches", "anew"), [(1, True), (MAX_WAIT - 1, True), (MAX_WAIT, False)])
@pytest.mark.parametrize("factor", [0.1, 10.0])
def test_only_early_batches_with_far_smaller_advantages_begin_the_scale_anew(
    batches: int, anew: bool, factor: float
) -> None:
    scale, one = AdvantageScale(), torch.ones(MIN_JUDGED, dtype=DOUBLE)
    for _ in range(batches):
        scale.learn(one, one.bool())
    scale.learn(factor * one, one.bool())
    assert (scale.count == MIN_JUDGED) == (anew and factor < 1)


@pytest.mark.parametrize("heavy", [False, True])
def test_evidence_is_the_density_of_a_new_mean(heavy: bool) -> None:
    """Normal, or Student's t with four degrees of freedom and as wide as the variance says; up to a constant."""
    rng, belief = (
        np.random.default_rng(3),
        RegressionBelief(process_noise=[0.0, 0.1], prior_variance=[0.1, 1.0]),
    )
    for step in range(8):
        ids, reward = batch(rng, 4, 1.0)
        reward[::25] *= 30 if heavy else 1
        belief.update(ids, reward, step=step)
    assert belief.reward_noise.robust == heavy
    rows = belief._table.rows(list(range(20)))
    levels = belief._levels(rows, torch.ones(20, dtype=DOUBLE), torch.ones(20, 1, dtype=DOUBLE), 8)
    y, noise = torch.from_numpy(rng.normal(size=20)), torch.from_numpy(rng.uniform(0.5, 2, (20, 2)))
    mean, variance = (part.numpy() for part in levels.moments(belief._all_tau2()))
    width = np.sqrt(variance + noise.numpy()[..., None])
    density = scipy.stats.t(4, mean, width) if heavy else scipy.stats.norm(mean, width)
    want = density.logpdf(y.numpy()[:, None, None]).sum(0)
    found = belief._log_likelihood(levels, y, noise).numpy()
    np.testing.assert_allclose(found - found[0, 0], want - want[0, 0], atol=1e-9)
