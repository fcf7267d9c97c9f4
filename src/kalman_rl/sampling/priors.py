"""What is known of prompts before training: solve rates that come with the data, or completions of the start model."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, quote
from kalman_rl.sampling.tracking import Tracking

MOST = 4096
"""Completions behind a prior; the policy will have moved long before more of them could matter."""
_CHUNK = 4096  # prompts absorbed at a time


@dataclass(frozen=True)
class SolveRate:
    """``rate`` in [0, 1], the mean reward of ``count`` completions of the start model."""

    rate: float
    count: int


def read_priors(
    names: Sequence[Hashable], values: Iterable[Any], column: str = "prior"
) -> dict[Hashable, SolveRate]:
    """The solve rates of a data column, by prompt; prompts whose value is None have none.

    Args: names: one per row. values: ``{"rate": 0.25, "count": 8}`` or None for each. column: for messages.
    Raises: ConfigError for a value without rate or count, or out of range.

    >>> read_priors(["a", "b"], [{"rate": 0.25, "count": 8}, None])
    {'a': SolveRate(rate=0.25, count=8)}
    """
    found: dict[Hashable, SolveRate] = {}
    for name, value in zip(names, values, strict=True):
        if value is None:
            continue
        read: Any = value if isinstance(value, Mapping) else {}
        rate, count = read.get("rate"), read.get("count")
        if not (is_real(rate) and 0 <= rate <= 1 and is_whole(count, 1, MOST)):
            raise ConfigError(
                f"{column}: got {quote(value, 80)} for prompt {quote(name)}, expected a rate in [0, 1] and the "
                "count of "
                f'completions behind it, 1 to {MOST}, like {{"rate": 0.25, "count": 8}}, or nothing'
            )
        found[name] = SolveRate(float(rate), int(count))
    return found


def absorb_priors(tracking: Tracking, priors: Mapping[Hashable, SolveRate]) -> None:
    """Absorb solve rates as the completions they stand for, ``rate count`` of them right, rounded to whole ones."""
    rewards = {}
    for name, prior in priors.items():
        right = round(prior.rate * prior.count)
        rewards[name] = [1.0] * right + [0.0] * (prior.count - right)
    absorb_rewards(tracking, rewards)


def absorb_rewards(tracking: Tracking, rewards: Mapping[Hashable, Sequence[float]]) -> None:
    """Absorb rewards of the start model, by prompt, NaN = missing: they are of step 0, and training begins at step 1.

    A belief that goes on from a checkpoint has them already, and is replaced by the saved one.
    """
    prompts = list(rewards)
    for start in range(0, len(prompts), _CHUNK):
        part = prompts[start : start + _CHUNK]
        names = [name for name in part for _ in rewards[name]]
        reward = torch.tensor([value for name in part for value in rewards[name]], dtype=torch.float64)
        tracking.belief.update(names, reward, step=0)
    if prompts:
        tracking.last_step = max(tracking.last_step, 0)
