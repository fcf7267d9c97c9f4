"""What the surprise rule watches: one row per metric, with its transform, its harmful directions and what to try."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SHARE_OFFSET = 1e-3
"""Added to a share and to what it leaves, so that 0 and 1 have a logit."""


@dataclass(frozen=True)
class Metric:
    """One watched number.

    ``key``: its name in the log, ``complement``: watch 1 minus it. ``transform``: log (positive numbers; 0 is
    missing), logit (shares) or same. ``least``: standard deviation below which a change is none, after the transform.
    ``rising``, ``falling``: what to try where that direction is harmful; empty = harmless. ``of_ratio``: missing in an
    update whose log-ratios are all 0, the first after each sampling.
    """

    name: str
    key: str
    transform: str
    least: float
    rising: str = ""
    falling: str = ""
    complement: bool = False
    of_ratio: bool = False

    def read(self, row: Mapping[str, Any]) -> float | None:
        """The transformed value in a logged row, or None if it is missing."""
        value = row.get(self.key)
        if not isinstance(value, (int, float)) or not math.isfinite(value) or abs(value) > 1e100:
            return None
        if self.of_ratio and row.get("ratio/noop") == 1:
            return None
        return _FORWARD[self.transform](1.0 - value if self.complement else float(value))

    def back(self, transformed: float) -> float:
        """The value in the units of the log (of 1 minus the logged one where ``complement``)."""
        return _BACK[self.transform](transformed)

    @property
    def harmful(self) -> tuple[int, ...]:
        """+1 and -1 for the directions that count."""
        return (*((1,) if self.rising else ()), *((-1,) if self.falling else ()))

    def advice(self, direction: int) -> str:
        """What to try when it leaves its band in a harmful direction."""
        return self.rising if direction > 0 else self.falling


def _log(value: float) -> float | None:
    return math.log(value) if value > 0 else None


def _logit(share: float) -> float:
    share = min(max(share, 0.0), 1.0)
    return math.log((share + SHARE_OFFSET) / (1 - share + SHARE_OFFSET))


def _share(logit: float) -> float:
    odds = math.exp(min(max(logit, -50.0), 50.0))
    return min(max((odds * (1 + SHARE_OFFSET) - SHARE_OFFSET) / (1 + odds), 0.0), 1.0)


_FORWARD: dict[str, Callable[[float], float | None]] = {"log": _log, "logit": _logit, "same": float}
_BACK: dict[str, Callable[[float], float]] = {
    "log": lambda value: math.exp(min(value, 700.0)),
    "logit": _share,
    "same": float,
}

_SMALLER_STEPS = "a lower learning rate or fewer passes (iterations, updates_per_generation)"
WATCHED: tuple[Metric, ...] = (
    Metric(
        "entropy",
        "entropy",
        "log",
        0.02,
        rising=f"{_SMALLER_STEPS}; a KL penalty (kl) or a smaller clip range",
        falling="a larger clip-high (method_options high), a higher temperature, harder or fresher prompts",
    ),
    Metric(
        "largest log-ratio",
        "ratio/max_abs_log_ratio",
        "log",
        0.05,
        rising=f"kpo_robust or a smaller process_noise, so that one token moves the ratio less; {_SMALLER_STEPS}",
        of_ratio=True,
    ),
    Metric(
        "clipped share",
        "trust/kept",
        "logit",
        0.1,
        rising=f"{_SMALLER_STEPS}; if it stays high with stable rewards, a wider clip range",
        complement=True,
        of_ratio=True,
    ),
    Metric(
        "KL to the old policy",
        "policy/kl_old",
        "log",
        0.05,
        rising=f"{_SMALLER_STEPS}; a method with a trust region, or a narrower one (method_options low, high)",
        of_ratio=True,
    ),
    Metric(
        "KL to the reference", "kl", "log", 0.05, rising="a larger KL weight (kl), or a lower learning rate"
    ),
    Metric(
        "reward",
        "reward",
        "same",
        0.01,
        falling="the newest checkpoint from before the fall, with a lower learning rate or a KL penalty (kl)",
    ),
    Metric(
        "gradient norm",
        "grad_norm",
        "log",
        0.05,
        rising="a lower learning rate, or a smaller max_grad_norm; look at the rewards of this batch",
    ),
    Metric(
        "completion length",
        "completions/mean_length",
        "log",
        0.02,
        rising="a look at the longest completions: is the reward paid for length?",
        falling="a look at the shortest completions: is the reward paid for stopping early?",
    ),
)
