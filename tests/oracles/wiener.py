"""The integrated Wiener process as one dense Gaussian: every observation is ``int g(u) dW(u)`` plus a polynomial."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np


class Functionals(NamedTuple):
    """Linear functionals of the path: ``white`` (n, nodes) with covariance q white white', ``flat`` (n, m)."""

    white: np.ndarray
    flat: np.ndarray

    def __getitem__(self, rows) -> Functionals:
        return Functionals(self.white[rows], self.flat[rows])


def functionals(order: int, times: np.ndarray, *, derivative: int = 0, knots: np.ndarray) -> Functionals:
    """``x^(derivative)(t)`` at each time; -1 = the integral since the time before (since 0 for the first).

    ``x(t) = sum_k c_k t^k / k! + int_0^t (t - u)^(m-1) / (m-1)! dW(u)``, times >= 0 and among the knots. The products
    of the kernels are polynomials between knots, so Gauss-Legendre nodes make every covariance exact.
    """
    edges = np.unique(np.concatenate(([0.0], knots)))
    node, weight = np.polynomial.legendre.leggauss(order + 2)
    half = np.diff(edges) / 2
    nodes = (edges[:-1, None] + half[:, None] * (node + 1)).ravel()
    root = np.sqrt((half[:, None] * weight).ravel())
    power = order - 1 - derivative

    def at(t: np.ndarray) -> Functionals:
        since = np.maximum(t[:, None] - nodes, 0.0)
        white = np.where(t[:, None] > nodes, since**power, 0.0) / math.factorial(power) * root
        flat = [
            t ** (k - derivative) / math.factorial(k - derivative) if k >= derivative else 0 * t
            for k in range(order)
        ]
        return Functionals(white, np.stack(flat, 1))

    here = at(np.asarray(times, dtype=float))
    if derivative >= 0:
        return here
    before = at(np.concatenate(([0.0], times[:-1])))
    return Functionals(here.white - before.white, here.flat - before.flat)


class Posterior(NamedTuple):
    """Mean and covariance of the targets; ``quadratic`` and ``log_determinant`` of the diffuse likelihood."""

    mean: np.ndarray
    covariance: np.ndarray
    quadratic: float
    log_determinant: float


def posterior(
    target: Functionals, seen: Functionals, y: np.ndarray, noise: np.ndarray, q: float
) -> Posterior:
    """Universal kriging: a Gaussian process with a flat polynomial, all at once."""
    total = q * seen.white @ seen.white.T + np.diag(noise)
    shared = q * target.white @ seen.white.T
    inverse = np.linalg.inv(total)
    precision = seen.flat.T @ inverse @ seen.flat
    start = np.linalg.solve(precision, seen.flat.T @ inverse @ y)
    rest = y - seen.flat @ start
    left = target.flat - shared @ inverse @ seen.flat
    covariance = q * target.white @ target.white.T - shared @ inverse @ shared.T
    covariance += left @ np.linalg.solve(precision, left.T)
    logs = np.linalg.slogdet(total)[1] + np.linalg.slogdet(precision)[1]
    return Posterior(target.flat @ start + shared @ inverse @ rest, covariance, rest @ inverse @ rest, logs)
