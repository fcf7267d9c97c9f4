"""BAPO's search against a literal loop over clip bounds, and its statistics against sums over tokens."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.methods import make_method
from kalman_rl.objectives import ratio
from kalman_rl.objectives.aggregate import totals_of
from kalman_rl.objectives.learning import step_statistics, with_bounds
from kalman_rl.objectives.ratio.transforms import Ratio
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.balance import Balance
from kalman_rl.objectives.trust.clip import Clip
from tests.oracles.batches import make_batch, run

quick = settings(max_examples=60, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
MEASURES = ["share", "quotient"]
FIRSTS = ["high", "low"]


def tokens(seed: int, rows: int = 4, length: int = 7) -> tuple[Ratio, Tensor, Current, Rollouts]:
    """Random weights on both sides of every bound, advantages of all signs, holes."""
    batch = make_batch(seed, rows, length, scale=0.8)
    g = torch.Generator().manual_seed(seed)
    advantage = torch.randn(rows, length, generator=g, dtype=torch.float64)
    advantage[torch.rand(rows, length, generator=g) < 0.2] = 0.0
    rollouts = batch.rollouts()
    current = Current(torch.where(rollouts.mask, batch.logp, 0.0))
    return ratio.token(current.logp, rollouts), advantage, current, rollouts


def sides(part: Balance, low: float, high: float, seed: int) -> tuple[float, float]:
    """S+ and S- at two bounds, one token at a time."""
    observed, advantage, _, rollouts = tokens(seed)
    positive, negative = 0.0, 0.0
    for s, a, trained in zip(
        observed.log_weight.flatten().tolist(), advantage.flatten().tolist(), rollouts.mask.flatten().tolist()
    ):
        w = math.exp(s)
        if not trained:
            continue
        if a > 0:
            positive += a * (min(w, high) if not part.gradient else w if w <= high else 0.0)
        if a < 0:
            negative += -a * (max(w, low) if not part.gradient else w if w >= low else 0.0)
    return positive, negative


def searched(part: Balance, seed: int) -> tuple[float, float]:
    """The search as its sources describe it: try, raise one bound by a step, try again."""
    low, high = part.low, part.high
    slack = 1e-9  # the ends themselves may be reached, whatever 0.6 + 15 * 0.02 rounds to

    def measure() -> float:
        positive, negative = sides(part, low, high, seed)
        if negative == 0:
            return math.inf
        return positive / (positive + negative) if part.measure == "share" else positive / negative

    def can_raise_high() -> bool:
        return high + part.high_step <= part.high_end + slack

    def can_raise_low() -> bool:
        return low + part.low_step <= part.low_end + slack

    while measure() < part.target and (can_raise_high() or can_raise_low()):
        order = [can_raise_high, can_raise_low] if part.first == "high" else [can_raise_low, can_raise_high]
        if next(possible for possible in order if possible()) is can_raise_high:
            high += part.high_step
        else:
            low += part.low_step
    return low, high


def bounds(found: Clip) -> tuple[float, float]:
    return 1 - found.low, 1 + found.high


# ---- the grid


@pytest.mark.parametrize(
    "start, end, step, count", [(0.6, 0.9, 0.02, 16), (0.6, 0.8, 0.05, 5), (0.9, 1, 0.1, 2)]
)
def test_grid_of_low_reaches_its_end(start: float, end: float, step: float, count: int) -> None:
    grid = Balance(low=start, low_end=end, low_step=step).grid("low")
    assert len(grid) == count and grid[0] == start and grid[-1] == end


@pytest.mark.parametrize(
    "start, end, step, count", [(1.2, 3.0, 0.05, 37), (1.2, 2.0, 0.1, 9), (1.0, 1.35, 0.1, 4)]
)
def test_grid_of_high_reaches_its_last_step(start: float, end: float, step: float, count: int) -> None:
    grid = Balance(high=start, high_end=end, high_step=step).grid("high")
    assert len(grid) == count and end - step < grid[-1] <= end


def test_no_grid_leaves_the_legal_range() -> None:
    """low_end = 1 in any number of steps: never above 1, which would be a negative clip distance."""
    for start in (0.0, 0.1, 0.3, 0.6, 0.7, 0.9):
        for steps in range(1, 60):
            part = Balance(low=start, low_end=1.0, low_step=(1 - start) / steps)
            grid = part.grid("low")
            assert grid[-1] == 1.0 and len(grid) == steps + 1
            found = part.fitted(torch.tensor([0.0] * len(part.grid("high")) + [1.0] * len(grid)))
            assert bounds(found)[0] == 1.0


def test_a_grid_of_one_point() -> None:
    part = Balance(low=0.8, low_end=0.8, high=1.2, high_end=1.2)
    assert part.grid("low") == [0.8] and part.grid("high") == [1.2]


# ---- statistics


@quick
@given(seed=seeds, gradient=st.booleans())
def test_statistics_against_a_loop(seed: int, gradient: bool) -> None:
    part = Balance(gradient=gradient)
    statistics = part.statistics(*tokens(seed)).tolist()
    highs, lows = part.grid("high"), part.grid("low")
    expected = [sides(part, 0.6, high, seed)[0] for high in highs]
    expected += [sides(part, low, 1.2, seed)[1] for low in lows]
    assert statistics == pytest.approx(expected, rel=1e-12, abs=1e-13)


@quick
@given(seed=seeds, cut=st.integers(1, 3), gradient=st.booleans())
def test_statistics_add_up_over_parts(seed: int, cut: int, gradient: bool) -> None:
    part, method = Balance(gradient=gradient), make_method("bapo")
    batch = make_batch(seed, 4, 7, scale=0.8)
    method = dataclasses.replace(method, trust=part)
    advantage = method.advantage(batch.reward, batch.group)

    def statistics(rows: Tensor) -> Tensor:
        found = step_statistics(
            method, batch.rows(rows).rollouts(), batch.logp[rows], advantage=advantage[rows]
        )
        assert found is not None and found.dtype == torch.float64
        return found

    everything = torch.arange(4)
    torch.testing.assert_close(
        statistics(everything[:cut]) + statistics(everything[cut:]), statistics(everything)
    )


@quick
@given(seed=seeds)
def test_monotone(seed: int) -> None:
    """S+ grows with high, S- with low: raising low lowers the value share, raises the gradient share."""
    value, gradient = Balance(), Balance(gradient=True)
    count = len(value.grid("high"))
    for part, sign in ((value, 1), (gradient, -1)):
        statistics = part.statistics(*tokens(seed))
        positive, negative = statistics[:count], statistics[count:]
        assert (positive.diff() >= -1e-12).all() and (sign * negative.diff() >= -1e-12).all()
        share = positive[0] / (positive[0] + negative)
        assert (sign * share.diff() <= 1e-12).all() or positive[0] == 0


def test_raising_low_moves_the_two_shares_apart() -> None:
    generator = torch.Generator().manual_seed(0)
    log_weight = 0.5 * torch.randn(1, 4000, generator=generator, dtype=torch.float64)
    advantage = torch.where(torch.rand(1, 4000, generator=generator) < 0.25, 1.0, -1.0).double()
    logp = torch.full((1, 4000), -1.0, dtype=torch.float64)
    rollouts = Rollouts(logp, torch.ones(1, 4000))
    count = len(Balance().grid("high"))
    shares = []
    for gradient in (False, True):
        s = Balance(gradient=gradient).statistics(
            Ratio(log_weight, log_weight), advantage, Current(logp), rollouts
        )
        shares.append((s[0] / (s[0] + s[count]), s[0] / (s[0] + s[-1])))
    (value_before, value_after), (gradient_before, gradient_after) = shares
    assert value_after < value_before - 0.005 and gradient_after > gradient_before + 0.02


# ---- the search


@quick
@given(
    seed=seeds,
    target=st.sampled_from([0.0, 0.2, 0.35, 0.5, 0.667, 1.0, 3.0]),
    measure=st.sampled_from(MEASURES),
    first=st.sampled_from(FIRSTS),
    gradient=st.booleans(),
)
def test_search_against_a_literal_loop(
    seed: int, target: float, measure: Any, first: Any, gradient: bool
) -> None:
    part = Balance(target, measure, first, gradient, dual=3.0)
    found = part.fitted(part.statistics(*tokens(seed)))
    assert bounds(found) == pytest.approx(searched(part, seed), abs=1e-9) and found.dual == 3.0


def ends(part: Balance) -> tuple[float, float]:
    return part.low_end, part.high_end


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("first", FIRSTS)
def test_single_sign_batches_and_targets_at_the_ends(measure: Any, first: Any) -> None:
    observed, advantage, current, rollouts = tokens(3)

    def found(target: float, a: Tensor) -> tuple[float, float]:
        part = Balance(target, measure, first)
        return bounds(part.fitted(part.statistics(observed, a, current, rollouts)))

    start, end = (0.6, 1.2), pytest.approx((0.9, 3.0))
    assert found(0.9, advantage.abs()) == pytest.approx(start)  # nothing negative: nothing to balance
    assert found(0.9, torch.zeros_like(advantage)) == pytest.approx(start)
    assert found(0.4, -advantage.abs()) == end  # nothing positive: no bound helps
    assert found(0.0, -advantage.abs()) == pytest.approx(start)
    assert found(1e6, advantage) == end


@quick
@given(seed=seeds)
def test_target_zero_is_ppo_with_the_first_bounds(seed: int) -> None:
    batch = make_batch(seed, scale=0.8)
    bapo = run(make_method("bapo", target=0.0, dual=1.5), batch)
    ppo = run(dataclasses.replace(make_method("bapo"), trust=Clip(0.4, 0.2, 1.5)), batch)
    torch.testing.assert_close(bapo.gradient, ppo.gradient)
    torch.testing.assert_close(bapo.value, ppo.value)


@quick
@given(seed=seeds, target=st.sampled_from([0.3, 0.45, 0.6]), name=st.sampled_from(["bapo", "bapo_published"]))
def test_split_over_micro_batches_is_the_whole_batch(seed: int, target: float, name: str) -> None:
    method, batch = make_method(name, target=target), make_batch(seed, 6, 9, scale=0.8)
    whole = run(method, batch)
    advantage = method.advantage(batch.reward, batch.group)
    parts = [torch.tensor(rows) for rows in ([0, 1], [2], [3, 4, 5])]
    pieces = [(batch.rows(rows), advantage[rows]) for rows in parts]
    total: Any = sum(
        step_statistics(method, piece.rollouts(), piece.logp, advantage=a) for piece, a in pieces
    )
    fixed, totals = with_bounds(method, total), totals_of(batch.rollouts())
    assert isinstance(fixed.trust, Clip)
    gradient = torch.cat([run(fixed, piece, advantage=a, totals=totals).gradient for piece, a in pieces])
    torch.testing.assert_close(gradient, whole.gradient)


def test_other_methods_have_no_bounds_to_choose() -> None:
    method, batch = make_method("grpo"), make_batch(0)
    assert (
        step_statistics(method, batch.rollouts(), batch.logp, advantage=torch.ones(len(batch.logp))) is None
    )
    assert with_bounds(method, None) is method


# ---- errors


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"target": -0.1}, NumericError, "target: got -0.1, expected"),
        ({"target": math.nan}, NumericError, "target: got nan, expected"),
        ({"measure": "ratio"}, ConfigError, "measure: got 'ratio', expected one of"),
        ({"first": "both"}, ConfigError, "first: got 'both', expected one of"),
        ({"low": 0.95}, NumericError, "low, low_end: got 0.95, 0.9, step 0.02"),
        ({"low": -0.1}, NumericError, "low, low_end: got -0.1"),
        ({"low_end": 1.1}, NumericError, "low, low_end: got 0.6, 1.1"),
        ({"low_step": 0.0}, NumericError, "low, low_end: got 0.6, 0.9, step 0.0"),
        ({"high": 0.9}, NumericError, "high, high_end: got 0.9"),
        ({"high_end": math.inf}, NumericError, "high, high_end: got 1.2, inf"),
        ({"high_step": math.nan}, NumericError, "high, high_end: got 1.2, 3.0, step nan"),
        ({"high_step": 1e-9}, NumericError, "high, high_end: got 1.2, 3.0, step 1e-09"),
        ({"dual": 1.0}, NumericError, "dual: got 1.0"),
    ],
)
def test_bad_settings(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        Balance(**options)


@pytest.mark.parametrize("statistics", [torch.zeros(3), torch.zeros(37 + 16, 1), torch.zeros(54)])
def test_statistics_of_another_grid(statistics: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"^statistics: got shape .*expected \(53,\)"):
        Balance().fitted(statistics)
