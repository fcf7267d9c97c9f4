"""Settings of a budget: which go together, how many candidates there are, and that all of them are handed on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kalman_rl.beliefs import BetaBelief, GaussianBelief
from kalman_rl.errors import ConfigError
from kalman_rl.sampling.budget import Budget, check_belief_only, check_prior
from kalman_rl.sampling.rounds import RoundPlan
from kalman_rl.sampling.stream import PromptStream
from kalman_rl.sampling.tracking import Tracking

CHOICE = {"allocation": "rounds", "candidates": 6}
REFUSED: dict[str, Callable[[], Any]] = {
    "select: got 'stream' with allocation": lambda: Budget(select="stream", allocation="rounds"),
    "candidates: got 4 with select": lambda: Budget(select="stream", candidates=4),
    "candidates: got 0, expected a number": lambda: Budget(allocation="rounds", candidates=0),
    "candidates: got 4 with allocation='fixed'": lambda: Budget(candidates=4),
    "completions_min: got 1 with candidates=6": lambda: Budget(**CHOICE, completions_min=1),
    "budget: got 4.0 with allocation='fixed'": lambda: Budget(budget=4.0),
    "candidates: got 6, expected at least 7": lambda: Budget(**CHOICE).chooses_among(7, 28),
    "candidates: got 6, expected at most 5": lambda: Budget(**CHOICE).chooses_among(4, 16, pool=5),
    "select: got 'sage' .* because only a belief": lambda: check_belief_only(
        SimpleNamespace(select="sage"), False, "without one", "take one"
    ),
    "prior_column, measure_prior: got 'solved' and 4": lambda: check_prior("solved", 4, False),
    "prompt_features: got True with solve rates": lambda: check_prior("solved", 0, True),
    "prompt_features: got True with": lambda: check_prior(None, 4, True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_settings_that_contradict_each_other(message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        REFUSED[message]()


def test_settings_that_go_together() -> None:
    check_belief_only(SimpleNamespace(select="sage"), True, "", "")
    check_belief_only(SimpleNamespace(select="passes", measure_prior=0), False, "", "")
    for given in (("solved", 0, False), (None, 4, False), (None, 0, True)):
        check_prior(*given)


@pytest.mark.parametrize(
    ("options", "pool", "among"),
    [
        ({}, None, 4),  # fixed: the prompts of the batch
        ({"allocation": "rounds", "completions_min": 1}, None, 4),
        ({"allocation": "rounds"}, None, 16),  # as many as the batch has completions
        ({"allocation": "rounds"}, 9, 9),  # or as the dataset has prompts
        ({"allocation": "rounds"}, 3, 4),
        (CHOICE, None, 6),
        (CHOICE, 6, 6),
    ],
)
def test_how_many_prompts_a_batch_is_chosen_among(
    options: dict[str, Any], pool: int | None, among: int
) -> None:
    assert Budget(**options).chooses_among(4, 16, pool) == among


def plain(made: object) -> dict[str, Any]:
    """What an object was built with, as far as it is plain."""
    return {
        name: value
        for name, value in vars(made).items()
        if isinstance(value, int | float | str | tuple | list)
    }


STREAMS: list[dict[str, Any]] = [
    {"score": "sage", "floor": 0.3, "power": 2.0, "weights": "unbiased", "reward_range": "unit"},
    {"score": "stream", "floor": 0.2, "power": 0.5, "weights": "equal", "reward_range": "real"},
]


@pytest.mark.parametrize("given", STREAMS, ids=lambda given: given["score"])
def test_a_stream_has_the_settings_of_its_budget(given: dict[str, Any]) -> None:
    belief, names, noise = GaussianBelief(), ["a", "b", "c", "d", "e"], 0.25
    tracking = Tracking(
        belief,
        Budget(
            select=given["score"],
            select_floor=given["floor"],
            select_power=given["power"],
            select_weights=given["weights"],
            reward_range=given["reward_range"],
            reward_noise_variance=noise,
            completions_max=9,
        ),
    )
    tracking.open_stream(names, 3, group=4, seed=5)
    made = PromptStream(belief, names, 3, most=2, seed=5, reward_noise_variance=noise, **given)
    assert plain(tracking.stream) == plain(made)
    drawn, wanted = tracking.stream.draw(step=0), made.draw(step=0)
    assert torch.equal(drawn.place, wanted.place) and torch.equal(drawn.weight, wanted.weight)


@pytest.mark.parametrize("allocation", ["rounds", "predictive"])
def test_a_plan_has_the_settings_of_its_budget(allocation: str) -> None:
    belief, in_rounds = BetaBelief(), allocation == "rounds"
    budget = Budget(
        allocation=allocation,
        aim="mixed_groups",
        rounds=(1, 3),
        max_rounds=3,
        completions_min=1,
        completions_max=5,
    )
    tracking = Tracking(belief, budget)
    made = RoundPlan(
        belief,
        ["a", "b"],
        step=2,
        total=7,
        rounds=(1, 3),
        max_rounds=3 if in_rounds else None,
        n_min=1,
        n_max=5,
        aim="mixed_groups",
        weighting="tau" if in_rounds else "equal",
        coverage=tracking.coverage,
    )
    assert plain(tracking.plan(["a", "b"], step=2, total=7)) == plain(made)
    assert tracking.expected_counts(["a", "b"], step=2, total=7) == {"a": 4, "b": 3}


def test_a_plan_made_before_sampling_says_so() -> None:
    plan = RoundPlan(BetaBelief(), ["a", "b", "c"], step=0, total=2, weighting="equal", n_min=0, n_max=1)
    told = [name for name, count in plan.next_round() or [] for _ in range(count)]
    plan.tell(told, torch.ones(2))
    assert plan.next_round() is None
    reasons = dict(zip(["a", "b", "c"], plan.result().stop_reason))
    assert reasons == {name: "planned" if name in told else "skipped" for name in reasons}


def test_the_budget_among_the_settings_of_a_host() -> None:
    settings = SimpleNamespace(allocation="rounds", rounds=[1, 3], budget=4.0, learning_rate=1e-6)
    assert Budget.of(settings) == Budget(allocation="rounds", rounds=(1, 3), budget=4.0)
