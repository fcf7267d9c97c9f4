"""Maximum likelihood of a Gaussian model with one shape parameter and one scale, from sums that add up.

Where every observation has the density ``N(nu_i; 0, R g_i)`` and ``g_i`` depends on a shape parameter only,
three sums for each shape on a fixed grid hold everything that the likelihood needs::

    n,   quadratic = sum nu_i^2 / g_i,   log_determinant = sum log g_i

They add up over micro-batches, ranks and optimizer steps. ``R = quadratic / n`` is profiled out, and what is
left is a curve over the grid whose highest point is found between the grid's points by interpolation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Peak(NamedTuple):
    """The most likely pair: ``log_shape`` (natural log; -inf and inf are the limits) and ``scale`` R > 0."""

    log_shape: float
    scale: float


def pack(count: float | Tensor, quadratic: Tensor, log_determinant: Tensor) -> Tensor:
    """The sums as one float64 vector (1 + 2 G,), for a grid of G shapes."""
    quadratic, log_determinant = quadratic.double(), log_determinant.double()
    return torch.cat((quadratic.new_tensor([float(count)]), quadratic, log_determinant))


def profile(state: Tensor) -> Tensor:
    """Log-likelihood (G,) at each shape with the best R, ``-(n log(2 pi R) + log_determinant + n) / 2``.

    Args:
        state: what :func:`pack` made, or a weighted sum of such vectors, with n > 0.

    Returns: float64, nats; -inf or NaN where the sums allow no R > 0; :func:`peak` refuses such sums.

    >>> one = pack(2, torch.tensor([2.0]), torch.tensor([0.0]))  # 1 and -1 under N(0, R)
    >>> round(profile(one).item(), 4)  # 2 log N(1; 0, 1)
    -2.8379
    """
    grid = (len(state) - 1) // 2
    count, quadratic, log_determinant = state[0], state[1 : 1 + grid], state[1 + grid :]
    return -(count * torch.log(2 * math.pi * quadratic / count) + log_determinant + count) / 2


def peak(state: Tensor, log_grid: Sequence[float], least: float) -> Peak | None:
    """The most likely shape and scale, or None where the sums do not determine them.

    Args:
        state: as in :func:`profile`.
        log_grid: G natural logs of the shapes, increasing and evenly spaced; the first may be -inf and the
            last inf, for the two limits of the model.
        least: smallest number n of observations to learn from.

    Returns:
        The top, to a thousandth of a grid step, of the polynomial through the best point and up to two finite
        neighbours on either side; where a limit is best, the limit. None for fewer than ``least``
        observations, observations that are all 0, or sums that are not finite.
    """
    grid = len(log_grid)
    values = state.detach().double().cpu()
    count, quadratic = values[0], values[1 : 1 + grid]
    if not (values.isfinite().all() and count >= least and count > 0 and (quadratic > 0).all()):
        return None
    curve, log_scale = profile(values).tolist(), (quadratic / count).log().tolist()
    best = max(range(grid), key=curve.__getitem__)
    if not math.isfinite(log_grid[best]):
        return _finite(Peak(log_grid[best], math.exp(log_scale[best])))
    near = [i for i in range(max(best - 2, 0), min(best + 3, grid)) if math.isfinite(log_grid[i])]
    nodes = torch.tensor([float(i - best) for i in near], dtype=torch.float64)
    fine = torch.linspace(max(nodes[0].item(), -1.0), min(nodes[-1].item(), 1.0), 2001, dtype=torch.float64)
    weights = _lagrange(nodes, fine)
    top = int((weights @ torch.tensor([curve[i] for i in near], dtype=torch.float64)).argmax())
    shape = weights[top] @ torch.tensor([log_grid[i] for i in near], dtype=torch.float64)
    scale = weights[top] @ torch.tensor([log_scale[i] for i in near], dtype=torch.float64)
    return _finite(Peak(shape.item(), math.exp(scale.item())))


def _lagrange(nodes: Tensor, x: Tensor) -> Tensor:
    """Weights (X, N) of values at N nodes for the polynomial through them, at X places."""
    apart = nodes[:, None] - nodes[None, :] + torch.eye(len(nodes), dtype=nodes.dtype)
    factor = (x[:, None, None] - nodes) / apart  # (X, N, N); the diagonal does not take part
    return torch.where(torch.eye(len(nodes), dtype=torch.bool), 1.0, factor).prod(-1)


def _finite(found: Peak) -> Peak | None:
    return found if 0 < found.scale < math.inf else None
