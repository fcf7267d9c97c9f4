"""Our compositions against verl's own functions, called live where verl is installed.

Not compared: log-ratios beyond 20 (verl clamps them, which takes their gradient away; we cap the weight),
``reinforce_plus_plus*`` (whitened over the batch's tokens; no part of ours does that), packed rows (verl has
none), and the losses ``clip_cov``, ``kl_cov``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from kalman_rl.objectives import advantage, aggregate, correction, penalty, ratio, trust
from kalman_rl.objectives.advantage.group import group_centred
from kalman_rl.objectives.loss import Loss, Method, estimate_advantage, policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.objectives.trust import divergence
from tests.oracles.batches import Batch, make_batch

core_algos = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
rollout_corr = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
configs = pytest.importorskip("verl.workers.config", exc_type=ImportError)

LENGTH = 23
AGGREGATE: dict[str, Any] = {
    "token-mean": aggregate.token_mean,
    "seq-mean-token-mean": aggregate.sequence_mean,
    "seq-mean-token-sum": aggregate.SequenceSum(1.0),
    "seq-mean-token-sum-norm": aggregate.SequenceSum(float(LENGTH)),
}
EPSILON = 2e-8
"""Tolerance where verl adds 1e-8 to a sequence's length (sequence means, geometric means)."""


class Pair(NamedTuple):
    """verl's loss and settings, our ratio, trust region and penalty."""

    loss: str
    settings: dict[str, Any]
    ratio: Any
    trust: Any
    penalty: Any = None
    clips: bool = True


def _divergence(name: str, low: float, high: float) -> Pair:
    distance = {"dppo_tv": divergence.binary_tv, "dppo_kl": divergence.binary_kl}[name]
    settings = {"clip_ratio_low": low, "clip_ratio_high": high, "clip_ratio_c": 1.6}
    mask = divergence.DivergenceMask(distance, low, high, cap=1.6)
    return Pair(name, settings, ratio.BehaviourToken(), mask)


LOSSES: dict[str, Pair] = {
    "vanilla": Pair(
        "vanilla",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28, "clip_ratio_c": 1.7},
        ratio.token,
        trust.Clip(0.2, 0.28, 1.7),
    ),
    "vanilla, dual clip out of reach": Pair(
        "vanilla",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.3, "clip_ratio_c": 1e9},
        ratio.token,
        trust.Clip(0.1, 0.3),
    ),
    "gspo": Pair(
        "gspo",
        {"clip_ratio_low": 0.01, "clip_ratio_high": 0.015},
        ratio.sequence_mean,
        trust.Clip(0.01, 0.015),
    ),
    "cispo": Pair(
        "cispo",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.28},
        ratio.token,
        trust.Cap(high=1.28, low=0.8),
        clips=False,
    ),
    "sapo": Pair(
        "sapo", {"tau_pos": 1.3, "tau_neg": 2.1}, ratio.token, trust.SoftGate(1.3, 2.1), clips=False
    ),
    "geo_mean": Pair(
        "geo_mean",
        {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3},
        ratio.token,
        trust.GeometricClip(0.2, 0.3),
    ),
    "gpg": Pair("gpg", {}, ratio.one, trust.log_likelihood, clips=False),
    "dro": Pair(
        "dro",
        {"policy_loss": configs.PolicyLossConfig(loss_mode="dro", dro_beta=0.3)},
        ratio.one,
        trust.log_likelihood,
        penalty.SquaredLogRatio(0.3),
        clips=False,
    ),
    "dppo_tv": _divergence("dppo_tv", 0.05, 0.08),
    "dppo_kl": _divergence("dppo_kl", 0.02, 0.03),
}
OWN_MEAN = ("sapo", "geo_mean")
"""Losses that ignore the mode and take a mean over sequences."""
BY_SEQUENCE = ("gspo", "geo_mean")
"""Losses that need one advantage per sequence."""


COMBINED = [
    (name, mode)
    for name, pair in LOSSES.items()
    for mode in AGGREGATE
    if mode == "seq-mean-token-mean" or pair.loss not in OWN_MEAN
]


