"""Gains, division of a budget, price, coverage floor and choice of prompts, against brute force and SciPy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.beliefs.gaussian import GaussianBelief
from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling import gains as gain
from kalman_rl.sampling.allocate import allocate
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.divide import divide, divide_at_price, gradient_gains, mixed_group_gains
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.price import Price

quick = settings(max_examples=60, deadline=None, derandomize=True)
shape = st.floats(0.1, 40.0)
BETAS = [(0.15, 0.15), (0.5, 0.5), (1.0, 1.0), (0.3, 7.0), (20.0, 2.0), (400.0, 300.0)]
betas = pytest.mark.parametrize("a, b", BETAS)


def expect(a: float, b: float, function: object) -> float:
    """E[function(p)] for p ~ Beta(a, b), by SciPy's quadrature."""
    return stats.beta(a, b).expect(function, epsabs=1e-12, epsrel=1e-12, limit=500)


def number(value: Tensor) -> float:
    assert value.dtype == torch.float64
    return value.item()


# ---- gains


@betas
def test_gradient_gain_is_the_expected_drop_of_the_variance_of_a_mean(a: float, b: float) -> None:
    for n, k in ((1, 1), (2, 4), (8, 3)):
        brute = expect(a, b, lambda p, n=n, k=k: p * (1 - p) / n - p * (1 - p) / (n + k)) / k
        ours = number(gain.gradient_gain(gain.beta_signal(a, b), n, k))
        assert ours == pytest.approx(brute, rel=1e-7)


def test_gradient_gains_fall_from_the_empty_group_on() -> None:
    gains = gradient_gains(torch.tensor([0.25]), 50)[0]
    assert gains[:3].tolist() == pytest.approx([0.25, 0.125, 0.25 / 6])
    assert (gains.diff() < 0).all()


@betas
@pytest.mark.parametrize("k", [1, 2, 5])
def test_mixed_group_gain_by_enumerating_every_outcome(a: float, b: float, k: int) -> None:
    """(a, b) as posterior; all 2^k continuations, weighted by the exact beta-binomial probability of each."""
    for successes, failures in ((0, 0), (3, 0), (0, 2), (2, 1)):
        mixed = 0.0
        for outcome in itertools.product((0, 1), repeat=k):
            s, f = sum(outcome), k - sum(outcome)
            chance = math.exp(_log_beta(a + s, b + f) - _log_beta(a, b))
            mixed += chance * (successes + s > 0 and failures + f > 0)
        if successes and failures:
            mixed = 0.0  # it is mixed already
        assert number(gain.mixed_group_gain(a, b, successes, failures, k)) == pytest.approx(
            mixed / k, abs=1e-12
        )


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


@quick
@given(a=shape, b=shape)
def test_mixed_group_gains_add_up_to_the_probability_of_a_mixed_group(a: float, b: float) -> None:
    gains = mixed_group_gains(
        torch.tensor([a], dtype=torch.float64), torch.tensor([b], dtype=torch.float64), 12
    )[0]
    for n in range(13):
        binomial = stats.betabinom(n, a, b)
        mixed = 1 - binomial.pmf(0) - binomial.pmf(n) if n else 0.0
        assert gains[:n].sum().item() == pytest.approx(mixed, abs=1e-9)
    assert gains[0] == 0 and (gains[1:].diff() <= 1e-15).all()


@quick
@given(a=shape, b=shape)
def test_a_beta_comes_back_from_its_moments(a: float, b: float) -> None:
    a, b = max(a, 0.2), max(b, 0.2)
    truth = stats.beta(a, b)
    mean, variance = torch.tensor(truth.mean()), torch.tensor(truth.var())
    if 1e-3 < mean < 1 - 1e-3:
        found = gain.beta_from_moments(Gaussian(mean.double(), variance.double()))
        assert [number(x) for x in found] == pytest.approx([a, b], rel=1e-6)


