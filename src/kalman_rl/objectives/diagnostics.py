"""Diagnosis: numbers about the ratios of one batch, the same for every objective.

Each function takes (B, T) values and the mask and returns a 0-dimensional tensor over trained tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over trained tokens; 0 if there are none."""
    return torch.where(mask, values.float(), 0.0).sum() / mask.sum().clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor) -> Tensor:
    """Population variance over trained tokens."""
    return masked_mean((values.float() - masked_mean(values, mask)).square(), mask)


def max_abs(values: Tensor, mask: Tensor) -> Tensor:
    """Largest absolute value over trained tokens; 0 if there are none."""
    inside = torch.where(mask, values.abs(), 0.0).float()
    return inside.amax() if inside.numel() else inside.sum()


def effective_sample_size(weight: Tensor, mask: Tensor) -> Tensor:
    """Kish's effective sample size as a share of the tokens: ``(sum w)^2 / (n sum w^2)``, in (0, 1]."""
    weight = torch.where(mask, weight.double(), 0.0)
    squares = weight.square().sum() * mask.sum()
    return torch.where(squares > 0, weight.sum().square() / squares.clamp(min=1e-300), 1.0).float()


def sign_switch(log_ratio: Tensor, mask: Tensor, sequence: Tensor | None = None) -> Tensor:
    """Share of neighbouring trained tokens whose log-ratio changes sign; in packed rows, neighbours of the
    same ``sequence`` (B, T) number.

    White noise gives 0.5; smoothing lowers it whether or not anything is learned, so it says how much was
    smoothed, not how healthy a run is.
    """
    if mask.shape[1] < 2:
        return torch.zeros((), device=mask.device)
    pairs = mask[:, 1:] & mask[:, :-1]
    if sequence is not None:
        pairs = pairs & (sequence[:, 1:] == sequence[:, :-1])
    sign = log_ratio.sign()  # a product of the log-ratios themselves would underflow
    return masked_mean(sign[:, 1:] * sign[:, :-1] < 0, pairs)


def kl_old(log_ratio: Tensor, mask: Tensor) -> Tensor:
    """Estimate of KL(old || current) per token in nats: mean of ``exp(l) - 1 - l >= 0`` under old samples."""
    return masked_mean(torch.expm1(log_ratio.clamp(max=20.0)) - log_ratio, mask)
