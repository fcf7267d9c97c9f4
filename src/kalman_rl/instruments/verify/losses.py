"""Plain restatements of trust regions: losses as papers print them, for autograd.

Nothing here is fast, packed or detached more than its formula says. :data:`LOSSES` is looked up by function or by
class; a trust region that is missing there has no oracle, which fails verification.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.instruments.verify.example import Example, positions
from kalman_rl.numerics.log_bins import bin_of
from kalman_rl.objectives import trust
from kalman_rl.objectives.trust.moment import BINS


def lookup(table: dict[Any, Any], part: object) -> Any:
    """The entry for a function, or for the class of a component; None if there is none."""
    return table.get(part) if callable(part) and part in table else table.get(type(part))


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


def _quadratic(part: trust.Quadratic, terms: Terms) -> Tensor:
    """The price as printed, with ``mu`` the policy that the ratio is taken to."""
    a, w = terms.advantage, terms.weight
    mu = (terms.logp.exp() / w).detach() if part.by_probability else torch.ones_like(a)
    return -a * w + a.abs() * mu * (w - 1) ** 2 / (2 * part.bound)


def _prefix(part: trust.PrefixBudget, terms: Terms) -> Tensor:
    rollouts = terms.batch.rollouts
    assert rollouts.logp_behaviour is not None
    pi, mu = (logp.detach().clamp(max=0.0).exp() for logp in (terms.logp, rollouts.logp_behaviour))
    distance = (pi - mu).abs().tolist()
    keep = torch.ones_like(terms.advantage)
    for i, trained in enumerate(positions(rollouts)):
        spent = earned = 0.0
        sizes = sorted(distance[i][t] for t in trained)
        place = 0.9 * (len(sizes) - 1)
        below, above = sizes[math.floor(place)], sizes[math.ceil(place)]
        rate = min(max(below + (place - math.floor(place)) * (above - below), part.rate), 2 * part.rate)
        for rank, t in enumerate(trained):
            share = 1 - (1 - part.least) * rank / max(len(trained) - 1, 1)
            away = terms.advantage[i, t] * (terms.weight[i, t] - 1) > 0
            if away and share * distance[i][t] > min(part.bound, part.bound + rate * earned - spent):
                keep[i, t] = 0.0
            spent, earned = spent + share * distance[i][t], earned + share
    return -terms.advantage * terms.weight * keep


def _band(part: trust.Band, terms: Terms) -> Tensor:
    size = terms.weight.detach().log()
    return -terms.advantage * terms.weight * ((size >= -part.low) & (size <= part.high))


def _moment(part: trust.SecondMoment, terms: Terms) -> Tensor:
    """The largest go, a bin at a time, until the mean of the others is small enough or one bin is left."""
    trained = [(i, t) for i, row in enumerate(positions(terms.batch.rollouts)) for t in row]
    size = {place: abs(math.log(terms.weight[place].item())) for place in trained}
    bins: dict[int, list[tuple[int, int]]] = {}
    for place in sorted(trained, key=size.__getitem__):
        bins.setdefault(int(bin_of(torch.tensor(size[place], dtype=torch.float64), BINS)), []).append(place)
    left = list(bins.values())
    while len(left) > 1 and statistics.fmean(size[p] ** 2 for group in left for p in group) >= part.bound:
        left.pop()
    keep = torch.zeros_like(terms.advantage)
    for place in itertools.chain(*left):
        keep[place] = 1.0
    return -terms.advantage * terms.weight * keep


def _decoupled(part: trust.Decoupled, terms: Terms) -> Tensor:
    """Decoupled PPO: the near policy's ratio to the behaviour policy is a constant in front."""
    behaviour = terms.batch.rollouts.logp_behaviour
    assert behaviour is not None
    whole = (terms.logp - behaviour).detach().exp()
    inner: Tensor = lookup(LOSSES, part.then)(part.then, terms)
    return (whole / terms.weight.detach()).clamp(max=part.cap) * inner


def _geometric(part: trust.GeometricClip, terms: Terms) -> Tensor:
    rollouts, out = terms.batch.rollouts, []
    sign = torch.sign(terms.advantage)
    difference = terms.logp - rollouts.logp_old
    bounded = sign * torch.min(sign * difference, sign * torch.clamp(difference, -part.low, part.high))
    for i, trained in enumerate(positions(rollouts)):
        out.append((bounded[i, trained].mean()).exp().expand(len(bounded[i])))
    return -terms.advantage * torch.stack(out)


def _distance(divergence: trust.Divergence, terms: Terms) -> Tensor:
    rollouts = terms.batch.rollouts
    p, mu = terms.logp.detach().exp(), rollouts.logp_old.exp()
    if isinstance(divergence, trust.Averaged):
        each = _distance(divergence.divergence, terms)
        means = [each[i, trained].mean() for i, trained in enumerate(positions(rollouts))]
        return torch.stack(means)[:, None].expand_as(p)
    if divergence is trust.ratio_distance:
        return (p / mu - 1).abs()
    if divergence in (trust.binary_tv, trust.binary_kl):
        new, old = torch.stack([p, 1 - p], -1), torch.stack([mu, 1 - mu], -1)
    else:
        top = terms.batch.top_logp.exp(), rollouts.top_behaviour
        assert top[1] is not None
        new, old = (torch.cat([q, 1 - q.sum(-1, keepdim=True)], -1) for q in (top[0], top[1].exp()))
    if divergence in (trust.binary_tv, trust.top_k_tv):
        return (new - old).abs().sum(-1) / 2
    return torch.where(rollouts.mask, (old * (old / new).log()).sum(-1), 0.0)


def _divergence(part: trust.DivergenceMask, terms: Terms) -> Tensor:
    p, mu = terms.logp.detach().exp(), terms.batch.rollouts.logp_old.exp()
    distance = _distance(part.divergence, terms)
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
    trust.Quadratic: _quadratic,
    trust.PrefixBudget: _prefix,
    trust.Band: _band,
    trust.SecondMoment: _moment,
    trust.Decoupled: _decoupled,
}
"""Trust region -> the loss it stands for."""
