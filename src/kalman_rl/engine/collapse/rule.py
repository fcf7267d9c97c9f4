"""The reward has fallen: its filtered level lies below half of its best, beyond doubt.

A local-level filter of the reward, ``Q = q R`` with R the discounted mean of squared innovations over their variance;
level m with standard deviation s. An alarm when ``m + DOUBT s < best / 2``, where best is the largest ``m - DOUBT s``
so far; the next one only after ``m`` has been above ``best / 2`` again. Rewards whose best is not positive never alarm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from kalman_rl.engine.collapse.metrics import WATCHED
from kalman_rl.engine.collapse.rule import Alarm
from kalman_rl.numerics.kalman import Gaussian, predict, update

RATIO = 0.2
MEMORY = 0.95
WARM_UP = 4
DOUBT = 1.0
REWARD = next(metric for metric in WATCHED if metric.name == "reward")


class Fall:
    """Watches the reward's level, fed one logged row at a time.

    >>> fall = Fall()
    >>> rewards = [0.40, 0.41, 0.39, 0.40, 0.41, 0.40, 0.05, 0.05, 0.05, 0.05, 0.05]
    >>> [alarm.step for t, reward in enumerate(rewards) for alarm in fall.see(t, {"reward": reward})]
    [9]
    """

    def __init__(self) -> None:
        self._mean, self._variance = 0.0, math.inf  # of the level, in units of R
        self._weight = self._squares = 0.0
        self._count, self._best, self._down = 0, -math.inf, False

    def see(self, step: int, row: Mapping[str, Any]) -> list[Alarm]:
        """Take in the row logged at a step; a missing reward changes nothing. Returns: at most one alarm."""
        value = REWARD.read(row)
        if value is None:
            return []
        state = Gaussian(*(torch.tensor(part, dtype=torch.float64) for part in (self._mean, self._variance)))
        after, info = update(predict(state, RATIO), torch.tensor(value, dtype=torch.float64), 1.0)
        if math.isfinite(self._variance):
            self._weight = MEMORY * self._weight + 1.0
            self._squares = (
                MEMORY * self._squares + (info.innovation.square() / info.innovation_variance).item()
            )
        self._mean, self._variance = after.mean.item(), after.variance.item()
        self._count += 1
        if self._count <= WARM_UP:
            return []
        spread = max(math.sqrt(self._variance * self._squares / self._weight), REWARD.least)
        self._best = max(self._best, self._mean - DOUBT * spread)
        half = self._best / 2
        if self._best <= 0 or self._mean > half:
            self._down = False
        if self._down or self._best <= 0 or self._mean + DOUBT * spread >= half:
            return []
        self._down = True
        z = (self._mean - half) / spread
        advice = REWARD.advice(-1)
        return [Alarm(step, "reward", "reward", "falling", self._mean, self._best, z, 1, 1, advice)]

    def state_dict(self) -> dict[str, Any]:
        """JSON-safe state."""
        return {name: None if value in (math.inf, -math.inf) else value for name, value in vars(self).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a saved state."""
        unset = {"_variance": math.inf, "_best": -math.inf}
        for name in vars(self):
            setattr(self, name, unset[name] if state[name] is None else state[name])
