"""What a fixed number of completions per prompt would have cost for the same result, from a run's beliefs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kalman_rl.engine.runs.beliefs import Beliefs, Visit
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling.gains import beta_from_moments, beta_signal

MAX_SAMPLES = 4096.0
MAX_VISITS = 3_000
"""Of more, every second, third... is counted; it changes the second digit at most."""


@dataclass(frozen=True)
class Saving:
    """``equality`` is what is held equal; ``fixed`` completions per prompt reach it; ``used`` were used per
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
    visits = visits[:: math.ceil(len(visits) / MAX_VISITS)]
    used = sum(visit.n for visit in visits) / len(visits)
    shapes = beta_shapes(visits)
    result = []
    signal = beta_signal(*torch.tensor(shapes, dtype=torch.float64).T).tolist()
    error = sum(s / max(visit.n, 0.5) for s, visit in zip(signal, visits))
    if error > 0:
        result.append(Saving("the same expected error of the gradient", used, sum(signal) / error))
    found = sum(visit.mixed for visit in visits)
    if found:
        result.append(Saving("as many groups with different rewards", used, _fixed_for(found, shapes)))
    return result


def beta_shapes(visits: Sequence[Visit]) -> list[tuple[float, float]]:
    """Beta(a, b) with the posterior's moments, one per visit; see :func:`beta_from_moments`."""
    mean = torch.tensor([visit.after for visit in visits], dtype=torch.float64)
    deviation = torch.tensor([visit.after_sd for visit in visits], dtype=torch.float64)
    a, b = beta_from_moments(Gaussian(mean, deviation.square()))
    return list(zip(a.tolist(), b.tolist()))


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
    low, high = 1.0, MAX_SAMPLES
    if sum(mixed_share(high, shape) for shape in shapes) < found:
        return math.inf
    for _ in range(40):
        middle = (low + high) / 2
        enough = sum(mixed_share(middle, shape) for shape in shapes) >= found
        low, high = (low, middle) if enough else (middle, high)
    return high
