"""Section 5.1, exact: by how much a rule that stops on what it saw multiplies a prompt's gradient.

For 0/1 rewards the gradient along the success probability's logit is ``E[sum_j A_j (r_j - p)]`` per prompt; the
*implied weight* is that, over the true ``p (1 - p)``. Rounds are enumerated, nothing is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

DIFFICULTIES = (0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
ROUND, CAP = 4, 32


class Rounds(NamedTuple):
    """One way a prompt can go: successes of each round, all of ``size`` samples, and its probability."""

    wins: tuple[int, ...]
    size: int
    probability: float

    @property
    def n(self) -> int:
        return len(self.wins) * self.size


def fixed(p: float, n: int = 8) -> Iterator[Rounds]:
    """One round of n."""
    for wins in range(n + 1):
        yield Rounds((wins,), n, math.comb(n, wins) * p**wins * (1 - p) ** (n - wins))


def until_mixed(p: float, size: int = ROUND, cap: int = CAP) -> Iterator[Rounds]:
    """Rounds until both outcomes were seen, or the cap."""
    last = cap // size
    for first in (0, size):  # all equal so far: failures, or successes
        same = (1 - p) ** size if first == 0 else p**size
        for rounds in range(1, last + 1):
            before = (first,) * (rounds - 1)
            for end in _round(p, size):
                mixed = end.wins[0] != first
                if (rounds == 1 and not 0 < end.wins[0] < size) or not (mixed or rounds == last):
                    continue
                if rounds == 1 and first:
                    continue  # a first mixed round is counted once, below first = 0
                yield Rounds((*before, end.wins[0]), size, same ** (rounds - 1) * end.probability)


def _round(p: float, size: int) -> Iterator[Rounds]:
    return fixed(p, size)


def weight(p: float, paths: Iterator[Rounds], per_path: Callable[[Rounds, float], float]) -> float:
    """``E[per_path] / (p (1 - p))``."""
    return sum(path.probability * per_path(path, p) for path in paths) / (p * (1 - p))


def expected_samples(p: float, paths: Iterator[Rounds]) -> float:
    return sum(path.probability * path.n for path in paths)


def _sum(wins: int, n: int, p: float, success: float, failure: float) -> float:
    """``sum_j A_j (r_j - p)`` with one advantage for successes and one for failures."""
    return wins * success * (1 - p) - (n - wins) * failure * p


def loo(path: Rounds, p: float) -> float:
    """Leave-one-out over all samples, averaged over the own number of samples."""
    wins, n = sum(path.wins), path.n
    return _sum(wins, n, p, 1 - (wins - 1) / (n - 1), -wins / (n - 1)) / n


def group_mean(path: Rounds, p: float) -> float:
    """GRPO without the division by the standard deviation."""
    wins, n = sum(path.wins), path.n
    return _sum(wins, n, p, 1 - wins / n, -wins / n) / n


def group_std(path: Rounds, p: float) -> float:
    """GRPO: divided by the group's standard deviation (n - 1 in its denominator) plus 1e-4."""
    wins, n = sum(path.wins), path.n
    std = math.sqrt(wins * (n - wins) / n / (n - 1))
    return group_mean(path, p) / (std + 1e-4)


def fused(path: Rounds, p: float, strength: float = 2.0) -> float:
    """Leave-one-out fused with a prior worth two samples that is right on average, over the own n."""
    wins, n = sum(path.wins), path.n
    total = strength + n - 1
    up, down = 1 - (strength * p + wins - 1) / total, -(strength * p + wins) / total
    return _sum(wins, n, p, up, down) / n


def round_causal(path: Rounds, p: float, strength: float = 1.0, center: float = 0.5) -> float:
    """Summed, not averaged: a round's baseline is the prior, the earlier rounds and the others of its round."""
    total, before, seen = 0.0, 0, 0
    for wins in path.wins:
        size = strength + seen + path.size - 1
        up = 1 - (strength * center + before + wins - 1) / size
        down = -(strength * center + before + wins) / size
        total += _sum(wins, path.size, p, up, down)
        before, seen = before + wins, seen + path.size
    return total


COLUMNS = (
    "fixed8_loo",
    "fixed8_group_mean",
    "fixed8_grpo_std",
    "mixed_loo_mean",
    "mixed_round_causal",
    "expected_samples",
    "causal_weight_vs_fixed8",
    "mixed_fused_mean",
)


def table() -> list[dict[str, float]]:
    """One row per success probability."""
    rows = []
    for p in DIFFICULTIES:
        samples = expected_samples(p, until_mixed(p))
        causal = weight(p, until_mixed(p), round_causal)
        numbers = (
            weight(p, fixed(p), loo),
            weight(p, fixed(p), group_mean),
            weight(p, fixed(p), group_std),
            weight(p, until_mixed(p), loo),
            causal / samples,
            samples,
            causal / 8,
            weight(p, until_mixed(p), fused),
        )
        rows.append({"p": p} | dict(zip(COLUMNS, numbers)))
    return rows
