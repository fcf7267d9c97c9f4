"""SAGE's score of a prompt: gradient against curvature at the logit of its success.

With ``m = log(p / (1 - p))``, ``g = 1 / (1 + e^m)`` and ``h = g (1 - g)`` the score is ``g^2 / (h + damping)``, less
where m is uncertain. :class:`~kalman_rl.sampling.stream.PromptStream` draws by it with ``score="sage"``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kalman_rl.checks import expect_tensor, is_real
from kalman_rl.errors import NumericError, ShapeError, quote


def success_margin(mean: Tensor) -> Tensor:
    """``m = log(p / (1 - p))`` (N,) of success probabilities, as a belief has them; -inf at 0, inf at 1.

    Raises: NumericError outside [0, 1]. Detached.
    """
    mean = _vector("mean", mean)
    _every("mean", mean, (mean >= 0) & (mean <= 1), "success probabilities in [0, 1]")
    return mean.log() - torch.log1p(-mean)


def log_score(margin: Tensor, damping: float = 0.1) -> Tensor:
    """``log(g^2 / (h + damping))`` (N,), accurate for any margin, infinite ones included; detached.

    Args: margin: (N,); NaN is refused. damping: >= 0; 0 gives exactly ``-m``.
    Raises: ShapeError, NumericError.
    """
    margin = _vector("margin", margin)
    _every("margin", margin, ~margin.isnan(), "numbers; leave rows without an estimate out")
    _in_range("damping", damping, is_real(damping) and 0 <= damping < math.inf, "a finite number >= 0")
    if damping == 0:
        return -margin
    dtype, margin, damping = margin.dtype, margin.double(), float(damping)  # a damping of 1e-50 is not 0
    small = torch.exp(-margin.abs())
    # e = exp(-|m|):  m < 0:  1 / (e + d (1 + e)^2);   m >= 0:  e^2 / (e + d (1 + e)^2)
    below = torch.log(small + damping * (1 + small).square())
    return (-2 * margin.clamp(min=0.0) - below).to(dtype)


def score(
    margin: Tensor,
    *,
    damping: float = 0.1,
    variance: Tensor | None = None,
    penalty: float = 1.0,
    limit: float = math.inf,
) -> Tensor:
    """Signal against curvature, ``g^2 / (h + damping) / (1 + penalty Var m)``, 0 where ``m < -limit``; (N,), detached.

    g and h are gradient and curvature of ``softplus(-m)``; half the score is about what a Newton step on m gains. It
    is largest for confident errors, **where wrong labels sit too**: with margins N(2, 2) and a tenth of the labels
    flipped, 79 % of the best-scored twentieth are flipped, 51 % with limit 3, 18 % with limit 1 (the test computes it).

    Args:
        margin: (N,), NaN refused.
        damping: >= 0; the score never exceeds ``1 / damping``. At 0 it overflows to inf for very negative m.
        variance: (N,) >= 0, variance of the margin over dropout, checkpoints or a belief: an unstable error
            teaches less. None = 0.
        penalty: >= 0, weight of that variance.
        limit: >= 0; errors more confident than this (in logits) are taken for wrong labels and get 0.

    Raises: ShapeError, NumericError.
    Source: SAGE (arXiv 2602.01207), reconstructed from its abstract; formulas and defaults are ours.

    >>> score(torch.tensor([-9.0, -2.0, 0.0, 2.0]), limit=6.0)
    tensor([0.0000, 3.7845, 0.7143, 0.0693])
    """
    _in_range("limit", limit, is_real(limit) and limit >= 0, "a number of logits >= 0, or inf")
    _in_range("penalty", penalty, is_real(penalty) and 0 <= penalty < math.inf, "a finite number >= 0")
    penalty, limit = float(penalty), float(limit)
    found = log_score(margin, damping).exp()
    if variance is not None:
        variance = _vector("variance", variance, len(found))
        _every("variance", variance, (variance >= 0) & variance.isfinite(), "finite variances >= 0")
        found = found / (1 + penalty * variance)
    return torch.where(margin < -limit, 0.0, found)


def _vector(name: str, values: Tensor, rows: int | None = None) -> Tensor:
    """(N,) numbers, detached, in float32 at least."""
    expect_tensor(name, values)
    if values.is_complex():
        raise ShapeError(f"{name}: got {values.dtype}, expected real numbers")
    if values.dim() != 1 or (rows is not None and len(values) != rows):
        expected = "(N,)" if rows is None else f"({rows},)"
        raise ShapeError(f"{name}: got shape {tuple(values.shape)}, expected {expected}: one number a row")
    return values.detach() if values.dtype == torch.float64 else values.detach().float()


def _every(name: str, values: Tensor, legal: Tensor, expected: str) -> None:
    if not legal.all():
        wrong = (~legal).nonzero().flatten().tolist()
        told = f"{values[wrong[0]].item()} at row {wrong[0]} ({len(wrong)} such rows)"
        raise NumericError(f"{name}: got {told}, expected {expected}")


def _in_range(name: str, value: float, legal: bool, expected: str) -> None:
    if not legal:
        raise NumericError(f"{name}: got {quote(value)}, expected {expected}")
