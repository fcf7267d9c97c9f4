"""Plain restatements that the tests compare with, and builders of awkward batches."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.instruments.verify.definitions import LOOPS, Known
from kalman_rl.instruments.verify.example import Example
from kalman_rl.instruments.verify.losses import LOSSES, Terms, lookup
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives import ratio
from kalman_rl.objectives.advantage.filtered import BatchFilter, GroupFilter
from kalman_rl.objectives.advantage.group import ConstantBaseline, batch_leave_one_out
from kalman_rl.objectives.aggregate import SequenceSum, Totals, token_mean
from kalman_rl.objectives.correction import FilteredTruncated, Masked, Rejected, Truncated, TruncatedRejected
from kalman_rl.objectives.loss import Loss, Method, estimate_advantage, policy_loss
from kalman_rl.objectives.penalty import KL, k2
from kalman_rl.objectives.ratio.learned import AutoFiltered
from kalman_rl.objectives.ratio.robust import RobustFiltered
from kalman_rl.objectives.ratio.token_noise import NoiseFiltered
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts
from kalman_rl.objectives.trust.balance import Balance
from kalman_rl.objectives.trust.clip import Cap, Clip, GeometricClip, SoftGate, log_likelihood, unclipped
from kalman_rl.objectives.trust.curvature import CurvatureMask
from kalman_rl.objectives.trust.divergence import DivergenceMask, log_complement
from kalman_rl.objectives.trust.gamma import Gamma

TABLE: dict[str, Method] = {name: make_method(name) for name in METHODS}
"""Every method of the package with its defaults."""

CASES: dict[str, Method] = TABLE | {
    # Options that switch other branches on, and bounds loose enough that some tokens pass and some do not.
    "grpo+dual": make_method("grpo", dual=1.5),
    "gspo+wide": make_method("gspo", low=0.05, high=0.05),
    "cispo+two-sided": make_method("cispo", high=1.28, low=0.8),
    "kpo+open": make_method("kpo", process_noise=0.3, low=0.1, high=0.15),
    "kpo+token-mean": dataclasses.replace(make_method("kpo", process_noise=0.01), aggregate=token_mean),
    "kpo_unclipped+sum": dataclasses.replace(make_method("kpo_unclipped"), aggregate=SequenceSum(7.0)),
    "kpo_diffuse+still": make_method("kpo_diffuse", process_noise=0.0),
    "grpo+kl": dataclasses.replace(make_method("grpo"), penalty=KL(0.1)),
    "gspo+kl2": dataclasses.replace(make_method("gspo"), penalty=KL(0.1, k2)),
    "gmpo+narrow": make_method("gmpo", low=0.05, high=0.1),
    "sapo+sharp": make_method("sapo", positive=4.0, negative=6.0),
    "vespo+steep": make_method("vespo", positive_power=0.5, positive_decay=1.0, negative_decay=6.0),
    "vespo+behaviour": make_method("vespo", behaviour=True),
    "dppo_tv+strict": make_method("dppo_tv", low=0.01, high=0.02, cap=1.1),
    "dppo_topk_kl+strict": make_method("dppo_topk_kl", low=1e-3, high=1e-3),
    "minpro+inclusive": make_method("minpro", inclusive=True, capped=True),
    "bapo+gradient": make_method("bapo", target=0.9, gradient=True, dual=2.0),
    "bapo_published+far": make_method("bapo_published", target=5.0),
    "k_score+code": make_method("k_score", adapt=0.9, final=True),
    "kpo_auto+open": make_method("kpo_auto", process_noise=0.1, observation_noise=0.2),
    "kpo_noise+open": make_method("kpo_noise", process_noise=0.05, low=0.1, high=0.1),
    "kpo_noise+behaviour": make_method("kpo_noise", behaviour=True, process_noise=0.05, low=0.1, high=0.1),
    "kpo_robust+tight": make_method(
        "kpo_robust", observation_noise=0.05, process_noise=0.01, threshold=0.5, low=0.05
    ),
    "drpo+tight": make_method("drpo", bound=0.02),
    "cfpo+tight": make_method("cfpo", bound=0.1),
    "cppo+tight": make_method("cppo", bound=0.05, rate=0.01, least=0.5),
    "m2po+tight": make_method("m2po", bound=0.01),
    "vaco+strict": make_method("vaco", low=0.1, high=0.15, cap=1.1),
    "grpo+truncated": dataclasses.replace(make_method("grpo"), correction=Truncated(1.02)),
    "cispo+rejected": dataclasses.replace(make_method("cispo"), correction=Rejected("k2", "max", 2e-3)),
    "grpo+both": dataclasses.replace(
        make_method("grpo"), correction=TruncatedRejected(1.02, "token", "k2", "max", 2e-3)
    ),
    "kpo+filtered": dataclasses.replace(make_method("kpo"), correction=FilteredTruncated(0.1, 1.02)),
    "gspo+masked": dataclasses.replace(make_method("gspo"), correction=Masked(0.97, 1.05, "geometric")),
}
"""``TABLE`` and a few compositions of the same parts."""


TOKEN_FIELDS = ("logp_old", "logp", "reference", "behaviour", "share", "push", "lag")
"""Fields of a batch with one number per token."""


@dataclass
class Batch:
    """The pieces of a batch before they become :class:`Rollouts`."""

    logp_old: Tensor
    logp: Tensor
    mask: Tensor
    reward: Tensor
    group: Tensor
    reference: Tensor
    behaviour: Tensor
    share: Tensor  # (B, T) in (0, 1): how the mass beside the sampled token is split; see below
    push: Tensor  # (B, T) effect of the token's own optimizer step
    lag: Tensor  # (B, T) optimizer steps since the token was sampled
    segment: Tensor | None = None

    def top(self, logp: Tensor) -> Tensor:
        """(B, T, 2) log-probabilities of the sampled token and of one other token."""
        logp = logp.double().clamp(max=-1e-3)
        return torch.stack((logp, log_complement(logp) + self.share.double().log()), dim=-1)

    def current(self, logp: Tensor) -> Current:
        step = LastLayerStep(self.push, self.push.square() * self.share, 0.01)
        return Current(logp, self.top(logp), step)

    def rollouts(self, **changes: Any) -> Rollouts:
        p, share = self.logp_old.double().exp(), self.share.double()
        values = {
            "logp_behaviour": self.behaviour,
            "top_behaviour": self.top(self.behaviour),
            "sum_pi_squared": p**2 + share * (1 - p) ** 2,
            "logp_old": self.logp_old,
            "mask": self.mask,
            "reward": self.reward,
            "group": self.group,
            "logp_reference": self.reference,
            "segment": self.segment,
            "lag": self.lag,
        }
        return Rollouts(**(values | changes))

    def rows(self, index: Tensor) -> Batch:
        return self.each(lambda value: value[index])

    def tokens(self, change: Any) -> Batch:
        """Apply ``change(tensor, fill)`` to the (B, T) fields; ``fill`` is poison where nothing may look."""
        nan = math.nan
        fields = {name: nan for name in TOKEN_FIELDS} | {"mask": False}
        return dataclasses.replace(self, **{f: change(getattr(self, f), fill) for f, fill in fields.items()})

    def each(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{name: None if v is None else change(v) for name, v in values.items()})


def make_batch(
    seed: int, rows: int = 6, length: int = 9, *, scale: float = 0.3, holes: bool = True, groups: int = 2
) -> Batch:
    """A random float64 batch: ragged rows, holes, padding at both ends, at least one token a row."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.ones(rows, length, dtype=torch.bool)
    if holes:
        mask = torch.rand(rows, length, generator=g) < 0.7
        mask[torch.arange(rows), torch.randint(length, (rows,), generator=g)] = True
    old = -normal(rows, length).abs() - 0.1
    group = torch.arange(rows) % groups
    return Batch(
        logp_old=old,
        logp=old + scale * normal(rows, length),
        mask=mask,
        reward=normal(rows).sigmoid(),  # in [0, 1], where success counts are defined too
        group=group[torch.randperm(rows, generator=g)],
        reference=old + scale * normal(rows, length),
        behaviour=old + 0.1 * scale * normal(rows, length),
        share=torch.rand(rows, length, generator=g, dtype=torch.float64) * 0.8 + 0.1,
        push=normal(rows, length),
        lag=torch.randint(4, (rows, length), generator=g).double(),
    )


