"""Plain restatements: log-weights one token at a time, and losses as papers print them, for autograd.

Nothing here is fast, packed or detached more than its formula says. :data:`LOOPS` and :data:`LOSSES` are
looked up by function or by class; a part that is missing there has no oracle, which fails verification.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.instruments.verify.place import CPU, Place
from kalman_rl.objectives import aggregate, penalty, ratio, trust
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.ratio.learned import AutoFiltered
from kalman_rl.objectives.ratio.robust import RobustFiltered
from kalman_rl.objectives.ratio.token_noise import NoiseFiltered
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts


class Example(NamedTuple):
    """A batch of ragged rows with holes, and a policy that has moved away from the one that sampled it."""

    rollouts: Rollouts
    logp: Tensor
    top_logp: Tensor
    step: LastLayerStep

    def current(self, logp: Tensor | None = None) -> Current:
        """What a method may ask to know about the current policy."""
        return Current(self.logp if logp is None else logp, self.top_logp, self.step)


def example(
    seed: int = 0, rows: int = 12, length: int = 9, scale: float = 0.3, place: Place = CPU
) -> Example:
    """A batch in groups of three, moved so far (nats) that every trust region acts on some tokens.

    Rewards lie in [0, 1], where success counts are defined. Baselines that learn from other groups need
    several of them: with two there is no spread to shrink by. The numbers are the same in every place.
    """
    g, put = torch.Generator().manual_seed(seed), place.put

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(rows, length, generator=g) < 0.75
    mask[:, 2] = True
    logits = normal(rows, length, 5)
    moved = logits + 2 * scale * normal(rows, length, 5)
    old, logp = logits.log_softmax(-1), moved.log_softmax(-1)  # token 0 was sampled
    rollouts = Rollouts(
        logp_old=put(old[..., 0]),
        mask=put(mask),
        reward=put(normal(rows).sigmoid()),
        group=put(torch.arange(rows) // 3),
        prompt_id=[f"prompt {row // 3}" for row in range(rows)],
        logp_behaviour=put(old[..., 0]),
        logp_reference=put(old[..., 0] + scale * normal(rows, length)),
        top_behaviour=put(old[..., :3]),
        sum_pi_squared=put(old.exp().square().sum(-1)),
    )
    along, curvature = normal(rows, length).abs() * 90, normal(rows, length).square() * 900
    step = LastLayerStep(put(along), put(curvature), 1e-4)
    return Example(rollouts, put(logp[..., 0]), put(logp[..., :3]), step)


def positions(rollouts: Rollouts) -> list[list[int]]:
    """Trained positions of each row."""
    return [row.nonzero().flatten().tolist() for row in rollouts.mask]


# ---- log-weights: (part, observed log-ratios of one row by position, old log-probabilities) -> log-weights

Row = dict[int, float]


def _token(part: Any, row: Row, old: Row) -> Row:
    return row


def _one(part: Any, row: Row, old: Row) -> Row:
    return dict.fromkeys(row, 0.0)


def _sequence_mean(part: Any, row: Row, old: Row) -> Row:
    return dict.fromkeys(row, sum(row.values()) / len(row))


def _kalman(part: Any, row: Row, old: Row) -> Row:
    """Scalar filter: R may depend on the token's old log-probability, innovations may be clipped."""
    x, p, out = 0.0, getattr(part, "initial_variance", math.inf), {}
    for t in range(min(row), max(row) + 1):  # time passes in holes, not in padding
        p += part.process_noise
        if t in row:
            if isinstance(part, NoiseFiltered):
                noise = part.floor + part.scale * (1 - math.exp(old[t])) ** 2
            else:
                noise = part.observation_noise
            limit = getattr(part, "threshold", math.inf) * math.sqrt(p + noise)
            gain = 1.0 if math.isinf(p) else p / (p + noise)
            x, p = x + gain * min(max(row[t] - x, -limit), limit), noise * gain
            out[t] = x
    return out


def _prefix_minimum(part: ratio.PrefixMinimum, row: Row, old: Row) -> Row:
    out = {}
    for t, own in row.items():
        lowest = min((v for u, v in row.items() if u < t or (part.inclusive and u == t)), default=0.0)
        out[t] = own + (min(lowest, 0.0) if part.capped else lowest)
    return out


