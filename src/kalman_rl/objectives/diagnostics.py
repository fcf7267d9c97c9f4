"""Diagnosis: numbers about the ratios of one batch, the same for every objective.

A metric is made of sums over tokens, (4,) float64: how many there are, the sum of the values, the sum of their squares,
and the largest. Sums of micro-batches, ranks and steps add up, and the metric is divided once at the end. A mean of
means would let an empty micro-batch count as much as a full one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from kalman_rl.objectives.rollouts import Rollouts

KINDS = ("tokens_raw", "tokens", "sequences_raw", "sequences")
"""Effective sample sizes, in the order of :func:`sample_sizes`."""

LARGEST_LOG = 300.0
"""Nats beyond which a weight counts as no larger: its square would leave the range of float64."""


def sums_of(values: Tensor, mask: Tensor) -> Tensor:
    """``(n, sum x, sum x^2, max x)`` (4,) float64 of the values (B, T) where the mask is True; zeros if nowhere.

    >>> sums_of(torch.tensor([[3.0, 1.0, 9.0]]), torch.tensor([[True, True, False]])).tolist()
    [2.0, 4.0, 10.0, 3.0]
    """
    if not mask.numel():
        return torch.zeros(4, dtype=torch.float64, device=mask.device)
    inside, count = torch.where(mask, values.double(), 0.0), mask.sum().double()
    largest = torch.where(mask, inside, -torch.inf).amax()
    largest = torch.where(count > 0, largest, 0.0)
    return torch.stack([count, inside.sum(), inside.square().sum(), largest])


def joined(parts: Tensor) -> Tensor:
    """Sums (..., 4) of all parts (m, ..., 4) together.

    >>> joined(torch.tensor([[2.0, 4.0, 10.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, 5.0, 25.0, 5.0]])).tolist()
    [3.0, 9.0, 35.0, 5.0]
    """
    largest = torch.where(parts[..., 0] > 0, parts[..., 3], -torch.inf).amax(0)
    total = parts[..., :3].sum(0)
    return torch.cat([total, torch.where(total[..., 0] > 0, largest, 0.0)[..., None]], dim=-1)


def mean(sums: Tensor) -> Tensor:
    """Mean; 0 if there are no tokens."""
    return sums[..., 1] / sums[..., 0].clamp(min=1.0)


def variance(sums: Tensor) -> Tensor:
    """Population variance. In float64 it is right to a part in ``1e-15 mean^2 / variance``."""
    return (sums[..., 2] / sums[..., 0].clamp(min=1.0) - mean(sums).square()).clamp(min=0.0)


def effective_sample_size(sums: Tensor) -> Tensor:
    """Kish's effective sample size as a share of the tokens: ``(sum w)^2 / (n sum w^2)``, in (0, 1]; 1 without any."""
    squares = sums[..., 0] * sums[..., 2]
    return torch.where(squares > 0, sums[..., 1].square() / squares, 1.0)


def share_left(sums: Tensor) -> Tensor:
    """Kish's effective sample size as a share, in [0, 1]: 0 where every weight is 0, 1 without any."""
    dropped = (sums[..., 0] > 0) & (sums[..., 2] == 0)
    return torch.where(dropped, 0.0, effective_sample_size(sums))


def largest(sums: Tensor) -> Tensor:
    """The largest value."""
    return sums[..., 3]


def smallest(sums: Tensor) -> Tensor:
    """The smallest value, from the sums of the negative values."""
    return -sums[..., 3]


def none_moved(sums: Tensor) -> Tensor:
    """1 if the largest absolute value is 0, else 0."""
    return (sums[..., 3] == 0).double()


READ: dict[str, Callable[[Tensor], Tensor]] = {
    "ratio/raw_log_variance": variance,
    "ratio/filtered_log_variance": variance,
    "ratio/effective_sample_size": effective_sample_size,
    "correction/effective_sample_size": effective_sample_size,
    "effective_sample_size/tokens_raw": share_left,
    "effective_sample_size/tokens": share_left,
    "effective_sample_size/sequences_raw": share_left,
    "effective_sample_size/sequences": share_left,
    "ratio/max_abs_log_ratio": largest,
    "ratio/noop": none_moved,
    "clip_ratio/low_min": smallest,
    "clip_ratio/high_max": largest,
}
"""How a metric is read from its sums, where it is not their mean."""


