"""The first batch ever: every prompt is predicted from the other prompts of the batch."""

from __future__ import annotations

import math

import torch

from kalman_rl.beliefs.base import Prior
from kalman_rl.beliefs.groups import Groups
from kalman_rl.numerics.kalman import Gaussian

_MIN_SHARE = 1e-6


def leave_one_out_prior(groups: Groups, mean: float) -> Prior:
    """Prior of each prompt from all others: their mean, their spread beyond noise, their noise.

    With means y_k of n_k rewards over the other prompts k: ``m = mean y_k``,
    ``R = sum within_k / sum (n_k - 1)``, ``P = max(0, var y_k - R mean 1/n_k)``. Together with the
    leave-one-out formula for the own group this is James-Stein shrinkage in which no reward takes part in
    its own baseline.

    Args:
        groups: u prompts; those without a known reward inform nobody.
        mean: what to expect of a prompt without any other prompt beside it; P is inf then.

    Returns: :class:`Prior`, each field (u,).
    Source: James and Stein (1961); per-prompt use in RL: arXiv 2511.03710. Deviation: exact to the last bit.
    """
    from_left = _running(groups, range(len(groups.ids)))
    from_right = _running(groups, range(len(groups.ids) - 1, -1, -1))[::-1]
    out = [_prior_of(_merged(left, right), mean) for left, right in zip(from_left, from_right)]
    m, p, r = torch.tensor(out, dtype=torch.float64).unbind(1)
    return Prior(Gaussian(m, p), r)


_Sums = tuple[float, float, float, float, float, float]
"""Prompts, mean of their means, squared deviations of the means, sum 1/n, within squares, freedom."""


def _running(groups: Groups, order: range) -> list[_Sums]:
    """Sums over the prompts before each one in the given order."""
    means, counts, within = groups.mean.tolist(), groups.size.tolist(), groups.within.tolist()
    sums: _Sums = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    out = []
    for i in order:
        out.append(sums)
        if counts[i]:
            sums = _merged(sums, (1.0, means[i], 0.0, 1 / counts[i], within[i], counts[i] - 1))
    return out


def _merged(a: _Sums, b: _Sums) -> _Sums:
    number = a[0] + b[0]
    if not number:
        return a
    apart = b[1] - a[1]
    mean = a[1] + apart * b[0] / number
    squares = a[2] + b[2] + apart * apart * a[0] * b[0] / number
    return number, mean, squares, a[3] + b[3], a[4] + b[4], a[5] + b[5]


def _prior_of(sums: _Sums, mean: float) -> tuple[float, float, float]:
    number, centre, squares, inverse, within, freedom = sums
    if not number:
        return mean, math.inf, 1.0
    spread = squares / (number - 1) if number > 1 else 0.0
    noise = within / freedom if freedom else spread
    value = max(0.0, spread - noise * inverse / number) if freedom else spread / 2
    # Others that agree exactly still leave a little doubt, so that R is never 0.
    noise = max(noise, _MIN_SHARE * (noise + spread), 1e-12)
    return centre, value if number > 1 else math.inf, noise