LOOPS: dict[Any, Callable[[Any, Row, Row], Row]] = {
    ratio.token: _token,
    ratio.BehaviourToken: _token,
    ratio.one: _one,
    ratio.sequence_mean: _sequence_mean,
    ratio.KalmanFiltered: _kalman,
    AutoFiltered: _kalman,
    NoiseFiltered: _kalman,
    RobustFiltered: _kalman,
    ratio.PrefixMinimum: _prefix_minimum,
}
"""Ratio transform -> its definition."""


def lookup(table: dict[Any, Any], part: object) -> Any:
    """The entry for a function, or for the class of a component; None if there is none."""
    return table.get(part) if callable(part) and part in table else table.get(type(part))


def log_weights(method: Method, batch: Example, logp: Tensor) -> Tensor | None:
    """(B, T) by definition, 0 outside the mask, of a batch whose behaviour policy is the old policy."""
    loop = lookup(LOOPS, method.ratio)
    if loop is None:
        return None
    out = torch.zeros_like(logp)
    observed = (logp - batch.rollouts.logp_old).tolist()
    before = batch.rollouts.logp_old.tolist()
    for i, trained in enumerate(positions(batch.rollouts)):
        row, old = ({t: values[i][t] for t in trained} for values in (observed, before))
        for t, value in loop(method.ratio, row, old).items():
            out[i, t] = value
    return out


# ---- losses per token: (trust region, arguments) -> (B, T), to be differentiated by logp


class Terms(NamedTuple):
    """``logp`` with gradient; ``weight``, whose value is exp of the log-weight and whose gradient is that
    of the printed ratio; ``advantage`` (B, T); the batch."""

    logp: Tensor
    weight: Tensor
    advantage: Tensor
    batch: Example


def _ppo(part: trust.Clip, terms: Terms) -> Tensor:
    a, w = terms.advantage, terms.weight
    loss = torch.max(-a * w, -a * torch.clamp(w, 1 - part.low, 1 + part.high))
    if part.dual is None:
        return loss
    return torch.where(a < 0, torch.min(loss, -a * part.dual), loss)


def _cap(part: trust.Cap, terms: Terms) -> Tensor:
    return -terms.advantage * torch.clamp(terms.weight.detach(), part.low, part.high) * terms.logp


def _unclipped(part: Any, terms: Terms) -> Tensor:
    return -terms.advantage * terms.weight


def _score(part: Any, terms: Terms) -> Tensor:
    return -terms.advantage * terms.weight.detach() * terms.logp


def _soft(part: trust.SoftGate, terms: Terms) -> Tensor:
    tau = torch.full_like(terms.weight, part.negative)
    tau[terms.advantage > 0] = part.positive
    return -terms.advantage * 4 / tau * torch.sigmoid(tau * (terms.weight - 1))


def _gamma(part: trust.Gamma, terms: Terms) -> Tensor:
    """``phi`` row by row, from the ratios as they are: those of the example never come near the caps."""
    phi = torch.zeros_like(terms.advantage)
    for i, trained in enumerate(positions(terms.batch.rollouts)):
        whole = math.prod(terms.weight[i, trained].tolist())
        for t in trained:
            good = bool(terms.advantage[i, t] >= 0)
            k, rate = (
                (part.positive_power, part.positive_decay)
                if good
                else (part.negative_power, part.negative_decay)
            )
            phi[i, t] = math.exp(rate) * whole**k * math.exp(-rate * whole)
    return -terms.advantage * phi * terms.logp


def _geometric(part: trust.GeometricClip, terms: Terms) -> Tensor:
    rollouts, out = terms.batch.rollouts, []
    sign = torch.sign(terms.advantage)
    difference = terms.logp - rollouts.logp_old
    bounded = sign * torch.min(sign * difference, sign * torch.clamp(difference, -part.low, part.high))
    for i, trained in enumerate(positions(rollouts)):
        out.append((bounded[i, trained].mean()).exp().expand(len(bounded[i])))
    return -terms.advantage * torch.stack(out)


def _divergence(part: trust.DivergenceMask, terms: Terms) -> Tensor:
    p, mu = terms.logp.detach().exp(), terms.batch.rollouts.logp_old.exp()
    if part.divergence in (trust.binary_tv, trust.binary_kl):
        new, old = torch.stack([p, 1 - p], -1), torch.stack([mu, 1 - mu], -1)
    else:
        top = terms.batch.top_logp.exp(), terms.batch.rollouts.top_behaviour
        assert top[1] is not None
        new, old = (torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1) for q in (top[0], top[1].exp()))
    if part.divergence in (trust.binary_tv, trust.top_k_tv):
        distance = (new - old).abs().sum(-1) / 2
    else:
        distance = torch.where(terms.batch.rollouts.mask, (old * (old / new).log()).sum(-1), 0.0)
    a = terms.advantage
    bad = ((a > 0) & (p > mu) & (distance > part.high)) | ((a <= 0) & (p < mu) & (distance > part.low))
    return -a * terms.weight.detach().clamp(max=part.cap) * (~bad) * terms.logp