@pytest.mark.parametrize(
    "mean, variance", [(-3.0, 0.1), (4.0, 1e-9), (0.5, math.inf), (0.0, 0.0), (1.0, 50.0)]
)
def test_moments_that_no_beta_has(mean: float, variance: float) -> None:
    a, b = gain.beta_from_moments(Gaussian(torch.tensor(mean), torch.tensor(variance)))
    assert a > 0 and b > 0 and a + b >= gain.SMALLEST_EVIDENCE - 1e-12
    assert 0 < gain.beta_signal(a, b) < 0.25


def test_noisy_signal_and_its_reading_from_a_belief() -> None:
    assert gain.noisy_signal(torch.tensor([1.25, 0.5]), 1.0).tolist() == [0.25, 0.0]
    belief = GaussianBelief(observation_noise=1.25, mean=0.0, variance=3.0)
    assert read_signal(
        belief, ["a"], step=0, reward_range="real", reward_noise_variance=1.0
    ).variance.item() == (pytest.approx(0.25))
    beta = BetaBelief(prior=(2.0, 3.0))
    signal = read_signal(beta, ["a", "b"], step=0)
    assert signal.variance.tolist() == pytest.approx([0.2, 0.2])
    assert signal.a.tolist() == pytest.approx([2.0, 2.0])


@pytest.mark.parametrize(
    "call",
    [
        lambda: gain.beta_signal(0.0, 1.0),
        lambda: gain.beta_signal(1.0, math.nan),
        lambda: gain.gradient_gain(-0.1, 2, 1),
        lambda: gain.gradient_gain(0.1, -1, 1),
        lambda: gain.gradient_gain(0.1, 2, 0),
        lambda: gain.mixed_group_gain(1.0, 1.0, -1, 0, 1),
        lambda: gain.mixed_group_gain(1.0, 1.0, 0, 0, 0),
        lambda: gain.noisy_signal(math.inf),
        lambda: gain.beta_from_moments(Gaussian(torch.tensor(math.nan), torch.tensor(1.0))),
    ],
)
def test_bad_numbers_are_named(call: object) -> None:
    with pytest.raises(NumericError, match=r"^\w+: got .*, expected "):
        call()


# ---- dividing


def worth(gains: Tensor, counts: tuple[int, ...]) -> float:
    return sum(gains[i, :n].sum().item() for i, n in enumerate(counts))


def best_by_force(gains: Tensor, total: int, least: list[int], most: list[int]) -> float:
    ranges = [range(low, high + 1) for low, high in zip(least, most)]
    return max(worth(gains, c) for c in itertools.product(*ranges) if sum(c) == total)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, list[int], list[int]]:
    size, n_max = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    mixed = draw(st.booleans())
    a = torch.tensor(draw(st.lists(st.floats(0.05, 5), min_size=size, max_size=size)), dtype=torch.float64)
    b = torch.tensor(draw(st.lists(st.floats(0.05, 5), min_size=size, max_size=size)), dtype=torch.float64)
    gains = mixed_group_gains(a, b, n_max) if mixed else gradient_gains(gain.beta_signal(a, b), n_max)
    most = [draw(st.integers(0, n_max)) for _ in range(size)]
    least = [draw(st.integers(0, high)) for high in most]
    if sum(most) == 0:
        most[0] = n_max
    return gains, draw(st.integers(max(sum(least), 1), sum(most))), least, most


@settings(max_examples=400, deadline=None, derandomize=True)
@given(problem=problems())
def test_divide_is_the_optimum_by_brute_force(problem: tuple[Tensor, int, list[int], list[int]]) -> None:
    gains, total, least, most = problem
    counts = divide(gains, total, torch.tensor(least), torch.tensor(most)).counts.tolist()
    assert sum(counts) == total
    assert all(low <= n <= high for low, n, high in zip(least, counts, most))
    assert worth(gains, counts) == pytest.approx(best_by_force(gains, total, least, most), abs=1e-9)


