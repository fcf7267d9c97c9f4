"""The feature filter in its dual (Gram) form: one Cholesky factor predicts every sample from the past."""

from __future__ import annotations

import torch
from torch import Tensor

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.numerics.kalman import Gaussian


def prefix_predictions(
    phi: Tensor,
    y: Tensor,
    mask: Tensor,
    *,
    prior_variance: float,
    process_noise: float,
    observation_noise: float,
) -> Gaussian:
    """What each reward of short sequences was expected to be, from the earlier rewards of its sequence.

    ``y_i = phi_i' theta_i + eps_i``, ``theta_1 ~ N(0, P_0 I)``, ``theta_{i+1} = theta_i + N(0, Q I)``. Then
    ``Cov(y_i, y_j) = phi_i' phi_j (P_0 + Q (min(i, j) - 1)) + R [i = j] = L L'`` and, with ``L z = y``, the
    innovation of sample i is ``L_ii z_i`` with variance ``L_ii^2``: the sequential Kalman filter for all
    prefixes at once, whatever the width of the features. Time passes at masked samples too.

    Args:
        phi: (B, n, d) features. y: (B, n) rewards. mask: (B, n) bool, True = observed.
        prior_variance: P_0 > 0. process_noise: Q >= 0 per sample. observation_noise: R > 0.

    Returns: mean and variance (P + R) of each observed sample, (B, n) float64; 0 and R where masked.
    Gradient flows through phi and y. Cost O(B n^2 (n + d)).

    Raises: ShapeError, NumericError.
    Source: the innovations form of Gaussian regression (Kailath 1968).

    >>> phi, y = torch.ones(1, 3, 1), torch.tensor([[1.0, 1.0, 4.0]])
    >>> noise = {"prior_variance": 1.0, "process_noise": 0.0, "observation_noise": 1.0}
    >>> prefix_predictions(phi, y, y > 0, **noise).mean.round(decimals=4)
    tensor([[0.0000, 0.5000, 0.6667]], dtype=torch.float64)
    """
    if phi.dim() != 3 or y.shape != phi.shape[:2] or mask.shape != y.shape or mask.dtype != torch.bool:
        raise ShapeError(
            f"phi, y, mask: got {tuple(phi.shape)}, {tuple(y.shape)}, {mask.dtype} {tuple(mask.shape)}, "
            "expected (B, n, d), (B, n), bool (B, n)"
        )
    if not (prior_variance > 0 and process_noise >= 0 and observation_noise > 0):
        raise NumericError(
            f"prior_variance, process_noise, observation_noise: got {prior_variance}, {process_noise}, "
            f"{observation_noise}, expected > 0, >= 0, > 0"
        )
    full = bool(mask.all())
    x = phi.double() if full else torch.where(mask[..., None], phi.double(), 0.0)
    shown = y.double() if full else torch.where(mask, y.double(), 0.0)
    products, length = x @ x.mT, shown.square().sum(-1)
    if not bool(torch.isfinite(products.sum() + length.sum())):  # a bad number spoils every sum it is in
        raise NumericError("phi, y: got NaN or infinity at an observed sample, expected finite numbers")
    time = torch.arange(y.shape[1], dtype=torch.float64)
    prior = prior_variance + process_noise * torch.minimum(time[:, None], time[None, :])
    covariance = products * prior + observation_noise * torch.eye(y.shape[1], dtype=torch.float64)
    # The last row of the factor of [[C, y], [y', c]] is z; any c > y' C^-1 y will do, and that is <= y' y / R.
    corner = 1 + 2 * length / observation_noise
    above = torch.cat((covariance, shown[..., None]), -1)
    below = torch.cat((shown, corner[..., None]), -1)[..., None, :]
    factor = torch.linalg.cholesky(torch.cat((above, below), -2))
    standard, deviation = factor[..., -1, :-1], factor.diagonal(dim1=-2, dim2=-1)[..., :-1]
    return Gaussian(shown - deviation * standard, deviation.square())