def theirs(pair: Pair, batch: Batch, advantages: Tensor, mode: str, weights: Tensor | None = None) -> Loss:
    """verl's value and gradient; ``weights`` are its rollout correction."""
    logp = batch.logp.clone().requires_grad_()
    config = configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, **pair.settings
    )
    loss = core_algos.get_policy_loss_fn(pair.loss)
    value, _ = loss(batch.logp_old, logp, advantages, batch.mask.double(), mode, config, weights)
    value.backward()
    assert logp.grad is not None
    return Loss(value.detach(), {}, logp.grad, {})  # type: ignore[arg-type]


def ours(
    pair: Pair, batch: Batch, advantages: Tensor, mode: str, correct: Any = None, **options: Any
) -> tuple[Loss, Tensor]:
    method = Method(pair.loss, group_centred, pair.ratio, pair.trust, AGGREGATE[mode], pair.penalty, correct)
    logp = batch.logp.clone().requires_grad_()
    options = {"logp_behaviour": batch.logp_old} | options  # verl's DPPO compares with the old policy
    rollouts = Rollouts(batch.logp_old, batch.mask, **options)
    out = policy_loss(method, rollouts, logp, advantage=advantages)
    out.value.backward()
    assert logp.grad is not None
    return out, logp.grad


def _advantages(name: str, rows: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, LENGTH, dtype=torch.float64, generator=g)
    return values[:, :1].expand(-1, LENGTH) if LOSSES[name].loss in BY_SEQUENCE else values


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize(("name", "mode"), COMBINED)
def test_gradient(name: str, mode: str, holes: bool, seed: int) -> None:
    pair = LOSSES[name]
    batch = make_batch(100 + seed, 7, LENGTH, scale=0.3, holes=holes)
    advantages = _advantages(name, 7, seed)
    expected = theirs(pair, batch, advantages, mode)
    out, gradient = ours(pair, batch, advantages, mode)

    dropped = 1 - out.metrics["trust/kept"]
    assert not pair.clips or 0 < dropped < 1, "choose inputs where the trust region acts on some tokens"
    tolerance = EPSILON if mode == "seq-mean-token-mean" else 1e-12
    torch.testing.assert_close(
        gradient, expected.tokens, rtol=tolerance, atol=tolerance * expected.tokens.abs().max().item()
    )
    assert out.value.item() == pytest.approx(expected.value.item(), rel=10 * tolerance, abs=1e-12)


@pytest.mark.parametrize(("name", "mode"), COMBINED)
def test_an_empty_row(name: str, mode: str) -> None:
    """Nobody counts it, except verl's ``geo_mean``, whose plain mean over rows does."""
    pair = LOSSES[name]
    batch = make_batch(31, 5, LENGTH, scale=0.3)
    mask = batch.mask.clone()
    mask[2] = False
    batch = dataclasses.replace(batch, mask=mask)
    advantages = _advantages(name, 5, 3)
    expected = theirs(pair, batch, advantages, mode)
    _, gradient = ours(pair, batch, advantages, mode, allow_empty=True)
    factor = 4 / 5 if pair.loss == "geo_mean" else 1.0
    torch.testing.assert_close(factor * gradient, expected.tokens, rtol=EPSILON, atol=1e-9)
    assert expected.tokens.abs().max() > 1e-3


# ---- importance corrections

UNCORRECTED = ("geo_mean", "dro", "dppo_tv", "dppo_kl")
"""``geo_mean``: verl multiplies a sequence by the geometric mean of its tokens' factors. ``dro``: verl's
factor multiplies the penalty too, ours leaves penalties alone. DPPO: ours refuses a second correction."""
CORRECTIONS: dict[str, tuple[str, str | float, Any]] = {
    "token, truncated": ("token", 1.05, correction.Truncated(1.05)),
    "sequence, truncated": ("sequence", 1.2, correction.Truncated(1.2, "sequence")),
    "token, masked": ("token", "0.95_1.05", correction.Masked(0.95, 1.05)),
    "IcePop": ("token", "0.9_1.1", correction.icepop(0.9, 1.1)),
    "sequence, masked": ("sequence", "0.8_1.3", correction.Masked(0.8, 1.3, "sequence")),
}


