"""Rewards absorbed one after another by the feature tracker, compiled: O(d^2) each."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from kalman_rl.kernels.jit import REORDER, compiled

Array = Any


class Absorber:
    """A belief ``theta ~ N(mean, root root')`` in the form that the loop changes in place.

    Args: root: (d, d) lower triangular; mean: (d,), of the same type.
    """

    def __init__(self, mean: Tensor, root: Tensor) -> None:
        upper = root.T.contiguous()
        self.mean, self.root = mean.clone(), upper.T
        self._arrays = upper.numpy(), self.mean.numpy()
        self._work = upper.new_empty(4, len(mean)).numpy()

    def __call__(
        self, x: Tensor, y: Tensor, mask: Tensor | None, noise: float, scale: float
    ) -> tuple[Tensor, Tensor, float, int] | None:
        """Take rewards ``y = x theta + N(0, noise)`` one after another.

        Args: x: (n, d) and y: (n,), NaN = missing, of the belief's type. mask: (n,) bool or None. scale: of
            the returned variances.

        Returns: innovations and their variances from before the first reward, (n,) float64; the sum of
        squared standardised innovations; the number of rewards used. None, and nothing has changed, if a
        number is not finite.
        """
        known = _nothing() if mask is None else mask.contiguous().numpy()
        out = torch.empty(2, len(y), dtype=torch.float64)
        given = x.contiguous().numpy(), y.contiguous().numpy(), known
        kernel = compiled(_absorb, REORDER)
        surprise, used = kernel(*self._arrays, *given, noise, scale, self._work, out.numpy())
        if used < 0:
            return None
        innovation, variance = out
        return innovation, variance, surprise, used


@functools.cache
def _nothing() -> Any:
    return torch.ones(0, dtype=torch.bool).numpy()


def _absorb(
    upper: Array,
    mean: Array,
    x: Array,
    y: Array,
    known: Array,
    noise: float,
    scale: float,
    work: Array,
    out: Array,
) -> tuple[float, int]:
    """With ``phi = U x`` and ``alpha_j = R + sum_{i > j} phi_i^2``, the new factor of ``U' U - U' phi phi' U / S``
    is, row by row from the last::

        U'_j = sqrt(alpha_j / alpha_{j-1}) U_j - phi_j / sqrt(alpha_j alpha_{j-1}) sum_{i > j} phi_i U_i

    Only sums of squares are divided, so the diagonal keeps its sign and the covariance stays positive
    definite (the Cholesky factor of I - phi phi' / S in closed form; Carlson 1973).
    """
    dim, surprise, used = len(mean), 0.0, 0
    for i in range(len(y)):
        for r in range(dim):
            if not math.isfinite(x[i, r]):
                return 0.0, -1
        if math.isinf(y[i]) and (len(known) == 0 or known[i]):
            return 0.0, -1
    phi, total, factor, share = work[0], work[1], work[2], work[3]
    for i in range(len(y)):
        seen = not math.isnan(y[i]) and (len(known) == 0 or known[i])
        explained, predicted, row = 0.0, 0.0, x[i]
        for j in range(dim):
            dot, part, features = upper[j, j] * 0, upper[j, j:], row[j:]
            for r in range(len(part)):
                dot += part[r] * features[r]
            phi[j] = dot
            explained += dot * dot
        for r in range(dim):
            predicted += row[r] * mean[r]
        out[0, i] = y[i] - predicted if seen else 0.0
        out[1, i] = scale * (explained + noise)
    for i in range(len(y)):
        if math.isnan(y[i]) or not (len(known) == 0 or known[i]):
            continue
        row, predicted = x[i], 0.0
        for j in range(dim if len(y) > 1 else 0):  # a single one has been projected above
            dot, part, features = upper[j, j] * 0, upper[j, j:], row[j:]
            for r in range(len(part)):
                dot += part[r] * features[r]
            phi[j] = dot
        for r in range(dim):
            predicted += row[r] * mean[r]
        below = noise
        for u in range(dim):
            j = dim - 1 - u
            above = below + phi[j] * phi[j]
            inverse = 1.0 / math.sqrt(below * above)
            factor[j], share[j] = below * inverse, phi[j] * inverse
            below = above
        total[:] = 0.0
        for u in range(dim):
            j = dim - 1 - u
            a, b, f = factor[j], share[j], phi[j]
            part, sums = upper[j, j:], total[j:]
            for r in range(len(part)):
                old = part[r]
                part[r] = a * old - b * sums[r]
                sums[r] += f * old
        innovation = y[i] - predicted
        for r in range(dim):
            mean[r] += total[r] * (innovation / below)
        surprise += innovation * innovation / below
        used += 1
    return surprise, used
