"""Which prompts a generation batch has and how completions are divided among them: one set of settings for every host.

Nothing here needs torch, so that a command line can show and check these settings at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from kalman_rl.checks import is_real, is_whole
from kalman_rl.errors import ConfigError, quote, unknown_name

Allocation = Literal["fixed", "predictive", "rounds"]
Aim = Literal["gradient", "mixed_groups"]
RewardRange = Literal["unit", "real"]
Select = Literal["passes", "stream", "sage"]
SelectWeights = Literal["equal", "unbiased"]


@dataclass(frozen=True)
class Budget:
    """Which prompts a generation batch has, and how completions are divided among them.

    The hosts' own settings have the same names, so that :meth:`of` can read them. The text under each field is its
    documentation, on the command line too.

    Raises: ConfigError for a value out of range.

    >>> Budget(allocation="rounds", budget=4.0).total(prompts=8, rows=64)
    32
    """

    allocation: Allocation = "fixed"
    """Completions per prompt: the same for all, from the belief before sampling, or in rounds that see rewards."""
    aim: Aim = "gradient"
    """What an allocation buys: gradient (spend near success rate 1/2) or mixed_groups (groups with both outcomes)."""
    budget: float | None = None
    """Mean completions per prompt that an allocation may spend. Unset: as many as without an allocation."""
    rounds: tuple[int, ...] = (2, 4)
    """Completions per prompt in each round of allocation=rounds; the last number repeats."""
    max_rounds: int = 2
    """Rounds per generation batch; the last one takes what is left of the budget. Each is a generation call."""
    candidates: int | None = None
    """Prompts an allocation chooses among; those it gives no completion wait for the next pass. Unset: as many as the
    batch has completions, or the dataset prompts; with completions_min above 0 those of the batch."""
    completions_min: int = 0
    """Least completions of a prompt in a batch; with 0 an allocation may pass a prompt over."""
    completions_max: int = 32
    """Most completions of a prompt in a batch; a stream draws a prompt so often where few others teach."""
    coverage_steps: int = 64
    """Optimizer steps after which a prompt that was passed over is due again; a tenth of the batch is for such."""
    reward_range: RewardRange = "unit"
    """Where rewards lie, for an allocation: unit in [0, 1], real anywhere."""
    reward_noise_variance: float = 0.0
    """Variance of the scorer's noise, in squared reward units; read where reward_range is real."""
    select: Select = "passes"
    """Prompts of a batch: in passes over the dataset, or drawn from all of it by what the belief says a prompt teaches:
    stream (by the variance of its reward) or sage (SAGE's signal against curvature, reconstructed)."""
    select_weights: SelectWeights = "equal"
    """Weight of what was drawn: equal, or unbiased for the mean over the dataset (1 / how often a prompt comes)."""
    select_floor: float = 0.1
    """Share of draws that are uniform over the dataset, above 0 and at most 1, so that every prompt comes again."""
    select_power: float = 1.0
    """Power of the score that draws are in proportion to; 0 draws uniformly."""

    def __post_init__(self) -> None:
        if self.allocation not in get_args(Allocation):
            raise unknown_name("allocation", self.allocation, get_args(Allocation))
        check_aim(self.aim, self.reward_range)
        check_select(self.select, self.select_weights, self.reward_range)
        check_shares(self.select_floor, self.select_power)
        if self.select != "passes" and self.allocation != "fixed":
            raise ConfigError(
                f"select: got {quote(self.select)} with allocation={quote(self.allocation)}, expected "
                "allocation fixed because the draw has decided where completions go"
            )
        if self.select != "passes" and self.candidates is not None:
            raise ConfigError(
                f"candidates: got {quote(self.candidates)} with select={quote(self.select)}, expected it unset "
                "because the draw chooses among all prompts of the dataset"
            )
        check_rounds(self.rounds)
        low, high = self.completions_min, self.completions_max
        if not (is_whole(low) and is_whole(high, max(low, 1), 4_096)):
            raise ConfigError(
                f"completions_min, completions_max: got {quote(low)}, {quote(high)}, expected whole numbers with "
                "0 <= min <= max and 1 <= max <= 4,096"
            )
        for name, number in (("max_rounds", self.max_rounds), ("coverage_steps", self.coverage_steps)):
            if not is_whole(number, 1):
                raise ConfigError(f"{name}: got {quote(number)}, expected a whole number >= 1")
        noise = self.reward_noise_variance
        if not (is_real(noise) and 0 <= noise < math.inf):
            raise ConfigError(f"reward_noise_variance: got {quote(noise)}, expected a finite variance >= 0")
        if self.budget is not None:
            self._check_budget(self.budget)
        if self.candidates is not None:
            self._check_candidates(self.candidates)

    def _check_budget(self, budget: float) -> None:
        if not (is_real(budget) and 0 < budget < math.inf):
            raise ConfigError(f"budget: got {quote(budget)}, expected a mean number of completions > 0")
        if self.allocation == "fixed":
            raise ConfigError(
                f"budget: got {quote(budget)} with allocation='fixed', expected predictive or rounds; with "
                "fixed the number of completions per prompt is the budget"
            )
        low, high = self.completions_min, self.completions_max
        if not low <= budget <= high:
            raise ConfigError(
                f"budget: got {quote(budget)}, expected {low} to {high}, the bounds of one prompt's completions"
            )

    def _check_candidates(self, candidates: int) -> None:
        if not is_whole(candidates, 1):
            raise ConfigError(f"candidates: got {quote(candidates)}, expected a number of prompts >= 1")
        if self.allocation == "fixed":
            raise ConfigError(
                f"candidates: got {quote(candidates)} with allocation='fixed', expected predictive or rounds; "
                "with fixed every prompt of the batch is sampled"
            )
        if self.completions_min:
            raise ConfigError(
                f"completions_min: got {quote(self.completions_min)} with candidates={candidates}, expected 0 "
                "because a candidate may go without a completion"
            )

    @staticmethod
    def of(settings: Any) -> Budget:
        """The budget among a host's settings, read by name; what they lack keeps its default.

        Raises: ConfigError for a value out of range.
        """
        found = {s.name: getattr(settings, s.name) for s in fields(Budget) if hasattr(settings, s.name)}
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
        }
        return Budget(**known)

    def chooses_among(self, prompts: int, rows: int, pool: int | None = None) -> int:
        """Prompts among which a batch of ``prompts`` prompts with ``rows`` completions is chosen, from ``pool`` in all.

        Raises: ConfigError for ``candidates`` below the prompts of the batch or above those of the pool.
        """
        if self.allocation == "fixed" or self.completions_min:
            return prompts
        if self.candidates is None:
            return max(prompts, rows if pool is None else min(rows, pool))
        if self.candidates < prompts:
            raise ConfigError(
                f"candidates: got {quote(self.candidates)}, expected at least {prompts}, the prompts of a "
                "batch; raise it, or take fewer prompts"
            )
        if pool is not None and self.candidates > pool:
            raise ConfigError(
                f"candidates: got {quote(self.candidates)}, expected at most {pool}, the prompts of the "
                "dataset; lower it"
            )
        return self.candidates

    def total(self, prompts: int, rows: int, candidates: int | None = None) -> int:
        """Completions of a batch of ``prompts`` prompts, chosen among ``candidates``, for which there are ``rows``
        rows."""
        wanted = rows if self.budget is None else min(rows, round(self.budget * prompts))
        among = prompts if candidates is None else candidates
        return max(min(wanted, among * self.completions_max), among * self.completions_min, 1)