def test_pairs_for_mixed_groups_need_the_programme() -> None:
    """Greedy by pairs would take 2 of the first and waste one; 3 of the last is better."""
    gains = torch.tensor([[0.0, 2.0, 0.0], [0.0, 1.8, 0.0], [0.0, 1.78, 0.89]], dtype=torch.float64)
    counts = divide(gains, 3, torch.zeros(3, dtype=torch.long), torch.tensor([2, 2, 3])).counts
    assert counts.tolist() == [0, 0, 3]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(problem=problems(), price=st.floats(0, 0.3))
def test_divide_at_price_maximises_gain_minus_cost(
    problem: tuple[Tensor, int, list[int], list[int]], price: float
) -> None:
    gains, _, least, most = problem
    counts = divide_at_price(gains, price, torch.tensor(least), torch.tensor(most)).counts.tolist()
    assert all(low <= n <= high for low, n, high in zip(least, counts, most))
    ours = worth(gains, counts) - price * sum(counts)
    ranges = [range(low, high + 1) for low, high in zip(least, most)]
    best = sum(
        max(worth(gains[i : i + 1], (n,)) - price * n for n in options) for i, options in enumerate(ranges)
    )
    assert ours == pytest.approx(best, abs=1e-9)


def test_divide_is_fast_and_equal_prompts_share_evenly() -> None:
    counts = divide(
        gradient_gains(torch.full((512,), 0.2), 32), 4096, torch.full((512,), 2), torch.full((512,), 32)
    ).counts
    assert (counts == 8).all()


@pytest.mark.parametrize(
    "gains, total, least, most, error, message",
    [
        (torch.ones(0, 3), 1, [], [], ShapeError, "is the pool empty"),
        (torch.ones(2), 1, [0, 0], [1, 1], ShapeError, "gains: got shape"),
        (torch.ones(1, 2), 0, [0], [2], ConfigError, "total: got 0"),
        (torch.ones(1, 2), 3, [0], [2], ConfigError, "expected 0 to 2"),
        (torch.ones(1, 2), 1, [2], [2], ConfigError, "expected 2 to 2"),
        (torch.ones(1, 2), 1, [2], [1], ConfigError, "least, most: got 2 and 1 at prompt 0"),
        (torch.ones(1, 2), 1, [0, 0], [1, 1], ShapeError, "least, most"),
        (torch.full((1, 2), math.nan), 1, [0], [2], NumericError, "gains: got nan"),
        (-torch.ones(1, 2), 1, [0], [2], NumericError, "gains: got -1"),
    ],
)
def test_problems_that_cannot_be_divided(gains, total, least, most, error, message) -> None:
    with pytest.raises(error, match=message):
        divide(
            gains.double(),
            total,
            torch.tensor(least, dtype=torch.long),
            torch.tensor(most, dtype=torch.long),
        )


# ---- allocation from a belief


def taught(seed: int = 0, groups: int = 6) -> tuple[BetaBelief, list[str], Tensor]:
    """A belief that has seen eight prompts from hopeless to solved."""
    belief, success = BetaBelief(), torch.tensor([0.0, 0.03, 0.1, 0.3, 0.5, 0.8, 0.97, 1.0])
    ids, generator = [f"p{i}" for i in range(8)], torch.Generator().manual_seed(seed)
    for step in range(groups):
        rows = torch.arange(8).repeat_interleave(8)
        reward = (torch.rand(64, generator=generator) < success[rows]).double()
        belief.update([ids[i] for i in rows], reward, step=step)
    return belief, ids, success


def test_gradient_spends_on_even_prompts_and_mixed_groups_on_hard_ones() -> None:
    belief, ids, _ = taught()
    gradient = allocate(belief, ids, step=6, total=64, n_min=0).counts
    mixed = allocate(belief, ids, step=6, total=32, aim="mixed_groups", n_min=0).counts
    assert gradient.sum() == 64 and mixed.sum() == 32
    assert gradient[4] > gradient[2] > gradient[0] and gradient[4] > gradient[7]
    assert mixed[2] > mixed[4] > mixed[0]
    assert not (mixed == 1).any()


