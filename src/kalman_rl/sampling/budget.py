"""How completions are divided among the prompts of a generation batch: one set of settings for every host."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, unknown_name
from kalman_rl.sampling.allocate import check_rounds
from kalman_rl.sampling.learnability import OBJECTIVES, REWARDS, check_objective

Kind = Literal["fixed", "predictive", "rounds"]


@dataclass(frozen=True)
class Budget:
    """How completions are divided among the prompts of a generation batch.

    Args:
        allocation: "fixed", the same number each; "predictive", from the belief before sampling (exactly
            unbiased); "rounds", in rounds that see the rewards so far (exact direction, weight E[tau]).
        mean: completions per prompt on average, or None for as many as TRL's batch holds.
        rounds: completions per prompt and round; the last number repeats.
        max_rounds: the last round asks for all that is left. Every round is a generation call; two suffice.
        low, high: bounds of one prompt's completions in a batch; with low 0 a prompt can be skipped.
        objective: "gradient" spends near success rate 1/2, "light" on hard but solvable prompts.
        coverage: a prompt is due again after so many optimizer steps without a completion.
        rewards: "unit" if they lie in [0, 1], else "real".
        noise_variance: of the scorer, in squared reward units; read for "real" only.

    Raises: ConfigError for a value out of range, under the name it has in the settings of training.
    """

    allocation: Kind = "fixed"
    mean: float | None = None
    rounds: tuple[int, ...] = (2, 4)
    max_rounds: int = 2
    low: int = 0
    high: int = 32
    objective: Literal["gradient", "light"] = "gradient"
    coverage: int = 256
    rewards: Literal["unit", "real"] = "unit"
    noise_variance: float = 0.0

    def __post_init__(self) -> None:
        for name, value, known in (
            ("allocation", self.allocation, get_args(Kind)),
            ("allocation_objective", self.objective, OBJECTIVES),
            ("reward_range", self.rewards, REWARDS),
        ):
            if value not in known:
                raise unknown_name(name, value, known)
        check_objective(self.objective, self.rewards)
        check_rounds(self.rounds)
        if not (is_whole(self.low) and is_whole(self.high, max(self.low, 1))):
            raise ConfigError(
                f"completions_min, completions_max: got {self.low!r}, {self.high!r}, expected whole numbers with "
                "0 <= min <= max and max >= 1"
            )
        for name, number in (("max_rounds", self.max_rounds), ("coverage_steps", self.coverage)):
            if not is_whole(number, 1):
                raise ConfigError(f"{name}: got {number!r}, expected a whole number >= 1")
        if not (is_real(self.noise_variance) and 0 <= self.noise_variance < math.inf):
            raise ConfigError(
                f"reward_noise_variance: got {self.noise_variance!r}, expected a finite variance >= 0"
            )
        if self.mean is not None:
            self._check_mean(self.mean)

    def _check_mean(self, mean: float) -> None:
        if not (is_real(mean) and 0 < mean < math.inf):
            raise ConfigError(f"budget: got {mean!r}, expected a mean number of completions > 0")
        if self.allocation == "fixed":
            raise ConfigError(
                f"budget: got {mean} with allocation='fixed', expected predictive or rounds; with fixed the number of "
                "completions per prompt is the budget"
            )
        if not self.low <= mean <= self.high:
            raise ConfigError(
                f"budget: got {mean}, expected {self.low} to {self.high}, the bounds of one prompt's completions"
            )

    def total(self, prompts: int, rows: int) -> int:
        """Completions of a batch of ``prompts`` prompts for which there are ``rows`` rows."""
        wanted = rows if self.mean is None else min(rows, round(self.mean * prompts))
        return max(min(wanted, prompts * self.high), prompts * self.low, 1)
