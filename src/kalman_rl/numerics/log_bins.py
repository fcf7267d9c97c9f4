"""Bins of equal ratio for sizes over twelve decades: sums over them add up, whoever counted."""

from __future__ import annotations

import math

import torch
from torch import Tensor

LOG_RANGE = (math.log(1e-9), math.log(1e3))
"""Sizes that are told apart, as natural logs; what lies outside is in the first or the last bin."""


def bin_of(size: Tensor, bins: int) -> Tensor:
    """Number of the bin of every size >= 0.

    >>> bin_of(torch.tensor([0.0, 1e-3, 1e9]), 12).tolist()
    [0, 6, 11]
    """
    low, high = LOG_RANGE
    return ((size.log() - low) / (high - low) * bins).clamp(0, bins - 1).long()


def edge(place: float, bins: int) -> float:
    """The size at which bin ``place`` begins; between two whole numbers, a size inside the bin.

    >>> round(edge(6, 12), 6)
    0.001
    """
    low, high = LOG_RANGE
    return math.exp(low + place / bins * (high - low))


def counted(places: Tensor, values: Tensor, bins: int) -> Tensor:
    """Sum (bins,), float64, of the values in each bin."""
    return torch.zeros(bins, dtype=torch.float64, device=places.device).index_add_(0, places, values.double())
