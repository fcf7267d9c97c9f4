"""The price of a completion, for budgets that need to hold on average only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kalman_rl.checks import is_real, saved
from kalman_rl.errors import ConfigError, NumericError
from kalman_rl.sampling.divide import divide


@dataclass
class Price:
    """The price of one completion that makes the mean number per prompt meet a budget: a log-dual update.

    After a step that took ``mean`` completions per prompt: ``log price += rate * log(mean / budget)``, with
    the logarithm held within +-1. The gradient gain falls like 1/n^2, so rate 2 would correct an error in one
    step and rate 1 halves it.

    Args:
        budget: wanted mean completions per prompt, > 0.
        rate: > 0.
        value: the price, in units of gain; None until the first allocation sets it to the price at which
            the belief itself expects to spend the budget.

    Raises: ConfigError for a number out of range.

    >>> price = Price(budget=8.0, value=0.01)
    >>> round(price.update(16.0), 4), round(price.update(4.0), 4)  # dearer after too many, cheaper after too few
    (0.02, 0.01)
    """

    budget: float
    rate: float = 1.0
    value: float | None = None

    def __post_init__(self) -> None:
        for name in ("budget", "rate"):
            value = getattr(self, name)
            if not (is_real(value) and 0 < value < math.inf):
                raise ConfigError(f"{name}: got {value!r}, expected a finite number > 0")
        if self.value is not None and not (is_real(self.value) and 0 < self.value < math.inf):
            raise ConfigError(f"value: got {self.value!r}, expected a price > 0, or None for not yet known")

    def start(self, gains: Tensor, least: Tensor, most: Tensor) -> float:
        """The current price; the first time, the gain of the last completion the budget would buy.

        Args: gains, least, most: of :func:`~kalman_rl.sampling.divide.divide`. Raises: what that raises.
        """
        if self.value is None:
            low, high = int(least.sum()), int(most.sum())
            total = min(max(round(self.budget * len(gains)), low, 1), max(high, 1))
            self.value = max(divide(gains, total, least, most).price, 1e-12)
        return self.value

    def update(self, mean: float) -> float:
        """Move the price after a step that took ``mean`` completions per prompt; returns the new price.

        Raises: NumericError for a mean out of range, ConfigError before :meth:`start`.
        """
        if not (is_real(mean) and 0 <= mean < math.inf):
            raise NumericError(f"mean: got {mean!r}, expected completions per prompt >= 0")
        if self.value is None:
            raise ConfigError("price: got an update before the first allocation, expected start() first")
        error = math.log(mean / self.budget) if mean > 0 else -1.0
        self.value = min(max(self.value * math.exp(self.rate * min(max(error, -1.0), 1.0)), 1e-12), 1e12)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        """Budget, rate and price, for :meth:`load_state_dict`."""
        return {"format": 1, "budget": self.budget, "rate": self.rate, "value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over the saved price; budget and rate stay those of this object. Raises: ConfigError."""
        form, value = saved("price state", state, "format", "value")
        if form != 1:
            raise ConfigError(f"price state: got format {form!r}, expected 1")
        Price(self.budget, self.rate, value)  # checks it
        self.value = value
