"""Trust regions of 2026 where the tests over all methods do not look: bounds, packing, splits, negative weights."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from benchmarks.learning import bounds
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.methods import cards, make_method
from kalman_rl.numerics.log_bins import edge
from kalman_rl.objectives import ratio, trust
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.moment import BINS, SecondMoment
from kalman_rl.objectives.trust.prefix import before, quantile
from tests.oracles.batches import make_batch, run

quick = settings(max_examples=30, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)


def moved(probability: Tensor, before_it: Tensor) -> tuple[ratio.Ratio, Current, Rollouts]:
    """Tokens whose probability went from one value to the other."""
    old, logp = before_it.log()[None], probability.log()[None]
    rollouts = Rollouts(old, torch.ones_like(old), logp_behaviour=old)
    return ratio.BehaviourToken()(logp, rollouts), Current(logp), rollouts


# ---- a quadratic price


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_drpos_published_bound_reverses_no_token_and_a_fifth_does(sign: float) -> None:
    """Every pair of probabilities on a grid: ``c / w = 1 - sign(A) (pi - mu) / bound``."""
    grid = torch.linspace(1e-6, 1 - 1e-6, 301, dtype=torch.float64)
    pi, mu = (values.flatten() for values in torch.meshgrid(grid, grid, indexing="ij"))
    found, current, rollouts = moved(pi, mu)
    advantage = torch.full_like(found.log_ratio, sign)
    for bound, ends in ((12.5, (0.92, 1.08)), (0.2, (-4.0, 6.0))):
        kept = trust.Quadratic(bound, by_probability=True)(found, advantage, current, rollouts)
        share = kept.weight / found.log_weight.exp()
        assert share.min().item() == pytest.approx(ends[0], abs=1e-4)
        assert share.max().item() == pytest.approx(ends[1], abs=1e-4)
        assert kept.keep.all()


def test_a_negative_weight_pushes_a_token_back() -> None:
    """Ratio 1.5 at a bound of 0.2: the better the completion, the more its token loses."""
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    logp = (old + torch.tensor(1.5).log()).requires_grad_()
    rollouts = Rollouts(old, torch.ones_like(old))
    loss = policy_loss(make_method("cfpo", bound=0.2), rollouts, logp, advantage=torch.ones(1))
    loss.value.backward()
    assert logp.grad is not None and loss.tokens.coefficient.item() == pytest.approx(1.5 * (1 - 0.5 / 0.2))
    assert logp.grad.item() == pytest.approx(-loss.tokens.coefficient.item()) and logp.grad.item() > 0
    assert 0 < loss.metrics["ratio/effective_sample_size"] <= 1


def test_the_cards_say_what_was_measured() -> None:
    """The written table is what this code finds, and the cards of DRPO and VESPO quote it."""
    found, written = bounds.measured(), json.loads(bounds.RESULTS.read_text(encoding="utf-8"))
    for name, rows in found.items():
        for row, expected in zip(rows, written[name], strict=True):
            assert row == pytest.approx(expected, rel=1e-6)
    shares = {row["length"]: row["effective_share"] for row in found["vespo"]}
    said = cards.card("vespo")["avoid"]
    assert f"{shares[16]:.2f} at 16 tokens, {shares[256]:.2f} at 256, {shares[4096]:.4f} at 4096" in said
    published, small = found["drpo"]
    assert published["pulled_back"] == 0 and 0.92 < published["least"] < published["most"] < 1.08
    assert f"0.2 pulls back {100 * small['pulled_back']:.1f} % of the tokens" in cards.card("drpo")["avoid"]


# ---- a prefix's budget


@quick
@given(seed=seeds)
def test_sums_before_and_quantiles_of_packed_rows_are_those_of_their_sequences(seed: int) -> None:
    batch = make_batch(seed, 4, 7)
    g = torch.Generator().manual_seed(seed)
    value = torch.rand(4, 7, generator=g, dtype=torch.float64)
    apart = Rollouts(batch.logp_old, batch.mask)
    packed = Rollouts(
        batch.logp_old.reshape(1, -1),
        batch.mask.reshape(1, -1),
        segment=torch.arange(4).repeat_interleave(7)[None],
    )
    for of in (before, lambda values, rollouts: quantile(values, rollouts, 0.9)):
        apart_found, packed_found = (of(value.reshape(r.mask.shape), r) for r in (apart, packed))
        expected = torch.where(batch.mask, apart_found, 0.0)
        found = torch.where(packed.mask, packed_found, 0.0).reshape(4, 7)
        torch.testing.assert_close(found, expected)
    for i, row in enumerate(batch.mask):
        own = value[i, row]
        torch.testing.assert_close(quantile(value, apart, 0.9)[i, row], own.quantile(0.9).expand(len(own)))
        torch.testing.assert_close(before(value, apart)[i, row], own.cumsum(0) - own)


def test_quantiles_of_sequences_without_tokens_are_not_read() -> None:
    mask = torch.tensor([[0, 0], [1, 0], [0, 0], [1, 1], [0, 0]])
    values = torch.arange(10.0).reshape(5, 2)
    found = quantile(values, Rollouts(torch.zeros(5, 2), mask, allow_empty=True), 0.5)
    assert found.tolist() == [[0, 0], [2, 0], [0, 0], [6.5, 6.5], [0, 0]]
    assert not quantile(values, Rollouts(torch.zeros(5, 2), 0 * mask, allow_empty=True), 0.5).any()


def test_a_spent_budget_stops_what_a_single_token_may_do() -> None:
    """Six tokens gain 0.15 each: alone every one is allowed, together the prefix has spent more than it earned."""
    old = torch.full((1, 6), 0.3, dtype=torch.float64).log()
    logp = torch.full((1, 6), 0.45, dtype=torch.float64).log()
    rollouts = Rollouts(old, torch.ones(1, 6), logp_behaviour=old)
    found = ratio.BehaviourToken()(logp, rollouts)
    for advantage, kept in ((1.0, [True] + [False] * 5), (-1.0, [True] * 6)):
        region = trust.PrefixBudget(0.2, 0.02, 1.0)(
            found, torch.full_like(old, advantage), Current(logp), rollouts
        )
        assert region.keep[0].tolist() == kept


# ---- a batch's second moment


@quick
@given(seed=seeds, bound=st.sampled_from([0.005, 0.02, 0.08]))
def test_the_limit_is_that_of_the_whole_step_however_it_is_split(seed: int, bound: float) -> None:
    batch, method = make_batch(seed, 8, 9), make_method("m2po", bound=bound)
    whole = run(method, batch)
    parts = []
    for rows in (slice(0, 3), slice(3, 4), slice(4, 8)):
        part = batch.rows(torch.arange(8)[rows])
        rollouts = part.rollouts()
        found = method.ratio(torch.where(rollouts.mask, part.logp, 0.0), rollouts)
        parts.append(method.trust.statistics(found, part.logp, Current(part.logp), rollouts))
    step = run(dataclasses.replace(method, trust=method.trust.fitted(sum(parts))), batch)
    assert torch.equal(step.gradient, whole.gradient)
    size = whole.loss.tokens.log_ratio[whole.loss.tokens.kept].square()
    assert size.mean() < bound or len(size) <= 2
    gone = whole.loss.tokens.log_ratio[batch.mask & ~whole.loss.tokens.kept].abs()
    assert not len(gone) or size.sqrt().max() <= gone.min()


def test_without_a_bound_the_band_ends_above_the_farthest_token() -> None:
    """The last bin has no upper end; the one below it has."""
    part = SecondMoment(math.inf)
    for last, ends in ((BINS - 1, False), (BINS - 2, True), (5, True)):
        state = part.initial()
        state[[3, last]], state[[BINS + 3, BINS + last]] = 1.0, 1.0
        band = part.fitted(state)
        assert band.low == band.high == (edge(last + 1.5, BINS) if ends else math.inf)


def test_statistics_of_something_else_are_refused() -> None:
    with pytest.raises(ShapeError, match=rf"^statistics: got shape \(4,\), expected \({2 * BINS},\)"):
        trust.SecondMoment().fitted(torch.zeros(4))


# ---- lags


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
def test_lags_are_counts(bad: float) -> None:
    lag = torch.tensor([[0.0, bad]])
    with pytest.raises(NumericError, match="^lag: got .* at row 0, token 1"):
        Rollouts(torch.full((1, 2), -1.0), torch.ones(1, 2), lag=lag)
    Rollouts(torch.full((1, 2), -1.0), torch.tensor([[1, 0]]), lag=lag)  # outside the mask nothing is read


def test_a_lag_takes_back_all_steps_but_the_last() -> None:
    old = torch.full((1, 4), -2.0, dtype=torch.float64)
    rollouts = Rollouts(old, torch.ones(1, 4), logp_behaviour=old, lag=torch.tensor([[0, 1, 2, 4]]))
    found = ratio.Lagged()(old + 0.8, rollouts)
    assert found.log_weight[0].tolist() == pytest.approx([0.8, 0.8, 0.4, 0.2])
    assert found.log_ratio[0].tolist() == pytest.approx([0.8] * 4)
