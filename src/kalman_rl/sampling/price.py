"""The price of a completion, for budgets that need to hold on average only."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kalman_rl.checks import is_real, is_whole, reading, saved
from kalman_rl.errors import ConfigError, NumericError, quote
from kalman_rl.sampling.divide import Allocation, divide, divide_at_price

FORMAT = 2
MIN_SLACK = 0.05
"""Share of a step's budget that the price may move it by, once the first steps are over."""


@dataclass
class Price:
    """The price of one completion that makes the mean number per prompt meet a budget: a log-dual update.

    After a step that took ``mean`` completions per prompt: ``log price += rate * log((mean - balance / N) / budget)``,
    with the logarithm held within +-1; ``balance`` (below) is the one before the step. The gradient gain falls like
    1/n^2, so rate 2 would correct an error in one step and rate 1 halves it.

    A price alone cannot divide prompts that are alike: all of them are worth it, or none. So what a step took too
    much or too little is kept as a ``balance``, and a step N prompts wide takes ``budget N + balance`` completions
    up to ``budget N max(2^-steps, 0.05)``: from the sixth step on every one is within 10 % of the budget, and their
    mean is the budget.

    Args:
        budget: wanted mean completions per prompt, > 0.
        rate: > 0.
        value: the price, in units of gain; None until the first allocation sets it to the price at which
            the belief itself expects to spend the budget.
        balance: completions that earlier steps left over; < 0 if they took more than the budget.
        steps: number of updates so far.

    Raises: ConfigError for a number out of range.

    >>> price = Price(budget=8.0, value=0.01)
    >>> price.update(16.0)  # dearer after too many
    0.02
    >>> price.balance, round(price.update(4.0), 4)  # 8 too many are still owed: these 4 count as 12
    (-8.0, 0.03)
    """

    budget: float
    rate: float = 1.0
    value: float | None = None
    balance: float = 0.0
    steps: int = 0

    def __post_init__(self) -> None:
        for name in ("budget", "rate"):
            value = getattr(self, name)
            if not (is_real(value) and 0 < value < math.inf):
                raise ConfigError(f"{name}: got {quote(value)}, expected a finite number > 0")
        if self.value is not None and not (is_real(self.value) and 0 < self.value < math.inf):
            raise ConfigError(
                f"value: got {quote(self.value)}, expected a price > 0, or None for not yet known"
            )
        if not (is_real(self.balance) and math.isfinite(self.balance) and is_whole(self.steps)):
            raise ConfigError(
                f"balance, steps: got {quote(self.balance)}, {quote(self.steps)}, expected a finite number and "
                "a count >= 0"
            )

    def start(self, gains: Tensor, least: Tensor, most: Tensor) -> float:
        """The current price; the first time, the gain of the last completion the budget would buy.

        Args: gains, least, most: of :func:`~kalman_rl.sampling.divide.divide`. Raises: what that raises.
        """
        if self.value is None:
            low, high = int(least.sum()), int(most.sum())
            total = min(max(round(self.budget * len(gains)), low, 1), max(high, 1))
            self.value = max(divide(gains, total, least, most).price, 1e-12)
        return self.value

    def window(self, least: Tensor, most: Tensor) -> tuple[int, int]:
        """Fewest and most completions (inclusive) that this step may take in all; ``least, most`` (N,) hold first."""
        wanted = self.budget * len(least)
        slack = wanted * self._slack
        low = math.ceil(wanted + self.balance - slack)
        high = max(math.floor(wanted + self.balance + slack), low)
        must, may = int(least.sum()), int(most.sum())
        return min(max(low, must), may), min(max(high, must), may)

    def divide(self, gains: Tensor, least: Tensor, most: Tensor) -> Allocation:
        """Every completion worth more than the price, the best ones up or down to :meth:`window`.

        Arguments and errors: of :func:`~kalman_rl.sampling.divide.divide`.
        """
        found = divide_at_price(gains, self.start(gains, least, most), least, most)
        low, high = self.window(least, most)
        wanted = int(found.counts.sum())
        total = min(max(wanted, low), high)
        return found if total in (wanted, 0) else divide(gains, total, least, most)

    @property
    def _slack(self) -> float:
        return max(0.5**self.steps, MIN_SLACK)

    def update(self, mean: float, prompts: int = 1) -> float:
        """Move the price after a step that took ``mean`` completions for each of ``prompts``; returns the new price.

        Raises: NumericError for a number out of range, ConfigError before :meth:`start`.
        """
        if not is_whole(prompts, 1):
            raise NumericError(f"prompts: got {quote(prompts)}, expected a number of prompts >= 1")
        if not (is_real(mean) and 0 <= mean < math.inf):
            raise NumericError(f"mean: got {quote(mean)}, expected completions per prompt >= 0")
        if self.value is None:
            raise ConfigError("price: got an update before the first allocation, expected start() first")
        # A step that a wrong price fills to the edge of its window takes the budget; the debt says it is wrong.
        counted = mean - self.balance / prompts
        # Bounds of single prompts may keep a step from the budget; what it owes then is not run up for ever.
        most = self.budget * prompts * self._slack
        self.balance = min(max(self.balance + (self.budget - mean) * prompts, -most), most)
        self.steps += 1
        share = counted / self.budget
        error = math.log(share) if share > 0 else -1.0
        self.value = min(max(self.value * math.exp(self.rate * min(max(error, -1.0), 1.0)), 1e-12), 1e12)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Everything learned and the settings, for :meth:`load_state_dict`."""
        return {"format": FORMAT, **asdict(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the saved price; budget and rate stay those of this object. Raises: ConfigError."""
        with reading("price state", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        (form,) = saved("price state", state, "format")
        if form != FORMAT:
            raise ConfigError(f"price state: got format {quote(form)}, expected {FORMAT}")
        found = saved("price state", state, "value", "balance", "steps")
        Price(self.budget, self.rate, *found)  # checks them
        self.value, self.balance, self.steps = found
