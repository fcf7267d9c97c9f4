"""Solve rates from before training: what is read, what the belief makes of them, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from kalman_rl.beliefs import make_belief
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.errors import ConfigError
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.priors import SolveRate, absorb_priors, absorb_rewards, read_priors
from kalman_rl.sampling.tracking import Tracking


def test_a_prior_is_the_completions_it_stands_for() -> None:
    """Laplace's rule; 0.3 of 8 is 2 completions. Training begins at step 1."""
    tracking = Tracking(BetaBelief(forgetting=1.0, prior=(1.0, 1.0)), Budget())
    absorb_priors(tracking, read_priors("abc", [{"rate": 0.3, "count": 8}, {"rate": 1, "count": 2}, None]))
    value = tracking.belief.predict(["a", "b", "c"], step=1)
    assert value.mean.tolist() == pytest.approx([3 / 10, 3 / 4, 1 / 2])
    assert tracking.tick(0) == 1 and tracking.tick(4) == 4
    fresh = Tracking(BetaBelief(), Budget())
    absorb_priors(fresh, {})
    assert fresh.tick(0) == 0


def test_measured_rewards_may_be_any_numbers_and_missing() -> None:
    """More prompts than are absorbed at a time, so in two parts."""
    belief = make_belief("auto")
    tracking = Tracking(belief, Budget())
    absorb_rewards(tracking, {i: [float(i % 7), math.nan, float(i % 7) + 1] for i in range(5000)})
    mean = belief.predict([0, 4, 4999], step=1).mean
    assert mean.tolist() == pytest.approx([0.5, 4.5, 1.5], abs=0.4)
    assert belief.reward_noise.binary is False and len(belief) == 5000


@pytest.mark.parametrize(
    "value",
    [
        {"rate": 1.1, "count": 8},
        {"rate": -0.1, "count": 8},
        {"rate": math.nan, "count": 8},
        {"rate": 0.5},
        {"rate": 0.5, "count": None},
        {"rate": 0.5, "count": 0},
        {"rate": 0.5, "count": 2.5},
        {"rate": 0.5, "count": 5000},
        {"count": 8},
        0.5,
        "0.5",
        True,
    ],
)
def test_what_is_no_solve_rate_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read_priors(["a", "b"], [{"rate": 0.5, "count": 8}, value], "solved")
    text = str(caught.value)
    assert (
        text.startswith("solved: got ") and "for prompt 'b', expected a rate in [0, 1] and the count" in text
    )


def test_a_rate_of_zero_or_one_is_legal() -> None:
    assert read_priors(["a"], [{"rate": 0, "count": 1}]) == {"a": SolveRate(0.0, 1)}
