"""Plain restatements: log-weights one token at a time, and whole losses as papers print them, for autograd.

Nothing here is fast or packed. :data:`LOOPS` is looked up by function or by class, as the trust regions' ``LOSSES``; a
part that is missing there has no oracle, which fails verification.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.instruments.verify.example import Example, positions
from kalman_rl.instruments.verify.losses import LOSSES, Terms, lookup
from kalman_rl.objectives import aggregate, penalty, ratio
from kalman_rl.objectives.loss import Method
from kalman_rl.objectives.ratio.learned import AutoFiltered
from kalman_rl.objectives.ratio.robust import RobustFiltered
from kalman_rl.objectives.ratio.token_noise import NoiseFiltered

# ---- log-weights: (part, observed log-ratios of one row by position, what else is known) -> log-weights

Row = dict[int, float]


class Known(NamedTuple):
    """Of one row by position: log-probabilities of the policy the ratio is taken to, and lags."""

    old: Row
    lag: Row


def _token(part: Any, row: Row, known: Known) -> Row:
    return row


def _one(part: Any, row: Row, known: Known) -> Row:
    return dict.fromkeys(row, 0.0)


def _sequence_mean(part: Any, row: Row, known: Known) -> Row:
    return dict.fromkeys(row, sum(row.values()) / len(row))


def _kalman(part: Any, row: Row, known: Known) -> Row:
    """Scalar filter: R may depend on the token's old log-probability, innovations may be clipped."""
    x, p, out = 0.0, getattr(part, "initial_variance", math.inf), {}
    for t in range(min(row), max(row) + 1):  # time passes in holes, not in padding
        p += part.process_noise
        if t in row:
            if isinstance(part, NoiseFiltered):
                noise = part.floor + part.scale * (1 - math.exp(known.old[t])) ** 2
            else:
                noise = part.observation_noise
            limit = getattr(part, "threshold", math.inf) * math.sqrt(p + noise)
            gain = 1.0 if math.isinf(p) else p / (p + noise)
            x, p = x + gain * min(max(row[t] - x, -limit), limit), noise * gain
            out[t] = x
    return out


def _prefix_minimum(part: ratio.PrefixMinimum, row: Row, known: Known) -> Row:
    out = {}
    for t, own in row.items():
        lowest = min((v for u, v in row.items() if u < t or (part.inclusive and u == t)), default=0.0)
        out[t] = own + (min(lowest, 0.0) if part.capped else lowest)
    return out


def _lagged(part: ratio.Lagged, row: Row, known: Known) -> Row:
    """Against ``mu^(1-a) pi^a``: the newer of two policies k steps apart, one step back."""
    out = {}
    for t, own in row.items():
        steps = known.lag[t]
        near = (steps - 1) / steps if steps >= 1 else 0.0
        out[t] = own - near * own
    return out


LOOPS: dict[Any, Callable[[Any, Row, Known], Row]] = {
    ratio.token: _token,
    ratio.BehaviourToken: _token,
    ratio.one: _one,
    ratio.sequence_mean: _sequence_mean,
    ratio.KalmanFiltered: _kalman,
    AutoFiltered: _kalman,
    NoiseFiltered: _kalman,
    RobustFiltered: _kalman,
    ratio.PrefixMinimum: _prefix_minimum,
    ratio.Lagged: _lagged,
}
"""Ratio transform -> its definition."""


def log_weights(method: Method, batch: Example, logp: Tensor) -> Tensor | None:
    """(B, T) by definition, 0 outside the mask, of a batch whose behaviour policy is the old policy."""
    loop = lookup(LOOPS, method.ratio)
    if loop is None:
        return None
    out = torch.zeros_like(logp)
    observed = (logp - batch.rollouts.logp_old).tolist()
    assert batch.rollouts.lag is not None
    before, lag = batch.rollouts.logp_old.tolist(), batch.rollouts.lag.tolist()
    for i, trained in enumerate(positions(batch.rollouts)):
        row, *known = ({t: values[i][t] for t in trained} for values in (observed, before, lag))
        for t, value in loop(method.ratio, row, Known(*known)).items():
            out[i, t] = value
    return out


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
