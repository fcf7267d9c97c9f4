"""Log-probabilities that moved far: values, gradients and metrics stay finite, and penalties have their limits."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.objectives import diagnostics, trust
from kalman_rl.objectives.correction import Masked, Truncated
from kalman_rl.objectives.learning import step_statistics, with_bounds
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.penalty import KL, SquaredLogRatio, k1, k2, k3
from kalman_rl.objectives.rollouts import Current, Rollouts, score_norm_squared
from tests.oracles.batches import CASES, Batch, advantage_of, make_batch

FAR = (20.0, 50.0, 60.0, 89.0, 95.0, 178.0, 1e3, 1e4)
both = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
PENALTIES = {
    **{
        f"{k.__name__}, weighted {w}": KL(0.05, k, importance_weighted=w)
        for k in (k1, k2, k3)
        for w in (False, True)
    },
    "squared": SquaredLogRatio(),
}


def moved(seed: int, size: float, dtype: torch.dtype) -> Batch:
    """Policies that differ by up to ``size`` nats a token, in both directions, and all that goes with them."""
    batch = make_batch(seed, 4, 7, groups=1)
    noise = torch.Generator().manual_seed(seed + 1)

    def away() -> Tensor:
        return -1 - size * torch.rand(4, 7, generator=noise, dtype=torch.float64).round(decimals=1)

    batch = dataclasses.replace(
        batch, logp_old=away(), logp=away(), reference=away(), behaviour=away(), push=size * batch.push
    )
    return batch.each(lambda value: value.to(dtype) if value.dtype == torch.float64 else value)


def check_finite(method: Method, batch: Batch, fused: bool) -> None:
    logp = batch.logp.clone().requires_grad_()
    rollouts, current = batch.rollouts(), batch.current(logp)
    advantage = advantage_of(method, batch)
    assert advantage.isfinite().all()
    if method.learns:
        statistics = step_statistics(method, rollouts, current, advantage=advantage)
        assert statistics is None or statistics.isfinite().all()
        if "trust" in method.learns:
            method = with_bounds(method, statistics)
    loss = policy_loss(method, rollouts, current, advantage=advantage, fused=fused)
    loss.value.backward()
    assert loss.value.isfinite(), "value"
    assert logp.grad is not None and logp.grad.isfinite().all(), "gradient"
    bad = [name for name, value in loss.metrics.items() if not value.isfinite()]
    assert not bad
    assert all(part.isfinite().all() for part in loss.tokens if part is not None)


@both
@pytest.mark.parametrize("name", list(CASES))
def test_every_method_stays_finite(name: str, dtype: torch.dtype) -> None:
    for (seed, size), fused in itertools.product(enumerate(FAR), (True, False)):
        check_finite(CASES[name], moved(seed, size, dtype), fused)


@both
@pytest.mark.parametrize("name", PENALTIES)
@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 10_000), size=st.floats(1.0, 1e4), fused=st.booleans())
def test_every_penalty_stays_finite(
    name: str, dtype: torch.dtype, seed: int, size: float, fused: bool
) -> None:
    method = dataclasses.replace(CASES["grpo"], penalty=PENALTIES[name])
    check_finite(method, moved(seed, size, dtype), fused)


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("correction", [Truncated, Masked])
def test_every_correction_stays_finite(correction: type, level: str) -> None:
    for seed, size in enumerate(FAR):
        method = dataclasses.replace(CASES["grpo"], correction=correction(level=level))
        check_finite(method, moved(seed, size, torch.float32), fused=False)


def penalty_of(
    penalty: KL, dtype: torch.dtype, *, old: float, reference: float, logp: float
) -> tuple[float, float]:
    """Value and gradient at one token."""
    now = torch.tensor([[logp]], dtype=dtype, requires_grad=True)
    past = torch.tensor([[old]], dtype=dtype), torch.ones(1, 1)
    value = penalty(now, Rollouts(*past, logp_reference=torch.tensor([[reference]], dtype=dtype))).sum()
    value.backward()
    assert now.grad is not None
    return value.item(), now.grad.item()


@both
@pytest.mark.parametrize("d", FAR)
def test_a_token_that_died_out_costs_one_and_pulls_no_more(d: float, dtype: torch.dtype) -> None:
    """``exp(-d) (exp(d) - 1 - d)`` and its derivative by the log-probability, ``-exp(-d) d``."""
    value, gradient = penalty_of(
        KL(1.0, importance_weighted=True), dtype, old=-1.0, reference=-1.0, logp=-1.0 - d
    )
    assert value == pytest.approx(1 - math.exp(-d) * (1 + d), rel=1e-6)
    assert gradient == pytest.approx(-d * math.exp(-d), rel=1e-5, abs=1e-30)


@both
@pytest.mark.parametrize("d", [-1e4, -50.0, -3.0, -0.1, 0.1, 0.9, 1.1, 5.0, 15.0, 60.0, 1e4])
def test_weighted_k3_has_the_gradient_of_the_backward_kl(d: float, dtype: torch.dtype) -> None:
    """``w d grad d = -w d``, with the weight of an on-policy token, 1, and of one beyond the cap."""
    for log_ratio, weight in ((0.0, 1.0), (30.0, math.exp(20.0))):
        penalty = KL(1.0, importance_weighted=True)
        old = -2.0 - log_ratio
        value, gradient = penalty_of(penalty, dtype, old=old, reference=-2.0 + d, logp=-2.0)
        assert gradient == pytest.approx(-weight * d, rel=3e-6)
        if d <= 20:
            assert value == pytest.approx(
                weight * (math.expm1(d) - d), rel=1e-5 if d > 0.5 or d < 0 else 1e-4
            )


@both
@pytest.mark.parametrize("d", FAR)
def test_k3_pulls_a_token_beyond_the_cap_as_hard_as_at_it(d: float, dtype: torch.dtype) -> None:
    """The gradient is ``-expm1(min(d, 20))``, the value its integral."""
    value, gradient = penalty_of(KL(1.0), dtype, old=-1.0 - d, reference=-1.0, logp=-1.0 - d)
    assert gradient == pytest.approx(-math.expm1(20.0), rel=1e-6)
    assert value == pytest.approx(math.expm1(20.0) - 20 + math.expm1(20.0) * (d - 20), rel=1e-6)


def test_k3_is_the_plain_formula_within_the_cap() -> None:
    d = torch.linspace(-30.0, trust.LOG_WEIGHT_CAP, 501, dtype=torch.float64)
    torch.testing.assert_close(k3(d), torch.expm1(d) - d, rtol=0.0, atol=0.0)


@both
def test_a_log_probability_that_rounding_put_above_zero_is_certain(dtype: torch.dtype) -> None:
    """Log-probabilities far above 0 are nobody's, yet ``exp`` must not make infinity of them."""
    above = torch.full((1, 1), 1e3, dtype=dtype)
    rollouts = Rollouts(above, torch.ones(1, 1), logp_behaviour=torch.full((1, 1), -1.0, dtype=dtype))
    distance = trust.binary_tv(Current(above), rollouts)
    assert distance.item() == pytest.approx(1 - math.exp(-1.0))
    assert score_norm_squared(above, torch.ones(1, 1, dtype=dtype)).item() == 0
    assert diagnostics.divergence(above).isfinite().all()
