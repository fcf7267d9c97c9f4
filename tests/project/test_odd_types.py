"""Every numeric entry point, every argument, values of another kind: the answer, or an error of ours that names it."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kalman_rl.beliefs import BetaBelief, GaussianBelief, RegressionBelief, SPOBelief
from kalman_rl.errors import KalmanRLError, NumericError, ShapeError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.numerics import kalman
from kalman_rl.numerics.feature_filter import KalmanPreferenceTracker
from kalman_rl.numerics.hadamard import SRHT, hadamard_transform
from kalman_rl.objectives.advantage import group as advantages
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.sampling import divide, gains, sage, stream
from kalman_rl.sampling.allocate import allocate
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.one_prompt.environment import SimulatedPreferenceEnv
from kalman_rl.sampling.one_prompt.loop import run_adaptive_sampling
from kalman_rl.sampling.price import Price
from kalman_rl.sampling.rounds import RoundPlan

tensor = torch.tensor
HUGE = 10**400
UNWRITABLE = 10**5000
"""Python refuses to write it out."""
ODD: dict[str, Any] = {
    "text": "text",
    "digit": "1",
    "surrogate": "\ud800",
    "bytes": b"1",
    "none": None,
    "huge": HUGE,
    "minus huge": -HUGE,
    "unwritable": UNWRITABLE,
    "beyond int64": 2**70,
    "tiny": 5e-324,
    "nan": math.nan,
    "inf": math.inf,
    "true": True,
    "minus": -1,
    "half": 1.5,
    "complex": 1j,
    "object": object(),
    "type": float,
    "nothing": [],
    "mixed": [1.0, "x"],
    "unwritable in a list": [UNWRITABLE],
    "dictionary": {"a": UNWRITABLE},
    "scalar tensor": tensor(1.0, dtype=torch.float16),
    "whole tensor": tensor([1, 2]),
    "complex tensor": tensor([1j]),
    "matrix": tensor([[1.0]]),
    "nan tensor": tensor([math.nan]),
    "empty tensor": torch.zeros(0),
}
IDS, REWARD, GROUP = ["a", "a", "b"], tensor([1.0, 0.0, 1.0]), tensor([0, 0, 1])
PAIR, GAINS, LEAST, MOST = torch.ones(2), torch.rand(2, 4), tensor([1, 1]), tensor([4, 4])
LOGP, SEEN = -torch.ones(3, 2), torch.ones(3, 2, dtype=torch.bool)
FILTER = {
    "observation": tensor([[1.0, 2.0]]),
    "mask": torch.ones(1, 2, dtype=torch.bool),
    "process_noise": 0.1,
    "observation_noise": 1.0,
    "initial_mean": 0.0,
    "initial_variance": 1.0,
    "segment": torch.zeros(1, 2, dtype=torch.long),
}
Call = tuple[Callable[..., Any], dict[str, Any]]


def defaults(call: Callable[..., Any]) -> dict[str, Any]:
    """Arguments that can be left out."""
    found = inspect.signature(call).parameters.items()
    return {name: one.default for name, one in found if one.default is not inspect.Parameter.empty}


def fresh(make: Callable[[], Any], name: str) -> Callable[..., Any]:
    """A method of an object that no earlier call has changed."""
    return lambda **given: getattr(make(), name)(**given)


def rollouts() -> Rollouts:
    return Rollouts(LOGP, SEEN, reward=REWARD, group=GROUP)


def visited() -> Coverage:
    coverage = Coverage(3)
    coverage.visit(["a"], step=1)
    return coverage


BETA = {"a": PAIR, "b": PAIR}
COUNTS = {"a": 1.0, "b": 1.0, "successes": 0, "failures": 1, "k": 2}
BELIEFS = (GaussianBelief, BetaBelief, SPOBelief, RegressionBelief)
CALLS: dict[str, Call] = {
    "causal_filter": (kalman.causal_filter, FILTER),
    "causal_mean": (kalman.causal_mean, FILTER),
    "causal_filter_loop": (kalman.causal_filter_loop, FILTER),
    "hadamard": (hadamard_transform, {"x": torch.ones(4)}),
    "SRHT": (SRHT, {"dimension_in": 3, "dimension_out": 2, "seed": 0}),
    "project": (lambda x: SRHT(3, 2)(x), {"x": torch.ones(2, 3)}),
    "tracker": (KalmanPreferenceTracker, {**defaults(KalmanPreferenceTracker), "dim": 2}),
    "tracker.predict": (fresh(lambda: KalmanPreferenceTracker(2), "predict"), {"gap": 1.0}),
    "tracker.update": (
        fresh(lambda: KalmanPreferenceTracker(2), "update"),
        {"phi": torch.ones(2, 2), "y": PAIR, "mask": PAIR.bool()},
    ),
    "tracker.value": (fresh(lambda: KalmanPreferenceTracker(2), "value"), {"phi": torch.ones(2, 2)}),
    **{kind.__name__: (kind, defaults(kind)) for kind in BELIEFS},
    **{
        f"{kind.__name__}.update": (fresh(kind, "update"), {"ids": IDS, "reward": REWARD, "step": 0})
        for kind in BELIEFS
    },
    **{f"{kind.__name__}.predict": (fresh(kind, "predict"), {"ids": IDS, "step": 1}) for kind in BELIEFS},
    "start": (fresh(SPOBelief, "start"), {"ids": ["a"], "successes": [1], "trials": [2]}),
    "Rollouts": (
        Rollouts,
        {
            "logp_old": LOGP,
            "mask": SEEN,
            "reward": REWARD,
            "group": GROUP,
            "logp_behaviour": LOGP,
            "segment": None,
        },
    ),
    "policy_loss": (
        policy_loss,
        {"method": make_method("kpo"), "rollouts": rollouts(), "logp": LOGP, "advantage": REWARD},
    ),
    "policy_loss of rewards": (
        policy_loss,
        {"method": make_method("grpo"), "rollouts": rollouts(), "logp": LOGP},
    ),
    **{
        f"make_method {name}": (
            lambda _name=name, **options: make_method(_name, **options),
            defaults(make),
        )
        for name, make in METHODS.items()
    },
    **{
        f"advantages {name}": (part, {"reward": REWARD, "group": GROUP})
        for name, part in vars(advantages).items()
        if inspect.isfunction(part) and list(inspect.signature(part).parameters) == ["reward", "group"]
    },
    "allocate": (
        allocate,
        {"belief": GaussianBelief(), "ids": ["a", "b"], "step": 1, "total": 4, "n_min": 1, "n_max": 4},
    ),
    "Budget": (Budget, defaults(Budget)),
    "Coverage": (Coverage, {"every": 3, "share": 0.5}),
    "coverage.visit": (fresh(visited, "visit"), {"ids": ["a"], "step": 1}),
    "coverage.due": (fresh(visited, "due"), {"ids": ["a"], "step": 1, "limit": 2}),
    "Price": (Price, {**defaults(Price), "budget": 4.0, "value": 0.1}),
    "price.update": (fresh(lambda: Price(4.0, value=0.1), "update"), {"mean": 3.0, "prompts": 2}),
    "divide": (divide.divide, {"gains": GAINS, "total": 4, "least": LEAST, "most": MOST}),
    "divide_at_price": (divide.divide_at_price, {"gains": GAINS, "price": 0.1, "least": LEAST, "most": MOST}),
    "gradient_gains": (divide.gradient_gains, {"signal": PAIR, "n_max": 3}),
    "mixed_group_gains": (divide.mixed_group_gains, {**BETA, "n_max": 3}),
    "beta_signal": (gains.beta_signal, BETA),
    "noisy_signal": (gains.noisy_signal, {"reward_variance": PAIR, "noise_variance": 0.1}),
    "gradient_gain": (gains.gradient_gain, {"signal": PAIR, "n": PAIR, "k": 1}),
    "mixed_group_gain": (gains.mixed_group_gain, COUNTS),
    "remaining_mixed_group_gains": (gains.remaining_mixed_group_gains, COUNTS),
    "success_margin": (sage.success_margin, {"mean": PAIR / 2}),
    "log_score": (sage.log_score, {"margin": PAIR, "damping": 0.1}),
    "score": (sage.score, {**defaults(sage.score), "margin": PAIR, "variance": PAIR}),
    "PromptStream": (
        lambda **given: stream.PromptStream(GaussianBelief(), **given),
        {**defaults(stream.PromptStream), "pool": ["a", "b"], "count": 1},
    ),
    "some_of": (
        lambda **given: stream.some_of(**given, generator=torch.Generator()),
        {"size": 5, "count": 2},
    ),
    "mean_draws": (stream.mean_draws, {"share": PAIR, "count": 2, "most": 1}),
    "RoundPlan": (
        lambda **given: RoundPlan(GaussianBelief(), **given),
        {
            "ids": ["a", "b"],
            "step": 0,
            "total": 8,
            "max_rounds": 3,
            "n_min": 2,
            "n_max": 32,
            "rounds": (2, 4),
        },
    ),
    "environment": (SimulatedPreferenceEnv, defaults(SimulatedPreferenceEnv)),
    "sample": (fresh(SimulatedPreferenceEnv, "sample"), {"k": 2}),
    "adaptive": (
        lambda **given: run_adaptive_sampling(SimulatedPreferenceEnv(), KalmanPreferenceTracker(2), **given),
        defaults(run_adaptive_sampling),
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_another_kind(name: str) -> None:
    call, given = CALLS[name]
    call(**given)
    wrong = []
    for argument in given:
        for kind, value in ODD.items():
            try:
                call(**{**given, argument: value})
            except KalmanRLError as error:
                if len(str(error)) > 2000:
                    wrong.append(f"{argument}, {kind}: an error of {len(str(error))} characters")
            except Exception as error:
                wrong.append(f"{argument}, {kind}: {type(error).__name__}: {error}"[:200])
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("call", [kalman.causal_filter, kalman.causal_mean, kalman.causal_filter_loop])
@pytest.mark.parametrize(
    ("argument", "value", "kind", "words"),
    [
        ("process_noise", "0.1", NumericError, "process_noise: got '0.1', expected a number or a tensor"),
        (
            "observation_noise",
            HUGE,
            NumericError,
            "observation_noise: got 1000.*, expected a number or a tensor",
        ),
        ("observation_noise", None, NumericError, "observation_noise: got None"),
        ("initial_mean", [1.0], NumericError, r"initial_mean: got \[1.0\], expected a number"),
        ("initial_variance", "inf", NumericError, "initial_variance: got 'inf'"),
        ("observation", [[1.0, 2.0]], ShapeError, "observation: got list, expected a tensor"),
        ("mask", [[True, True]], ShapeError, "mask: got list"),
        ("segment", [[0, 0]], ShapeError, "segment: got list"),
    ],
)
def test_odd_arguments_of_the_filter(
    call: Callable[..., Any], argument: str, value: Any, kind: type[KalmanRLError], words: str
) -> None:
    with pytest.raises(kind, match=words):
        call(**{**FILTER, argument: value})


def test_whole_numbers_of_the_filter_are_its_numbers() -> None:
    whole = kalman.causal_mean(
        **{**FILTER, "process_noise": 2**70, "initial_mean": 2**70, "initial_variance": 1}
    )
    real = kalman.causal_mean(**{**FILTER, "process_noise": 2.0**70, "initial_mean": 2.0**70})
    assert torch.equal(whole, real)