def test_skipped_prompts_come_back_by_the_coverage_floor() -> None:
    belief, ids, _ = taught()
    coverage, visits = Coverage(every=5), {name: [] for name in ids}
    for step in range(6, 26):
        counts = allocate(belief, ids, step=step, total=12, n_min=0, coverage=coverage).counts
        assert counts.sum() == 12
        for name, n in zip(ids, counts.tolist()):
            visits[name] += [step] * bool(n)
    assert any(len(steps) < 20 for steps in visits.values()), "nothing was skipped: the test shows nothing"
    for steps in visits.values():
        assert max(np.diff([5, *steps, 26])) <= 5


def test_coverage_when_the_total_cannot_pay_for_all_and_its_state() -> None:
    belief, ids, _ = taught()
    coverage = Coverage(every=1)
    first = allocate(belief, ids, step=6, total=3, n_min=0, n_max=1, coverage=coverage).counts
    second = allocate(belief, ids, step=7, total=3, n_min=0, n_max=1, coverage=coverage).counts
    assert first.sum() == second.sum() == 3
    assert not (first * second).any(), "those that wait longest come first"
    copy = Coverage(every=1)
    copy.load_state_dict(coverage.state_dict())
    assert copy.waiting(ids, step=9).tolist() == coverage.waiting(ids, step=9).tolist()
    with pytest.raises(ConfigError, match="coverage state"):
        copy.load_state_dict({"format": 2, "ids": [], "step": torch.zeros(0)})
    with pytest.raises(ConfigError, match="every: got 0"):
        Coverage(every=0)


def test_a_share_of_the_total_goes_to_prompts_that_are_due() -> None:
    """In a large pool all are due when they come up: without a share the belief would have no say."""
    belief, ids, _ = taught()
    free = allocate(belief, ids, step=6, total=8, n_min=0).counts
    assert free.min() == 0 and free.max() > 1
    for share, at_most in ((1.0, 8), (0.5, 4), (0.25, 2), (0.01, 1)):
        coverage = Coverage(every=1, share=share)
        counts = allocate(belief, ids, step=6, total=8, n_min=0, coverage=coverage).counts
        assert counts.sum() == 8
        forced = int(((counts > 0) & (free == 0)).sum())
        assert forced <= at_most and (share == 0.01 or forced > 0)
    assert (counts.sort().values - free.sort().values).abs().sum() <= 2, "a visit moves one completion"
    small, waited = Coverage(every=1, share=0.01), set()
    for step in range(6, 14):  # the longest wait comes first, so eight steps are enough for eight prompts
        before = small.waiting(ids, step=step)
        counts = allocate(belief, ids, step=step, total=8, n_min=0, coverage=small).counts
        waited |= {name for name, n in zip(ids, counts.tolist()) if n}
        assert counts[int(before.argmax())] >= 1
    assert waited == set(ids)
    for share in (0.0, 1.5, math.nan, "a"):
        with pytest.raises(ConfigError, match="share: got"):
            Coverage(every=1, share=share)  # type: ignore[arg-type]


def test_price_meets_the_budget_on_average_and_caps_always_hold() -> None:
    belief, ids, success = taught(groups=1)
    price, generator, means = Price(budget=7.0), torch.Generator().manual_seed(1), []
    for step in range(1, 60):
        counts = allocate(belief, ids, step=step, price=price, n_min=1, n_max=24).counts
        assert counts.min() >= 1 and counts.max() <= 24
        means.append(counts.double().mean().item())
        rows = torch.repeat_interleave(torch.arange(8), counts)
        reward = (torch.rand(len(rows), generator=generator) < success[rows]).double()
        belief.update([ids[i] for i in rows], reward, step=step)
    assert np.mean(means[-30:]) == pytest.approx(7.0, rel=0.07)


