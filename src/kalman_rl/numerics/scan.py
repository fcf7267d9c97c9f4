"""The state of a scalar filter before every token, without a loop over time.

A token acts on the variance as a Moebius map and on the mean as an affine one. Maps compose associatively, so that the
running products of T of them take ``log2 T`` rounds of whole-tensor arithmetic: a parallel prefix scan.
:mod:`kalman_rl.numerics.kalman` holds the model and its definition, one token after another.

Source: the scan is Blelloch (1990); the filter as a scan is Sarkka and Garcia-Fernandez (IEEE TAC 2021).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def variance_before(
    process_noise: Tensor, observation_noise: Tensor, restart: Tensor, start: Tensor
) -> Tensor:
    """Variance before every token, from the running products of maps p -> (a p + b) / (c p + d).

    A token restarts (p -> P_0), predicts (p -> p + Q) and updates (1/p -> 1/p + 1/R). Each is a matrix
    (a b; c d) acting on p = x / y as on the vector (x, y), where p = inf has a place too: (1, 0).

    Args:
        process_noise: Q (B, T) in [0, inf].
        observation_noise: R (B, T) in (0, inf]; inf = missing.
        restart: (B, T) bool, the first token of a segment; true at the first token of every row.
        start: P_0 in [0, inf], a scalar.

    Returns: (B, T); P_0 at a restart. Gradient flows through Q and R.

    >>> one = torch.ones(1, 3, dtype=torch.float64)
    >>> variance_before(0 * one, one, torch.tensor([[True, False, False]]), torch.tensor(math.inf))
    tensor([[   inf, 1.0000, 0.5000]], dtype=torch.float64)
    """
    noise = observation_noise
    smallest = noise.detach().amin(-1, keepdim=True)
    unit = torch.where(smallest.isinf(), 1.0, smallest)  # keeps the entries of comparable size
    one, zero = torch.ones_like(noise), torch.zeros_like(noise)
    x, y = _projective(start / unit)
    restarts = torch.where(restart, torch.stack((x, x, y, y)), torch.stack((one, zero, zero, one)))
    x, y = _projective(process_noise / unit)
    predicts = torch.stack((one, x, zero, y))
    updates = torch.stack((one, zero, unit / noise, one))
    x, _, y, _ = _scan(_moebius, _moebius(_moebius(restarts, predicts), updates))
    # Every row begins with a restart, so each product is constant: either column is the variance.
    after = unit * torch.where(y == 0, math.inf, x / torch.where(y == 0, 1.0, y))
    return shifted(after, restart, start)


def mean_before(gain: Tensor, keep: Tensor, observation: Tensor, restart: Tensor, start: Tensor) -> Tensor:
    """Mean before every token, from the running products of maps x -> a x + b with a in [0, 1].

    Args: gain, keep: K and 1 - K (B, T). observation: z (B, T). restart, start: as for the variance, start a mean.

    >>> half = torch.full((1, 3), 0.5)
    >>> z, restart = torch.tensor([[4.0, 8.0, 0.0]]), torch.tensor([[True, False, False]])
    >>> mean_before(half, half, z, restart, torch.tensor(0.0))
    tensor([[0., 2., 5.]])
    """
    a = torch.where(restart, 0.0, keep)
    b = gain * observation + torch.where(restart, keep * start, 0.0)
    return shifted(_scan(_affine, torch.stack((a, b)))[1], restart, start)


def shifted(after: Tensor, restart: Tensor, start: Tensor) -> Tensor:
    """The state before each token (B, T): after the previous one, or the prior at a restart."""
    return torch.where(restart, start, after.roll(1, -1))


def _projective(p: Tensor) -> tuple[Tensor, Tensor]:
    return torch.where(p.isinf(), 1.0, p), (~p.isinf()).to(p.dtype)


def _moebius(first: Tensor, then: Tensor) -> Tensor:
    """Both maps in turn: a 2x2 matrix product, scaled so that its largest entry is 1."""
    (a, b, c, d), (e, f, g, h) = first, then
    product = torch.stack((e * a + f * c, e * b + f * d, g * a + h * c, g * b + h * d))
    return product / product.detach().amax(0)


def _affine(first: Tensor, then: Tensor) -> Tensor:
    return torch.stack((then[0] * first[0], then[0] * first[1] + then[1]))


def _scan(compose: Callable[[Tensor, Tensor], Tensor], maps: Tensor) -> Tensor:
    """Running products along the last axis: scan the pairs of neighbours, then fill in every other place."""
    if maps.shape[-1] == 1:
        return maps
    odd = _scan(compose, compose(maps[..., :-1:2], maps[..., 1::2]))
    even = compose(odd[..., : (maps.shape[-1] - 1) // 2], maps[..., 2::2])
    out = maps.clone()
    out[..., 1::2], out[..., 2::2] = odd, even
    return out
