"""Methods that differ in the ratio: how much a token still counts off-policy.

Options of most: ``low``, ``high`` >= 0, distances of the clip's ends from a ratio of 1 (in :func:`minpro`, whose
weight is capped, ``high`` is the cap itself); ``epsilon`` >= 0, reward units, added to the group's standard
deviation. NumericError for a value outside its range.
"""

from __future__ import annotations

import math

from kalman_rl.objectives import advantage, aggregate, ratio, trust
from kalman_rl.objectives.loss import Method


def gspo(*, low: float = 3e-4, high: float = 4e-4, epsilon: float = 1e-4) -> Method:
    """GSPO: the sequence's mean log-ratio at every token, tightly clipped. Source: arXiv 2507.18071."""
    return Method(
        "gspo",
        advantage.GroupZScore(epsilon),
        ratio.sequence_mean,
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def gspo_token(*, low: float = 3e-4, high: float = 4e-4, epsilon: float = 1e-4) -> Method:
    """GSPO-token: GSPO's sequence ratio with an advantage per token. Source: arXiv 2507.18071.

    Equal to :func:`gspo` while a completion has one advantage; pass ``advantage`` (B, T) to use more.
    """
    return Method(
        "gspo_token",
        advantage.GroupZScore(epsilon),
        ratio.sequence_mean,
        trust.Clip(low, high),
        aggregate.sequence_mean,
    )


def luspo(*, low: float = 2e-3, high: float = 2.5e-3, epsilon: float = 1e-4) -> Method:
    """LUSPO: GSPO with every completion's loss times its length. Source: arXiv 2602.05261."""
    return Method(
        "luspo",
        advantage.GroupZScore(epsilon),
        ratio.sequence_mean,
        trust.Clip(low, high),
        aggregate.SequenceSum(1.0),
    )


def minpro(
    *, high: float = 5.0, inclusive: bool = False, capped: bool = False, epsilon: float = 1e-4
) -> Method:
    """MinPRO: token ratio times the smallest earlier ratio, capped like CISPO. Source: arXiv 2601.22718.

    Reconstructed from the abstract. ``inclusive`` and ``capped`` choose between its readings; the default
    equals the exact prefix ratio for two tokens. ``high`` is the bound itself, ours.
    """
    return Method(
        "minpro",
        advantage.GroupZScore(epsilon),
        ratio.PrefixMinimum(inclusive, capped),
        trust.Cap(high),
        aggregate.token_mean,
    )


def minpro_clipped(
    *,
    low: float = 0.2,
    high: float = 0.2,
    inclusive: bool = False,
    capped: bool = False,
    epsilon: float = 1e-4,
) -> Method:
    """MinPRO inside PPO's clip instead of a cap: the other reading. Source: arXiv 2601.22718."""
    return Method(
        "minpro_clipped",
        advantage.GroupZScore(epsilon),
        ratio.PrefixMinimum(inclusive, capped),
        trust.Clip(low, high),
        aggregate.token_mean,
    )


def pnpo(*, low: float = 0.03, high: float = 0.03, epsilon: float = 1e-4) -> Method:
    """PNPO: the geometric mean of the ratios so far, tokens outside a band rejected. Source: arXiv 2608.01418.

    Reconstructed from the abstract. The prefix's geometric mean is :func:`kalman_rl.methods.by_filter.kpo_diffuse` at
    Q = 0. ``low`` and ``high`` in nats, ours.
    """
    return Method(
        "pnpo",
        advantage.GroupZScore(epsilon),
        ratio.KalmanFiltered(0.0, 1.0, math.inf),
        trust.Band(low, high),
        aggregate.token_mean,
    )


def a3po(*, low: float = 0.2, high: float = 0.2, cap: float = 5.0, epsilon: float = 1e-4) -> Method:
    """A-3PO: clip the change since the last step, guessed from the lag, and weigh by the rest. arXiv 2512.06547.

    ``cap`` bounds the weight of the rest. Needs the ``lag`` of every token in optimizer steps.
    """
    return Method(
        "a3po",
        advantage.GroupZScore(epsilon),
        ratio.Lagged(),
        trust.Decoupled(trust.Clip(low, high), cap),
        aggregate.token_mean,
    )


def ratio_one(*, low: float = 3e-4, high: float = 4e-4, epsilon: float = 1e-4) -> Method:
    """The control "ratio := 1 with the same clip": what remains of KPO when the filter passes nothing."""
    return Method(
        "ratio_one", advantage.GroupZScore(epsilon), ratio.one, trust.Clip(low, high), aggregate.sequence_mean
    )