def _balance(part: trust.Balance, terms: Terms) -> Tensor:
    return _ppo(balance_by_search(part, terms), terms)


def balance_by_search(part: trust.Balance, terms: Terms) -> trust.Clip:
    """The bounds, by evaluating the whole batch at every step of the search."""
    mask = terms.batch.rollouts.mask
    a, w = terms.advantage[mask], terms.weight.detach()[mask]

    def reached(low: float, high: float) -> bool:
        up, down = a[a > 0] * w[a > 0].clamp(max=high), -a[a < 0] * w[a < 0].clamp(min=low)
        if part.gradient:
            up, down = up[w[a > 0] <= high], down[w[a < 0] >= low]
        if down.sum() == 0:
            return True
        whole = up.sum() + down.sum() if part.measure == "share" else down.sum()
        return bool(up.sum() / whole >= part.target)

    low, high, tiny = part.low, part.high, 1e-9
    while not reached(low, high):
        can_low = low + part.low_step <= part.low_end + tiny
        can_high = high + part.high_step <= part.high_end + tiny
        if can_high and (part.first == "high" or not can_low):
            high += part.high_step
        elif can_low:
            low += part.low_step
        else:
            break
    return trust.Clip(1 - low, high - 1, part.dual)


def _curvature(part: trust.CurvatureMask, terms: Terms) -> Tensor:
    step, a = terms.batch.step, terms.advantage
    along, eta = step.alignment, step.learning_rate
    shift = (eta * along) ** 2 / 2
    change = eta * a * along + eta**2 * a * (along**2 - step.curvature) / 2
    keep = (change.abs() < part.objective) & (shift < part.policy)
    inner: Tensor = lookup(LOSSES, part.then)(part.then, terms)
    return torch.where(keep, inner, torch.zeros_like(inner))


LOSSES: dict[Any, Callable[[Any, Terms], Tensor]] = {
    trust.Clip: _ppo,
    trust.Cap: _cap,
    trust.unclipped: _unclipped,
    trust.log_likelihood: _score,
    trust.SoftGate: _soft,
    trust.Gamma: _gamma,
    trust.GeometricClip: _geometric,
    trust.DivergenceMask: _divergence,
    trust.Balance: _balance,
    trust.CurvatureMask: _curvature,
}
"""Trust region -> the loss it stands for."""


def literal_loss(method: Method, batch: Example, logp: Tensor, advantage: Tensor) -> Tensor | None:
    """The loss as printed, a scalar to call ``backward`` on; None where a part has no restatement.

    ``advantage`` (B, T). The sequence ratio of GSPO is differentiated as it stands; other ratios carry their
    gradient through their own token only, as their papers say.
    """
    values = log_weights(method, batch, logp.detach())
    loss = lookup(LOSSES, method.trust)
    if values is None or loss is None:
        return None
    weight = (logp - logp.detach() + values).exp()
    if method.ratio is ratio.sequence_mean:
        means = [
            (logp - batch.rollouts.logp_old)[i, t].mean() for i, t in enumerate(positions(batch.rollouts))
        ]
        weight = torch.stack(means).exp()[:, None].expand_as(logp)
    per_token = loss(method.trust, Terms(logp, weight, advantage, batch))
    if isinstance(method.penalty, penalty.SquaredLogRatio):
        per_token = per_token + method.penalty.coefficient / 2 * (logp - batch.rollouts.logp_old) ** 2
    elif method.penalty is not None:
        return None
    return _aggregated(method, batch, per_token)


def _aggregated(method: Method, batch: Example, per_token: Tensor) -> Tensor | None:
    rows = [per_token[i, trained] for i, trained in enumerate(positions(batch.rollouts))]
    if method.aggregate is aggregate.token_mean:
        return torch.cat(rows).mean()
    if method.aggregate is aggregate.sequence_mean:
        return torch.stack([row.mean() for row in rows]).mean()
    if isinstance(method.aggregate, aggregate.SequenceSum):
        return torch.stack([row.sum() / method.aggregate.length for row in rows]).mean()
    return None
