"""Beliefs that count, Beta and SPO's, against conjugate closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from kalman_rl.beliefs import BetaBelief, SPOBelief
from kalman_rl.beliefs.beta import _log_beta
from kalman_rl.errors import ConfigError, NumericError, ShapeError

DOUBLE = torch.float64


def test_beta_without_forgetting_counts() -> None:
    belief = BetaBelief(forgetting=1.0, prior=(1.5, 2.5))
    generator, a, b = torch.Generator().manual_seed(0), 1.5, 2.5
    for step in range(20):
        reward = torch.randint(2, (1 + step % 4,), generator=generator).double()
        n, total = len(reward), reward.sum().item()
        result = belief.advantages(["x"] * n, reward, step=7 * step)
        baseline = (a + total - reward) / (a + b + n - 1)
        torch.testing.assert_close(result.baseline, baseline, rtol=1e-12, atol=1e-12)
        belief.update(["x"] * n, reward, step=7 * step)
        a, b = a + total, b + n - total
        value, exact = belief.predict(["x"], step=7 * step), scipy.stats.beta(a, b)
        assert value.mean.item() == pytest.approx(exact.mean(), abs=1e-12)
        assert value.variance.item() == pytest.approx(exact.var(), abs=1e-12)
        m = exact.mean()
        assert belief.predictive(["x"], step=7 * step).variance.item() == pytest.approx(
            m * (1 - m), abs=1e-12
        )


def test_beta_forgets_per_step_towards_the_prior() -> None:
    belief = BetaBelief(forgetting=0.9, prior=(1.0, 3.0))
    belief.update(["x"] * 4, torch.tensor([1.0, 1.0, 1.0, 0.0]), step=0)
    belief.update(["x"] * 2, torch.tensor([0.0, 1.0]), step=5)
    s, f = 3 * 0.9**5 + 1, 1 * 0.9**5 + 1
    assert belief.predict(["x"], step=5).mean.item() == pytest.approx((1 + s) / (4 + s + f))
    belief.update(["x"], torch.tensor([1.0]), step=2)  # three steps late
    assert belief.predict(["x"], step=5).mean.item() == pytest.approx((1 + s + 0.9**3) / (4 + s + f + 0.9**3))
    assert belief.predict(["x"], step=10**6).mean.item() == pytest.approx(0.25)


def test_beta_bank_is_weighted_by_the_beta_binomial_likelihood() -> None:
    belief = BetaBelief(forgetting=(1.0, 0.5), prior=(1.0, 1.0))
    belief.update(["x"] * 6, torch.tensor([1.0] * 5 + [0.0]), step=0)
    belief.update(["x"] * 4, torch.tensor([1.0] + [0.0] * 3), step=2)
    likelihood = []
    for keep in (1.0, 0.25):
        likelihood.append(scipy.stats.betabinom(4, 1 + 5 * keep, 1 + keep).pmf(1))
    expected = np.array(likelihood) / sum(likelihood)
    np.testing.assert_allclose(belief.weights.numpy(), expected, rtol=1e-9)
    a, b = torch.tensor([0.3, 7.0], dtype=DOUBLE), torch.tensor([2.0, 0.1], dtype=DOUBLE)
    np.testing.assert_allclose(_log_beta(a, b).numpy(), scipy.special.betaln(a.numpy(), b.numpy()))


def test_beta_learns_its_prior_from_all_prompts() -> None:
    rng, belief = np.random.default_rng(0), BetaBelief(forgetting=1.0)
    rate = rng.beta(0.6, 1.4, size=3000)
    for step in range(30):
        rows = np.arange(100 * step, 100 * step + 100).repeat(8)
        belief.update(
            rows.tolist(), torch.from_numpy((rng.random(800) < rate[rows]).astype(float)), step=step
        )
    a, b = belief._pseudo_counts()
    assert a / (a + b) == pytest.approx(0.3, abs=0.03) and a + b == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("same", [0.0, 1.0])
@pytest.mark.parametrize("apart", [False, True])
def test_a_learned_prior_of_beta_stays_within_its_bounds(same: float, apart: bool) -> None:
    """A mean from 0.01 to 0.99, worth half a reward to fifty."""
    belief = BetaBelief()
    for step in range(3):
        ids = [i for i in range(40 * step, 40 * step + 40) for _ in range(4)]
        reward = torch.tensor([float(i % 2) if apart else same for i in ids])
        belief.update(ids, reward, step=step)
    a, b = belief._pseudo_counts()
    mean, strength = (0.5, 0.5) if apart else (min(max(same, 0.01), 0.99), 50.0)
    assert (a, b) == (pytest.approx(strength * mean), pytest.approx(strength * (1 - mean)))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.5, 1.0])
def test_constant_fractions_leave_what_the_prior_leaves(value: float) -> None:
    """Beta counts fractions; its advantage falls as 1/n, SPO's with rho to the power of the visits."""
    beta, spo = BetaBelief(forgetting=1.0, prior=(1.0, 1.0), scale=False), SPOBelief(rho=0.5, scale=False)
    reward = torch.tensor([value], dtype=DOUBLE)
    for n in range(60):
        left = value - (1 + n * value) / (2 + n)
        assert beta.advantages(["x"], reward, step=n).advantage.item() == pytest.approx(left, abs=1e-7)
        assert abs(spo.advantages(["x"], reward, step=n).advantage.item()) <= 0.5**n
        for belief in (beta, spo):
            belief.update(["x"], reward, step=n)


