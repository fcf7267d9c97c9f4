"""Advice from the belief's own numbers, against pools whose success rates are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kalman_rl.beliefs import make_belief
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling.advice import advice, informative_share, noise_factor
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.tracking import Tracking, fixed_groups, outcome_metrics


def true_factor(rate: Tensor) -> float:
    return float(1 + rate.var(correction=0) / (rate * (1 - rate)).mean())


def pool(size: int = 600) -> dict[str, Tensor]:
    third = torch.linspace(0.03, 0.95, 3 * size // 10, dtype=torch.float64)
    hopeless, solved = torch.full((4 * size // 10,), 0.004).double(), torch.full((len(third),), 0.99).double()
    return {
        "half and half": torch.tensor([0.65, 0.07], dtype=torch.float64).repeat(size // 2),
        "hopeless, between, solved": torch.cat([hopeless, third, solved]),
        "alike": torch.full((size,), 0.4, dtype=torch.float64),
    }


@pytest.mark.parametrize(("name", "expected"), [("half and half", 1.57), ("alike", 1.0)])
def test_of_known_rates(name: str, expected: float) -> None:
    rate = pool()[name]
    assert true_factor(rate) == pytest.approx(expected, abs=0.005)
    assert noise_factor(Gaussian(rate, torch.zeros_like(rate))) == pytest.approx(true_factor(rate), rel=1e-9)


@pytest.mark.parametrize("visits", [0, 1, 2, 5, 40])
def test_a_coarse_belief_gives_the_same_factor(visits: int) -> None:
    """Rates uniform on [0, 1]: after n rewards every number of successes s is equally likely and the belief is
    Beta(1 + s, 1 + n - s). F is (1/12) / (1/6) + 1 = 1.5 for every n, while that of the means alone is not."""
    successes = torch.arange(visits + 1, dtype=torch.float64).repeat(1_000)
    mean = (1 + successes) / (2 + visits)
    value = Gaussian(mean, mean * (1 - mean) / (3 + visits))
    of_one = 1 / (12 * len(mean)) / (1 / 6)  # Var of a finite pool is below that of the distribution
    assert noise_factor(value) == pytest.approx(1.5, abs=2 * of_one)
    assert abs(true_factor(mean) - 1.5) > (0.01 if visits == 40 else 0.1)


def test_the_variance_of_a_finite_pool() -> None:
    """Two prompts of unknown rate: the expected square of half their difference, by integration over both Betas."""
    g = torch.Generator().manual_seed(0)
    beta = torch.distributions.Beta(torch.tensor([2.0, 5.0]).double(), torch.tensor([3.0, 1.5]).double())
    torch.manual_seed(int(torch.randint(100, (1,), generator=g)))
    draws = beta.sample((400_000,))
    within, between = (draws * (1 - draws)).mean(), draws.var(dim=1, correction=0).mean()
    found = noise_factor(Gaussian(beta.mean, beta.variance))
    assert found == pytest.approx(float(1 + between / within), rel=0.01)


@pytest.mark.parametrize("name", pool())
@pytest.mark.parametrize("seed", [5, 6])
def test_of_a_belief_that_saw_a_few_rewards(seed: int, name: str) -> None:
    """Eight single completions of each of 600 prompts, in batches of 60: within a tenth of the truth, and nearer to it
    than the means alone."""
    g = torch.Generator().manual_seed(seed)
    rate, belief, ids = pool()[name], make_belief("auto"), torch.arange(600)
    rate = rate[torch.randperm(600, generator=g)]
    for step in range(80):
        rows = ids.roll(-60 * step)[:60]
        belief.update(rows.tolist(), torch.bernoulli(rate[rows], generator=g), step=step)
    value = belief.predict(ids.tolist(), step=80)
    found, truth = noise_factor(value), true_factor(rate)
    assert found == pytest.approx(truth, rel=0.1)
    if name != "alike":
        assert abs(found - truth) < abs(true_factor(value.mean.clamp(0, 1)) - truth) / 2


def test_other_rewards_have_the_variance_analogue() -> None:
    """Values N(0, 4), noise 1: F = 1 + 4 / 1, whether the values are known, half known or not known at all."""
    g = torch.Generator().manual_seed(1)
    truth = 2 * torch.randn(20_000, generator=g, dtype=torch.float64)
    noise = torch.ones_like(truth)
    for visits in (0, 1, 8, 10_000):
        gain = 4 / (4 + 1 / visits) if visits else 0.0
        seen = truth + torch.randn(20_000, generator=g, dtype=torch.float64) / max(visits, 1) ** 0.5
        value = Gaussian(gain * seen, torch.full_like(truth, 4 * (1 - gain)))
        assert noise_factor(value, noise) == pytest.approx(5.0, rel=0.03)


def test_nothing_known_and_nothing_to_teach() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    assert noise_factor(Gaussian(empty, empty)) is None
    one = torch.tensor([0.3], dtype=torch.float64)
    assert noise_factor(Gaussian(one, 0 * one)) == pytest.approx(1.0)
    assert noise_factor(Gaussian(one, one), 0 * one) is None


def test_informative_share() -> None:
    value = Gaussian(torch.tensor([0.5, 0.0, 1.0, 0.1]).double(), torch.zeros(4).double())
    counts = torch.tensor([3, 0, 0, 1])
    assert informative_share(value, counts) == pytest.approx((3 * 1.0 + 0.36) / 4, rel=1e-6)
    assert informative_share(value, torch.tensor([0, 5, 5, 0])) < 0.005


@pytest.mark.parametrize(
    ("factor", "single", "said"),
    [(1.57, True, "F = 1.6: use a batch mean"), (2.5, True, "single completions may pay"),
     (4.6, False, "F = 4.6: single completions pay here; sample each prompt once"),
     (4.6, True, "halve the batch before raising the learning rate")],
)  # fmt: skip
def test_what_is_said(factor: float, single: bool, said: str) -> None:
    assert said in advice(factor, single=single)


@pytest.mark.parametrize("offsets", [False, True])
def test_metrics_of_every_batch(offsets: bool) -> None:
    """Over all prompts visited, not those of the batch alone; no share of graded rewards."""
    g = torch.Generator().manual_seed(2)
    rate = pool(240)["half and half"]
    books = Tracking(make_belief("auto"), Budget())
    for number in range(24):
        rows = torch.arange(240).roll(-40 * number)[:40].repeat(2)  # twice, so that noise shows within groups
        reward = torch.bernoulli(rate[rows], generator=g) + offsets * 3.0 * (rows % 3).double()
        names = [f"q{i}" for i in rows.tolist()]
        step = books.tick(number)
        predicted = books.before(names[:40], step)
        sampled = fixed_groups(books, names, reward, step)
        found = outcome_metrics(sampled, (names, reward), predicted, books, 80)
    truth = (
        true_factor(rate) if not offsets else float(1 + (rate + 3.0 * (torch.arange(240) % 3)).var() / 0.1463)
    )
    assert found["belief/noise_factor"] == pytest.approx(truth, rel=0.25)
    assert ("belief/informative" in found) == (not offsets)
    if not offsets:
        assert found["belief/informative"] == pytest.approx(4 * 0.1463, rel=0.25)
    first = Tracking(make_belief("auto"), Budget())
    names, reward = ["a", "b", "c", "d"], torch.tensor([1.0, 0.0, 1.0, 0.0])
    predicted = first.before(names, first.tick(0))
    sampled = fixed_groups(first, names, reward, 0)
    share = outcome_metrics(sampled, (names, reward), predicted, first, 4)["belief/informative"]
    assert 0.3 < share < 1, "also where nothing was known before the batch"
    assert len(books.coverage.visited(100)) == 80 and len(books.coverage.visited(240)) == 240
