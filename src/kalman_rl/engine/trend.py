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


def trend(rewards: Sequence[tuple[int, float]]) -> str:
    """How the training reward went; "" for fewer than two parts of it.

    A fall is a last part whose mean is lower than the best part's by more than ``ERRORS`` standard errors,
    ``sqrt(2 v / n)`` with v half the mean square of successive differences, n batches in a part.

    >>> trend([(step, 0.1 * step) for step in range(10)])
    'training reward: mean 0.100 over the first 3 batches, 0.800 over the last'
    """
    size = max(LEAST, len(rewards) // PARTS)
    if len(rewards) < 2 * size:
        return ""
    values = [reward for _, reward in rewards]
    means = [fmean(values[i : i + size]) for i in range(len(values) - size + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    noise = fmean((b - a) ** 2 for a, b in itertools.pairwise(values)) / 2
    first, last = means[0], means[-1]
    if means[best] - last <= ERRORS * math.sqrt(2 * noise / size):
        return f"training reward: mean {first:.3f} over the first {size} batches, {last:.3f} over the last"
    begin, end = rewards[best][0], rewards[best + size - 1][0]
    return (
        f"warning: the training reward fell: mean {last:.3f} over the last {size} batches, {means[best]:.3f} at its "
        f"best (steps {begin} to {end}); try a lower learning rate or a KL penalty (kl), or fewer steps"
    )
