"""What one check found, and how large an error is."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Check(NamedTuple):
    """``error`` is the largest difference, relative to the largest expected value."""

    method: str
    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """NaN does not pass."""
        return self.error <= self.tolerance


def relative_error(found: Tensor, expected: Tensor) -> float:
    """``max |found - expected| / max |expected|``; infinite for other shapes, absolute where all is 0."""
    if found.shape != expected.shape:
        return float("inf")
    if not found.numel():
        return 0.0
    found, expected = (side.detach().cpu().double() for side in (found, expected))
    scale = expected.abs().max().item()
    return (found - expected).abs().max().item() / (scale if scale > 0 else 1.0)
