"""The integrated Wiener process: a path whose m-th derivative is white noise, seen at any times.

The state holds the path and its derivatives, ``s = (x, x', ..., x^(m-1))``. Over a step d it moves by::

    s(t + d) = F s(t) + w,   Cov w = q Q
    F_ij = d^(j-i) / (j-i)!                                              for j >= i
    Q_ij = d^(2m+1-i-j) / ((2m+1-i-j) (m-i)! (m-j)!)                      i, j = 1..m

Where not the path but its integral over each step is observed, the state has one more entry, I, the integral
since the step began; it follows the same formulas with the index 0 and forgets its own past.

The smoothed mean under such a model is the natural smoothing spline of degree 2m - 1 (2m with integrals) that
minimises ``sum (y_k - x(t_k))^2 / R_k + 1/q int (x^(m))^2``.

Source: Wahba (1978); Kohn and Ansley (1987).
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

HIGHEST_ORDER = 4


def transition(order: int, step: Tensor, *, integral: bool = False) -> Tensor:
    """F (..., n, n) of steps d (...,), n = order, or order + 1 with the integral, whose own column is 0.

    >>> transition(2, torch.tensor(0.5))
    tensor([[1.0000, 0.5000],
            [0.0000, 1.0000]])
    """
    rows = _indices(order, integral)
    entries = [
        step ** (j - i) / math.factorial(j - i) if j >= max(i, 1) else torch.zeros_like(step)
        for i in rows
        for j in rows
    ]
    return torch.stack(entries, -1).reshape(*step.shape, len(rows), len(rows))


def diffusion(order: int, step: Tensor, *, integral: bool = False) -> Tensor:
    """Q (..., n, n), the covariance gathered over steps d (...,) at intensity q = 1.

    >>> diffusion(2, torch.tensor(1.0))
    tensor([[0.3333, 0.5000],
            [0.5000, 1.0000]])
    """
    rows = _indices(order, integral)
    entries = []
    for i in rows:
        for j in rows:
            power = 2 * order + 1 - i - j
            entries.append(step**power / (power * math.factorial(order - i) * math.factorial(order - j)))
    return torch.stack(entries, -1).reshape(*step.shape, len(rows), len(rows))


def polynomial(order: int, step: Tensor, *, integral: bool = False) -> Tensor:
    """The posterior mean between two states, as derivatives of a polynomial at the first.

    ``(x, x', ..., x^(D))(t_k+) = C (s_k, s_{k+1})`` with the degree D = 2m - 1, or 2m with the integral. For m = 2 it
    is Hermite's cubic: ``x'' = (6 (x_1 - x_0) / d - 4 v_0 - 2 v_1) / d``.

    Returns: C (..., D + 1, 2n).

    >>> polynomial(1, torch.tensor(0.5))  # a straight line
    tensor([[ 1.,  0.],
            [-2.,  2.]])
    """
    rows = _indices(order, integral)
    unit = _unit_polynomial(order, integral).to(step)
    derivative = torch.arange(len(unit), device=step.device)
    entry = torch.tensor([i - 1 for i in rows] * 2, device=step.device)
    return unit * step[..., None, None] ** (entry - derivative[:, None])


@functools.cache
def _unit_polynomial(order: int, integral: bool) -> Tensor:
    """C for a step of 1: the start is given, the other derivatives solve the state at the end."""
    rows = _indices(order, integral)
    n, count = len(rows), len(rows) + order
    end = torch.zeros(n, count, dtype=torch.float64)  # state at the end from the derivatives at the start
    for row, i in enumerate(rows):
        for k in range(max(i - 1, 0), count):
            end[row, k] = 1 / math.factorial(k - (i - 1))
    out = torch.zeros(count, 2 * n, dtype=torch.float64)
    out[:order, :order] = torch.eye(order, dtype=torch.float64)
    inverse = torch.linalg.inv(end[:, order:])
    out[order:, :order] = -inverse @ end[:, :order]
    out[order:, n:] = inverse
    return out


def _indices(order: int, integral: bool) -> list[int]:
    """The index of each entry of the state: 1..m of the path and its derivatives, 0 of the integral."""
    return [*range(1, order + 1), *([0] if integral else [])]