REJECTIONS: dict[str, tuple[str, correction.Rejected]] = {
    "token_k1": ("0.95_1.04", correction.Rejected("k1", "token", math.log(1.04), -math.log(0.95))),
    "token_k2": ("0.001", correction.Rejected("k2", "token", 0.001)),
    "token_k3": ("0.001", correction.Rejected("k3", "token", 0.001)),
    "seq_sum_k1": ("0.9_1.2", correction.Rejected("k1", "sum", math.log(1.2), -math.log(0.9))),
    "seq_sum_k2": ("0.03", correction.Rejected("k2", "sum", 0.03)),
    "seq_sum_k3": ("0.03", correction.Rejected("k3", "sum", 0.03)),
    "seq_mean_k1": ("0.99_1.01", correction.Rejected("k1", "mean", math.log(1.01), -math.log(0.99))),
    "seq_mean_k2": ("0.0018", correction.Rejected("k2", "mean", 0.0018)),
    "seq_mean_k3": ("0.0018", correction.Rejected("k3", "mean", 0.0018)),
    "seq_max_k2": ("0.006", correction.Rejected("k2", "max", 0.006)),
    "seq_max_k3": ("0.006", correction.Rejected("k3", "max", 0.006)),
}
"""verl's name of a rejection -> its threshold, and ours."""


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", list(REJECTIONS))
def test_rejection_masks(name: str, holes: bool) -> None:
    threshold, part = REJECTIONS[name]
    batch = make_batch(78, 9, LENGTH, scale=0.6, holes=holes)
    kept, _ = rollout_corr.compute_rollout_rejection_mask(
        batch.logp_old - batch.behaviour, batch.mask.double(), name, threshold
    )
    factor = part(Rollouts(batch.logp_old, batch.mask, logp_behaviour=batch.behaviour))
    assert torch.equal(torch.where(batch.mask, factor, 0.0), kept)
    assert 0 < kept[batch.mask].mean() < 1, "choose bounds that act on some tokens"
    assert set(REJECTIONS) == rollout_corr.SUPPORTED_ROLLOUT_RS_OPTIONS


@pytest.mark.parametrize("name", list(REJECTIONS))
def test_weights_with_rejection(name: str) -> None:
    """verl's two steps at once, with ``rollout_is`` and ``rollout_rs``."""
    threshold, part = REJECTIONS[name]
    batch = make_batch(80, 9, LENGTH, scale=0.6)
    found, kept, _ = rollout_corr.compute_rollout_correction_and_rejection_mask(
        batch.logp_old, batch.behaviour, batch.mask.double(), "token", 1.05, False, name, threshold
    )
    both = correction.TruncatedRejected(
        1.05, "token", part.statistic, part.over, high=part.high, low=part.low
    )
    factor = both(Rollouts(batch.logp_old, batch.mask, logp_behaviour=batch.behaviour))
    expected = found.batch["rollout_is_weights"] * kept
    torch.testing.assert_close(torch.where(batch.mask, factor, 0.0), expected, rtol=1e-12, atol=0.0)
    assert len(expected[batch.mask].unique()) > 2, "choose bounds where some are kept and some are not"
    assert 0 < kept[batch.mask].mean() < 1


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_correction_weights(name: str, holes: bool) -> None:
    level, threshold, part = CORRECTIONS[name]
    batch = make_batch(77, 9, LENGTH, scale=0.6, holes=holes)
    mask = batch.mask.double()
    weights, _ = rollout_corr.compute_rollout_correction_weights(
        batch.logp_old - batch.behaviour, mask, level, threshold
    )
    factor = part(Rollouts(batch.logp_old, batch.mask, logp_behaviour=batch.behaviour))
    torch.testing.assert_close(torch.where(batch.mask, factor, 0.0), weights, rtol=1e-12, atol=0.0)
    bound = weights[batch.mask]
    acted = (bound == threshold) if isinstance(threshold, float) else (bound == 0)
    assert 0 < acted.double().mean() < 1, "choose inputs where the bound acts on some tokens"