def read_by(name: str) -> Callable[[Tensor], Tensor]:
    """How the metric of that name is read from its sums."""
    return READ.get(name, mean)


def metric(name: str, sums: Tensor) -> Tensor:
    """The metric of that name from its sums (4,): 0-dimensional."""
    return read_by(name)(sums)


def metrics_of(sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """:func:`metric` of every name, those that are read alike at once."""
    alike: dict[Callable[[Tensor], Tensor], list[str]] = {}
    for name in sums:
        alike.setdefault(read_by(name), []).append(name)
    found: dict[str, Tensor] = {}
    for read, names in alike.items():
        found |= zip(names, read(torch.stack([sums[name] for name in names])).unbind())
    return {name: found[name] for name in sums}


def sample_sizes(log_ratio: Tensor, coefficient: Tensor, rollouts: Rollouts) -> dict[str, Tensor]:
    """Sums (4,) behind Kish's effective sample sizes, of tokens and of sequences, before and after the method.

        ESS / n = (sum w)^2 / (n sum w^2)

    tokens_raw      w = pi / pi_old of the token
    tokens          w = the coefficient on its gradient, 0 where it was dropped
    sequences_raw   w = the product of the sequence's token ratios
    sequences       w = the mean coefficient of its tokens

    Args: log_ratio, coefficient: (B, T) of :class:`kalman_rl.objectives.loss.Tokens`, finite everywhere. rollouts: of
        the batch.
    Gradient: none. Source: VCPO (arXiv 2602.17616) for sequences_raw.

    >>> rollouts = Rollouts(torch.zeros(2, 2), torch.tensor([[1, 1], [1, 0]]))
    >>> log_ratio = torch.tensor([[0.0, 0.0], [3.0, 0.0]]).log1p()  # products 1 and 4
    >>> sums = sample_sizes(log_ratio, torch.ones(2, 2), rollouts)
    >>> round(metric("effective_sample_size/sequences_raw", sums["effective_sample_size/sequences_raw"]).item(), 4)
    0.7353
    """
    mask = rollouts.mask.double()
    log, used = log_ratio.detach() * mask, coefficient.detach().abs() * mask
    product, total, length = (rollouts.by_sequence(values) for values in (log, used, mask))
    tokens = _sums_of_both(_weight(log), used, mask)
    sequences = _sums_of_both(_weight(product), total / length.clamp(min=1.0), length.clamp(max=1.0))
    found = zip(KINDS, (*tokens, *sequences))
    return {f"effective_sample_size/{name}": sums for name, sums in found}


def _weight(log: Tensor) -> Tensor:
    return log.clamp(-LARGEST_LOG, LARGEST_LOG).exp_()


def _sums_of_both(raw: Tensor, used: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
    """:func:`sums_of` two kinds of weights >= 0, of which ``used`` is 0 where the ``mask`` of 0 and 1 is."""
    both = torch.stack([raw * mask, used]).flatten(1)
    count = mask.sum().expand(2)
    return torch.stack([count, both.sum(1), both.square().sum(1), both.amax(1)], dim=1).unbind()


def switches(log_ratio: Tensor, mask: Tensor, sequence: Tensor) -> Tensor:
    """Sums over neighbouring trained tokens of whether their log-ratio changes sign, neighbours of the same
    ``sequence`` (B, T) number.

    White noise gives a mean of 0.5; smoothing lowers it whether or not anything is learned, so it shows how much was
    smoothed, not how healthy a run is. A token whose log-ratio is 0 has no sign, and changes none.
    Gradient: none.
    """
    pairs = mask[:, 1:] & mask[:, :-1]
    pairs = pairs & (sequence[:, 1:] == sequence[:, :-1])
    sign = log_ratio.sign()  # a product of the log-ratios themselves would underflow
    return sums_of(sign[:, 1:] * sign[:, :-1] < 0, pairs)


def divergence(log_ratio: Tensor) -> Tensor:
    """``exp(l) - 1 - l >= 0`` per token (B, T), nats: its mean under old samples estimates KL(old || current)."""
    return torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio
