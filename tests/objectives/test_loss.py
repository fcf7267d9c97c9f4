"""Invariances that every method must have, and the formula itself.

The tests run over ``TABLE`` (all of ``METHODS``) or ``CASES`` (with more options), so that a new method is
tested by being in the table.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives import aggregate, diagnostics, ratio, trust
from kalman_rl.objectives.aggregate import Totals, totals_of
from kalman_rl.objectives.learning import step_statistics, with_bounds
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.penalty import KL
from kalman_rl.objectives.rollouts import Rollouts
from tests.oracles.batches import (
    CASES,
    TABLE,
    TOKEN_FIELDS,
    Batch,
    Outcome,
    advantage_of,
    depends_on_order,
    gspo_loss,
    has_band,
    has_own_baseline,
    is_filtered,
    make_batch,
    naive_coefficient,
    naive_log_weight,
    naive_metrics,
    on_policy,
    per_token,
    ppo_surrogate,
    run,
    uninformative_reward,
)

every = pytest.mark.parametrize("name", list(CASES))
few = settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10_000)
shapes = st.tuples(st.integers(1, 6), st.integers(1, 12))

EXACT = {"rtol": 1e-11, "atol": 1e-13}


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(EXACT | tolerance), check_dtype=False)


def same(a: Outcome, b: Outcome, **tolerance: float) -> None:
    close(a.value, b.value, **tolerance)
    close(a.gradient, b.gradient, **tolerance)


def metrics_close(a: dict[str, float], b: dict[str, float]) -> None:
    assert a == pytest.approx(b, rel=2e-5, abs=1e-6)


def without_penalty(method: Method) -> Method:
    return dataclasses.replace(method, penalty=None)


def test_the_table_is_the_table() -> None:
    assert set(TABLE) == set(METHODS) and set(TABLE) <= set(CASES)


# ---- the formula


@every
@few
@given(seed=seeds, shape=shapes)
def test_gradient_is_the_formula(name: str, seed: int, shape: tuple[int, int]) -> None:
    method, batch = without_penalty(CASES[name]), make_batch(seed, *shape)
    out = run(method, batch)
    weights = method.aggregate(out.rollouts, totals_of(out.rollouts))
    advantage = per_token(advantage_of(method, batch))
    close(out.gradient, -weights * out.loss.tokens.coefficient * advantage, rtol=1e-14, atol=0.0)
    assert (out.gradient[~batch.mask] == 0).all()


@every
@few
@given(seed=seeds, shape=shapes)
def test_log_weight_and_coefficient_against_scalar_loops(
    name: str, seed: int, shape: tuple[int, int]
) -> None:
    method, batch = CASES[name], make_batch(seed, *shape)
    out = run(method, batch)
    expected = torch.from_numpy(naive_log_weight(method, batch))
    close(out.loss.tokens.log_weight, expected)
    weight, keep = naive_coefficient(method, batch, expected.numpy(), advantage_of(method, batch))
    factor = 1.0 if method.correction is None else method.correction(out.rollouts)
    assert torch.equal(out.loss.tokens.kept, torch.from_numpy(keep) & batch.mask)
    close(
        out.loss.tokens.coefficient, torch.where(out.loss.tokens.kept, torch.from_numpy(weight), 0.0) * factor
    )


@pytest.mark.parametrize(
    "name", [n for n, m in CASES.items() if m.ratio is ratio.token and has_band(m) and m.correction is None]
)
@few
@given(seed=seeds, shape=shapes)
def test_token_clip_is_autograd_of_the_literal_ppo_loss(name: str, seed: int, shape: tuple[int, int]) -> None:
    method, batch = without_penalty(CASES[name]), make_batch(seed, *shape, scale=0.5)
    out = run(method, batch)
    logp = batch.logp.clone().requires_grad_()
    limits = method.trust
    advantage = per_token(advantage_of(method, batch))
    token = ppo_surrogate(logp, batch.logp_old, advantage, limits.low, limits.high, limits.dual)
    literal = (token * method.aggregate(out.rollouts, totals_of(out.rollouts))).sum()
    literal.backward()
    close(out.value, literal.detach())
    close(out.gradient, logp.grad)


@few
@given(seed=seeds, shape=shapes)
def test_gspo_is_autograd_of_the_literal_sequence_loss(seed: int, shape: tuple[int, int]) -> None:
    method, batch = make_method("gspo", low=0.05, high=0.08), make_batch(seed, *shape)
    out = run(method, batch)
    logp = batch.logp.clone().requires_grad_()
    literal = gspo_loss(logp, batch.logp_old, batch.mask, advantage_of(method, batch), 0.05, 0.08)
    literal.backward()
    close(out.value, literal.detach())
    close(out.gradient, logp.grad)


@pytest.mark.parametrize("name", ["grpo", "grpo+dual", "dr_grpo", "dapo", "gspo+wide", "grpo+kl"])
def test_gradcheck_where_the_surrogate_is_a_function_of_logp(name: str) -> None:
    """Finite differences of the *value* agree with backward, although value and gradient are built apart."""
    method, batch = CASES[name], make_batch(5, 6, 7, scale=0.4)
    out = run(method, batch)
    weight = out.loss.tokens.log_weight.exp()[batch.mask]
    edges = [1 - method.trust.low, 1 + method.trust.high, method.trust.dual or 1 + method.trust.high]
    assert min((weight - edge).abs().min() for edge in edges) > 1e-4, "choose a seed away from the kinks"
    assert 0.3 < out.metrics["trust/kept"] < 1, "choose a seed where something is clipped"
    rollouts = batch.rollouts()
    logp = batch.logp.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: policy_loss(method, rollouts, x).value, (logp,), eps=1e-7)


@every
def test_gradient_reaches_logp_and_nothing_else(name: str) -> None:
    batch = make_batch(1)
    others = {k: getattr(batch, k).clone().requires_grad_() for k in ("logp_old", "reward", "reference")}
    leaky = dataclasses.replace(batch, **others)
    assert run(CASES[name], leaky).gradient.abs().sum() > 0
    advantage = torch.randn(batch.mask.shape, dtype=torch.float64, requires_grad=True)
    out = run(CASES[name], leaky, advantage=advantage)
    assert [x.grad for x in (*others.values(), advantage)] == [None] * 4
    for value in (*out.loss.metrics.values(), *out.loss.tokens):
        assert value is None or not value.requires_grad


@every
def test_value_is_the_surrogate_and_the_penalty(name: str) -> None:
    out = run(CASES[name], make_batch(2))
    m = out.metrics
    assert out.value.item() == pytest.approx(m["objective/surrogate"] + m.get("objective/penalty", 0.0))
    assert ("objective/penalty" in m) == (CASES[name].penalty is not None)


# ---- masks, padding, order, packing, splitting


@every
@few
@given(seed=seeds, shape=shapes)
def test_what_stands_under_the_mask_is_never_seen(name: str, seed: int, shape: tuple[int, int]) -> None:
    batch, method = make_batch(seed, *shape), CASES[name]
    advantage = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    clean = run(method, batch, advantage=advantage)
    for poison in (math.nan, math.inf, -1e30):
        under = {f: torch.where(batch.mask, getattr(batch, f), poison) for f in TOKEN_FIELDS}
        dirty = dataclasses.replace(batch, **under)
        out = run(method, dirty, advantage=torch.where(batch.mask, advantage, poison))
        assert torch.equal(out.value, clean.value)
        assert torch.equal(out.gradient, clean.gradient)
        assert out.metrics == clean.metrics
        for a, b in zip(out.loss.tokens, clean.loss.tokens):
            assert a is b is None or torch.equal(a, b)


@every
@few
@given(seed=seeds, shape=shapes, left=st.integers(0, 5), right=st.integers(0, 5))
def test_padding_changes_nothing(name: str, seed: int, shape: tuple[int, int], left: int, right: int) -> None:
    batch = make_batch(seed, *shape)
    padded = batch.tokens(lambda x, fill: torch.nn.functional.pad(x, (left, right), value=fill))
    plain, out = run(CASES[name], batch), run(CASES[name], padded)
    close(out.value, plain.value)
    close(out.gradient[:, left : left + shape[1]], plain.gradient)
    metrics_close(out.metrics, plain.metrics)


@every
@few
@given(seed=seeds, shape=shapes)
def test_order_of_rows_changes_nothing(name: str, seed: int, shape: tuple[int, int]) -> None:
    batch = make_batch(seed, *shape)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    advantage = advantage_of(CASES[name], batch)
    if not depends_on_order(CASES[name]):
        close(advantage_of(CASES[name], batch.rows(order)), advantage[order])
    plain = run(CASES[name], batch, advantage=advantage)
    out = run(CASES[name], batch.rows(order), advantage=advantage[order])
    close(out.value, plain.value)
    close(out.gradient, plain.gradient[order])
    metrics_close(out.metrics, plain.metrics)


def pack(batch: Batch, per_row: int) -> tuple[Batch, Callable[[Tensor], Tensor]]:
    """``per_row`` sequences one after another in each row, with poisoned filler; and how to unpack."""
    rows, length = batch.mask.shape
    lines = -(-rows // per_row)
    filler = lines * per_row - rows

    def line_up(x: Tensor, fill: Any) -> Tensor:
        x = torch.nn.functional.pad(x, (0, 0, 0, filler), value=fill)
        return x.reshape(lines, per_row * length)

    packed = batch.tokens(line_up)
    segment = torch.arange(per_row).repeat_interleave(length).expand(lines, -1).clone()
    return dataclasses.replace(packed, segment=segment), lambda x: x.reshape(-1, length)[:rows]


@every
@few
@given(seed=seeds, shape=shapes, per_row=st.integers(1, 4))
def test_packed_rows_equal_unpacked_rows(name: str, seed: int, shape: tuple[int, int], per_row: int) -> None:
    batch, method = make_batch(seed, *shape), CASES[name]
    advantage = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = run(method, batch, advantage=advantage)
    packed, unpack = pack(batch, per_row)
    lines = torch.full(packed.mask.shape, math.nan, dtype=torch.float64)
    lines.view(-1)[: advantage.numel()] = advantage.flatten()
    options = {"reward": None, "group": None, "allow_empty": True}
    out = run(method, packed, options=options, advantage=lines)
    close(out.value, plain.value)
    close(unpack(out.gradient), plain.gradient)
    metrics_close(out.metrics, plain.metrics)
    for a, b in zip(out.loss.tokens, plain.loss.tokens):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            close(torch.where(batch.mask, unpack(a), 0), torch.where(batch.mask, b, 0))


@every
@few
@given(seed=seeds, shape=shapes, cuts=st.lists(st.integers(0, 6), max_size=3))
def test_micro_batches_sum_to_the_batch(
    name: str, seed: int, shape: tuple[int, int], cuts: list[int]
) -> None:
    batch, method = make_batch(seed, *shape), CASES[name]
    advantage = advantage_of(method, batch)
    totals = totals_of(batch.rollouts())
    assert totals == Totals(float(batch.mask.sum()), float(shape[0]))
    whole = run(method, batch, advantage=advantage)
    edges = sorted({0, shape[0], *(min(c, shape[0]) for c in cuts)})
    slices = [(batch.rows(torch.arange(a, b)), advantage[a:b]) for a, b in itertools.pairwise(edges)]
    statistics = [
        step_statistics(method, part.rollouts(), part.current(part.logp), advantage=a) for part, a in slices
    ]
    if statistics[0] is not None:  # bounds of the whole step, from sums over its parts
        method = with_bounds(method, torch.stack([s for s in statistics if s is not None]).sum(0))
    parts = [run(method, part, advantage=a, totals=totals) for part, a in slices]
    close(torch.stack([p.value for p in parts]).sum(), whole.value, rtol=1e-12)
    close(torch.cat([p.gradient for p in parts]), whole.gradient, rtol=1e-12)


@every
def test_an_all_masked_micro_batch_adds_nothing(name: str) -> None:
    """A rank may get only empty rows; it must still call backward and add zero."""
    batch = make_batch(3)
    empty = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    for totals in (None, Totals(50.0, 6.0)):
        out = run(CASES[name], empty, options={"allow_empty": True}, totals=totals)
        assert out.value.item() == 0
        assert (out.gradient == 0).all()
        assert all(math.isfinite(v) for v in out.metrics.values())


@every
@few
@given(seed=seeds, shape=st.tuples(st.integers(2, 6), st.integers(1, 9)))
def test_empty_rows_count_for_nothing(name: str, seed: int, shape: tuple[int, int]) -> None:
    batch, method = make_batch(seed, *shape), CASES[name]
    advantage = advantage_of(method, batch)
    gone = torch.arange(shape[0]) == seed % shape[0]
    holey = dataclasses.replace(batch, mask=batch.mask & ~gone[:, None])
    with_empty = run(method, holey, options={"allow_empty": True}, advantage=advantage)
    without = run(method, batch.rows(~gone), advantage=advantage[~gone])
    close(with_empty.value, without.value)
    close(with_empty.gradient[~gone], without.gradient)
    assert (with_empty.gradient[gone] == 0).all()
    metrics_close(with_empty.metrics, without.metrics)


@pytest.mark.parametrize("name", [n for n, m in CASES.items() if is_filtered(m)])
@few
@given(seed=seeds, t=st.integers(0, 8))
def test_filtered_weights_are_causal(name: str, seed: int, t: int) -> None:
    """What comes after token t never changes its coefficient, nor do other rows."""
    batch = make_batch(seed, 4, 10)
    advantage = advantage_of(CASES[name], batch)
    future = batch.logp.clone()
    future[:, t + 1 :] -= 3.0
    future[2] -= 1.0
    before = run(CASES[name], batch, advantage=advantage).loss.tokens
    after = run(CASES[name], dataclasses.replace(batch, logp=future), advantage=advantage).loss.tokens
    rows = torch.tensor([0, 1, 3])
    close(after.coefficient[rows, : t + 1], before.coefficient[rows, : t + 1])
    assert torch.equal(after.kept[rows, : t + 1], before.kept[rows, : t + 1])


# ---- types and sizes


@every
@few
@given(seed=seeds)
def test_bfloat16_is_upcast_before_any_difference(name: str, seed: int) -> None:
    batch = make_batch(seed).each(lambda x: x.to(torch.bfloat16) if x.is_floating_point() else x)
    upcast = batch.each(lambda x: x.float() if x.is_floating_point() else x)
    narrow, wide = run(CASES[name], batch), run(CASES[name], upcast)
    assert narrow.loss.value.dtype == torch.float32
    assert torch.equal(narrow.value, wide.value)
    assert torch.equal(narrow.gradient, wide.gradient.to(torch.bfloat16))
    assert narrow.metrics == wide.metrics


@every
@few
@given(seed=seeds)
def test_float32_is_close_to_float64(name: str, seed: int) -> None:
    single = make_batch(seed).each(lambda x: x.float() if x.is_floating_point() else x)
    double = single.each(lambda x: x.double() if x.is_floating_point() else x)
    a, b = run(CASES[name], single), run(CASES[name], double)
    assert (a.loss.value.dtype, b.loss.value.dtype) == (torch.float32, torch.float64)
    flips = a.loss.tokens.kept != b.loss.tokens.kept  # within rounding of a clip bound
    assert flips.float().mean() < 0.05
    close(a.gradient[~flips], b.gradient[~flips].float(), rtol=1e-4, atol=1e-6)
    close(a.value, b.value.float(), rtol=1e-4, atol=1e-5)


@every
def test_mixed_types_follow_logp(name: str) -> None:
    batch = make_batch(4)
    mixed = dataclasses.replace(batch, logp_old=batch.logp_old.float(), reward=batch.reward.float())
    out = run(CASES[name], mixed)
    assert out.loss.value.dtype == torch.float64
    close(out.gradient, run(CASES[name], batch).gradient, rtol=1e-3, atol=1e-5)


@every
@few
@given(seed=seeds, rows=st.integers(1, 5))
def test_one_token_per_completion(name: str, seed: int, rows: int) -> None:
    out = run(CASES[name], make_batch(seed, rows, 1))
    assert torch.isfinite(out.value) and torch.isfinite(out.gradient).all()
    assert out.metrics["ratio/raw_sign_switch"] == 0


@every
def test_a_batch_without_rows(name: str) -> None:
    for segment in (None, torch.zeros(0, 4, dtype=torch.long)):
        batch = dataclasses.replace(make_batch(0, 2, 4).rows(torch.arange(0)), segment=segment)
        out = run(CASES[name], batch, advantage=torch.zeros(0))
        assert out.value.item() == 0 and out.gradient.shape == (0, 4)
        assert all(math.isfinite(v) for v in out.metrics.values())
    assert run(CASES[name], make_batch(0, 2, 4).rows(torch.arange(0))).value.item() == 0


@pytest.mark.parametrize("log_ratio", [19.9, 80.0, 89.0, 1e4])  # 20 itself is decided by rounding
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every
def test_extreme_log_ratios_stay_finite(name: str, dtype: torch.dtype, log_ratio: float) -> None:
    high, low = -0.5, -0.5 - log_ratio
    method = without_penalty(CASES[name])  # the penalty's own overflow is the reference's, not the ratio's
    for old, new in ((low, high), (high, low)):
        batch = make_batch(0, 4, 6, holes=False)
        for field, value in (("logp_old", old), ("behaviour", old), ("logp", new)):
            filled = getattr(batch, field).clone()
            filled[:2] = value
            batch = dataclasses.replace(batch, **{field: filled})
        batch = batch.each(lambda x: x.to(dtype) if x.is_floating_point() else x)
        out = run(method, batch)
        assert torch.isfinite(out.value) and torch.isfinite(out.gradient).all()
        assert all(math.isfinite(v) for v in out.metrics.values()), out.metrics
        assert out.metrics["ratio/max_abs_log_ratio"] == pytest.approx(log_ratio)
        used = naive_log_weight(method, batch.each(lambda x: x.double() if x.is_floating_point() else x))
        assert out.metrics["ratio/capped"] == pytest.approx((used > 20).mean())
        follows = method.ratio in (ratio.token, ratio.sequence_mean) or name.startswith("kpo_diffuse")
        if follows and new > old and log_ratio > 20:
            assert out.metrics["ratio/capped"] > 0


# ---- special batches


@every
@few
@given(seed=seeds, shape=shapes)
def test_on_policy_every_method_is_reinforce(name: str, seed: int, shape: tuple[int, int]) -> None:
    method, batch = without_penalty(CASES[name]), on_policy(make_batch(seed, *shape))
    plain = dataclasses.replace(method, ratio=ratio.one, trust=trust.unclipped, correction=None)
    out, reinforce = run(method, batch), run(plain, batch)
    close(out.gradient, reinforce.gradient, rtol=1e-14, atol=0.0)  # SAPO's 4 g (1 - g) rounds
    weights = method.aggregate(out.rollouts, totals_of(out.rollouts))
    close(out.gradient, -weights * per_token(advantage_of(method, batch)) * batch.mask)
    assert out.metrics["ratio/noop"] == out.metrics["trust/kept"] == 1
    assert out.metrics["ratio/effective_sample_size"] == 1
    assert out.metrics["policy/kl_old"] == out.metrics["ratio/max_abs_log_ratio"] == 0


@every
def test_noop_is_zero_when_one_token_moved(name: str) -> None:
    batch = on_policy(make_batch(1))
    logp = batch.logp_old.clone()
    row, token = batch.mask.nonzero()[-1]
    logp[row, token] += 1e-9
    assert run(CASES[name], dataclasses.replace(batch, logp=logp)).metrics["ratio/noop"] == 0


@every
def test_equal_rewards_teach_nothing(name: str) -> None:
    method, batch = without_penalty(CASES[name]), make_batch(6)
    equal = torch.full_like(batch.reward, uninformative_reward(method))
    out = run(method, dataclasses.replace(batch, reward=equal))
    rounding = 1e-15 if isinstance(method.advantage, (JamesStein, Tracked)) else 0.0  # of a weighted mean
    assert out.gradient.abs().max() <= rounding and abs(out.value.item()) <= rounding


@every
def test_a_group_of_one_teaches_nothing_without_a_baseline_of_its_own(name: str) -> None:
    method, batch = without_penalty(CASES[name]), make_batch(7)
    alone = dataclasses.replace(batch, group=torch.arange(len(batch.reward)))
    out = run(method, alone)
    if has_own_baseline(method):
        assert (out.gradient != 0).any()
        if method.name == "reinforce":
            close(out.gradient, run(method, batch).gradient)
    else:
        assert (out.gradient == 0).all()


@every
def test_missing_rewards_skip_their_rows_only(name: str) -> None:
    method, batch = without_penalty(CASES[name]), make_batch(8)
    missing = torch.arange(len(batch.reward)) == 2
    reward = torch.where(missing, math.nan, batch.reward)
    out = run(method, dataclasses.replace(batch, reward=reward))
    assert (out.gradient[missing] == 0).all()
    rest = advantage_of(method, batch.rows(~missing))
    expected = batch.reward.new_zeros(len(missing), *rest.shape[1:])
    expected[~missing] = rest
    same(out, run(method, batch, advantage=expected))


@pytest.mark.parametrize("name", [n for n, m in CASES.items() if has_band(m) and m.ratio is not ratio.one])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_nothing_kept_gives_exactly_zero_gradient(name: str, sign: float) -> None:
    method, batch = without_penalty(CASES[name]), make_batch(9)
    step = 1e3 if name.startswith("kpo") else 2.0  # the published filter passes almost nothing of a step
    moved = dataclasses.replace(batch, logp=batch.logp_old + sign * step)
    out = run(method, moved, advantage=torch.full((6,), sign, dtype=torch.float64))
    assert (out.gradient == 0).all() and torch.isfinite(out.value)
    assert out.metrics["trust/kept"] == 0
    side = "high" if sign > 0 else "low"
    assert out.metrics[f"trust/clipped_{side}"] == 1


@every
@few
@given(
    seed=seeds,
    shape=st.tuples(st.integers(1, 8), st.integers(2, 12)),
    scale=st.sampled_from([0.01, 0.3, 2.0]),
)
def test_metrics_against_a_loop_over_tokens(
    name: str, seed: int, shape: tuple[int, int], scale: float
) -> None:
    method, batch = CASES[name], make_batch(seed, *shape, scale=scale)
    advantage = advantage_of(method, batch)
    ours = {k: v for k, v in run(method, batch).metrics.items() if not k.startswith("objective/")}
    expected = naive_metrics(method, batch, advantage)
    assert set(ours) == set(expected), "naive_metrics must know every metric"
    for key in ours:
        assert ours[key] == pytest.approx(expected[key], rel=1e-4, abs=1e-7), key


# ---- reductions between methods


@few
@given(seed=seeds)
def test_kpo_with_infinite_process_noise_is_the_token_ratio(seed: int) -> None:
    batch = make_batch(seed)
    clip = {"low": 0.2, "high": 0.2}
    for name in ("kpo", "kpo_diffuse"):
        same(run(make_method(name, process_noise=math.inf, **clip), batch), run(TABLE["grpo"], batch))


@few
@given(seed=seeds)
def test_kpo_without_any_noise_is_ratio_one(seed: int) -> None:
    batch = make_batch(seed)
    still = make_method("kpo", process_noise=0.0, initial_variance=0.0)
    same(run(still, batch), run(TABLE["ratio_one"], batch))


@few
@given(seed=seeds)
def test_diffuse_still_kpo_ends_in_gspos_sequence_ratio(seed: int) -> None:
    batch = make_batch(seed)
    kpo = run(make_method("kpo_diffuse", process_noise=0.0), batch).loss.tokens.log_weight
    gspo = run(TABLE["gspo"], batch).loss.tokens.log_weight
    last = batch.mask.shape[1] - 1 - batch.mask.flip(1).int().argmax(1)
    rows = torch.arange(len(last))
    close(kpo[rows, last], gspo[rows, last])


@few
@given(seed=seeds)
def test_dr_grpo_is_rloo_up_to_a_constant_on_policy(seed: int) -> None:
    batch = make_batch(seed, 6, 9, groups=2)
    batch = dataclasses.replace(batch, logp=batch.logp_old.clone())
    rloo = dataclasses.replace(TABLE["rloo"], aggregate=aggregate.SequenceSum(1024.0))
    close(run(TABLE["dr_grpo"], batch).gradient, 2 / 3 * run(rloo, batch).gradient)


def test_aggregations_give_the_weights_they_promise() -> None:
    mask = torch.tensor([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=torch.float64)
    rollouts = Rollouts(torch.zeros_like(mask), mask)
    totals = totals_of(rollouts)
    assert totals == Totals(4.0, 2.0)
    close(aggregate.token_mean(rollouts, totals), mask / 4)
    close(aggregate.sequence_mean(rollouts, totals), mask / torch.tensor([[6.0], [2.0]]))
    close(aggregate.SequenceSum(10.0)(rollouts, totals), mask / 20)
    ranks = Totals(totals.tokens / 2, totals.sequences / 2)  # two ranks whose gradients are averaged
    close(aggregate.token_mean(rollouts, ranks), mask / 2)


# ---- errors


@pytest.mark.parametrize("missing", ["reward", "group"])
@every
def test_rewards_are_asked_for_by_name(name: str, missing: str) -> None:
    batch = make_batch(0)
    with pytest.raises(
        ConfigError, match=rf"^{missing}: got None for {CASES[name].name}, expected .*pass advantage="
    ):
        run(CASES[name], batch, options={missing: None})


def test_packed_rows_need_token_advantages() -> None:
    batch = dataclasses.replace(make_batch(0), segment=torch.zeros(6, 9, dtype=torch.long))
    with pytest.raises(ConfigError, match=r"^advantage: got None for packed rows .*pass advantage="):
        run(TABLE["grpo"], batch)


@pytest.mark.parametrize("shape", [(9,), (6, 1), (9, 6), ()])
def test_advantage_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match=r"^advantage: got shape .*expected \(6,\) or \(6, 9\)"):
        run(TABLE["grpo"], make_batch(0), advantage=torch.zeros(shape))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@every
def test_bad_numbers_at_trained_tokens_are_refused(name: str, bad: float) -> None:
    batch = make_batch(0)
    row, token = batch.mask.nonzero()[3].tolist()
    logp = batch.logp.clone()
    logp[row, token] = bad
    where = rf"got {bad} at row {row}, token {token} \(1 such tokens\), expected finite"
    with pytest.raises(NumericError, match=f"^logp: {where} log-prob.*; mask the token out"):
        run(CASES[name], dataclasses.replace(batch, logp=logp))
    advantage = torch.zeros(6, 9)
    advantage[row, token] = bad
    with pytest.raises(NumericError, match=f"^advantage: {where} numbers .*; 0 skips a token"):
        run(CASES[name], batch, advantage=advantage)


def test_logp_shape() -> None:
    batch = make_batch(0)
    with pytest.raises(ShapeError, match=r"^logp: got shape \(6, 8\), expected \(6, 9\)"):
        policy_loss(TABLE["grpo"], batch.rollouts(), batch.logp[:, :8])


def test_penalty_without_reference() -> None:
    method = dataclasses.replace(TABLE["grpo"], penalty=KL(0.1))
    with pytest.raises(ConfigError, match=r"^logp_reference: got None, expected .*Rollouts"):
        run(method, make_batch(0), options={"logp_reference": None})


# ---- metrics of a whole step


@every
@few
@given(seed=seeds, shape=shapes, cuts=st.lists(st.integers(0, 6), max_size=3))
def test_metrics_do_not_depend_on_micro_batches(
    name: str, seed: int, shape: tuple[int, int], cuts: list[int]
) -> None:
    """Sums of micro-batches, an empty one among them, are divided once: a mean of their means is another number."""
    batch, method = make_batch(seed, *shape), CASES[name]
    advantage = advantage_of(method, batch)
    if "trust" in method.learns:  # bounds of the whole step, see above
        whole_step = step_statistics(method, batch.rollouts(), batch.current(batch.logp), advantage=advantage)
        method = with_bounds(method, whole_step)
    whole = run(method, batch, advantage=advantage)
    edges = sorted({0, shape[0], *(min(c, shape[0]) for c in cuts)})
    parts = [
        run(method, batch.rows(torch.arange(a, b)), advantage=advantage[a:b])
        for a, b in itertools.pairwise(edges)
    ]
    empty = dataclasses.replace(batch, mask=torch.zeros_like(batch.mask))
    parts.append(run(method, empty, advantage=advantage, options={"allow_empty": True}))
    found = {
        key: diagnostics.metric(
            key, diagnostics.joined(torch.stack([p.loss.sums[key] for p in parts]))
        ).item()
        for key in whole.loss.sums
    }
    metrics_close(found, {key: whole.metrics[key] for key in found})
    assert set(whole.metrics) - set(found) <= {"objective/surrogate", "objective/penalty", "objective/fused"}
