"""Compositions and batches on which a fused pass is compared with the composed objective."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.kernels.loss.plan import METRICS
from kalman_rl.objectives import diagnostics, ratio, trust
from kalman_rl.objectives.aggregate import SequenceSum, Totals, sequence_mean, token_mean
from kalman_rl.objectives.loss import Loss, Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts

INF = math.inf
RATIOS = [
    ratio.one,
    ratio.token,
    ratio.sequence_mean,
    ratio.KalmanFiltered(1e-6, 1.0, 0.0),
    ratio.KalmanFiltered(0.05, 0.3, 0.7),
    ratio.KalmanFiltered(0.0, 2.0, INF),
    ratio.KalmanFiltered(INF, 1.0, 0.0),
]
TRUSTS = [
    trust.unclipped,
    trust.log_likelihood,
    trust.Clip(0.02, 0.03),
    trust.Clip(0.1, 0.0, 1.2),
    trust.Clip(INF, INF),
    trust.Cap(1.1, 0.9),
    trust.Cap(5.0),
]
AGGREGATES = [sequence_mean, token_mean, SequenceSum(7.0)]


def composition(*parts: Any) -> Method:
    return Method("composition", lambda reward, group: reward, *parts)


@dataclasses.dataclass
class Case:
    """One drawn batch: what :func:`policy_loss` takes."""

    rollouts: Rollouts
    logp: Tensor
    advantage: Tensor
    totals: Totals | None = None

    def loss(self, method: Method, fused: bool | None) -> tuple[Loss, Tensor]:
        logp = self.logp.clone().requires_grad_()
        loss = policy_loss(
            method, self.rollouts, logp, advantage=self.advantage, totals=self.totals, fused=fused
        )
        loss.value.backward()
        assert logp.grad is not None
        return loss, logp.grad


def draw(
    seed: int,
    rows: int,
    length: int,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.1,
    packed: bool = False,
    per_token: bool = False,
) -> Case:
    """Holes, padding on both sides, empty rows, poison under the mask, advantages of exactly 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    dense = (torch.rand(rows, 1, generator=g) < 0.5).double()
    mask = torch.rand(rows, length, generator=g) < torch.rand(rows, 1, generator=g) + dense
    place = torch.arange(length)
    first, last = torch.randint(length + 1, (2, rows, 1), generator=g).sort(0).values
    mask &= (place >= first) & (place < last)
    poison = [math.nan, INF, -INF, 1e30][seed % 4]
    old = -normal(rows, length).abs()
    logp = old + scale * normal(rows, length)
    advantage = normal(rows, length) if per_token else normal(rows)
    advantage = torch.where(torch.rand(advantage.shape, generator=g) < 0.2, 0.0, advantage)
    if per_token:
        advantage = torch.where(mask, advantage, poison)
    segment = (torch.rand(rows, length, generator=g) < 0.1).cumsum(1) if packed else None
    under = (torch.where(mask, x, poison).to(dtype) for x in (old, logp))
    old, logp = under
    return Case(Rollouts(old, mask, segment=segment, allow_empty=True), logp, advantage.to(dtype))


def bounds(method: Method) -> list[float]:
    """Weights at which a token is kept or dropped."""
    part = method.trust
    return [1 - part.low, 1 + part.high, part.dual or INF] if isinstance(part, trust.Clip) else []


def compare(method: Method, case: Case, expect: bool | None = True, state: float = 0.0) -> None:
    """Everything that the two paths return. ``state``: error that a filter in float32 may have, absolute."""
    (fused, gradient), (composed, expected) = case.loss(method, True), case.loss(method, False)
    assert composed.metrics["objective/fused"] == 0
    if expect is not None:
        assert fused.metrics["objective/fused"] == expect
    single = composed.value.dtype == torch.float32
    eps = torch.finfo(composed.value.dtype).eps
    weight = composed.tokens.log_weight.clamp(max=20).exp()
    edge = torch.zeros_like(case.rollouts.mask)  # within rounding of a bound, either answer is right
    for bound in bounds(method):
        edge |= (weight - bound).abs() <= 4 * eps * max(1.0, min(bound, 1e9)) + 2 * state
    moved = fused.tokens.kept != composed.tokens.kept
    assert not (moved & ~edge).any()
    largest = max(1.0, composed.metrics["ratio/max_abs_log_ratio"].item())  # means of these cancel to 0
    tolerance = (
        {"rtol": 2e-6, "atol": 1e-10 + 2 * state} if single else {"rtol": 1e-11, "atol": 1e-15 * largest}
    )
    close = lambda a, b: torch.testing.assert_close(a, b, **tolerance)  # noqa: E731
    close(torch.where(moved, 0, gradient), torch.where(moved, 0, expected))
    for name, a, b in zip(fused.tokens._fields, fused.tokens, composed.tokens):
        assert (a is None) == (b is None), name
        if a is not None and b is not None and name != "kept":
            close(torch.where(moved, 0, a), torch.where(moved, 0, b))
        assert a is None or not a.requires_grad
    assert set(fused.metrics) == set(composed.metrics)
    size = (composed.tokens.coefficient * torch.nan_to_num(case.logp, 0, 0, 0).abs()).abs().sum().item() + 1.0
    torch.testing.assert_close(
        fused.value, composed.value, rtol=0, atol=(2e-6 + state if single else 1e-12) * size
    )
    if moved.any():
        return
    for name in METRICS:
        a, b = fused.metrics[name], composed.metrics[name]
        assert a.dtype == b.dtype and a.shape == b.shape and a.device == b.device, name
        assert not a.requires_grad
        noise = 3e-7 * (largest**2 if "variance" in name else largest if "kl" in name else 1.0)
        near = {"rel": 2e-5, "abs": max(noise, 1e-9) + state}
        assert a.item() == pytest.approx(b.item(), **near), name
        for part in (fused.sums[name], composed.sums[name]):  # the sums say the same as the metric
            assert part.dtype == torch.float64 and part[0] == composed.sums[name][0], name
            assert diagnostics.metric(name, part).item() == pytest.approx(b.item(), **near), name
