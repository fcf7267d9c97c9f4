"""The trained weights of a model: copied, put back, rounded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Weights = dict[str, Tensor]
"""Parameters by name."""


def trained_weights(model: Any) -> Weights:
    """A copy of the parameters that are trained."""
    return {
        name: weight.detach().clone() for name, weight in model.named_parameters() if weight.requires_grad
    }


def load_weights(model: Any, weights: Weights) -> None:
    """Put weights where :func:`trained_weights` found them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in weights:
                weight.copy_(weights[name])


def rounded(weights: Weights, bits: int) -> Weights:
    """Matrices rounded to ``2^bits - 1`` levels, evenly spaced within each row's largest value."""
    levels = 2 ** (bits - 1) - 1
    found = {}
    for name, weight in weights.items():
        if weight.dim() < 2:
            found[name] = weight
            continue
        scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-12) / levels
        found[name] = (weight / scale).round() * scale
    return found