def on_policy(batch: Batch) -> Batch:
    """The same batch with one policy for behaviour policy, old and current, and optimizer steps without effect."""
    old = batch.logp_old
    return dataclasses.replace(batch, logp=old.clone(), behaviour=old.clone(), push=torch.zeros_like(old))


def run(method: Method, batch: Batch, *, options: dict[str, Any] | None = None, **kw: Any) -> Outcome:
    """Loss and gradient of a method on a batch; ``options`` go to Rollouts, the rest to ``policy_loss``."""
    logp = batch.logp.clone().requires_grad_()
    rollouts = batch.rollouts(**(options or {}))
    loss = policy_loss(method, rollouts, batch.current(logp), **kw)
    loss.value.backward()
    assert logp.grad is not None
    return Outcome(loss, logp.grad, rollouts)


@dataclass
class Outcome:
    loss: Loss
    gradient: Tensor
    rollouts: Rollouts

    @property
    def value(self) -> Tensor:
        return self.loss.value.detach()

    @property
    def metrics(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.loss.metrics.items()}


def advantage_of(method: Method, batch: Batch) -> Tensor:
    return estimate_advantage(method, batch.rollouts())


def per_token(advantage: Tensor) -> Tensor:
    """Advantages that broadcast over (B, T)."""
    return advantage if advantage.dim() == 2 else advantage[:, None]