@pytest.mark.parametrize("which", list(CORRECTIONS))
@pytest.mark.parametrize(("name", "mode"), [c for c in COMBINED if c[0] not in UNCORRECTED])
def test_corrected_loss(name: str, which: str, mode: str) -> None:
    pair, (level, threshold, part) = LOSSES[name], CORRECTIONS[which]
    batch = make_batch(78, 9, LENGTH, scale=0.6)
    weights, _ = rollout_corr.compute_rollout_correction_weights(
        batch.logp_old - batch.behaviour, batch.mask.double(), level, threshold
    )
    advantages = _advantages(name, 9, 5)
    expected = theirs(pair, batch, advantages, mode, weights)
    out, gradient = ours(pair, batch, advantages, mode, part, logp_behaviour=batch.behaviour)
    torch.testing.assert_close(gradient, expected.tokens, rtol=EPSILON, atol=1e-10)
    assert out.value.item() == pytest.approx(expected.value.item(), rel=1e-6, abs=1e-10)


def test_geometric_band_keeps_what_verls_rejection_keeps() -> None:
    """verl bounds ``exp`` of the mean of -(log-ratio) and shrinks the mask, so that rejected tokens leave the
    denominators; ours bounds the ratio, keeps the counts, and weighs kept tokens by it."""
    batch = make_batch(79, 12, LENGTH, scale=0.6)
    low, high = 0.99, 1.02
    kept, _ = rollout_corr.compute_rollout_rejection_mask(
        batch.logp_old - batch.behaviour, batch.mask.double(), "seq_mean_k1", f"{low}_{high}"
    )
    part = correction.Masked(1 / high, 1 / low, "geometric")
    factor = part(Rollouts(batch.logp_old, batch.mask, logp_behaviour=batch.behaviour))
    assert torch.equal((factor > 0) & batch.mask, kept > 0)
    mean = core_algos.verl_F.masked_mean(batch.logp_old - batch.behaviour, batch.mask.double(), axis=-1)
    plain = mean.exp()[:, None].expand_as(kept)
    torch.testing.assert_close(factor[kept > 0], plain[kept > 0], rtol=EPSILON, atol=0.0)
    assert 0 < kept[batch.mask].mean() < 1


# ---- advantages


class Scored(NamedTuple):
    rollouts: Rollouts
    scores: Tensor
    index: Any


def scored(seed: int, rows: int = 12) -> Scored:
    """Right-padded rows of unequal length, three interleaved groups, normal rewards on the last token."""
    g = torch.Generator().manual_seed(seed)
    length = torch.randint(1, LENGTH + 1, (rows,), generator=g)
    mask = torch.arange(LENGTH) < length[:, None]
    logp = -torch.rand(rows, LENGTH, generator=g, dtype=torch.float64) * 3 - 0.01
    spare = 1 - logp.exp()
    sum_pi_squared = logp.exp().square() + 0.4 * spare.square()
    reward = torch.randn(rows, generator=g, dtype=torch.float64)
    group = (torch.arange(rows) % 3)[torch.randperm(rows, generator=g)]
    scores = torch.zeros(rows, LENGTH, dtype=torch.float64)
    scores[torch.arange(rows), length - 1] = reward
    return Scored(Rollouts(logp, mask, reward, group, sum_pi_squared=sum_pi_squared), scores, group.numpy())


