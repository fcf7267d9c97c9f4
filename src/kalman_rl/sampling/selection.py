"""Which prompts or preference pairs to train on next: confident, stable errors first, by pools of difficulty.

A margin m says how right the policy already is: for a preference pair the logit of preferring the chosen
text, for a prompt the logit of its success probability. ``softplus(-m)`` has gradient and curvature

    g = sigmoid(-m),    h = sigmoid(m) sigmoid(-m);    score = g^2 / (h + damping) / (1 + penalty Var m)

so that one Newton step on m alone gains about ``score / 2``. The score tends to ``1 / damping`` for confident
errors, is ``0.25 / (0.25 + damping)`` at m = 0 and tends to 0 for what is already known. Without damping it
is ``exp(-m)``: the order of the margins and nothing else. **Confident errors are also where wrong labels
sit**: with margins N(2, 2) and one label in ten flipped, 79 % of the best-scored twentieth are flipped (the
test computes it). ``limit`` leaves the most confident errors out: 51 % at 3, 18 % at 1, of easier rows.

Use: margin -> :func:`score`; difficulty -> :func:`quantile_pools` or :func:`edge_pools`, kept up to date with
:func:`refreshed`; both -> :func:`select`, whose weights multiply the loss of each row.

Source: SAGE (arXiv 2602.01207), **reconstructed from its abstract**, which speaks of difficulty pools that
follow the model and of a forward-only score of signal against curvature. Every formula, threshold and default
here is ours.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError

# ---- margins


def pair_margin(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    *,
    beta: float = 0.1,
    length_chosen: Tensor | None = None,
    length_rejected: Tensor | None = None,
) -> Tensor:
    """DPO's margin ``m = beta [(lp_w - ref_w) / n_w - (lp_l - ref_l) / n_l]`` (N,), detached.

    Args:
        chosen, rejected: (N,) log-probabilities (nats) of the whole texts under the policy.
        reference_chosen, reference_rejected: (N,) the same under the reference policy.
        beta: > 0; with lengths it multiplies nats per token and wants to be larger.
        length_chosen, length_rejected: (N,) tokens >= 1, both or none (n = 1). Without them long pairs have
            the largest margins and dominate every ranking.

    Raises: ShapeError, NumericError for what does not fit or is not finite.

    >>> one = torch.tensor([-3.0])
    >>> pair_margin(one, one - 2, one, one, beta=0.5)
    tensor([1.])
    """
    _in_range("beta", beta, 0 < beta < math.inf, "a finite number > 0")
    if (length_chosen is None) != (length_rejected is None):
        raise ShapeError("length_chosen, length_rejected: got one of them, expected both or none")
    sides = []
    for name, logp, reference, length in (
        ("chosen", chosen, reference_chosen, length_chosen),
        ("rejected", rejected, reference_rejected, length_rejected),
    ):
        logp, reference = _vector(name, logp), _vector(f"reference_{name}", reference, len(chosen))
        _every(f"reference_{name}", reference, torch.isfinite(reference), "finite log-probabilities")
        _every(name, _vector(name, logp, len(chosen)), torch.isfinite(logp), "finite log-probabilities")
        difference = logp - reference
        if length is not None:
            tokens = _vector(f"length_{name}", length, len(chosen))
            _every(f"length_{name}", tokens, (tokens >= 1) & tokens.isfinite(), "token counts >= 1")
            difference = difference / tokens
        sides.append(difference)
    return beta * (sides[0] - sides[1])


def success_margin(mean: Tensor) -> Tensor:
    """``m = log(p / (1 - p))`` (N,) of success probabilities, as a belief has them; -inf at 0, inf at 1.

    Raises: NumericError outside [0, 1]. Detached.
    """
    mean = _vector("mean", mean)
    _every("mean", mean, (mean >= 0) & (mean <= 1), "success probabilities in [0, 1]")
    return mean.log() - torch.log1p(-mean)


def counted_margin(successes: Tensor, failures: Tensor, *, prior: float = 0.5) -> Tensor:
    """``m = log((s + prior) / (f + prior))`` (N,): the logit of the mean of a Beta posterior.

    Args:
        successes, failures: (N,) counts >= 0, fractions allowed.
        prior: > 0, imagined successes and failures each; 0.5 is Jeffreys'.

    Raises: ShapeError, NumericError. Detached.

    >>> counted_margin(torch.tensor([0, 4]), torch.tensor([0, 0]))
    tensor([0.0000, 2.1972])
    """
    _in_range("prior", prior, 0 < prior < math.inf, "a finite number > 0")
    successes = _vector("successes", successes)
    failures = _vector("failures", failures, len(successes))
    for name, counts in (("successes", successes), ("failures", failures)):
        _every(name, counts, (counts >= 0) & counts.isfinite(), "finite counts >= 0")
    return (successes + prior).log() - (failures + prior).log()


# ---- score


def log_score(margin: Tensor, damping: float = 0.1) -> Tensor:
    """``log(g^2 / (h + damping))`` (N,), accurate for any margin, infinite ones included; detached.

    Args:
        margin: (N,); NaN is refused.
        damping: >= 0; 0 gives exactly ``-m``.

    Raises: ShapeError, NumericError.
    """
    margin = _vector("margin", margin)
    _every("margin", margin, ~margin.isnan(), "numbers; leave rows without an estimate out")
    _in_range("damping", damping, 0 <= damping < math.inf, "a finite number >= 0")
    if damping == 0:
        return -margin
    dtype, margin = margin.dtype, margin.double()  # a damping of 1e-50 is not 0
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
    """Signal against curvature, ``g^2 / (h + damping) / (1 + penalty Var m)``, 0 where ``m < -limit``; (N,).

    Args:
        margin: (N,), NaN refused.
        damping: >= 0; the score never exceeds ``1 / damping``. At 0 it overflows to inf for very negative m.
        variance: (N,) >= 0, variance of the margin over dropout, checkpoints or a belief: an unstable error
            teaches less. None = 0.
        penalty: >= 0, weight of that variance.
        limit: >= 0; errors more confident than this (in logits) are taken for wrong labels and get 0.

    Raises: ShapeError, NumericError. Detached.

    >>> score(torch.tensor([-9.0, -2.0, 0.0, 2.0]), limit=6.0)
    tensor([0.0000, 3.7845, 0.7143, 0.0693])
    """
    _in_range("limit", limit, limit >= 0, "a number of logits >= 0, or inf")
    _in_range("penalty", penalty, 0 <= penalty < math.inf, "a finite number >= 0")
    found = log_score(margin, damping).exp()
    if variance is not None:
        variance = _vector("variance", variance, len(found))
        _every("variance", variance, (variance >= 0) & variance.isfinite(), "finite variances >= 0")
        found = found / (1 + penalty * variance)
    return torch.where(margin < -limit, 0.0, found)


# ---- pools


def quantile_pools(difficulty: Tensor, count: int) -> Tensor:
    """Pool numbers (N,), 0 to count - 1 from the lowest value: about equally many rows in each.

    Equal values share a pool, so pools may be uneven or empty. Raises: ShapeError, NumericError.

    >>> quantile_pools(torch.tensor([0.9, 0.1, 0.5, 0.7]), 2)
    tensor([1, 0, 0, 1])
    """
    difficulty = _vector("difficulty", difficulty)
    _every("difficulty", difficulty, ~difficulty.isnan(), "numbers")
    _in_range("count", count, count >= 1, "a number of pools >= 1")
    ordered, rows = difficulty.sort().values, len(difficulty)
    starts = [
        ordered[math.ceil(i * rows / count)] for i in range(1, count) if math.ceil(i * rows / count) < rows
    ]
    edges = torch.stack(starts) if starts else difficulty.new_zeros(0)
    return torch.bucketize(difficulty, edges, right=True)


def edge_pools(difficulty: Tensor, edges: Sequence[float]) -> Tensor:
    """Pool numbers (N,), 0 to len(edges): how many of the rising edges are <= the value.

    Raises: ShapeError, NumericError.

    >>> edge_pools(torch.tensor([0.1, 0.25, 0.9]), [0.25, 0.75])
    tensor([0, 1, 2])
    """
    difficulty = _vector("difficulty", difficulty)
    _every("difficulty", difficulty, ~difficulty.isnan(), "numbers")
    if any(not a < b for a, b in itertools.pairwise(edges)) or any(math.isnan(edge) for edge in edges):
        raise NumericError(f"edges: got {list(edges)}, expected rising numbers")
    return torch.bucketize(difficulty, difficulty.new_tensor(list(edges)), right=True)


def refreshed(
    pool: Tensor | None, difficulty: Tensor, step: int, every: int, assign: Callable[[Tensor], Tensor]
) -> Tensor:
    """The pools to use at an optimizer step: new ones from ``assign(difficulty)`` every so many steps.

    Pools that move with every step chase noise, pools that never move forget that the model got better.

    Args:
        pool: the last answer, None at the start of a run.
        difficulty: (N,) as it is now. A number of rows other than the pool's counts as a start.
        step: >= 0. every: >= 1 steps.
        assign: for example ``lambda d: quantile_pools(d, 4)``.

    Raises: NumericError.
    """
    _in_range("step", step, step >= 0, "a step >= 0")
    _in_range("every", every, every >= 1, "a number of steps >= 1")
    if pool is None or step % every == 0 or len(pool) != len(difficulty):
        return assign(difficulty)
    return pool


def nearest_pool(pool: Tensor, success: Tensor, target: float = 0.5) -> int:
    """The pool whose mean success probability is nearest to a target competence; the lower one of two.

    Args: pool: (N,) from above, N >= 1. success: (N,) in [0, 1]. target: in [0, 1].
    Raises: ShapeError, NumericError.

    >>> nearest_pool(torch.tensor([0, 0, 1]), torch.tensor([0.0, 0.2, 0.6]))
    1
    """
    success = _vector("success", success, len(pool)).double()
    _every("success", success, (success >= 0) & (success <= 1), "success probabilities in [0, 1]")
    _in_range("target", target, 0 <= target <= 1, "a success probability")
    if len(pool) == 0:
        raise ShapeError("pool: got no rows, expected at least one")
    numbers = torch.unique(pool)
    means = torch.stack([success[pool == number].mean() for number in numbers])
    return int(numbers[(means - target).abs().argmin()])


# ---- selection


class Selection(NamedTuple):
    """``keep`` (N,) bool, and the ``weight`` (N,) of each row's loss: 0 where not kept, 1 on average."""

    keep: Tensor
    weight: Tensor


