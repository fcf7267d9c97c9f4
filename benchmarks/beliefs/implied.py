"""What a stopping rule does to the objective: the weight it gives to a prompt of success probability p,
exactly.

For 0/1 rewards every policy gradient estimate of a prompt is a multiple of the true gradient in expectation,
so a rule is described by ``c(p) = E[estimate] / gradient``. Equal for all p: the objective is the one
intended.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, NumericError, unknown_name

Stop = Callable[[int, int], bool]
"""``(completions, successes) -> stop?``, asked between rounds."""


def when_mixed(n: int, successes: int) -> bool:
    """Stop once there is a success and a failure."""
    return 0 < successes < n


def never(n: int, successes: int) -> bool:
    """Go on to the cap: a group of fixed size."""
    return False


class Implied(NamedTuple):
    """``weight`` c(p); ``tau`` E[completions]."""

    weight: float
    tau: float


@dataclass(frozen=True)
class StopRule:
    """Sample in rounds of ``k`` until ``stop`` or ``cap`` completions, then estimate the gradient.

    Args:
        stop: asked after every round. k, cap: >= 1, the cap a multiple of k.
        estimate: "leave-one-out" or "group-mean" = rewards minus the mean of the others, or of all, divided
            by tau; "z-score" = the latter over the group's unbiased standard deviation (GRPO);
            "round-causal" = baseline from a prior Beta(a, b), earlier rounds and the others of the own round,
            summed and *not* divided: its weight is E[tau].
        prior: (a, b) of the round-causal baseline, each > 0.

    Raises: ConfigError for a value out of range.
    """

    stop: Stop = when_mixed
    k: int = 4
    cap: int = 32
    estimate: str = "leave-one-out"
    prior: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if self.estimate not in ESTIMATES:
            raise unknown_name("estimate", self.estimate, ESTIMATES)
        if not (is_whole(self.k, 1) and is_whole(self.cap, self.k)) or self.cap % self.k:
            raise ConfigError(
                f"k, cap: got {self.k!r}, {self.cap!r}, expected k >= 1 and a cap that is a multiple of k"
            )
        prior = self.prior
        if not (
            isinstance(prior, tuple)
            and len(prior) == 2
            and is_real(*prior)
            and 0 < min(prior) <= max(prior) < math.inf
        ):
            raise ConfigError(f"prior: got {prior!r}, expected two finite numbers > 0")


def implied_weight(p: float, rule: StopRule) -> Implied:
    """``c(p) = E[sum_j w_j A_j (r_j - p)] / (p (1 - p))`` by summing over every course sampling can take.

    ``r - p`` is the score of a Bernoulli policy in its logit. Any policy gives the same c: the mean score of
    a success is ``g / p`` and that of a failure ``-g / (1 - p)``, and the advantages know only the rewards.

    Args: p: success probability in (0, 1). rule: the rule.
    Returns: :class:`Implied`. Raises: NumericError for p outside (0, 1).

    >>> c = implied_weight(0.1, StopRule())  # "mean over tau" over-weights what is rarely mixed
    >>> round(c.weight, 3), round(c.tau, 2)
    (1.664, 11.23)
    """
    if not 0 < p < 1:
        raise NumericError(f"p: got {p}, expected a success probability strictly between 0 and 1")
    causal = rule.estimate == "round-causal"
    weight = tau = 0.0
    alive = {0: 1.0}  # probability of going on with this many successes
    for n in range(0, rule.cap, rule.k):
        after: dict[int, float] = {}
        for before, chance in alive.items():
            for new in range(rule.k + 1):
                here = chance * math.comb(rule.k, new) * p**new * (1 - p) ** (rule.k - new)
                if causal:
                    weight += here * _round_causal(n, before, rule.k, new, p, rule.prior)
                after[before + new] = after.get(before + new, 0.0) + here
        size = n + rule.k
        done = {s: size == rule.cap or rule.stop(size, s) for s in after}
        for s, chance in after.items():
            if done[s]:
                tau += chance * size
                weight += 0.0 if causal else chance * _ESTIMATES[rule.estimate](size, s, p)
        alive = {s: chance for s, chance in after.items() if not done[s]}
    return Implied(weight / (p * (1 - p)), tau)


def _total(n: int, s: int, p: float, success: float, failure: float) -> float:
    """``sum_j A_j (r_j - p)`` with one advantage for all successes and one for all failures."""
    return s * success * (1 - p) - (n - s) * failure * p


def _group_mean(n: int, s: int, p: float) -> float:
    return _total(n, s, p, 1 - s / n, -s / n) / n


def _leave_one_out(n: int, s: int, p: float) -> float:
    return n / (n - 1) * _group_mean(n, s, p) if n > 1 else 0.0


def _z_score(n: int, s: int, p: float) -> float:
    if not 0 < s < n:
        return 0.0
    return _group_mean(n, s, p) / math.sqrt(s * (n - s) / (n * (n - 1)))


def _round_causal(n: int, before: int, k: int, new: int, p: float, prior: tuple[float, float]) -> float:
    successes, size = prior[0] + before + new, sum(prior) + n + k - 1
    return _total(k, new, p, 1 - (successes - 1) / size, -successes / size)


_ESTIMATES = {
    "leave-one-out": _leave_one_out,
    "group-mean": _group_mean,
    "z-score": _z_score,
}
ESTIMATES = (*_ESTIMATES, "round-causal")
