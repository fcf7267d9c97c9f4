"""The published KPO loss (arXiv 2602.10609), re-stated from its formulas in eager torch, as a peer to time.

    eta = arcosh(1 + Q/(2R)),  U_t = sinh(t eta) / sinh(eta),  gain K_t from U_t and U_{t-1},
    A_t = prod (1 - K),        x_t = A_t (x_0 + sum_{u <= t} K_u z_u / A_u),
    loss_t = max(-A rho_t, -A clip(rho_t, 1 - low, 1 + high)),   rho_t = exp(min(10, logp - sg(logp) + sg(x_t)))

with the published float32, floors and caps: gains of at least 1e-6, A of at least 1e-30, exponents of at most
80. Masked tokens are observations of zero. It breaks where those say so; see :func:`breaks`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gains(length: int, process_noise: float, observation_noise: float, start: float = 0.0) -> Tensor:
    """(T,) gains by the closed form, float32."""
    q, p0 = process_noise / observation_noise, start / observation_noise
    if q <= 1e-12:
        t = torch.arange(1, length + 1, dtype=torch.float32)
        return p0 / (1 + t * p0)
    eta = torch.acosh(torch.tensor(1 + q / 2, dtype=torch.float32))
    t = torch.arange(0, length + 2, dtype=torch.float32)
    u = torch.sinh(t * eta) / torch.sinh(eta).clamp(min=1e-20)
    now, before = u[1:-1], u[:-2]
    numerator = (now - before) * p0 + q * now
    return (numerator / (numerator + now - before + p0 * before)).clamp(1e-6, 1.0)


def filtered(z: Tensor, gain: Tensor) -> Tensor:
    """(B, T) filtered log-ratios by cumulative sums, float32."""
    log_keep = torch.log1p(-gain.clamp(max=1 - 1e-7)).cumsum(0)
    product = log_keep.exp().clamp(min=1e-30)
    inverse = torch.exp(torch.clamp(-log_keep, max=80.0)).clamp(max=1e30)
    return product * torch.cumsum(gain * z * inverse, dim=1)


def loss(
    logp: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    *,
    process_noise: float = 1e-6,
    observation_noise: float = 1.0,
    low: float = 3e-4,
    high: float = 4e-4,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss (mean over sequences of means over tokens) and the metrics that are logged with it."""
    weight = mask.to(logp.dtype)
    log_ratio = (logp - old).detach()
    z = (log_ratio * weight).float()
    x = filtered(z, gains(z.shape[1], process_noise, observation_noise).to(z.device)) * weight
    rho = torch.exp(torch.clamp(logp - logp.detach() + x.detach(), max=10.0))
    one, two = -advantage * rho, -advantage * torch.clamp(rho, 1 - low, 1 + high)
    token = torch.maximum(one, two)
    per_row = (token * weight).sum(-1) / weight.sum(-1)
    tokens = weight.sum()
    with torch.no_grad():
        metrics = {
            "kl": ((-log_ratio) * weight).sum() / tokens,
            "clipped": ((two > one).float() * weight).sum() / tokens,
            "ratio_mean": (rho * weight).sum() / tokens,
            "raw_variance": (z.square() * weight).sum() / tokens - ((z * weight).sum() / tokens).square(),
            "filtered_variance": (x.square() * weight).sum() / tokens
            - ((x * weight).sum() / tokens).square(),
        }
    return per_row.mean(), metrics


def breaks(length: int, process_noise: float, observation_noise: float = 1.0) -> str:
    """What happens to the published arithmetic on a row of this length, as measured."""
    gain = gains(length, process_noise, observation_noise)
    out = filtered(torch.ones(1, length), gain)[0]
    broken = (~out.isfinite()).nonzero()
    if len(broken):
        return f"NaN from token {int(broken[0]) + 1}"
    exact = torch.empty(length, dtype=torch.float64)
    x, p, q = 0.0, 0.0, process_noise / observation_noise
    for t in range(length):
        p = (p + q) / (p + q + 1)
        x += p * (1.0 - x)
        exact[t] = x
    return f"error {(out.double() - exact).abs().max().item():.1e}" if math.isfinite(x) else "NaN"