def select(scores: Tensor, pool: Tensor, fraction: float) -> Selection:
    """Keep the best-scored fraction of every pool; weights make up for the rest, so no row has to be dropped.

    A pool of n rows keeps ``ceil(fraction n)`` of them, but only rows with a score > 0; the earlier row wins
    a tie. Each pool keeps its share of the batch, ``weight = n / kept``. A pool without candidates hands its
    share to the others; if no pool has any, every row is kept with weight 1.

    Args:
        scores: (N,) >= 0, finite. pool: (N,) integers, from :func:`quantile_pools` or :func:`edge_pools`.
        fraction: in (0, 1].

    Raises: ShapeError, NumericError.

    >>> select(torch.tensor([3.0, 1.0, 2.0, 0.0]), torch.tensor([0, 0, 1, 1]), 0.5)
    Selection(keep=tensor([ True, False,  True, False]), weight=tensor([2., 0., 2., 0.]))
    """
    scores = _vector("scores", scores)
    _every("scores", scores, (scores >= 0) & scores.isfinite(), "finite scores >= 0; set damping > 0")
    _in_range("fraction", fraction, 0 < fraction <= 1, "a share in (0, 1]")
    if pool.shape != scores.shape:
        raise ShapeError(f"pool: got shape {tuple(pool.shape)}, expected {tuple(scores.shape)} like scores")
    keep, weight = torch.zeros_like(scores, dtype=torch.bool), torch.zeros_like(scores)
    for number in torch.unique(pool):
        rows = (pool == number).nonzero().flatten()
        order = rows[scores[rows].argsort(descending=True, stable=True)]
        best = order[: math.ceil(fraction * len(rows) - 1e-9)]
        best = best[scores[best] > 0]
        keep[best] = True
        weight[best] = len(rows) / max(len(best), 1)
    if not keep.any():
        return Selection(torch.ones_like(keep), torch.ones_like(weight))
    return Selection(keep, weight * (len(weight) / weight.sum()))


# ---- checks


def _vector(name: str, values: Tensor, rows: int | None = None) -> Tensor:
    """(N,) numbers, detached, in float32 at least."""
    if values.dim() != 1 or (rows is not None and len(values) != rows):
        expected = "(N,)" if rows is None else f"({rows},)"
        raise ShapeError(f"{name}: got shape {tuple(values.shape)}, expected {expected}: one number a row")
    return values.detach() if values.dtype == torch.float64 else values.detach().float()


def _every(name: str, values: Tensor, legal: Tensor, expected: str) -> None:
    if not legal.all():
        row = int((~legal).nonzero()[0])
        count = int((~legal).sum())
        raise NumericError(
            f"{name}: got {values[row].item()} at row {row} ({count} such rows), expected {expected}"
        )


def _in_range(name: str, value: float, legal: bool, expected: str) -> None:
    if not legal:
        raise NumericError(f"{name}: got {value}, expected {expected}")
