"""The filter by its textbook recursion, and the batches it is timed on."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Q, R = 1e-4, 1.0


def reference(z: Tensor, mask: Tensor, q: float, r: float) -> np.ndarray:
    """Means by the textbook recursion in float64, all rows side by side."""
    values, seen = z.double().numpy(), mask.numpy()
    mean, variance, out = np.zeros(len(z)), np.zeros(len(z)), np.empty(z.shape)
    begun = np.zeros(len(z), dtype=bool)  # padding on the left is no time
    for t in range(z.shape[1]):
        begun |= seen[:, t]
        variance = variance + q * begun
        gain = np.where(seen[:, t], variance / (variance + r), 0.0)
        mean = np.where(seen[:, t], mean + gain * (np.where(seen[:, t], values[:, t], 0.0) - mean), mean)
        variance = np.where(seen[:, t], gain * r, variance)
        out[:, t] = mean
    return out


def batch(rows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values with NaN in the padding; a padding mask (lengths T/2..T); the same with 30 % holes."""
    g = torch.Generator().manual_seed(rows + length)
    z = torch.randn(rows, length, generator=g) + 0.5
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    z[~mask] = float("nan")
    return z, mask, mask & (torch.rand(rows, length, generator=g) < 0.7)