def uninformative_reward(method: Method) -> float:
    """The common reward that teaches this method nothing: any for a group baseline, else the baseline."""
    part = method.advantage
    if isinstance(part, (ConstantBaseline, GroupFilter, BatchFilter)):
        return getattr(part, "value", 0.0)
    return 0.5 if isinstance(part, Tracked) and part.belief == "spo" else 0.35


def has_own_baseline(method: Method) -> bool:
    """Whether a completion alone in its group is compared with something."""
    part = method.advantage
    own = isinstance(part, (ConstantBaseline, GroupFilter, BatchFilter, Tracked, JamesStein))
    return own or part is batch_leave_one_out


def depends_on_order(method: Method) -> bool:
    """Whether the order of completions decides, as published."""
    part = method.advantage
    return isinstance(part, BatchFilter) or (isinstance(part, GroupFilter) and not part.invariant)


def is_filtered(method: Method) -> bool:
    """Whether the log-weight of a token is an estimate from the tokens up to it."""
    filters = (ratio.KalmanFiltered, AutoFiltered, NoiseFiltered, RobustFiltered)
    return isinstance(method.ratio, filters)


def has_band(method: Method) -> bool:
    return isinstance(method.trust, Clip)


def has_cap(method: Method) -> bool:
    return isinstance(method.trust, Cap)


# ---- the literal losses, differentiated by autograd


def ppo_surrogate(
    logp: Tensor, old: Tensor, advantage: Tensor, low: float, high: float, dual: float | None
) -> Tensor:
    """(B, T) textbook PPO loss whose gradient is whatever autograd says."""
    ratio = torch.exp(logp - old)
    loss = torch.max(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - low, 1 + high))
    if dual is None:
        return loss
    return torch.where(advantage < 0, torch.min(loss, -advantage * dual), loss)


