"""The reduction graph: settings at which two compositions are one, over batches with holes and padding.

One table of (left, right, what is compared). Then which losses are an antiderivative of their gradient.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives import advantage, aggregate, correction, ratio, trust
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Current
from tests.oracles.batches import TABLE, Batch, Outcome, make_batch, on_policy, run

few = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
seeds = st.integers(0, 10_000)
INF = math.inf
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def close(actual: Tensor, expected: Tensor, **tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, **(CLOSE | tolerance), check_dtype=False)


# ---- what is compared


def loss(left: Outcome, right: Outcome, factor: float, **tolerance: float) -> None:
    close(left.value, factor * right.value, **tolerance)
    gradient(left, right, factor, **tolerance)


def gradient(left: Outcome, right: Outcome, factor: float, **tolerance: float) -> None:
    close(left.gradient, factor * right.gradient, **tolerance)
    assert right.gradient.abs().max() > 0


def log_weight(left: Outcome, right: Outcome, factor: float, **tolerance: float) -> None:
    close(left.loss.tokens.log_weight, factor * right.loss.tokens.log_weight, **tolerance)


def last_log_weight(left: Outcome, right: Outcome, factor: float, **tolerance: float) -> None:
    mask = left.rollouts.mask
    last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)
    a, b = (x.loss.tokens.log_weight[last] for x in (left, right))
    close(a, factor * b, **tolerance)


# ---- batches on which a reduction holds


def anything(batch: Batch) -> Batch:
    return batch


def rising(batch: Batch) -> Batch:
    """Every ratio at least 1."""
    return dataclasses.replace(batch, logp=batch.logp_old + (batch.logp - batch.logp_old).abs())


def sampled_by_old(batch: Batch) -> Batch:
    return dataclasses.replace(batch, behaviour=batch.logp_old.clone())


def short(tokens: int) -> Callable[[Batch], Batch]:
    """At most this many trained tokens a row, holes between them."""
    return lambda b: dataclasses.replace(b, mask=b.mask & (b.mask.cumsum(1) <= tokens))


def one_group(batch: Batch) -> Batch:
    return dataclasses.replace(batch, group=torch.zeros_like(batch.group))


def pairs(batch: Batch) -> Batch:
    """Groups of two, three of them: a spread of their means that is learned."""
    return dataclasses.replace(batch, group=torch.arange(len(batch.group)) // 2)


def of(method: str | Method, **parts: Any) -> Method:
    """A method of the table with some parts exchanged."""
    return dataclasses.replace(TABLE[method] if isinstance(method, str) else method, **parts)


@dataclass(frozen=True)
class Reduction:
    """``left`` compared with ``factor`` times ``right``."""

    left: Method
    right: Method
    compare: Callable[..., None] = loss
    batch: Callable[[Batch], Batch] = anything
    holes: bool = True
    factor: float = 1.0
    tolerance: dict[str, float] = field(default_factory=dict)
    options: Callable[[Batch], dict[str, Any]] = lambda batch: {}


def unlikely(batch: Batch) -> Batch:
    """The same ratios, with old probabilities below 1/5, where a squared score norm of 1 can occur."""
    shift = math.log(5)
    return dataclasses.replace(batch, logp_old=batch.logp_old - shift, logp=batch.logp - shift)


def equal_score_norms(batch: Batch) -> dict[str, Any]:
    """Squared score norm ``1 - 2 p + sum_pi_squared`` of 1 at every token."""
    return {"sum_pi_squared": 2 * batch.logp_old.exp()}


@dataclass(frozen=True)
class Mixture:
    """PSPO's trust region (arXiv 2509.21282): the token's ratio to a mixture of both policies, ``(1 - a) w + a``."""

    share: float

    def __call__(self, ratio: Any, advantage: Tensor, current: Current, rollouts: Any) -> trust.Trust:
        kept = trust.unclipped(ratio, advantage, current, rollouts)
        mixed = (1 - self.share) * kept.weight + self.share
        return trust.Trust(kept.keep, (1 - self.share) * kept.weight, -advantage * mixed)


G = 3
"""Rows a group in every batch here."""
OPEN = of("grpo", trust=trust.unclipped)
RAW = of("dr_grpo", ratio=ratio.BehaviourToken(), trust=trust.Cap(INF))
PREFIX = Method("prefix", TABLE["minpro"].advantage, ratio.token, trust.Cap(5.0), aggregate.token_mean)
NOISE = 0.3

REDUCTIONS: dict[str, Reduction] = {
    "KPO, q = inf: GRPO": Reduction(make_method("kpo", process_noise=INF, low=0.2, high=0.2), TABLE["grpo"]),
    "KPO diffuse, q = inf: GRPO": Reduction(
        make_method("kpo_diffuse", process_noise=INF, low=0.2, high=0.2), TABLE["grpo"]
    ),
    "KPO, Q = P0 = 0: ratio one": Reduction(
        make_method("kpo", process_noise=0.0, initial_variance=0.0), TABLE["ratio_one"]
    ),
    "KPO, Q = 0, P0 = inf, at the last token: GSPO": Reduction(
        make_method("kpo_diffuse", process_noise=0.0), TABLE["gspo"], last_log_weight
    ),
    "KPO, Q = 0, P0 = inf, one token: token ratio": Reduction(
        make_method("kpo_diffuse", process_noise=0.0), TABLE["grpo"], log_weight, short(1)
    ),
    "KPO auto before it has learned: KPO diffuse": Reduction(
        make_method("kpo_auto", process_noise=0.02, observation_noise=0.3),
        make_method("kpo_diffuse", process_noise=0.02, observation_noise=0.3, low=0.05, high=0.05),
    ),
    "KPO noise, scale 0: KPO diffuse with R = floor": Reduction(
        make_method("kpo_noise", floor=0.3, scale=0.0, process_noise=0.02),
        make_method("kpo_diffuse", observation_noise=0.3, process_noise=0.02),
    ),
    "KPO noise, q = inf: GRPO": Reduction(
        make_method("kpo_noise", process_noise=INF, low=0.2, high=0.2), TABLE["grpo"]
    ),
    "KPO noise, behaviour policy is the old policy: either ratio": Reduction(
        make_method("kpo_noise", behaviour=True, process_noise=0.02),
        make_method("kpo_noise", process_noise=0.02),
        batch=sampled_by_old,
    ),
    "KPO robust without threshold, P0 = inf: KPO diffuse": Reduction(
        make_method("kpo_robust", threshold=INF, initial_variance=INF, process_noise=0.02),
        make_method("kpo_diffuse", process_noise=0.02),
    ),
    "KPO robust without threshold, P0 = 0: KPO": Reduction(
        make_method(
            "kpo_robust", threshold=INF, initial_variance=0.0, process_noise=0.02, low=3e-4, high=4e-4
        ),
        make_method("kpo", process_noise=0.02),
    ),
    "KPO robust, q = inf, without threshold: GRPO": Reduction(
        make_method("kpo_robust", threshold=INF, process_noise=INF, low=0.2, high=0.2), TABLE["grpo"]
    ),
    "GSPO-token: GSPO": Reduction(TABLE["gspo_token"], TABLE["gspo"]),
    "GSPO, one token: GRPO": Reduction(make_method("gspo", low=0.2, high=0.2), TABLE["grpo"], batch=short(1)),
    "GMPO without band: GSPO without clip": Reduction(
        make_method("gmpo", low=INF, high=INF), of("gspo", trust=trust.unclipped)
    ),
    "GMPO, one token: PPO in log space": Reduction(
        make_method("gmpo", low=0.1, high=0.15),
        make_method("grpo", low=-math.expm1(-0.1), high=math.expm1(0.15)),
        batch=short(1),
    ),
    "SAPO, tau to 0: no clip": Reduction(
        make_method("sapo", positive=1e-6, negative=1e-6), OPEN, gradient, tolerance={"rtol": 1e-9}
    ),
    "LUSPO, equal lengths: GSPO times the length": Reduction(
        make_method("luspo", low=0.1, high=0.1),
        make_method("gspo", low=0.1, high=0.1),
        holes=False,
        factor=9.0,
    ),
    "VESPO, no power and decay to 0: ratio 1": Reduction(
        make_method(
            "vespo", positive_power=0.0, positive_decay=1e-9, negative_power=0.0, negative_decay=1e-9
        ),
        of("cispo", ratio=ratio.one, trust=trust.log_likelihood),
        tolerance={"rtol": 1e-6},
    ),
    "VESPO, one token, power 1 and decay to 0: CISPO without cap": Reduction(
        make_method(
            "vespo", positive_power=1.0, positive_decay=1e-9, negative_power=1.0, negative_decay=1e-9
        ),
        make_method("cispo", high=INF),
        batch=short(1),
        tolerance={"rtol": 1e-6},
    ),
    "PNPO without band: KPO diffuse at Q = 0 without clip": Reduction(
        make_method("pnpo", low=INF, high=INF),
        of(
            make_method("kpo_diffuse", process_noise=0.0),
            trust=trust.unclipped,
            aggregate=aggregate.token_mean,
        ),
    ),
    "A-3PO, lag of one step: DAPO's clip on the ratio to the behaviour policy": Reduction(
        TABLE["a3po"],
        of(make_method("dapo", high=0.2), ratio=ratio.BehaviourToken()),
        options=lambda batch: {"lag": torch.ones_like(batch.lag)},
    ),
    "A-3PO without clip and cap: the ratio to the behaviour policy": Reduction(
        make_method("a3po", low=INF, high=INF, cap=INF),
        of("cispo", ratio=ratio.BehaviourToken(), trust=trust.unclipped),
    ),
    "DRPO without bound: the ratio to the behaviour policy": Reduction(
        make_method("drpo", bound=INF, length=7.0),
        of(RAW, trust=trust.unclipped, aggregate=aggregate.SequenceSum(7.0)),
    ),
    "CFPO without bound: no clip": Reduction(make_method("cfpo", bound=INF), OPEN),
    "PSPO's mixture pi -> (1 - a) pi + a mu, a = 1/4: no clip at 3/4 of the step": Reduction(
        of(OPEN, trust=Mixture(0.25)), OPEN, gradient, factor=0.75
    ),
    "CPPO without bound: no clip": Reduction(
        make_method("cppo", bound=INF),
        of("dr_grpo", ratio=ratio.BehaviourToken(), trust=trust.unclipped, aggregate=aggregate.token_mean),
    ),
    "CPPO, one token: DPPO's total variation at the same bound": Reduction(
        make_method("cppo", bound=0.05),
        of(make_method("dppo_tv", low=0.05, high=0.05, cap=INF), aggregate=aggregate.token_mean),
        gradient,
        short(1),
    ),
    "M2PO without bound: no clip": Reduction(
        make_method("m2po", bound=INF), of("cispo", ratio=ratio.BehaviourToken(), trust=trust.unclipped)
    ),
    "VACO without threshold: CISPO at its cap": Reduction(
        make_method("vaco", low=INF, high=INF),
        of(make_method("cispo", high=2.0), ratio=ratio.BehaviourToken()),
    ),
    "GRPO without band: no clip": Reduction(make_method("grpo", low=INF, high=INF), OPEN),
    "dual clip out of reach: GRPO": Reduction(make_method("grpo", dual=INF), TABLE["grpo"]),
    "CISPO without cap: no clip": Reduction(
        make_method("cispo", high=INF), of("cispo", trust=trust.unclipped), gradient
    ),
    "CAPO without bounds: GRPO": Reduction(make_method("capo", objective=INF, policy=INF), TABLE["grpo"]),
    "BAPO, target 0: clip at the start bounds": Reduction(
        make_method("bapo", target=0.0), make_method("dapo", low=0.4, high=0.2), tolerance={"rtol": 1e-10}
    ),
    "BAPO published, target 0: the same with dual clip": Reduction(
        make_method("bapo_published", target=0.0, dual=1.3),
        of(make_method("grpo", low=0.4, high=0.2, dual=1.3), aggregate=aggregate.token_mean),
        tolerance={"rtol": 1e-10},
    ),
    "MinPRO, one token: CISPO": Reduction(TABLE["minpro"], TABLE["cispo"], batch=short(1)),
    "MinPRO capped, rising ratios: CISPO": Reduction(
        make_method("minpro", capped=True), TABLE["cispo"], batch=rising
    ),
    "MinPRO capped and inclusive, rising ratios: CISPO": Reduction(
        make_method("minpro", capped=True, inclusive=True), TABLE["cispo"], batch=rising
    ),
    "Dr.GRPO: (G-1)/G of RLOO's advantage": Reduction(
        TABLE["dr_grpo"], of("dr_grpo", advantage=advantage.leave_one_out), factor=(G - 1) / G
    ),
    "KRPO without order, P0 to inf: RLOO up to scale": Reduction(
        make_method("krpo_invariant", observation_noise=NOISE, initial_variance=1e14),
        of("grpo", advantage=advantage.leave_one_out),
        factor=1 / math.sqrt(NOISE * G / (G - 1)),
    ),
    "KRPO without order, P0 to 0: baseline 0 up to scale": Reduction(
        make_method("krpo_invariant", observation_noise=NOISE, initial_variance=1e-20),
        of("grpo", advantage=advantage.ConstantBaseline()),
        factor=1 / math.sqrt(NOISE),
    ),
    "GPG with every group teaching: group mean": Reduction(
        TABLE["gpg"], of("gpg", advantage=advantage.group_centred)
    ),
    "GPG published without zero rewards: group mean": Reduction(
        TABLE["gpg_published"], of("gpg", advantage=advantage.group_centred)
    ),
    "James-Stein with two groups, no spread to learn: RLOO": Reduction(TABLE["james_stein"], TABLE["rloo"]),
    "batch mean, one group: RLOO": Reduction(TABLE["batch_mean"], TABLE["rloo"], batch=one_group),
    "K-GRPO, first batch: James-Stein": Reduction(
        TABLE["k_grpo"], of("k_grpo", advantage=TABLE["james_stein"].advantage), batch=pairs
    ),
    "SPO, first batch: baseline 1/2": Reduction(
        TABLE["spo"], of("spo", advantage=advantage.ConstantBaseline(0.5))
    ),
    "SPO without dual clip, first batch: DAPO with baseline 1/2": Reduction(
        make_method("spo", dual=INF), of("dapo", advantage=advantage.ConstantBaseline(0.5))
    ),
    "OPO, equal lengths: group mean": Reduction(
        TABLE["opo"], of("opo", advantage=advantage.group_centred), holes=False
    ),
    "OTB, equal score norms and lengths: group mean": Reduction(
        TABLE["otb"],
        of("otb", advantage=advantage.group_centred),
        batch=unlikely,
        holes=False,
        options=equal_score_norms,
    ),
    "DAPO with GRPO's band, equal lengths: GRPO": Reduction(
        make_method("dapo", high=0.2), TABLE["grpo"], holes=False
    ),
    "Dr.GRPO's divisor at the common length: GRPO's": Reduction(
        of("grpo", aggregate=aggregate.SequenceSum(9.0)), TABLE["grpo"], holes=False
    ),
    "correction telescopes: old times behaviour policy is the behaviour policy's ratio": Reduction(
        of(OPEN, correction=correction.Truncated(INF)), of(OPEN, ratio=ratio.BehaviourToken())
    ),
    "DPPO, behaviour policy is the old policy, no threshold: CISPO": Reduction(
        make_method("dppo_tv", low=INF, high=INF, cap=5.0, length=7.0),
        of("cispo", advantage=advantage.group_centred, aggregate=aggregate.SequenceSum(7.0)),
        batch=sampled_by_old,
    ),
}
for kind in ("dppo_tv", "dppo_kl", "dppo_topk_tv", "dppo_topk_kl"):
    REDUCTIONS[f"{kind} without threshold and cap: uncapped ratio to the behaviour policy"] = Reduction(
        make_method(kind, low=INF, high=INF, cap=INF), RAW
    )
for level in ("token", "sequence", "geometric"):
    for part in (
        correction.Truncated(INF, level),
        correction.Truncated(1.0, level),
        correction.Masked(1.0, 1.0, level),
    ):
        REDUCTIONS[f"{part}, behaviour policy is the old policy: none"] = Reduction(
            of("grpo", correction=part), TABLE["grpo"], batch=sampled_by_old
        )


@pytest.mark.parametrize("name", list(REDUCTIONS))
@few
@given(seed=seeds, padding=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_reduction(name: str, seed: int, padding: tuple[int, int]) -> None:
    r = REDUCTIONS[name]
    batch = r.batch(make_batch(seed, 2 * G, 9, holes=r.holes))
    batch = batch.tokens(lambda x, fill: torch.nn.functional.pad(x, padding, value=fill))
    left, right = (run(method, batch, options=r.options(batch)) for method in (r.left, r.right))
    r.compare(left, right, r.factor, **r.tolerance)


@few
@given(seed=seeds)
def test_minpro_on_two_tokens_is_the_exact_prefix_ratio(seed: int) -> None:
    batch = short(2)(make_batch(seed))
    found = run(TABLE["minpro"], batch).loss.tokens
    prefix = torch.where(batch.mask, found.log_ratio.cumsum(1), 0.0)
    close(found.log_weight, prefix)
    assert (batch.mask.sum(1) == 2).any()


@few
@given(seed=seeds)
def test_kpo_started_in_its_steady_state_is_an_exponential_average(seed: int) -> None:
    q, batch = 0.04, make_batch(seed, holes=False)
    gain = (-q + math.sqrt(q * q + 4 * q)) / 2
    found = run(make_method("kpo", process_noise=q, initial_variance=gain), batch).loss.tokens
    state = torch.zeros(len(batch.mask), dtype=torch.float64)
    for t in range(batch.mask.shape[1]):
        state = state + gain * (found.log_ratio[:, t] - state)
        close(found.log_weight[:, t], state)


@pytest.mark.parametrize("name", ["dppo_topk_tv", "dppo_topk_kl"])
@few
@given(seed=seeds)
def test_dppo_with_one_token_is_binary(name: str, seed: int) -> None:
    batch, limits = make_batch(seed), {"low": 0.02, "high": 0.03}
    batch = dataclasses.replace(
        batch, logp=batch.logp.clamp(max=-0.01), behaviour=batch.behaviour.clamp(max=-0.01)
    )
    logp = batch.logp.clone().requires_grad_()
    rollouts = batch.rollouts(top_behaviour=batch.behaviour[..., None])
    policy_loss(make_method(name, **limits), rollouts, Current(logp, logp[..., None])).value.backward()
    assert logp.grad is not None
    close(logp.grad, run(make_method(name.replace("topk_", ""), **limits), batch).gradient)


@few
@given(seed=seeds)
def test_reward_filters_without_drift_and_prior_are_running_means(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    reward, n = torch.randn(8, generator=g, dtype=torch.float64), torch.arange(1, 9, dtype=torch.float64)
    expected = (reward - reward.cumsum(0) / n) / (NOISE / n).sqrt()
    for prior in (1e14, 1e20):
        for part in (
            advantage.GroupFilter(0.0, NOISE, prior, epsilon=0.0),
            advantage.BatchFilter(0.0, NOISE, prior, epsilon=0.0),
        ):
            found = part(reward, torch.zeros(8, dtype=torch.long))
            close(found, expected, rtol=1e-9, atol=1e-9)


# ---- on-policy


@pytest.mark.parametrize("name", list(METHODS))
@few
@given(seed=seeds)
def test_on_policy_identity(name: str, seed: int) -> None:
    """Ratio 1 and nothing dropped: every gradient is ``-A`` over its own denominator, counted by hand."""
    method, batch = of(name, penalty=None), on_policy(make_batch(seed))
    out, n = run(method, batch), batch.mask.sum(1, keepdim=True).double()
    if method.aggregate is aggregate.token_mean:
        weights = torch.ones_like(n) / n.sum()
    elif method.aggregate is aggregate.sequence_mean:
        weights = 1 / n / len(n)
    else:
        weights = torch.ones_like(n) / len(n) / method.aggregate.length
    extra = {name: getattr(out.rollouts, name) for name in getattr(method.advantage, "inputs", ())}
    value = method.advantage(batch.reward, batch.group, **extra).reshape(len(n), -1)
    close(out.gradient, torch.where(batch.mask, -weights * value, 0.0))


# ---- value and gradient

ANTIDERIVATIVE = {
    *("grpo", "dr_grpo", "dapo", "opo", "otb", "gpg", "gpg_published", "krpo", "krpo_invariant", "k_score"),
    *("spo", "k_grpo"),
    *("maxrl", "drpo", "cfpo", "cppo", "m2po"),
    *("gspo", "gspo_token", "luspo", "gmpo", "sapo", "dro", "bapo", "bapo_published", "capo"),
}
"""Methods whose value, as a function of ``logp``, has the gradient that backward gives."""


def numeric(method: Method, batch: Batch, step: float = 1e-6) -> Tensor:
    """Central differences of the value at every trained token."""
    out = torch.zeros_like(batch.logp)
    for row, token in batch.mask.nonzero().tolist():
        ends = []
        for sign in (1, -1):
            logp = batch.logp.clone()
            logp[row, token] += sign * step
            ends.append(run(method, dataclasses.replace(batch, logp=logp)).value)
        out[row, token] = (ends[0] - ends[1]) / (2 * step)
    return out


@pytest.mark.parametrize("name", list(METHODS))
def test_value_against_gradient(name: str) -> None:
    """Equal where the surrogate is a function of the policy; for the rest (detached weights) it must not be
    mistaken for one: their value is there to be looked at."""
    method, batch = TABLE[name], make_batch(12, 6, 5, scale=0.4)
    if name == "a3po":  # its factor moves the value of clipped tokens only: clip some
        method = make_method(name, low=0.05, high=0.05)
    out = run(method, batch)
    for shift in (1e-5, -1e-5):  # no kink near, whichever way a token moves
        moved = run(method, dataclasses.replace(batch, logp=batch.logp + shift)).loss.tokens.kept
        assert torch.equal(moved, out.loss.tokens.kept), "choose a seed away from the kinks"
    found = numeric(method, batch)
    scale = out.gradient.abs().max().item()
    if name in ANTIDERIVATIVE:
        torch.testing.assert_close(out.gradient, found, rtol=1e-6, atol=1e-6 * scale)
    else:
        assert (out.gradient - found).abs().max() > 1e-2 * scale


@pytest.mark.parametrize("name", sorted(ANTIDERIVATIVE))
def test_gradcheck(name: str) -> None:
    method, batch = TABLE[name], make_batch(12, 6, 5, scale=0.4)
    logp, rollouts = batch.logp.clone().requires_grad_(), batch.rollouts()
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(method, rollouts, batch.current(x)).value, (logp,), eps=1e-7, atol=1e-6
    )
