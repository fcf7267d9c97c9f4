"""What the recipes share: a method by name, if a loss function called once per micro-batch can carry it out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache

from torch import Tensor

from kalman_rl.methods import make_method
from kalman_rl.objectives import diagnostics
from kalman_rl.objectives.aggregate import Totals
from kalman_rl.objectives.inputs import check_provided
from kalman_rl.objectives.loss import Loss, Method
from kalman_rl.objectives.rollouts import Rollouts

PROVIDED = {"advantage", "aggregate", "logp_behaviour"}
"""What the hosts pass to a loss or compute themselves, as :func:`kalman_rl.objectives.inputs.missing` reads it."""

SUM = Totals(1.0, 1.0)
"""With ``token_mean`` these totals give the plain sum over tokens."""


@lru_cache(maxsize=64)
def named(host: str, name: str, options: tuple[tuple[str, object], ...] = ()) -> Method:
    """A method by name and options, for a host that computes advantages itself. Raises: ConfigError."""
    return checked(host, make_method(name, **dict(options)))  # type: ignore[arg-type]


def checked(host: str, method: Method) -> Method:
    """The method, if log-probabilities, mask and advantages of one micro-batch are all it looks at.

    Raises: ConfigError for methods that choose bounds over a whole optimizer step, learn noises from past steps, or
        look at distributions or hidden states: KalmanGRPOTrainer and the verl plugin do what they need.
    """
    check_provided(method, PROVIDED, host, "take kpo_diffuse, or train with TRL or verl")
    return method


def summed(method: Method, weights: Callable[[Rollouts, Totals], Tensor]) -> Method:
    """The method with the host's own weights of tokens in the place of its aggregation."""
    return dataclasses.replace(method, aggregate=weights)


def metrics_of(loss: Loss, rollouts: Rollouts) -> dict[str, Tensor]:
    """The metrics of a micro-batch, effective sample sizes among them: detached scalars by name."""
    sizes = diagnostics.sample_sizes(loss.tokens.log_ratio, loss.tokens.coefficient, rollouts)
    return loss.metrics | diagnostics.metrics_of(sizes)