def gspo_loss(logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    """Scalar GSPO loss with one ratio per sequence, advantage (B,)."""
    losses = []
    for i in range(len(logp)):
        ratio = torch.exp((logp[i] - old[i])[mask[i]].mean())
        losses.append(torch.max(-advantage[i] * ratio, -advantage[i] * ratio.clamp(1 - low, 1 + high)))
    return torch.stack(losses).mean()


# ---- log-weights and metrics, one token at a time


def naive_log_weight(method: Method, batch: Batch) -> np.ndarray:
    """(B, T) log-weight of a method from its definition, 0 outside the mask."""
    mask = batch.mask.numpy()
    observed = naive_log_ratio(method, batch)
    base, lag = naive_base(method, batch).double().numpy(), batch.lag.double().numpy()
    loop, out = lookup(LOOPS, method.ratio), np.zeros_like(observed)
    for i, trained in enumerate(mask):
        row, *known = ({t: values[i, t] for t in np.flatnonzero(trained)} for values in (observed, base, lag))
        for t, value in loop(method.ratio, row, Known(*known)).items():
            out[i, t] = value
    return out


def naive_log_ratio(method: Method, batch: Batch) -> np.ndarray:
    """(B, T) observed log-ratio, against the policy that the method looks at."""
    return np.where(batch.mask.numpy(), (batch.logp - naive_base(method, batch)).numpy(), 0.0)


def naive_base(method: Method, batch: Batch) -> Tensor:
    """(B, T) log-probabilities of the policy that the ratio is taken to."""
    part = method.ratio
    to_behaviour = isinstance(part, (ratio.BehaviourToken, ratio.Lagged)) or getattr(part, "behaviour", False)
    return batch.behaviour if to_behaviour else batch.logp_old


def naive_coefficient(
    method: Method, batch: Batch, log_weight: np.ndarray, advantage: Tensor
) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) weight and keep of the trust region from their definitions, one token at a time."""
    mask, part = batch.mask.numpy(), method.trust
    a = per_token(advantage).expand_as(batch.logp).numpy()
    weight, keep = np.exp(np.minimum(log_weight, 20.0)), np.ones_like(mask)
    if type(part) not in BY_HAND and part not in BY_HAND:
        return by_autograd(method, batch, log_weight, a)
    if isinstance(part, Balance):
        part = settled_by_hand(part, weight, a, mask)
    if isinstance(part, CurvatureMask):
        push, share, eta = batch.push.numpy(), batch.share.numpy(), 0.01
        objective = eta * a * push + eta**2 * a * (push**2 - push**2 * share) / 2
        keep &= (np.abs(objective) < part.objective) & ((eta * push) ** 2 / 2 < part.policy)
        part = part.then
    for i, t in np.argwhere(mask):
        w, up = weight[i, t], a[i, t] > 0
        if isinstance(part, Clip):
            keep[i, t] &= not (w > 1 + part.high if up else (a[i, t] < 0 and w < 1 - part.low))
            if part.dual is not None and a[i, t] < 0 and w > part.dual:
                keep[i, t] = False
        elif isinstance(part, Cap):
            weight[i, t] = min(max(w, part.low), part.high)
        elif isinstance(part, SoftGate):
            tau = part.positive if up else part.negative
            gate = 1 / (1 + math.exp(-min(tau * (w - 1), 700.0)))
            weight[i, t] = 4 * gate * (1 - gate) * w
        elif isinstance(part, DivergenceMask):
            moved = float(batch.logp[i, t] - batch.behaviour[i, t])
            distance = float(part.divergence(batch.current(batch.logp), batch.rollouts())[i, t])
            away = moved > 0 if up else moved < 0
            keep[i, t] = not (away and distance > (part.high if up else part.low))
            weight[i, t] = min(w, part.cap)
    if isinstance(part, GeometricClip):
        observed = naive_log_ratio(method, batch)
        for i in range(len(mask)):
            tokens = np.flatnonzero(mask[i])
            z = {t: observed[i, t] for t in tokens}
            for t in tokens:
                limit = part.high if a[i, t] > 0 else -part.low if a[i, t] < 0 else observed[i, t]
                z[t] = min(z[t], limit) if a[i, t] > 0 else max(z[t], limit)
                keep[i, t] = z[t] == observed[i, t]
            weight[i, tokens] = math.exp(min(sum(z.values()) / len(tokens), 20.0))
    if isinstance(part, Gamma):
        for i, row in enumerate(mask):
            whole = sum(min(max(x, -20.0), 20.0) for x in log_weight[i, row])
            whole = min(max(whole, math.log(1e-8)), 20.0)
            for t in np.flatnonzero(row):
                good = a[i, t] >= 0
                power = part.positive_power if good else part.negative_power
                decay = part.positive_decay if good else part.negative_decay
                weight[i, t] = math.exp(decay + power * whole - decay * math.exp(whole))
    return weight, keep


BY_HAND = {
    Gamma,
    Balance,
    Cap,
    Clip,
    CurvatureMask,
    DivergenceMask,
    GeometricClip,
    SoftGate,
    unclipped,
    log_likelihood,
}
"""Trust regions whose definition is restated above; another is differentiated from its loss in ``definitions``."""


def by_autograd(
    method: Method, batch: Batch, log_weight: np.ndarray, a: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(B, T) weight and keep from the derivative of the loss as printed. A dropped token has the weight that the other
    sign of its advantage would leave it, or that of its ratio; an advantage of 0 has no side, and the mean of both."""
    logp = batch.logp.detach().double().requires_grad_()
    weight = (logp - logp.detach() + torch.from_numpy(log_weight)).exp()
    example = Example(batch.rollouts(), batch.logp, batch.top(batch.logp), batch.current(batch.logp).step)
    sides = []
    for sign in (1.0, -1.0):
        advantage = torch.from_numpy(sign * np.where(a == 0, 1.0, a)).double()
        loss = lookup(LOSSES, method.trust)(method.trust, Terms(logp, weight, advantage, example))
        (slope,) = torch.autograd.grad(loss[batch.mask].sum(), logp, retain_graph=True)
        sides.append(torch.where(batch.mask, -slope / advantage, 0.0).numpy())
    own, other = sides
    either = np.where(own != 0, own, np.where(other != 0, other, np.exp(np.minimum(log_weight, 20.0))))
    no_side = np.where((own != 0) & (other != 0), (own + other) / 2, either)
    return np.where(a == 0, no_side, either), np.where(a == 0, (own != 0) | (other != 0), own != 0)


