"""Published arithmetic, stated again from its formulas, as what ours is compared with.

KPO (arXiv 2602.10609) computes the gains of a scalar filter in closed form and the states by cumulative sums,
in float32. K-GRPO's tracker takes one observation at a time with Joseph's form of the covariance and sums the
logarithms of its eigenvalues. Constants (floors, caps) are those of the published programs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def kpo_gains(q: float, r: float, length: int, like: Tensor) -> Tensor:
    """K_1..K_T from P_0 = 0: ``K_t = q U_{t-1} / ((1 + q) U_{t-1} - U_{t-2})`` with q = Q / R.

    U_k are Chebyshev polynomials of the second kind at ``s = 1 + q / 2``, ``sinh((k + 1) eta) / sinh(eta)``
    with ``eta = arcosh s``. (t prediction-update maps of the variance are the t-th power of a 2x2 matrix.)
    """
    ratio = like.new_tensor(q / r)
    if q / r < 1e-12:
        return like.new_zeros(length).clamp(min=1e-6)
    eta = torch.arccosh(1 + ratio / 2)
    k = torch.arange(length, device=like.device, dtype=like.dtype)
    base = torch.sinh(eta).clamp(min=1e-20)
    now, before = torch.sinh((k + 1) * eta) / base, torch.sinh(k * eta) / base
    return (ratio * now / ((1 + ratio) * now - before)).clamp(1e-6, 1.0)


def kpo_filter(z: Tensor, mask: Tensor, q: float, r: float) -> Tensor:
    """``x_t = A_t sum_{s <= t} K_s z_s / A_s`` with ``A_t = prod_{s <= t} (1 - K_s)``, x_0 = 0.

    ``log A`` stops at log 1e-30 and ``1 / A`` at e^80; masked tokens count as observations of 0.
    """
    gain = kpo_gains(q, r, z.shape[-1], z)
    log_a = torch.log1p(-gain.clamp(max=1 - 1e-7)).cumsum(-1).clamp(min=math.log(1e-30))
    inverse = torch.exp((-log_a).clamp(max=80.0))
    return torch.exp(log_a) * torch.cumsum(gain * (z * mask) * inverse, -1) * mask


class KGrpoUpdate:
    """One observation ``y = h' theta + eps``: gain, Joseph's form, symmetric part, log det by eigenvalues."""

    def __init__(self, dim: int, noise: float = 0.01) -> None:
        self.mean, self.covariance = torch.zeros(dim), torch.eye(dim)
        self.noise = noise

    def __call__(self, h: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """(innovation, log det P), both ()."""
        shown = self.covariance @ h
        gain = shown / (h @ shown + self.noise)
        innovation = y - h @ self.mean
        self.mean = self.mean + gain * innovation
        keep = torch.eye(len(h)) - torch.outer(gain, h)
        joseph = keep @ self.covariance @ keep.T + self.noise * torch.outer(gain, gain)
        self.covariance = (joseph + joseph.T) / 2
        return innovation, torch.linalg.eigvalsh(self.covariance).clamp(min=1e-10).log().sum()