def test_spo_with_constant_rho_is_an_exponential_average() -> None:
    """Started at its fixed point a + b = 1/(1 - rho), the gain 1 - rho is constant."""
    rho, rng = 0.875, np.random.default_rng(0)
    belief = SPOBelief(rho=rho)
    belief.start(["x"], [2], [6])
    average = (2 + 0.5) / 7
    for step in range(30):
        reward = float(rng.random() < 0.4)
        result = belief.advantages(["x"], torch.tensor([reward]), step=step)
        assert result.baseline.item() == pytest.approx(average, abs=1e-12)
        belief.update(["x"], torch.tensor([reward]), step=step)
        average = rho * average + (1 - rho) * reward
    assert belief.predict(["x"], step=99).mean.item() == pytest.approx(average, abs=1e-12)


def test_spo_without_forgetting_counts_and_uses_the_past_only() -> None:
    belief = SPOBelief(rho=1.0)
    belief.update(["x"] * 3, torch.tensor([1.0, 1.0, 0.0]), step=0)
    result = belief.advantages(["x"] * 2, torch.tensor([0.0, 1.0]), step=1)
    assert result.baseline.tolist() == pytest.approx([2.5 / 4] * 2)


def test_spo_memory_follows_the_signal() -> None:
    belief = SPOBelief()
    belief.update(["x", "y", "z"], torch.tensor([1.0, 1.0, 1.0]), step=0)
    first = belief.predict(["x"], step=1).mean.item()
    assert first == pytest.approx((0.96 * 0.5 + 1) / (0.96 + 1))
    belief.update(
        ["x", "y", "z"], torch.zeros(3), step=1, signal=torch.tensor([0.0, 0.06 * math.log2(1 / 0.9), 9.0])
    )
    a, b = 0.96 * 0.5 + 1, 0.96 * 0.5
    expected = [rho * a / (rho * (a + b) + 1) for rho in (0.96, 0.9, 0.875)]
    np.testing.assert_allclose(belief.predict(["x", "y", "z"], step=2).mean.numpy(), expected, rtol=1e-6)
    for bad in (torch.tensor([-1.0]), torch.tensor([math.nan])):
        with pytest.raises(NumericError, match="^signal: got"):
            belief.update(["x"], torch.zeros(1), step=2, signal=bad)
    for bad in (torch.zeros(2), [0.0]):
        with pytest.raises(ShapeError, match="^signal: got"):
            belief.update(["x"], torch.zeros(1), step=2, signal=bad)
    with pytest.raises(NumericError, match="^signal: got 0.* in another row of prompt 'x'"):
        belief.update(["x", "x"], torch.zeros(2), step=2, signal=torch.tensor([0.0, 1.0]))
    with pytest.raises(ConfigError, match="got a prompt twice or one that was visited"):
        belief.start(["x"], [1], [2])


@pytest.mark.parametrize("make", [BetaBelief, SPOBelief])
def test_counts_need_rewards_between_0_and_1(make) -> None:
    belief = make()
    with pytest.raises(NumericError, match=r"^reward: got 1.5 at row 1, expected \[0, 1\]"):
        belief.update(["a", "b"], torch.tensor([0.5, 1.5]), step=0)
    assert len(belief) == 0