def settled_by_hand(part: Balance, weight: np.ndarray, a: np.ndarray, mask: np.ndarray) -> Clip:
    """The bounds of BAPO's search, by searching."""
    low, high = part.low, part.high
    while True:
        inside = ((a > 0) & (weight <= high)) | ((a < 0) & (weight >= low))
        clipped = np.where(a > 0, np.minimum(weight, high), np.maximum(weight, low))
        counted = np.where(inside, weight, 0.0) if part.gradient else clipped
        positive = (a * counted)[mask & (a > 0)].sum()
        negative = -(a * counted)[mask & (a < 0)].sum()
        total = positive + negative if part.measure == "share" else negative
        can_high, can_low = (
            high + part.high_step <= part.high_end + 1e-9,
            low + part.low_step <= part.low_end + 1e-9,
        )
        if negative == 0 or positive / total >= part.target or not (can_high or can_low):
            return Clip(1 - low, high - 1, part.dual)
        if can_high and (part.first == "high" or not can_low):
            high += part.high_step
        else:
            low += part.low_step


def naive_metrics(method: Method, batch: Batch, advantage: Tensor) -> dict[str, float]:
    """The logged metrics from their definitions; advantage (B,) or (B, T)."""
    mask = batch.mask.numpy()
    observed, filtered = naive_log_ratio(method, batch), naive_log_weight(method, batch)
    weight, keep = naive_coefficient(method, batch, filtered, advantage)
    raw, used, weights, kept = (x[mask] for x in (observed, filtered, weight, keep))
    low, high = ~kept & (used < 0), ~kept & (used >= 0)
    switches: dict[str, list[bool]] = {"raw": [], "used": []}
    for i, t in np.argwhere(mask[:, 1:] & mask[:, :-1]):
        switches["raw"].append(observed[i, t + 1] * observed[i, t] < 0)
        switches["used"].append(filtered[i, t + 1] * filtered[i, t] < 0)
    w = np.array(weights)
    metrics = {}
    if method.correction is not None:
        factor = method.correction(batch.rollouts()).numpy()[mask]
        size = float(factor.sum() ** 2 / (len(factor) * (factor**2).sum())) if factor.any() else 1.0
        metrics = {"correction/mean": float(factor.mean()), "correction/effective_sample_size": size}
    return metrics | {
        "ratio/raw_log_variance": float(np.var(raw)),
        "ratio/filtered_log_variance": float(np.var(used)),
        "ratio/effective_sample_size": float(w.sum() ** 2 / (len(w) * (w**2).sum())) if w.any() else 1.0,
        "ratio/max_abs_log_ratio": float(np.abs(raw).max()),
        "ratio/capped": float(np.mean(np.array(used) > 20)),
        "ratio/raw_sign_switch": float(np.mean(switches["raw"] or [0.0])),
        "ratio/filtered_sign_switch": float(np.mean(switches["used"] or [0.0])),
        "ratio/noop": float(all(x == 0 for x in raw)),
        "trust/kept": float(np.mean(kept)),
        "trust/clipped_low": float(np.mean(low)),
        "trust/clipped_high": float(np.mean(high)),
        "policy/kl_old": float(np.mean([math.expm1(x) - x for x in raw])),
    }


__all__ = [
    "CASES",
    "TABLE",
    "Batch",
    "Outcome",
    "Totals",
    "advantage_of",
    "depends_on_order",
    "gspo_loss",
    "has_band",
    "has_cap",
    "has_own_baseline",
    "is_filtered",
    "make_batch",
    "naive_coefficient",
    "naive_log_weight",
    "naive_metrics",
    "on_policy",
    "per_token",
    "ppo_surrogate",
    "run",
    "uninformative_reward",
]