@quick
@given(
    budget=st.floats(0.5, 40),
    seed=st.integers(0, 5),
    n_min=st.integers(0, 3),
    room=st.integers(0, 12),
    aim=st.sampled_from(["gradient", "mixed_groups"]),
)
def test_hard_caps_hold_whatever_the_price(budget: float, seed: int, n_min: int, room: int, aim: str) -> None:
    belief, ids, _ = taught(seed, groups=1)
    n_max, price = max(n_min + room, 1), Price(budget)
    for step in range(2, 8):
        counts = allocate(belief, ids, step=step, price=price, n_min=n_min, n_max=n_max, aim=aim).counts
        assert n_min <= counts.min() and counts.max() <= n_max
        total = int(counts.sum().clamp(min=8 * n_min, max=8 * n_max)) or 1
        exact = allocate(belief, ids, step=step, total=total, n_min=n_min, n_max=n_max, aim=aim).counts
        assert exact.sum() == total and n_min <= exact.min() and exact.max() <= n_max


@pytest.mark.parametrize("wrong", [0.01, 100.0])
def test_a_price_is_found_though_every_step_takes_the_budget(wrong: float) -> None:
    """A window cut each step to the budget, and the price stayed where it was."""
    gains = gradient_gains(torch.linspace(0.01, 0.25, 64, dtype=torch.float64), 32)
    least, most = torch.zeros(64, dtype=torch.long), torch.full((64,), 32)
    right = divide(gains, 4 * 64, least, most).price
    price = Price(4.0, value=right * wrong)
    for _ in range(150):
        price.update(price.divide(gains, least, most).counts.double().mean().item(), 64)
    alone = divide_at_price(gains, price.value, least, most).counts.double().mean().item()
    assert alone == pytest.approx(4.0, rel=0.1)


def test_price_state_and_bad_input() -> None:
    price = Price(8.0, value=0.01)
    assert price.update(16.0) == pytest.approx(0.01 * 2), "8 too many"
    assert price.update(8.0) == pytest.approx(0.02 * 2), "8 and the 8 that are owed"
    copy = Price(8.0)
    copy.load_state_dict(price.state_dict())
    assert copy == price and price.steps == 2
    for bad in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="budget: got"):
            Price(bad)
    with pytest.raises(ConfigError, match="before the first allocation"):
        Price(8.0).update(3.0)
    with pytest.raises(NumericError, match="mean: got nan"):
        price.update(math.nan)
    with pytest.raises(ConfigError, match="format 9"):
        price.load_state_dict({"format": 9, "value": 1.0})


@pytest.mark.parametrize(
    "ids, options, message",
    [
        ([], {"total": 4}, "ids: got an empty pool"),
        (["a", "b", "a"], {"total": 4}, "prompt 'a' twice"),
        (["a"], {}, "expected exactly one"),
        (["a"], {"total": 2, "price": Price(8.0)}, "expected exactly one"),
        (["a"], {"total": 0}, "total: got 0"),
        (["a"], {"total": 1, "n_min": 2}, "expected 2 to 32"),
        (["a"], {"total": 33}, "expected 2 to 32"),
        (["a"], {"total": 2, "n_min": 3, "n_max": 2}, "n_min, n_max: got 3, 2"),
        (["a"], {"total": 2, "n_min": 1.5}, "n_min, n_max: got 1.5, 32"),
        (["a"], {"total": 2, "aim": "gradeint"}, "did you mean 'gradient'"),
        (["a"], {"total": 2, "reward_range": "binary"}, "reward_range: got 'binary'"),
        (["a"], {"total": 2, "aim": "mixed_groups", "reward_range": "real"}, "expected 'gradient'"),
    ],
)
def test_allocations_that_cannot_be(ids: list[str], options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        allocate(BetaBelief(), ids, step=0, **options)
