"""What a fused kernel needs to know of a method, as numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

ONE, TOKEN, SEQUENCE, FILTERED = range(4)
"""Ratio transforms: 1, the token's, the sequence's mean, the Kalman filter's."""

UNCLIPPED, LOG_LIKELIHOOD, CLIP, CAP = range(4)
"""Trust regions."""

SEQUENCE_MEAN, TOKEN_MEAN, SEQUENCE_SUM = range(3)
"""Aggregations."""


class Plan(NamedTuple):
    """One composition: the kinds of its parts and their numbers.

    ``low, high`` bound the weight itself; ``dual`` is inf for none. ``process`` and ``start`` are Q / R and
    P0 / R. ``length`` divides the sum of a sequence where the aggregation has a constant.
    """

    ratio: int
    trust: int
    aggregate: int
    low: float = 0.0
    high: float = 0.0
    dual: float = float("inf")
    process: float = 0.0
    start: float = 0.0
    length: float = 1.0


class Fused(NamedTuple):
    """What a fused pass returns. ``value`` and ``gradient`` (B, T) of the surrogate with respect to logp;
    the fields of :class:`kalman_rl.objectives.loss.Tokens`; ``metrics`` (12,) float32 in the order of ``METRICS``;
    ``sums`` (12, 4) float64 behind each: tokens (or pairs), sum of the values and of their squares, largest. A sum
    that its metric is not made of may be 0."""

    value: Tensor
    gradient: Tensor
    log_ratio: Tensor
    log_weight: Tensor
    gain: Tensor | None
    coefficient: Tensor
    kept: Tensor
    metrics: Tensor
    sums: Tensor


METRICS = (
    "ratio/raw_log_variance",
    "ratio/filtered_log_variance",
    "ratio/effective_sample_size",
    "ratio/max_abs_log_ratio",
    "ratio/capped",
    "ratio/raw_sign_switch",
    "ratio/filtered_sign_switch",
    "ratio/noop",
    "trust/kept",
    "trust/clipped_low",
    "trust/clipped_high",
    "policy/kl_old",
)
"""Names of the metrics of a fused pass, as in :func:`kalman_rl.objectives.policy_loss`."""
