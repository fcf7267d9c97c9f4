"""Importance corrections against one completion at a time, and what they must leave alone."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.methods import make_method
from kalman_rl.objectives.aggregate import sequence_mean, token_mean, totals_of
from kalman_rl.objectives.correction import (
    CORRECTIONS,
    FilteredTruncated,
    Masked,
    Rejected,
    Truncated,
    TruncatedRejected,
    mismatch,
)
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.penalty import KL
from kalman_rl.objectives.ratio.transforms import BehaviourToken
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import Trust
from kalman_rl.registry import make
from tests.oracles.batches import Batch, make_batch

quick = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
LEVELS = ["token", "sequence", "geometric"]
levels = pytest.mark.parametrize("level", LEVELS)


def case(seed: int, packed: bool = False, scale: float = 0.5) -> tuple[Batch, Tensor, Rollouts]:
    batch = make_batch(seed, 5, 8)
    g = torch.Generator().manual_seed(seed)
    behaviour = batch.logp_old + scale * torch.randn(5, 8, generator=g, dtype=torch.float64)
    behaviour[~batch.mask] = math.nan
    segment = torch.randint(2, (5, 8), generator=g).cumsum(1) if packed else None
    return batch, behaviour, batch.rollouts(logp_behaviour=behaviour, segment=segment)


def naive_mismatch(rollouts: Rollouts, level: str) -> list[list[float]]:
    """D from its definition, token by token; a sequence is a run of one row with one segment value."""
    assert rollouts.logp_behaviour is not None
    rows, length = rollouts.mask.shape
    out = [[0.0] * length for _ in range(rows)]
    for i in range(rows):
        marks = [0] * length if rollouts.segment is None else rollouts.segment[i].tolist()
        for t in range(length):
            if not rollouts.mask[i, t]:
                continue
            start, end = t, t + 1
            while start > 0 and marks[start - 1] == marks[t]:
                start -= 1
            while end < length and marks[end] == marks[t]:
                end += 1
            window = range(start, end) if level != "token" else [t]
            d = [
                (rollouts.logp_old[i, u] - rollouts.logp_behaviour[i, u]).item()
                for u in window
                if rollouts.mask[i, u]
            ]
            out[i][t] = math.fsum(d) / (len(d) if level == "geometric" else 1)
    return out


# ---- the factor


@levels
@quick
@given(seed=seeds, packed=st.booleans())
def test_factors_against_scalar_loops(level: Any, seed: int, packed: bool) -> None:
    _, _, rollouts = case(seed, packed)
    expected = naive_mismatch(rollouts, level)
    torch.testing.assert_close(mismatch(rollouts, level), torch.tensor(expected, dtype=torch.float64))
    truncated, masked = Truncated(1.3, level)(rollouts), Masked(0.7, 1.4, level)(rollouts)
    for i, row in enumerate(expected):
        for t, d in enumerate(row):
            w = math.exp(d)
            assert truncated[i, t].item() == pytest.approx(min(w, 1.3), rel=1e-12)
            assert masked[i, t].item() == pytest.approx(w if 0.7 <= w <= 1.4 else 0.0, rel=1e-12)


@levels
def test_packed_rows_are_their_sequences_in_rows_of_their_own(level: Any) -> None:
    batch, behaviour, _ = case(11)
    packed = Rollouts(
        batch.logp_old.reshape(1, -1),
        batch.mask.reshape(1, -1),
        logp_behaviour=behaviour.reshape(1, -1),
        segment=torch.arange(5).repeat_interleave(8)[None],
    )
    plain = batch.rollouts(logp_behaviour=behaviour)
    for part in (Truncated(1.2, level), Masked(0.8, 1.3, level)):
        torch.testing.assert_close(part(packed).reshape(5, 8), part(plain), rtol=1e-14, atol=0)


@levels
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [30.0, 1000.0, 1e30])
def test_extreme_mismatches_stay_finite(level: Any, dtype: torch.dtype, size: float) -> None:
    old = torch.full((2, 4), -1.0, dtype=dtype)
    behaviour = old - torch.tensor([[size], [-size]], dtype=dtype)
    rollouts = Rollouts(old, torch.ones(2, 4), logp_behaviour=behaviour)
    for part in (Truncated(2.0, level), Truncated(math.inf, level), Masked(0.0, math.inf, level)):
        factor = part(rollouts)
        assert torch.isfinite(factor).all() and (factor >= 0).all()
        assert (factor[0] > 1).all() and (factor[1] < 1e-12).all()
    assert (Masked(level=level)(rollouts) == 0).all()
    assert (Truncated(2.0, level)(rollouts)[0] == 2).all()


@levels
def test_the_same_policy_costs_nothing(level: Any) -> None:
    batch = make_batch(0)
    rollouts = batch.rollouts(logp_behaviour=batch.logp_old)
    for part in (Truncated(1.0, level), Masked(1.0, 1.0, level)):
        assert (part(rollouts) == 1).all()


def naive_statistic(d: float, name: str) -> float:
    return {"k1": -d, "k2": d * d / 2, "k3": math.exp(d) - 1 - d}[name]


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
@quick
@given(seed=seeds, packed=st.booleans(), high=st.sampled_from([0.02, 0.1, 0.5]))
def test_rejection_against_scalar_loops(name: Any, seed: int, packed: bool, high: float) -> None:
    _, _, rollouts = case(seed, packed)
    tokens, index = naive_mismatch(rollouts, "token"), rollouts.sequence_index
    for over, of in (
        ("token", None),
        ("sum", math.fsum),
        ("mean", lambda v: math.fsum(v) / len(v)),
        ("max", max),
    ):
        if (name, over) == ("k1", "max"):
            continue
        found = Rejected(name, over, high, low=high / 2)(rollouts)
        for i, t in rollouts.mask.nonzero().tolist():
            same = (rollouts.mask & (index == index[i, t])).nonzero().tolist()
            values = [naive_statistic(tokens[a][b], name) for a, b in (same if of else [(i, t)])]
            value = of(values) if of else values[0]
            if abs(value - high) > 1e-12 and abs(value + high / 2) > 1e-12:
                assert found[i, t].item() == (-high / 2 <= value <= high)


@quick
@given(seed=seeds, packed=st.booleans(), q=st.sampled_from([0.0, 0.1, 3.0, math.inf]))
def test_the_filtered_factor_against_the_recursion(seed: int, packed: bool, q: float) -> None:
    """The scalar filter by hand; in its limits the token's own weight, and at the last token the geometric one."""
    _, _, rollouts = case(seed, packed)
    tokens, index = naive_mismatch(rollouts, "token"), rollouts.sequence_index
    found, geometric = FilteredTruncated(q, 1.4)(rollouts), Truncated(1.4, "geometric")(rollouts)
    for n in index[rollouts.mask].unique().tolist():
        places = (rollouts.mask & (index == n)).nonzero().tolist()
        mean, variance, last = 0.0, math.inf, places[0][1]
        for i, t in places:
            variance += q * (t - last) if t > last else 0.0
            gain = 1.0 if math.isinf(variance) else variance / (variance + 1)
            mean, variance, last = mean + gain * (tokens[i][t] - mean), gain, t
            assert found[i, t].item() == pytest.approx(min(math.exp(mean), 1.4), rel=1e-9)
        if q == 0:
            assert found[i, t].item() == pytest.approx(geometric[i, t].item(), rel=1e-9)


