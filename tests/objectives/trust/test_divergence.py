"""DPPO's divergences against mpmath, SciPy and the data-processing inequality; its mask against a loop."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.errors import ConfigError, NumericError, ShapeError
from kalman_rl.methods import make_method
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.ratio.transforms import BehaviourToken
from kalman_rl.objectives.rollouts import Current, Rollouts
from kalman_rl.objectives.trust import divergence as dv
from kalman_rl.objectives.trust.clip import Clip

quick = settings(max_examples=50, deadline=None, derandomize=True)
seeds = st.integers(0, 10_000)
TOP_K = [dv.top_k_tv, dv.top_k_kl]
ALL = [dv.binary_tv, dv.binary_kl, *TOP_K]


def one_token(mu: float, pi: float, dtype: torch.dtype = torch.float64) -> tuple[Current, Rollouts]:
    """A single position whose token has these log-probabilities under the behaviour policy and under the policy."""
    behaviour = torch.tensor([[mu]], dtype=dtype)
    return Current(torch.tensor([[pi]], dtype=dtype)), Rollouts(
        behaviour, torch.ones(1, 1), logp_behaviour=behaviour
    )


def vocabulary(
    seed: int, size: int, k: int, dtype: torch.dtype = torch.float64, spread: float = 2.0
) -> tuple[Current, Rollouts, np.ndarray, np.ndarray]:
    """Two softmax policies on 5 x 4 positions, seen through k tokens; and both in full, float64."""
    g = torch.Generator().manual_seed(seed)
    old = spread * torch.randn(5, 4, size, generator=g, dtype=torch.float64)
    new = old + torch.randn(5, 4, size, generator=g, dtype=torch.float64)
    sampled = torch.randint(size, (5, 4), generator=g)
    ids, top = dv.top_k_with_sampled(old.to(dtype), sampled, k)
    own = sampled[..., None]
    logp_mu = dv.log_probabilities(old.to(dtype), own)[..., 0]
    rollouts = Rollouts(logp_mu, torch.ones(5, 4), logp_behaviour=logp_mu, top_behaviour=top)
    current = Current(
        dv.log_probabilities(new.to(dtype), own)[..., 0], dv.log_probabilities(new.to(dtype), ids)
    )
    return current, rollouts, scipy.special.softmax(old.numpy(), -1), scipy.special.softmax(new.numpy(), -1)


def full_tv(mu: np.ndarray, pi: np.ndarray) -> np.ndarray:
    return np.abs(mu - pi).sum(-1) / 2


def full_kl(mu: np.ndarray, pi: np.ndarray) -> np.ndarray:
    return scipy.special.rel_entr(mu, pi).sum(-1)


# ---- log(1 - p)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 4e-16), (torch.float32, 3e-7)])
@pytest.mark.parametrize("p", ["1e-30", "1e-12", "1e-5", "0.3", "0.5", "0.6", "0.99", "0.999999", "1-1e-16"])
def test_log_complement_against_mpmath(p: str, dtype: torch.dtype, tolerance: float) -> None:
    """The oracle sees the rounded ``logp`` that we see, so only our own error counts."""
    with mpmath.workdps(80):
        exact = 1 - mpmath.mpf("1e-16") if p == "1-1e-16" else mpmath.mpf(p)
        logp = torch.tensor(float(mpmath.log(exact)), dtype=dtype)
        expected = float(mpmath.log(-mpmath.expm1(mpmath.mpf(logp.item()))))
    got = dv.log_complement(logp)
    assert got.dtype == dtype
    # torch.log1p(-x) is -x for tiny x, exactly what the relative bound asks for
    assert got.item() == pytest.approx(expected, rel=tolerance, abs=0)


def test_log_complement_at_its_ends() -> None:
    ends = dv.log_complement(torch.tensor([0.0, -math.inf, -1e-300, -800.0], dtype=torch.float64))
    assert ends[0] == -math.inf and ends[1] == 0 and ends[3] == 0
    assert ends[2].item() == pytest.approx(math.log(1e-300), rel=1e-15)


# ---- divergences


@quick
@given(seed=seeds)
def test_two_tokens_are_the_whole_vocabulary(seed: int) -> None:
    current, rollouts, mu, pi = vocabulary(seed, 2, 1)
    for binary, top, full in ((dv.binary_tv, dv.top_k_tv, full_tv), (dv.binary_kl, dv.top_k_kl, full_kl)):
        for ours in (binary(current, rollouts), top(current, rollouts)):
            np.testing.assert_allclose(ours.numpy(), full(mu, pi), rtol=1e-9, atol=1e-14)


@quick
@given(seed=seeds, size=st.integers(2, 9), data=st.data())
def test_a_finer_partition_never_gives_less(seed: int, size: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, size))
    current, rollouts, mu, pi = vocabulary(seed, size, k)
    for binary, top, full in ((dv.binary_tv, dv.top_k_tv, full_tv), (dv.binary_kl, dv.top_k_kl, full_kl)):
        coarse, middle = binary(current, rollouts).numpy(), top(current, rollouts).numpy()
        fine = full(mu, pi)
        assert (coarse >= 0).all() and (coarse <= middle + 1e-12).all() and (middle <= fine + 1e-12).all()
        if k == size:
            np.testing.assert_allclose(middle, fine, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("spread", [1.0, 8.0, 40.0])
@pytest.mark.parametrize("size, k", [(6, 6), (6, 5), (50, 20), (50, 50)])
def test_float32_rest_mass_is_not_taken_for_a_difference(size: int, k: int, spread: float) -> None:
    """The k masses sum to 1 up to rounding only; the residue must not look like an infinite divergence."""
    for seed in range(20):
        current, rollouts, mu, pi = vocabulary(seed, size, k, torch.float32, spread)
        fine = full_kl(mu, pi)
        ours = dv.top_k_kl(current, rollouts).numpy()
        assert np.isfinite(ours).all() and (ours <= fine + 1e-4 * (1 + fine)).all()
        if k == size:
            np.testing.assert_allclose(ours, fine, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                dv.top_k_tv(current, rollouts).numpy(), full_tv(mu, pi), rtol=1e-4, atol=1e-5
            )


@pytest.mark.parametrize("part", [dv.binary_tv, dv.binary_kl])
def test_a_probability_that_rounding_put_above_one_is_one(part: dv.Divergence) -> None:
    for mu, pi in ((1e-3, -1.0), (-1.0, 1e-3), (1e-3, 1e-3)):
        found, expected = (
            part(
                Current(torch.tensor([[b]])), Rollouts(torch.zeros(1, 1), logp_behaviour=torch.tensor([[a]]))
            )
            for a, b in ((mu, pi), (min(mu, 0.0), min(pi, 0.0)))
        )
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_certain_tokens(dtype: torch.dtype) -> None:
    """Probability 1 under either policy, or both: limits, no NaN."""
    log_half = math.log(0.5)
    for mu, pi, tv, kl in (
        (0.0, 0.0, 0.0, 0.0),
        (0.0, log_half, 0.5, math.log(2)),
        (log_half, 0.0, 0.5, math.inf),
        (0.0, -800.0, 1.0, 800.0),
        (-800.0, 0.0, 1.0, math.inf),
        (-800.0, -800.0, 0.0, 0.0),
    ):
        current, rollouts = one_token(mu, pi, dtype)
        top = torch.tensor([[[mu]]], dtype=dtype)
        rollouts = Rollouts(
            rollouts.logp_old, rollouts.mask, logp_behaviour=rollouts.logp_old, top_behaviour=top
        )
        current = Current(current.logp, torch.tensor([[[pi]]], dtype=dtype))
        for ours, expected in zip(ALL, (tv, kl, tv, kl)):
            assert ours(current, rollouts).item() == pytest.approx(expected, rel=1e-6), (ours, mu, pi)


def test_impossible_tokens_among_the_k() -> None:
    """-inf is probability 0: nothing where the behaviour policy has it, infinite where only the policy has it."""
    half, gone = math.log(0.5), -math.inf
    mask, logp = torch.ones(1, 2), torch.full((1, 2), half)
    top = torch.tensor([[[half, half, gone], [half, half, gone]]])
    rollouts = Rollouts(logp, mask, logp_behaviour=logp, top_behaviour=top)
    current = Current(logp, torch.tensor([[[half, half, gone], [0.0, gone, gone]]]))
    assert dv.top_k_kl(current, rollouts).tolist() == [[0.0, math.inf]]
    assert dv.top_k_tv(current, rollouts).tolist() == [[0.0, 0.5]]


# ---- the mask


def test_what_ratio_clipping_does_the_other_way_round() -> None:
    """A rare token made 100 times likelier moves .001 of mass and stays; .99 -> .80 moves .19 and goes."""
    mu = torch.tensor([[1e-5, 0.99]], dtype=torch.float64).log()
    pi = torch.tensor([[1e-3, 0.80]], dtype=torch.float64).log()
    advantage = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
    rollouts = Rollouts(mu, torch.ones(1, 2), logp_behaviour=mu)
    ratio = BehaviourToken()(pi, rollouts)
    mask = dv.DivergenceMask(dv.binary_tv, 0.15, 0.15)
    assert mask(ratio, advantage, Current(pi), rollouts).keep.tolist() == [[True, False]]
    assert Clip(0.2, 0.28)(ratio, advantage, Current(pi), rollouts).keep.tolist() == [[False, True]]


@quick
@given(seed=seeds, low=st.sampled_from([0.0, 0.02, 0.3]), high=st.sampled_from([0.0, 0.05, 0.2]))
def test_mask_against_a_loop(seed: int, low: float, high: float) -> None:
    current, rollouts, _, _ = vocabulary(seed, 4, 2)
    g = torch.Generator().manual_seed(seed)
    advantage = torch.randint(-1, 2, (5, 4), generator=g).double() * torch.rand(5, 4, generator=g).double()
    assert rollouts.logp_behaviour is not None
    moved = (current.logp - rollouts.logp_behaviour).tolist()
    for part in ALL:
        distance = part(current, rollouts).tolist()
        out = dv.DivergenceMask(part, low, high, cap=1.5)(
            BehaviourToken()(current.logp, rollouts), advantage, current, rollouts
        )
        for i in range(5):
            for t in range(4):
                a, step, d = advantage[i, t].item(), moved[i][t], distance[i][t]
                drop = (step > 0 and d > high) if a > 0 else (step < 0 and d > low)
                weight = min(math.exp(step), 1.5)
                assert out.keep[i, t] == (not drop)
                assert out.weight[i, t].item() == pytest.approx(weight, rel=1e-12)
                loss = 0.0 if drop else -a * weight * current.logp[i, t].item()
                assert out.surrogate[i, t].item() == pytest.approx(loss, rel=1e-12)


@pytest.mark.parametrize("part", ALL)
def test_infinite_thresholds_keep_all_even_at_infinite_divergence(part: dv.Divergence) -> None:
    log_half = math.log(0.5)
    logp = torch.full((1, 1), log_half)
    rollouts = Rollouts(logp, torch.ones(1, 1), logp_behaviour=logp, top_behaviour=logp[..., None])
    current = Current(torch.zeros(1, 1), torch.zeros(1, 1, 1))
    mask = dv.DivergenceMask(part, math.inf, math.inf)
    for sign in (1.0, 0.0, -1.0):
        ratio = BehaviourToken()(current.logp, rollouts)
        assert mask(ratio, torch.full((1, 1), sign), current, rollouts).keep.all()


def test_gradient_is_the_truncated_weight_times_keep_and_zero_for_zero_advantages() -> None:
    g = torch.Generator().manual_seed(0)
    mu = -torch.rand(4, 6, generator=g, dtype=torch.float64) - 0.05
    mask = torch.rand(4, 6, generator=g) < 0.8
    mask[:, 0] = True
    logp = (mu + 0.3 * torch.randn(4, 6, generator=g, dtype=torch.float64)).clamp(max=0).requires_grad_()
    advantage = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    rollouts = Rollouts(mu - 0.2, mask, logp_behaviour=mu)
    method = make_method("dppo_tv", low=0.05, high=0.05, length=7.0)
    out = policy_loss(method, rollouts, logp, advantage=advantage)
    out.value.backward()
    p, m = logp.detach().exp(), mu.exp()
    a = advantage[:, None].expand(4, 6)
    bad = ((a > 0) & (p > m) | (a <= 0) & (p < m)) & ((p - m).abs() > 0.05)
    expected = torch.where(mask & ~bad, -a * p / m, 0.0) / (7 * 4)
    assert logp.grad is not None
    torch.testing.assert_close(logp.grad, expected)
    assert (bad & mask).any() and (mask & ~bad).any() and (logp.grad[1] == 0).all()


# ---- k tokens


@quick
@given(seed=seeds, size=st.integers(1, 8), levels=st.integers(1, 4), data=st.data())
def test_sampled_token_is_there_exactly_once(seed: int, size: int, levels: int, data: st.DataObject) -> None:
    """Few levels make many ties, among them all logits equal."""
    k = data.draw(st.integers(1, size))
    g = torch.Generator().manual_seed(seed)
    logits = torch.randint(levels, (3, 4, size), generator=g).float()
    logits[torch.rand(3, 4, size, generator=g) < 0.2] = -math.inf
    logits[..., 0] = 0.5  # at least one possible token
    sampled = torch.randint(size, (3, 4), generator=g)
    before = logits.clone()
    ids, logp = dv.top_k_with_sampled(logits, sampled, k)
    assert torch.equal(logits, before) and ids.shape == logp.shape == (3, 4, k)
    assert ((ids == sampled[..., None]).sum(-1) == 1).all()
    for row, own, all_logits in zip(ids.reshape(-1, k), sampled.flatten(), logits.reshape(-1, size)):
        assert len(set(row.tolist())) == k
        chosen = sorted(all_logits[row[row != own]].tolist(), reverse=True)
        others = sorted(all_logits[torch.arange(size) != own].tolist(), reverse=True)
        assert chosen == others[: k - 1]
    expected = scipy.special.log_softmax(logits.double().numpy(), -1)
    np.testing.assert_allclose(logp.numpy(), np.take_along_axis(expected, ids.numpy(), -1), atol=2e-6)


def test_half_precision_logits_become_float32() -> None:
    ids, logp = dv.top_k_with_sampled(
        torch.randn(2, 5).bfloat16(), torch.tensor([0, 4], dtype=torch.int32), 3
    )
    assert logp.dtype == torch.float32 and ids.dtype == torch.int64


# ---- errors


@pytest.mark.parametrize("k", [0, -1, 6])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(NumericError, match=rf"^top_k: got {k}, expected 1 to the vocabulary size 5"):
        dv.top_k_with_sampled(torch.zeros(2, 5), torch.tensor([0, 4]), k)


@pytest.mark.parametrize("sampled", [torch.tensor([0]), torch.zeros(2, 1, dtype=torch.long), torch.tensor(0)])
def test_sampled_shape(sampled: Tensor) -> None:
    with pytest.raises(ShapeError, match=r"^sampled: got shape .*expected \(2,\)"):
        dv.top_k_with_sampled(torch.zeros(2, 5), sampled, 3)


@pytest.mark.parametrize("bad", [-100, 5])
def test_sampled_out_of_range(bad: int) -> None:
    with pytest.raises(NumericError, match=rf"^sampled: got {bad}, expected token ids 0 to 4"):
        dv.top_k_with_sampled(torch.zeros(2, 5), torch.tensor([0, bad]), 3)


@pytest.mark.parametrize("part", TOP_K)
def test_different_k(part: dv.Divergence) -> None:
    current, rollouts, _, _ = vocabulary(0, 6, 3)
    assert current.top_logp is not None
    with pytest.raises(ShapeError, match=r"^top_logp: got shape \(5, 4, 2\), expected \(5, 4, 3\)"):
        part(current._replace(top_logp=current.top_logp[..., :2]), rollouts)


@pytest.mark.parametrize("part", TOP_K)
def test_missing_distributions_are_asked_for_by_name(part: dv.Divergence) -> None:
    current, rollouts, _, _ = vocabulary(0, 6, 3)
    with pytest.raises(ConfigError, match=r"^top_logp: got None .*Current\(logp, top_logp="):
        part(Current(current.logp), rollouts)
    bare = Rollouts(rollouts.logp_old, rollouts.mask)
    with pytest.raises(ConfigError, match=r"^top_behaviour: got None .*top_k_with_sampled"):
        part(current, bare)
    with pytest.raises(ConfigError, match=r"^logp_behaviour: got None"):
        dv.binary_tv(current, bare)


@pytest.mark.parametrize("name", ["low", "high", "cap"])
@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_thresholds_out_of_range(name: str, bad: float) -> None:
    with pytest.raises(NumericError, match=rf"^{name}: got {bad}, expected"):
        dv.DivergenceMask(dv.binary_tv, **({"low": 0.1, "high": 0.1} | {name: bad}))
