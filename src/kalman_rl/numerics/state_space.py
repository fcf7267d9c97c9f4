"""Kalman filter and Rauch-Tung-Striebel smoother of a vector state with scalar observations.

::

    s_k = F_k s_{k-1} + w_k,   Cov w_k = Q_k
    y_k = h s_k + v_k,         Var v_k = R_k        (R = inf: missing)

The start s_0 is unknown: nothing is assumed about its first m entries, the others are 0. The filter is linear in
it, so it runs from a known start 0, and beside the data run m more columns, which start from each unit vector
and observe 0. Their innovations say how well each start explains the data, and the start follows by least squares
(:func:`settled`). This is the limit of an infinite start variance, without a large number in it.

:func:`predict`, :func:`update` and :func:`smooth` are one step; :func:`filtered` and :func:`smoothed` are the plain
loops. Every covariance is a sum of non-negative terms, so none becomes negative by rounding.

Source: Kalman (1960); Rauch, Tung and Striebel (1965); the diffuse start: de Jong (1991), "The diffuse Kalman
filter".
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.numerics.kalman import Gaussian


class Columns(NamedTuple):
    """A belief given the start: ``mean`` (..., n, 1 + m), the data's column first; ``covariance`` (..., n, n)."""

    mean: Tensor
    covariance: Tensor


class Steps(NamedTuple):
    """The model: ``transition`` F and ``noise`` Q (T, B or 1, n, n), entry k leads to knot k and entry 0 is not
    read; ``row`` h (n,); ``unknown`` m, entries of the start of which nothing is known."""

    transition: Tensor
    noise: Tensor
    row: Tensor
    unknown: int


class FilterPath(NamedTuple):
    """What a filter leaves: ``state`` after every knot (T, B, ...), ``innovation`` (T, B, 1 + m) and its variance
    (T, B) given the start, ``evidence`` (T, B, 1 + m, 1 + m) about the start and ``seen`` (T, B)
    observations, both so far."""

    state: Columns
    innovation: Tensor
    variance: Tensor
    evidence: Tensor
    seen: Tensor


def predict(state: Columns, transition: Tensor, noise: Tensor) -> Columns:
    """One step of time: ``m' = F m``, ``P' = F P F' + Q``."""
    spread = transition @ state.covariance @ transition.mT
    return Columns(transition @ state.mean, spread + noise)


def update(
    state: Columns, row: Tensor, observation: Tensor, variance: Tensor
) -> tuple[Columns, Tensor, Tensor]:
    """Combine a belief with observations of every column.

    ``S = h P h' + R``, ``K = P h' / S``, ``m' = m + K (y - h m)``, ``P' = (1 - K h) P (1 - K h)' + K R K'``.

    Args:
        state: belief before.
        row: h (n,).
        observation: y (..., 1 + m), finite.
        variance: R (...,) in (0, inf]; inf = missing, then nothing changes.

    Returns: belief after, innovations (..., 1 + m), 0 where missing, and S (...,).
    """
    missing = variance.isinf()
    shown = state.covariance @ row
    total = shown @ row + torch.where(missing, 1.0, variance)
    gain = torch.where(missing, 0.0, 1 / total)[..., None] * shown
    innovation = torch.where(missing[..., None], 0.0, observation - row @ state.mean)
    keep = torch.eye(len(row), dtype=gain.dtype, device=gain.device) - gain[..., None] * row
    noise = torch.where(missing, 0.0, variance)[..., None, None] * gain[..., None] * gain[..., None, :]
    mean = state.mean + gain[..., None] * innovation[..., None, :]
    return Columns(mean, keep @ state.covariance @ keep.mT + noise), innovation, total


def smooth(state: Columns, later: Columns, transition: Tensor, noise: Tensor) -> tuple[Columns, Tensor]:
    """One step back: what the next knot's smoothed belief says about this knot.

    ``G = P F' (F P F' + Q)^-1``, ``m' = m + G (m_later - F m)``,
    ``P' = (1 - G F) P (1 - G F)' + G (Q + P_later) G'``.

    Args:
        state: filtered belief of this knot.
        later: smoothed belief of the next.
        transition, noise: F and Q of the step between them, Q positive definite.

    Returns: smoothed belief of this knot, and its covariance with the next knot's, ``G P_later`` (..., n, n).
    """
    ahead = predict(state, transition, noise)
    root = torch.linalg.cholesky(ahead.covariance)
    gain = torch.cholesky_solve(transition @ state.covariance, root).mT
    keep = torch.eye(gain.shape[-1], dtype=gain.dtype, device=gain.device) - gain @ transition
    covariance = (
        keep @ state.covariance @ keep.mT + gain @ noise @ gain.mT + gain @ later.covariance @ gain.mT
    )
    mean = state.mean + gain @ (later.mean - ahead.mean)
    return Columns(mean, covariance), gain @ later.covariance


def start(steps: Steps, series: int) -> Columns:
    """The belief at the first knot: the columns start from 0 and from each unit vector, exactly."""
    n = len(steps.row)
    mean = torch.eye(n, dtype=steps.row.dtype, device=steps.row.device)[:, : steps.unknown]
    mean = torch.cat((torch.zeros_like(mean[:, :1]), mean), 1).expand(series, -1, -1)
    return Columns(mean, mean.new_zeros(series, n, n))


