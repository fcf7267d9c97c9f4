"""The published KPO loss in eager torch, stated again from its formulas, as what the fused objective is timed
against; its filter is in :mod:`benchmarks.speed.published`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.speed.published import kpo_filter


class Settings(NamedTuple):
    """Noises and clip of the published scripts."""

    process_noise: float = 1e-6
    observation_noise: float = 1.0
    low: float = 3e-4
    high: float = 4e-4


PUBLISHED = Settings()


def kpo_loss(
    logp: Tensor, old: Tensor, mask: Tensor, advantage: Tensor, settings: Settings = PUBLISHED
) -> tuple[Tensor, dict[str, Tensor]]:
    """Mean over sequences of means over tokens of ``max(-A rho, -A clip(rho, 1 - low, 1 + high))`` with
    ``rho = exp(min(10, logp - sg(logp) + sg(x)))``, and the numbers that are logged with it.

    Everything (B, T); the mask in the type of ``logp``. Where a row has no NaN, its gradient is
    ``-A exp(x)`` for tokens that are not clipped.
    """
    log_ratio = (logp - old).detach()
    x = kpo_filter(log_ratio, mask, settings.process_noise, settings.observation_noise)
    rho = torch.exp(torch.clamp(logp - logp.detach() + x, max=10.0))
    plain = -advantage * rho
    clipped = -advantage * torch.clamp(rho, 1 - settings.low, 1 + settings.high)
    token = torch.maximum(plain, clipped)
    value = ((token * mask).sum(-1) / mask.sum(-1)).mean()

    def mean(values: Tensor) -> Tensor:
        return (values * mask).sum() / mask.sum()

    with torch.no_grad():
        metrics = {
            "kl": mean(-log_ratio),
            "clipped": mean((clipped > plain).float()),
            "raw_variance": mean(log_ratio.square()) - mean(log_ratio).square(),
            "filtered_variance": mean(x.square()) - mean(x).square(),
        }
    return value, metrics
