"""What became of the training reward, in one sentence: above all, whether it has fallen."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

PARTS = 4
"""The last of so many parts of a training is compared with its best part."""
LEAST = 3
"""Generation batches of a part, at least."""
ERRORS = 3.0
"""Standard errors that a fall has to exceed."""


def rewards_of(rows: Sequence[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """Step and mean reward of every generation batch in the rows of a run's metrics."""
    found = [(row["step"], row.get("reward")) for row in rows if row["kind"] == "train"]
    return [(step, float(reward)) for step, reward in found if isinstance(reward, int | float)]


def course(rewards: Sequence[tuple[float, float]]) -> str:
    """How the training reward went, for a terminal; "" for fewer than two parts of it.

    >>> course([(step, 0.1 * step) for step in range(10)])
    'training reward: mean 0.100 over the first 3 batches, 0.800 over the last'
    """
    size = _size(rewards)
    if len(rewards) < 2 * size:
        return ""
    if said := fall(rewards):
        return f"warning: {said}; try a lower learning rate or a KL penalty (kl), or fewer steps"
    first, last = (fmean(reward for _, reward in part) for part in (rewards[:size], rewards[-size:]))
    return f"training reward: mean {first:.3f} over the first {size} batches, {last:.3f} over the last"


def fall(rewards: Sequence[tuple[float, float]]) -> str:
    """That the training reward has fallen, with levels and steps; "" where it has not.

    It has if the mean of the last part is lower than the best part's by more than ``ERRORS`` standard errors,
    ``sqrt(2 v / n)`` with v half the mean square of successive differences, n batches in a part.

    >>> fall([(step, 0.1 * min(step, 20 - step)) for step in range(16)])
    'the training reward fell: mean 0.650 over the last 4 batches, 0.900 at its best (steps 8 to 11)'
    """
    size = _size(rewards)
    if len(rewards) < 2 * size:
        return ""
    values = [reward for _, reward in rewards]
    means = [fmean(values[i : i + size]) for i in range(len(values) - size + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    noise = fmean((b - a) ** 2 for a, b in itertools.pairwise(values)) / 2
    if means[best] - means[-1] <= ERRORS * math.sqrt(2 * noise / size):
        return ""
    return (
        f"the training reward fell: mean {means[-1]:.3f} over the last {size} batches, {means[best]:.3f} at its best "
        f"(steps {rewards[best][0]:g} to {rewards[best + size - 1][0]:g})"
    )


def _size(rewards: Sequence[tuple[float, float]]) -> int:
    return max(LEAST, len(rewards) // PARTS)
