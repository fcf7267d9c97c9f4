"""MinPRO, the ratio to the behaviour policy, GMPO and SAPO against loops and plainly written losses."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.methods import make_method
from kalman_rl.objectives.aggregate import sequence_mean, token_mean
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.ratio.transforms import BehaviourToken, PrefixMinimum, token
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust.clip import GeometricClip, SoftGate
from tests.oracles.batches import make_batch

quick = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
OPTIONS = [(inclusive, capped) for inclusive in (False, True) for capped in (False, True)]
each = pytest.mark.parametrize("inclusive, capped", OPTIONS)


def packed_case(seed: int, rows: int = 4, length: int = 11) -> tuple[Tensor, Rollouts]:
    """Holes, padding on both sides, segments whose borders may lie in holes."""
    batch = make_batch(seed, rows, length)
    g = torch.Generator().manual_seed(seed)
    segment = (torch.rand(rows, length, generator=g) < 0.25).cumsum(1)
    return batch.logp, batch.rollouts(segment=segment)


# ---- prefix minimum


@each
@quick
@given(seed=seeds, length=st.integers(1, 17))
def test_prefix_minimum_against_a_quadratic_loop(
    inclusive: bool, capped: bool, seed: int, length: int
) -> None:
    logp, rollouts = packed_case(seed, 4, length)
    assert rollouts.segment is not None
    out = PrefixMinimum(inclusive, capped)(logp, rollouts)
    marks = rollouts.segment.tolist()
    for i in range(4):
        for t in range(length):
            own = (logp[i, t] - rollouts.logp_old[i, t]).item()
            seen = []
            for u in range(t, -1, -1):
                if marks[i][u] != marks[i][t]:
                    break
                if rollouts.mask[i, u] and (u < t or inclusive):
                    seen.append((logp[i, u] - rollouts.logp_old[i, u]).item())
            factor = min(seen, default=0.0)
            factor = min(factor, 0.0) if capped else factor
            expected = own + factor if rollouts.mask[i, t] else 0.0
            assert out.log_weight[i, t].item() == pytest.approx(expected, rel=1e-14, abs=1e-15)
            assert out.log_ratio[i, t].item() == (own if rollouts.mask[i, t] else 0.0)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 65, 1000])
def test_inclusive_minimum_is_torchs_cummin(length: int) -> None:
    batch = make_batch(length, 3, length)
    logp, rollouts = batch.logp, batch.rollouts()
    observed = torch.where(rollouts.mask, logp - rollouts.logp_old, math.inf)
    lowest = observed.cummin(1).values
    out = PrefixMinimum(inclusive=True)(logp, rollouts)
    expected = torch.where(rollouts.mask, observed + lowest, 0.0)
    assert torch.equal(out.log_weight, expected)
    before = torch.cat([torch.full((3, 1), math.inf, dtype=torch.float64), lowest[:, :-1]], 1)
    expected = torch.where(rollouts.mask, observed + torch.where(before == math.inf, 0.0, before), 0.0)
    assert torch.equal(PrefixMinimum()(logp, rollouts).log_weight, expected)


@each
@quick
@given(seed=seeds)
def test_a_packed_row_is_its_sequences(inclusive: bool, capped: bool, seed: int) -> None:
    batch = make_batch(seed, 4, 6)
    part = PrefixMinimum(inclusive, capped)
    packed = Rollouts(
        batch.logp_old.reshape(1, -1),
        batch.mask.reshape(1, -1),
        segment=torch.tensor([5, 2, 5, 2]).repeat_interleave(6)[None],  # names may come back
    )
    rows = part(batch.logp, batch.rollouts()).log_weight
    assert torch.equal(part(batch.logp.reshape(1, -1), packed).log_weight, rows.reshape(1, -1))


def test_two_tokens_are_the_exact_prefix_ratio() -> None:
    batch = make_batch(0, 5, 2, holes=False)
    out = PrefixMinimum()(batch.logp, batch.rollouts())
    torch.testing.assert_close(out.log_weight, (batch.logp - batch.logp_old).cumsum(1))


def test_no_ratio_below_one_and_a_cap_is_the_token_ratio() -> None:
    batch = make_batch(1)
    logp = batch.logp_old + (batch.logp - batch.logp_old).abs()
    rollouts = batch.rollouts()
    assert torch.equal(
        PrefixMinimum(capped=True)(logp, rollouts).log_weight, token(logp, rollouts).log_weight
    )


def test_weights_are_detached() -> None:
    batch = make_batch(2)
    logp = batch.logp.clone().requires_grad_()
    rollouts = batch.rollouts(logp_behaviour=batch.logp_old)
    for part in (PrefixMinimum(), BehaviourToken()):
        out = part(logp, rollouts)
        assert not out.log_weight.requires_grad and not out.log_ratio.requires_grad


# ---- ratio to the behaviour policy


@quick
@given(seed=seeds)
def test_behaviour_ratio_does_not_look_at_the_old_policy(seed: int) -> None:
    batch = make_batch(seed)
    g = torch.Generator().manual_seed(seed)
    behaviour = batch.logp_old + torch.randn(6, 9, generator=g, dtype=torch.float64)
    out = BehaviourToken()(batch.logp, batch.rollouts(logp_behaviour=behaviour))
    expected = torch.where(batch.mask, batch.logp - behaviour, 0.0)
    assert torch.equal(out.log_weight, expected) and torch.equal(out.log_ratio, expected)
    moved = batch.rollouts(logp_behaviour=behaviour, logp_old=torch.zeros(6, 9, dtype=torch.float64))
    assert torch.equal(BehaviourToken()(batch.logp, moved).log_weight, expected)


def test_behaviour_ratio_needs_the_behaviour_policy() -> None:
    batch = make_batch(0)
    with pytest.raises(ConfigError, match=r"^logp_behaviour: got None .*KalmanGRPOTrainer"):
        BehaviourToken()(batch.logp, batch.rollouts(logp_behaviour=None))


# ---- GMPO and SAPO as printed, differentiated by autograd


def gmpo_loss(logp: Tensor, rollouts: Rollouts, advantage: Tensor, low: float, high: float) -> Tensor:
    """Mean over sequences of -A times the geometric mean of one-sidedly clipped ratios."""
    losses = []
    for i, a in enumerate(advantage.tolist()):
        z = (logp - rollouts.logp_old)[i][rollouts.mask[i]]
        sign = 1.0 if a >= 0 else -1.0
        z = sign * torch.minimum(sign * z, sign * z.clamp(-low, high))
        losses.append(-a * z.mean().exp())
    return torch.stack(losses).mean()


@quick
@given(seed=seeds, low=st.sampled_from([0.05, 0.2, 3.0]), high=st.sampled_from([0.1, 0.4, 3.0]))
def test_geometric_clip(seed: int, low: float, high: float) -> None:
    batch = make_batch(seed)
    g = torch.Generator().manual_seed(seed)
    advantage = torch.randn(6, generator=g, dtype=torch.float64)
    rollouts = batch.rollouts()
    theirs, ours = batch.logp.clone().requires_grad_(), batch.logp.clone().requires_grad_()
    expected = gmpo_loss(theirs, rollouts, advantage, low, high)
    expected.backward()
    out = policy_loss(make_method("gmpo", low=low, high=high), rollouts, ours, advantage=advantage)
    out.value.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.value, expected)


def sapo_loss(
    logp: Tensor, rollouts: Rollouts, advantage: Tensor, positive: float, negative: float
) -> Tensor:
    """(B, T) loss of a sigmoid gate, one temperature for A > 0 and one for the rest."""
    w = (logp - rollouts.logp_old).exp()
    tau = torch.where(advantage > 0, *torch.tensor([positive, negative], dtype=torch.float64))
    return -advantage * torch.sigmoid(tau * (w - 1)) * 4 / tau


@quick
@given(seed=seeds, positive=st.sampled_from([0.3, 1.0, 5.0]), negative=st.sampled_from([0.5, 1.05, 9.0]))
def test_soft_gate(seed: int, positive: float, negative: float) -> None:
    batch = make_batch(seed, scale=1.0)
    g = torch.Generator().manual_seed(seed)
    advantage = torch.randn(6, 9, generator=g, dtype=torch.float64)
    advantage[0] = 0.0
    rollouts = batch.rollouts()
    theirs, ours = batch.logp.clone().requires_grad_(), batch.logp.clone().requires_grad_()
    loss = sapo_loss(theirs, rollouts, advantage, positive, negative)
    expected = loss[rollouts.mask].mean()
    expected.backward()
    method = Method("sapo", make_method("sapo").advantage, token, SoftGate(positive, negative), token_mean)
    out = policy_loss(method, rollouts, ours, advantage=advantage)
    out.value.backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(out.value, expected)


def test_soft_gate_is_one_at_ratio_one_and_the_token_ratio_for_small_temperatures() -> None:
    batch = make_batch(3)
    rollouts, ones = batch.rollouts(), torch.ones(6, 9, dtype=torch.float64)
    on_policy = SoftGate(0.7, 3.0)(
        token(rollouts.logp_old, rollouts), ones, Current(rollouts.logp_old), rollouts
    )
    assert torch.equal(on_policy.weight, ones)
    observed = token(batch.logp, rollouts)
    soft = SoftGate(1e-6, 1e-6)(observed, ones, Current(batch.logp), rollouts)
    torch.testing.assert_close(soft.weight, observed.log_weight.exp(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("part", [GeometricClip(), SoftGate()])
@pytest.mark.parametrize("size", [1e3, -1e3, 1e30])
def test_extreme_ratios_stay_finite(part: GeometricClip | SoftGate, size: float) -> None:
    old = torch.full((2, 3), -1.0)
    rollouts = Rollouts(old, torch.ones(2, 3))
    logp = old + size
    advantage = torch.tensor([[1.0], [-1.0]]).expand(2, 3)
    out = part(token(logp, rollouts), advantage, Current(logp), rollouts)
    assert torch.isfinite(out.weight).all() and torch.isfinite(out.surrogate).all()


def test_sequence_mean_of_a_geometric_clip_ignores_padding() -> None:
    batch = make_batch(4, holes=False)
    method = make_method("gmpo")
    assert method.aggregate is sequence_mean
    wide = batch.tokens(lambda x, fill: torch.nn.functional.pad(x, (2, 3), value=fill))
    advantage = torch.arange(6).double() - 2
    narrow = policy_loss(method, batch.rollouts(), batch.logp, advantage=advantage)
    padded = policy_loss(method, wide.rollouts(), wide.logp, advantage=advantage)
    torch.testing.assert_close(narrow.value, padded.value)
    assert torch.equal(padded.tokens.coefficient[:, 2:-3], narrow.tokens.coefficient)


@pytest.mark.parametrize(
    "part, name, bad",
    [(GeometricClip, "low", -0.1), (GeometricClip, "high", math.nan)]
    + [(SoftGate, name, bad) for name in ("positive", "negative") for bad in (0.0, -1.0, math.inf, math.nan)],
)
def test_bad_settings(part: type, name: str, bad: float) -> None:
    with pytest.raises(NumericError, match=f"^{name}: got {bad}, expected"):
        part(**{name: bad})