def test_icepop_is_a_masked_token_weight() -> None:
    assert make("correction", CORRECTIONS, "icepop", {}) == Masked(0.5, 5.0, "token")


# ---- in the objective


@levels
@quick
@given(seed=seeds, name=st.sampled_from(["grpo", "gspo", "cispo", "sapo", "kpo_diffuse"]))
def test_gradient_and_value_are_multiplied_token_by_token(level: Any, seed: int, name: str) -> None:
    """Denominators and the penalty are untouched: the plain token terms, each times its factor."""
    _, _, rollouts = case(seed)
    batch = make_batch(seed, 5, 8)
    method = dataclasses.replace(make_method(name), penalty=KL(0.1))
    part = Masked(0.7, 1.4, level)
    corrected = dataclasses.replace(method, correction=part)
    factor = part(rollouts)
    found = []
    for one in (method, corrected, dataclasses.replace(method, trust=_nothing)):
        logp = batch.logp.clone().requires_grad_()
        out = policy_loss(one, rollouts, logp)
        out.value.backward()
        found.append((out, logp.grad))
    (plain, before), (ours, after), (_, penalty) = found
    torch.testing.assert_close(after - penalty, factor * (before - penalty), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(
        ours.metrics["objective/penalty"], plain.metrics["objective/penalty"], rtol=0, atol=0
    )
    weights = method.aggregate(rollouts, totals_of(rollouts))
    trust = method.trust(
        method.ratio(batch.logp, rollouts), _advantage(method, rollouts), _current(batch, rollouts), rollouts
    )
    expected = (weights * torch.where(rollouts.mask, factor * trust.surrogate, 0.0)).sum()
    torch.testing.assert_close(ours.metrics["objective/surrogate"], expected)
    assert torch.equal(ours.tokens.kept, plain.tokens.kept)


def _nothing(ratio: Any, advantage: Tensor, current: Any, rollouts: Any) -> Any:
    zero = torch.zeros_like(advantage)
    return Trust(zero.bool(), zero, zero)


def _advantage(method: Any, rollouts: Rollouts) -> Tensor:
    values = method.advantage(rollouts.reward, rollouts.group)
    return torch.where(rollouts.mask, values[:, None], 0.0)


def _current(batch: Batch, rollouts: Rollouts) -> Any:
    return Current(torch.where(rollouts.mask, batch.logp, 0.0))


@pytest.mark.parametrize("aggregate", [token_mean, sequence_mean])
def test_masked_out_tokens_stay_in_the_denominator(aggregate: Any) -> None:
    old = torch.full((2, 4), -1.0, dtype=torch.float64)
    behaviour = old.clone()
    behaviour[0] = -9.0
    rollouts = Rollouts(old, torch.ones(2, 4), logp_behaviour=behaviour)
    method = dataclasses.replace(make_method("grpo"), aggregate=aggregate, correction=Masked())
    logp = old.clone().requires_grad_()
    policy_loss(method, rollouts, logp, advantage=torch.ones(2, dtype=torch.float64)).value.backward()
    assert logp.grad is not None
    assert (logp.grad[0] == 0).all() and torch.allclose(logp.grad[1], torch.full((4,), -1 / 8).double())


@levels
def test_metrics(level: Any) -> None:
    batch, _, rollouts = case(3)
    method = dataclasses.replace(make_method("grpo"), correction=Truncated(1.3, level))
    metrics = policy_loss(method, rollouts, batch.logp).metrics
    factor = Truncated(1.3, level)(rollouts)[rollouts.mask]
    assert metrics["correction/mean"].item() == pytest.approx(factor.mean().item(), rel=1e-6)
    share = factor.sum() ** 2 / (len(factor) * factor.square().sum())
    assert metrics["correction/effective_sample_size"].item() == pytest.approx(share.item(), rel=1e-6)
    assert not any(
        k.startswith("correction/") for k in policy_loss(make_method("grpo"), rollouts, batch.logp).metrics
    )


# ---- errors


@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl", "drpo", "vaco"])
@pytest.mark.parametrize(
    "part", [Truncated(), Masked(), FilteredTruncated(), Rejected(), TruncatedRejected()]
)
def test_a_ratio_to_the_sampler_is_not_corrected_again(name: str, part: Any) -> None:
    with pytest.raises(
        ConfigError,
        match=r"^correction: got .* beside the ratio BehaviourToken.*expected None .*would count twice",
    ):
        dataclasses.replace(make_method(name), correction=part)
    assert make_method(name).ratio == BehaviourToken()


@pytest.mark.parametrize(
    "part", [Truncated(), Masked(), FilteredTruncated(), Rejected(), TruncatedRejected()]
)
def test_behaviour_is_asked_for_by_name(part: Any) -> None:
    method = dataclasses.replace(make_method("grpo"), correction=part)
    assert method.inputs == ("logp_behaviour",)
    batch = make_batch(0)
    with pytest.raises(ConfigError, match=r"^logp_behaviour: got None .*Rollouts\(logp_behaviour="):
        policy_loss(method, batch.rollouts(logp_behaviour=None), batch.logp)


@pytest.mark.parametrize(
    "part, options, error, message",
    [
        (Truncated, {"cap": 0.0}, NumericError, "cap: got 0.0"),
        (Truncated, {"cap": math.nan}, NumericError, "cap: got nan"),
        (Truncated, {"level": "row"}, ConfigError, "level: got 'row', expected one of token, sequence"),
        (Masked, {"low": -0.1}, NumericError, "low, high: got -0.1"),
        (Masked, {"low": 3.0}, NumericError, "low, high: got 3.0, 2.0"),
        (Masked, {"low": 0.0, "high": 0.0}, NumericError, "low, high: got 0.0, 0.0"),
        (Masked, {"low": math.inf, "high": math.inf}, NumericError, "low, high: got inf"),
        (Masked, {"high": math.nan}, NumericError, "low, high: got 0.5, nan"),
        (Masked, {"level": "mean"}, ConfigError, "level: got 'mean'"),
        (
            FilteredTruncated,
            {"noise_ratio": -1.0},
            NumericError,
            "noise_ratio: got -1.0, expected Q / R >= 0",
        ),
        (FilteredTruncated, {"cap": 0.0}, NumericError, "cap: got 0.0"),
        (Rejected, {"statistic": "k4"}, ConfigError, "statistic: got 'k4', expected one of k1, k2, k3"),
        (Rejected, {"over": "row"}, ConfigError, "over: got 'row', expected one of token, sum, mean, max"),
        (Rejected, {"statistic": "k1", "over": "max"}, ConfigError, "over: got 'max' with statistic 'k1'"),
        (Rejected, {"high": -0.1}, NumericError, "high: got -0.1, expected a bound >= 0 in nats"),
        (TruncatedRejected, {"cap": 0.0}, NumericError, "cap: got 0.0"),
        (TruncatedRejected, {"over": "row"}, ConfigError, "over: got 'row', expected one of token, sum"),
        (Rejected, {"low": math.nan}, NumericError, "low: got nan, expected a bound >= 0"),
    ],
)
def test_bad_settings(part: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^{message}"):
        part(**options)


def test_by_name() -> None:
    made = make("correction", CORRECTIONS, "masked", {"low": 0.999, "high": 1.001, "level": "geometric"})
    assert made == Masked(0.999, 1.001, "geometric")
    with pytest.raises(
        ConfigError, match=r"^correction: got 'trunc', expected one of .*did you mean 'truncated'"
    ):
        make("correction", CORRECTIONS, "trunc", {})
