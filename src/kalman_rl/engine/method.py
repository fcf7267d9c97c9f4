"""The method that a configuration trains with: by name, and the advantage that it puts in the place of the method's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.methods import make_method
from kalman_rl.objectives.advantage.group import batch_leave_one_out, leave_one_out
from kalman_rl.objectives.loss import Method

BASELINES: dict[str, Callable[..., Tensor]] = {
    "leave_one_out": leave_one_out,
    "batch_mean": batch_leave_one_out,
    "james_stein": JamesStein(),
}
"""Advantages without memory that a configuration may put in the place of the method's own."""


def chosen_method(
    name: str, options: Mapping[str, float], advantage: str, belief: str, belief_options: Mapping[str, Any]
) -> Method:
    """The method ``name`` with ``advantage``: "method" for its own, "tracked" for that of ``belief``, or a baseline.

    Raises: ConfigError, NumericError for a name or an option that is none.
    """
    method = make_method(name, **options)
    if advantage == "method":
        return method
    part = Tracked(belief, tuple(belief_options.items())) if advantage == "tracked" else BASELINES[advantage]
    return dataclasses.replace(method, advantage=part)
