"""What a fixed number of completions per prompt would have cost for the same result, from a run's beliefs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kalman_rl.engine.runs.beliefs import Beliefs, Visit

MOST = 4096.0
MOST_VISITS = 3_000
"""Of more, every second, third... is counted; it changes the second digit at most."""
SMALLEST_EVIDENCE = 0.3


@dataclass(frozen=True)
class Saving:
    """``equality`` says what is held equal; ``fixed`` completions per prompt reach it; ``used`` were used per
    prompt on average. ``fixed`` is infinite if no number up to 4096 reaches it."""

    equality: str
    used: float
    fixed: float

    @property
    def share(self) -> float:
        """Part of the fixed budget that was not needed; negative if more was used."""
        return 1 - self.used / self.fixed


def savings(beliefs: Beliefs) -> list[Saving]:
    """Both equalities over the visits that were written down; nothing without two of them or without 0..1 rewards.

    *Gradient error*: the sum of ``E[p (1 - p)] / n`` over prompts, a skipped prompt counting as half a completion.
    *Informative groups*: those whose rewards differ; a fixed G is expected to give ``1 - E[p^G] - E[(1 - p)^G]``.
    Expectations are over the Beta with the mean and variance of the posterior at the time.
    """
    visits = [visit for batch in beliefs.batches for visit in batch.visits.values()]
    if len(visits) < 2 or not beliefs.unit:
        return []
    visits = visits[:: math.ceil(len(visits) / MOST_VISITS)]
    used = sum(visit.n for visit in visits) / len(visits)
    shapes = [beta_of(visit) for visit in visits]
    result = []
    signal = [a * b / ((a + b) * (a + b + 1)) for a, b in shapes]
    error = sum(s / max(visit.n, 0.5) for s, visit in zip(signal, visits))
    if error > 0:
        result.append(Saving("the same expected error of the gradient", used, sum(signal) / error))
    found = sum(visit.mixed for visit in visits)
    if found:
        result.append(Saving("as many groups with different rewards", used, _fixed_for(found, shapes)))
    return result


def beta_of(visit: Visit) -> tuple[float, float]:
    """Beta(a, b) of the posterior's moments; the evidence a + b is at least 0.3."""
    mean = min(max(visit.after, 1e-3), 1 - 1e-3)
    variance = max(visit.after_sd**2, 1e-12)
    evidence = max(mean * (1 - mean) / variance - 1, SMALLEST_EVIDENCE)
    return mean * evidence, (1 - mean) * evidence


def mixed_share(size: float, shape: tuple[float, float]) -> float:
    """``1 - E[p^G] - E[(1 - p)^G]`` for p ~ Beta(a, b) and any real G >= 0; at least 0.

    >>> round(mixed_share(2, (1.0, 1.0)), 4)
    0.3333
    """
    a, b = shape

    def all_alike(x: float) -> float:
        return math.exp(
            math.lgamma(x + size) + math.lgamma(a + b) - math.lgamma(x) - math.lgamma(a + b + size)
        )

    return max(0.0, 1 - all_alike(a) - all_alike(b))


def _fixed_for(found: float, shapes: Sequence[tuple[float, float]]) -> float:
    low, high = 1.0, MOST
    if sum(mixed_share(high, shape) for shape in shapes) < found:
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        enough = sum(mixed_share(middle, shape) for shape in shapes) >= found
        low, high = (low, middle) if enough else (middle, high)
    return high