def check_aim(aim: str, reward_range: str) -> None:
    """Refuse unknown names, and mixed groups of real-valued rewards. Raises: ConfigError."""
    for name, value, known in (
        ("aim", aim, get_args(Aim)),
        ("reward_range", reward_range, get_args(RewardRange)),
    ):
        if value not in known:
            raise unknown_name(name, value, known)
    if aim == "mixed_groups" and reward_range == "real":
        raise ConfigError(
            "aim: got 'mixed_groups' with real-valued rewards, expected 'gradient'; groups of real rewards "
            "are mixed from the second completion on"
        )


def check_select(select: str, weights: str, reward_range: str) -> None:
    """Refuse unknown names, and SAGE's margin of rewards that are no probabilities. Raises: ConfigError."""
    for name, value, known in (
        ("select", select, get_args(Select)),
        ("select_weights", weights, get_args(SelectWeights)),
    ):
        if value not in known:
            raise unknown_name(name, value, known)
    if select == "sage" and reward_range == "real":
        raise ConfigError(
            "select: got 'sage' with real-valued rewards, expected 'stream'; a margin is the logit of a success rate"
        )


def check_shares(floor: float, power: float) -> None:
    """Refuse a floor outside (0, 1] and a power that is negative or not finite. Raises: ConfigError."""
    if not (is_real(floor) and 0 < floor <= 1):
        raise ConfigError(
            f"select_floor: got {quote(floor)}, expected a share in (0, 1]; at 0 a prompt might never return"
        )
    if not (is_real(power) and 0 <= power < math.inf):
        raise ConfigError(f"select_power: got {quote(power)}, expected a finite number >= 0")


BELIEF_ONLY: dict[str, tuple[Any, str]] = {
    "allocation": ("fixed", "knows how to divide completions"),
    "select": ("passes", "knows what a prompt teaches"),
    "source_column": (None, "learns by source"),
    "prior_column": (None, "begins with what is known"),
    "measure_prior": (0, "begins with what is measured"),
}
"""Settings that only a belief reads: their value without one, and what a belief does with them."""


def check_belief_only(settings: Any, tracked: bool, where: str, advice: str) -> None:
    """Refuse settings of a belief where advantages do not come from one.

    Args: settings: of a host. tracked: whether there is a belief. where, advice: parts of the message.
    Raises: ConfigError.
    """
    for name, (default, what) in BELIEF_ONLY.items():
        value = getattr(settings, name, default)
        if value != default and not tracked:
            raise ConfigError(
                f"{name}: got {quote(value, 80)} {where}, expected {default or 'it unset'} because only a "
                f"belief {what}; {advice}"
            )


def check_prior(column: str | None, measured: int, features: bool) -> None:
    """Refuse two origins of what a belief begins with, and hidden states beside it. Raises: ConfigError."""
    if column is not None and measured:
        raise ConfigError(
            f"prior_column, measure_prior: got {quote(column)} and {measured}, expected one of the two; both are "
            "completions of the start model"
        )
    if (column is not None or measured) and features:
        raise ConfigError(
            "prompt_features: got True with solve rates from before training, expected False because they are taken up "
            "before any hidden state is known"
        )


def check_rounds(rounds: Sequence[int]) -> None:
    """Refuse what is no list of completions per round. Raises: ConfigError."""
    if not isinstance(rounds, Sequence) or not rounds or not all(is_whole(k, 1) for k in rounds):
        shown = list(rounds) if isinstance(rounds, tuple) else rounds
        raise ConfigError(f"rounds: got {quote(shown)}, expected a list of one or more integers >= 1")
