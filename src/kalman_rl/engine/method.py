"""The method that a configuration trains with: by name, with the advantage that it puts in the place of its own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.methods import make_method
from kalman_rl.objectives.advantage.group import batch_leave_one_out, leave_one_out
from kalman_rl.objectives.loss import Method

if TYPE_CHECKING:
    from kalman_rl.engine.config import TrainConfig

BASELINES: dict[str, Callable[..., Tensor]] = {
    "leave_one_out": leave_one_out,
    "batch_mean": batch_leave_one_out,
    "james_stein": JamesStein(),
}
"""Advantages without memory that a configuration may put in the place of the method's own."""


def chosen_method(config: TrainConfig) -> Method:
    """The method of a configuration. Raises: ConfigError, NumericError for a name or an option that is none."""
    method = make_method(config.method, **config.method_options)
    if config.advantage == "method":
        return method
    advantage = Tracked(config.belief) if config.advantage == "tracked" else BASELINES[config.advantage]
    return dataclasses.replace(method, advantage=advantage)
