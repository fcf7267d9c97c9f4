"""When to stop believing a scale: what was learned from the first batch may have been learned from an odd one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FAR = 4.0
"""A batch whose variance is this many times larger or smaller than the learned one is off."""
MIN_JUDGED = 16
"""With fewer numbers a batch is too little evidence about a variance."""
MAX_WAIT = 8
_TRIMMED = 0.05


@dataclass
class Change:
    """Whether batches contradict a learned variance for good.

    MAX_WAIT batches in a row must be off, on the same side: one odd batch among many changes nothing. Only what
    was learned from a single batch gives way to the next one, so that one odd batch at the start lasts for one batch.
    A batch that is larger even without its most extreme twentieths is believed at once: outliers do not explain it.

    Attributes: ``age`` batches judged, or after a change those that led to it, and one; ``off`` how many of the latest
    were larger (> 0) or smaller.
    """

    age: int = 0
    off: int = 0

    def seen(self, known: float, variance: float, count: float, core: float = 0.0) -> bool:
        """Note a batch; True if its ``variance`` should replace the known one.

        Args: count: numbers that the variance is of. core: variance without extremes, 0 = not known.
        """
        if count < MIN_JUDGED or known <= 0 or variance <= 0:
            return False
        side = (variance > FAR * known) - (known > FAR * variance)
        self.off = self.off + side if self.off * side > 0 else side
        if side and (core > FAR * known or abs(self.off) >= min(self.age, MAX_WAIT)):
            self.age, self.off = abs(self.off) + 1, 0
            return True
        self.age += 1
        return False


def core_variance(values: Tensor) -> float:
    """Variance of (n,) values without the lowest and the highest twentieth."""
    n = len(values)
    cut = int(_TRIMMED * n) + 1
    return float(torch.sort(values).values[cut : n - cut].var()) if n > 2 * cut + 1 else 0.0