ADVANTAGES: dict[str, tuple[str, dict[str, Any], Callable[..., Tensor], float]] = {
    "grpo": ("grpo", {}, advantage.GroupZScore(1e-6), 1e-12),
    "grpo, vectorized": ("grpo_vectorized", {}, advantage.GroupZScore(1e-6), 1e-6),  # float32 inside
    "grpo without std": ("grpo", {"norm_adv_by_std_in_grpo": False}, group_centred, 1e-12),
    "rloo": ("rloo", {}, advantage.leave_one_out, 1e-12),
    "rloo, vectorized": ("rloo_vectorized", {}, advantage.leave_one_out, 1e-12),
    "opo": ("opo", {}, advantage.LengthWeighted(), 1e-12),
    "gpg": ("gpg", {"f_norm": 1.5}, advantage.Rescaled(1.5, by_zeros=True), 2e-7),  # its alpha is float32
    # 1e-8 in its denominator
    "otb": ("optimal_token_baseline", {}, advantage.OptimalTokenBaseline(silent_tail=False), 1e-6),
    "otb, silent tail": (
        "optimal_token_baseline",
        {"handle_zero_tail": False},
        advantage.OptimalTokenBaseline(silent_tail=True),
        1e-6,
    ),
}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", list(ADVANTAGES))
def test_advantage(name: str, seed: int) -> None:
    """Holes are left out for the token baseline: verl aligns columns, ours aligns trained tokens."""
    function, options, part, tolerance = ADVANTAGES[name]
    batch = scored(seed)
    if name == "gpg":
        batch.scores[:4] = 0.0  # zero rewards, so that alpha is not 1
        batch = batch._replace(rollouts=dataclasses.replace(batch.rollouts, reward=batch.scores.sum(1)))
    mask = batch.rollouts.mask
    options |= {"old_log_probs": batch.rollouts.logp_old, "sum_pi_squared": batch.rollouts.sum_pi_squared}
    if "optimal" not in function:
        options = {k: v for k, v in options.items() if k not in ("old_log_probs", "sum_pi_squared")}
    expected, _ = core_algos.get_adv_estimator_fn(function)(
        batch.scores.clone(), mask.double(), index=batch.index, **options
    )
    method = Method(name, part, ratio.one, trust.unclipped, aggregate.token_mean)
    found = estimate_advantage(method, batch.rollouts)
    found = found if found.dim() == 2 else found[:, None]
    torch.testing.assert_close(
        torch.where(mask, found, 0.0), expected, rtol=tolerance, atol=tolerance, check_dtype=False
    )
    assert expected.abs().max() > 0.1


@pytest.mark.parametrize("function", ["grpo", "rloo", "opo", "gpg", "rloo_vectorized"])
def test_a_group_of_one_is_where_we_differ(function: str) -> None:
    """verl hands a lone completion its reward (only its vectorized RLOO gives 0, as ours do)."""
    scores = torch.tensor([[0.0, 0.7], [0.0, 1.0], [0.0, 0.2]], dtype=torch.float64)
    index = np.array([0, 1, 1])
    found, _ = core_algos.get_adv_estimator_fn(function)(scores, torch.ones(3, 2).double(), index=index)
    assert found[0, 0].item() == pytest.approx(0.0 if function == "rloo_vectorized" else 0.7, rel=1e-5)
    group = torch.from_numpy(index)
    for part in (group_centred, advantage.leave_one_out, advantage.GroupZScore(), advantage.Rescaled()):
        assert part(scores.sum(1), group)[0] == 0


# ---- penalties


@pytest.mark.parametrize("name", ["k1", "k2", "k3"])
def test_kl_estimators(name: str) -> None:
    """Value and gradient within verl's limits (|d| < 20, k3 < 10), where its clamps do nothing."""
    batch = make_batch(90, 6, LENGTH, scale=0.3, holes=False)
    logp = batch.logp.clone().requires_grad_()
    expected = core_algos.kl_penalty(logp, batch.reference, name)
    gradient = torch.autograd.grad(expected.sum(), logp)[0]
    mine = batch.logp.clone().requires_grad_()
    found = penalty.KL(1.0, getattr(penalty, name))(mine, batch.rollouts())
    assert (batch.reference - batch.logp).abs().max() < 2
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), mine)[0], gradient, rtol=1e-11, atol=1e-14)