def filtered(observation: Tensor, variance: Tensor, steps: Steps) -> FilterPath:
    """All series from the first knot to the last, one after another: the definition.

    Args:
        observation: y (B, T), finite. variance: R (B, T) in (0, inf]; inf = missing.
        steps: the model.
    """
    state = start(steps, len(observation))
    states, innovations, variances = [], [], []
    for k in range(observation.shape[1]):
        if k:
            state = predict(state, steps.transition[k], steps.noise[k])
        shown = torch.nn.functional.pad(observation[:, k, None], (0, steps.unknown))
        state, innovation, total = update(state, steps.row, shown, variance[:, k])
        states.append(state)
        innovations.append(innovation)
        variances.append(total)
    innovation, total = torch.stack(innovations), torch.stack(variances)
    evidence = evidence_of(innovation, total).cumsum(0)
    seen = (~variance.isinf()).T.cumsum(0)
    path = Columns(*(torch.stack(part) for part in zip(*states)))
    return FilterPath(path, innovation, total, evidence, seen)


def evidence_of(innovation: Tensor, variance: Tensor) -> Tensor:
    """What innovations (..., 1 + m) with a variance (...,) say of the start: ``e e' / S`` (..., 1 + m, 1 + m)."""
    return innovation[..., None] * innovation[..., None, :] / variance[..., None, None]


def smoothed(path: FilterPath, steps: Steps) -> tuple[Columns, Tensor]:
    """Every knot given all observations: belief (T, B, ...), covariance with the next knot (T - 1, B, n, n)."""
    state = Columns(*(part[-1] for part in path.state))
    states, across = [state], []
    for k in range(len(path.seen) - 2, -1, -1):
        here = Columns(*(part[k] for part in path.state))
        state, shared = smooth(here, state, steps.transition[k + 1], steps.noise[k + 1])
        states.append(state)
        across.append(shared)
    return Columns(*(torch.stack(part[::-1]) for part in zip(*states))), torch.stack(across[::-1])


def solved(evidence: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """The start by least squares: weights of the columns (..., 1 + m), the first is 1, and covariance (..., m, m).

    Args:
        evidence: sum of innovations times innovations over their variance (..., 1 + m, 1 + m).
        known: (...,) whether enough was observed; NaN where not.
    """
    unit = torch.eye(evidence.shape[-1] - 1, dtype=evidence.dtype, device=evidence.device)
    precision = torch.where(known[..., None, None], evidence[..., 1:, 1:], unit)
    root = torch.linalg.cholesky(precision)
    covariance = torch.cholesky_solve(unit.expand_as(root), root)
    weight = -torch.cholesky_solve(evidence[..., 1:, :1], root)[..., 0]
    weight = torch.cat((torch.ones_like(weight[..., :1]), weight), -1)
    return (
        torch.where(known[..., None], weight, math.nan),
        torch.where(known[..., None, None], covariance, math.nan),
    )


def settled(state: Columns, evidence: Tensor, known: Tensor) -> Gaussian:
    """A belief with the start put in: mean (..., n), covariance (..., n, n); NaN where the start is not known.

    ``m = m_0 + M delta``, ``P = P_0 + M Cov(delta) M'``; ``evidence`` and ``known`` as in :func:`solved`.
    """
    weight, covariance = solved(evidence, known)
    columns = state.mean[..., 1:]
    mean = (state.mean @ weight[..., None])[..., 0]
    return Gaussian(mean, state.covariance + columns @ covariance @ columns.mT)


def innovations(path: FilterPath, unknown: int) -> Gaussian:
    """Innovation and its variance (T, B) given the observations before; NaN until m were seen."""
    evidence = torch.cat((torch.zeros_like(path.evidence[:1]), path.evidence[:-1]))
    known = torch.cat((torch.zeros_like(path.seen[:1]), path.seen[:-1])) >= unknown
    return innovation_given(path.innovation, path.variance, evidence, known)


def innovation_given(innovation: Tensor, variance: Tensor, evidence: Tensor, known: Tensor) -> Gaussian:
    """An innovation of every column (..., 1 + m) with the start put in, as in :func:`settled`."""
    weight, covariance = solved(evidence, known)
    columns = innovation[..., 1:]
    spread = (columns[..., None, :] @ covariance @ columns[..., None])[..., 0, 0]
    return Gaussian((innovation * weight).sum(-1), variance + spread)


def likelihood_sums(path: FilterPath, observed: Tensor, unknown: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the diffuse likelihood (B,): degrees of freedom, quadratic, log-determinant.

    ``log p = -(n log 2 pi + log_determinant + quadratic) / 2`` with n = observed - m; NaN where n < 0.
    ``observed`` is (B, T) bool.
    """
    count, last = path.seen[-1], path.evidence[-1]
    weight, covariance = solved(last, count >= unknown)
    quadratic = (last[..., 0, :] * weight).sum(-1)
    logs = torch.where(observed.T, path.variance.log(), 0.0).sum(0)
    return count - unknown, quadratic, logs - torch.linalg.slogdet(covariance).logabsdet
