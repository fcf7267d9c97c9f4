"""Every number that the numeric core takes: the ends of its range are taken or refused as the range says.

A range is written as in the documents: "[0, 1)" takes 0 and the number below 1, and refuses 1 and the number below 0.
A range of whole numbers has dots: "[1 .. 4]".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from kalman_rl.beliefs import BetaBelief, GaussianBelief, RegressionBelief, SPOBelief
from kalman_rl.beliefs.ridge import Ridge
from kalman_rl.beliefs.table import PARTS
from kalman_rl.errors import KalmanRLError
from kalman_rl.numerics import smoother, wiener
from kalman_rl.numerics.feature_filter import KalmanPreferenceTracker
from kalman_rl.numerics.hadamard import SRHT
from kalman_rl.objectives import correction, penalty
from kalman_rl.objectives.advantage import filtered, group, scaled
from kalman_rl.objectives.ratio import learned, robust, token_noise, transforms
from kalman_rl.objectives.trust import (
    balance,
    clip,
    curvature,
    decoupled,
    divergence,
    gamma,
    moment,
    prefix,
    quadratic,
)
from kalman_rl.sampling import coverage, divide, gains, price, priors, rounds, sage, stream
from kalman_rl.sampling.allocate import allocate
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.one_prompt.environment import SimulatedPreferenceEnv
from kalman_rl.sampling.one_prompt.loop import run_adaptive_sampling

PAIR = torch.full((2,), 0.5)
LINE = torch.tensor([[0.0, 1.0, 0.5, 2.0, 1.0, 0.0]])
LEAST, MOST = torch.tensor([1, 1]), torch.tensor([2, 2])


def budget(**options: Any) -> Budget:
    return Budget(**{"allocation": "rounds", "completions_min": 2, "completions_max": 8, **options})


def plan(**options: Any) -> rounds.RoundPlan:
    given = {"step": 0, "total": 4, "n_min": 1, "n_max": 3, **options}
    return rounds.RoundPlan(GaussianBelief(), ["a", "b"], **given)


def drawn(**options: Any) -> stream.PromptStream:
    return stream.PromptStream(GaussianBelief(), **{"pool": ["a", "b", "c"], "count": 1, **options})


def adaptive(**options: Any) -> Any:
    given = {"n_min": 1, "n_max": 3, **options}
    return run_adaptive_sampling(SimulatedPreferenceEnv(dim=2), KalmanPreferenceTracker(2), **given)


def divided(**options: Any) -> Any:
    given = {"step": 0, "total": 4, "n_min": 1, "n_max": 3, **options}
    return allocate(GaussianBelief(), ["a", "b"], **given)


def effect(**options: Any) -> curvature.CurvatureMask:
    return curvature.CurvatureMask(**{"objective": 1.0, "policy": 1.0, "then": clip.unclipped, **options})


def distance(**options: Any) -> divergence.DivergenceMask:
    return divergence.DivergenceMask(
        **{"divergence": divergence.binary_tv, "low": 0.1, "high": 0.1, **options}
    )


def prior(rate: float = 0.5, count: int = 2) -> Any:
    return priors.read_priors(["a"], [{"rate": rate, "count": count}], column="solved")


RANGES: list[tuple[Callable[..., Any], dict[str, str]]] = [
    (KalmanPreferenceTracker, {"dim": "[1 .. ]", "R_val": "(0, inf)", "P_val": "(0, inf)", "Q_val": "[0, inf)",
                               "noise_strength": "(0, inf)"}),
    (lambda gap: KalmanPreferenceTracker(2).predict(gap), {"gap": "[0, inf)"}),
    (lambda **given: SRHT(**{"dimension_in": 5, "dimension_out": 2, **given}),
     {"dimension_in": "[2 .. ]", "dimension_out": "[1 .. 8]", "seed": "[0 .. ]"}),
    (lambda order: smoother.wiener_smoother(LINE, process_noise=1.0, order=order),
     {"order": f"[1 .. {wiener.HIGHEST_ORDER}]"}),
    (filtered.GroupFilter, {"process_noise": "[0, inf)", "observation_noise": "(0, inf)",
                            "initial_variance": "(0, inf)", "epsilon": "[0, inf)"}),
    (filtered.BatchFilter, {"process_noise": "[0, inf)", "observation_noise": "(0, inf)",
                            "initial_variance": "(0, inf)", "adapt": "(0, 1]", "epsilon": "[0, inf)"}),
    (scaled.BatchScaled, {"epsilon": "[0, inf)"}),
    (scaled.NormalizeThenSum, {"epsilon": "[0, inf)"}),
    (group.ConstantBaseline, {"value": "(-inf, inf)"}),
    (transforms.KalmanFiltered, {"process_noise": "[0, inf]", "observation_noise": "(0, inf)",
                                 "initial_variance": "[0, inf]"}),
    (robust.RobustFiltered, {"process_noise": "[0, inf]", "observation_noise": "(0, inf)",
                             "initial_variance": "[0, inf]", "threshold": "(0, inf]", "memory": "[0, 1)",
                             "least": "(0, inf)"}),
    (token_noise.NoiseModel, {"floor": "(0, inf)", "scale": "[0, inf)"}),
    (token_noise.NoiseFiltered, {"floor": "(0, inf)", "scale": "[0, inf)", "process_noise": "[0, inf]",
                                 "initial_variance": "[0, inf]", "memory": "[0, 1)", "least": "(0, inf)"}),
    (learned.AutoFiltered, {"process_noise": "[0, inf]", "observation_noise": "(0, inf)", "memory": "[0, 1)",
                            "least": "(0, inf)"}),
    (clip.Clip, {"low": "[0, inf]", "high": "[0, inf]", "dual": "(1, inf]"}),
    (clip.Cap, {"high": "(0, inf]", "low": "[0, 5]"}),
    (lambda **given: clip.Band(**{"low": 0.1, "high": 0.1, **given}), {"low": "[0, inf]", "high": "[0, inf]"}),
    (clip.GeometricClip, {"low": "[0, inf]", "high": "[0, inf]"}),
    (clip.SoftGate, {"positive": "(0, inf)", "negative": "(0, inf)"}),
    (balance.Balance, {"target": "[0, inf]", "low": "[0, 0.9]", "low_end": "[0.6, 1]", "high": "[1, 3]"}),
    (effect, {"objective": "(0, inf]", "policy": "(0, inf]"}),
    (distance, {"low": "[0, inf]", "high": "[0, inf]", "cap": "(0, inf]"}),
    (gamma.Gamma, {"positive_power": "[0, inf)", "negative_power": "[0, inf)", "positive_decay": "(0, inf)",
                         "negative_decay": "(0, inf)"}),
    (moment.SecondMoment, {"bound": "(0, inf]"}),
    (quadratic.Quadratic, {"bound": "(0, inf]"}),
    (prefix.PrefixBudget, {"bound": "(0, inf]", "rate": "[0, inf]", "least": "(0, 1]"}),
    (lambda cap: decoupled.Decoupled(clip.unclipped, cap), {"cap": "(0, inf]"}),
    (penalty.SquaredLogRatio, {"coefficient": "(0, inf)"}),
    (penalty.KL, {"coefficient": "[0, inf)"}),
    (correction.Truncated, {"cap": "(0, inf]"}),
    (correction.Masked, {"low": "[0, 2]", "high": "[0.5, inf]"}),
    (correction.FilteredTruncated, {"noise_ratio": "[0, inf]", "cap": "(0, inf]"}),
    (correction.Rejected, {"high": "[0, inf]", "low": "[0, inf]"}),
    (BetaBelief, {"forgetting": "(0, 1]"}),
    (lambda a: BetaBelief(prior=(a, 1.0)), {"a": "(0, inf)"}),
    (lambda b: BetaBelief(prior=(1.0, b)), {"b": "(0, inf)"}),
    (GaussianBelief, {"process_noise": "[0, inf)", "observation_noise": "(0, inf)", "mean": "(-inf, inf)",
                      "variance": "[0, inf]"}),
    (lambda step: GaussianBelief().predict(["a"], step=step), {"step": f"[0 .. {2**63 // PARTS - 1}]"}),
    (lambda part: GaussianBelief().update(["a"], PAIR[:1], step=1, part=part), {"part": f"[0 .. {PARTS - 1}]"}),
    (lambda q: RegressionBelief(process_noise=[q, 1.0]), {"q": "[0, inf)"}),
    (lambda v: RegressionBelief(prior_variance=[v, 1.0]), {"v": "(0, inf)"}),
    (RegressionBelief, {"forgetting": "(0, 1]", "dimension": "[1 .. ]", "seed": "[0 .. ]"}),
    (Ridge, {"forgetting": "(0, 1]"}),
    (SPOBelief, {"rho": "(0, 1]", "half": "(0, inf]", "low": "(0, 0.96]", "high": "[0.875, 1]"}),
    (lambda **given: coverage.Coverage(**{"every": 3, **given}), {"every": "[1 .. ]", "share": "(0, 1]"}),
    (prior, {"rate": "[0, 1]", "count": f"[1 .. {priors.MOST}]"}),
    (lambda k: gains.mixed_group_gain(1.0, 1.0, 0, 0, k=k), {"k": "[1 .. ]"}),
    (plan, {"total": "[2 .. 6]", "max_rounds": "[1 .. ]"}),
    (drawn, {"count": "[1 .. 3]", "most": "[1 .. ]", "seed": "[0 .. ]", "floor": "(0, 1]", "power": "[0, inf)"}),
    (lambda count: stream.mean_draws(PAIR, count, 2), {"count": "[1 .. 4]"}),
    (lambda count: stream.some_of(5, count, torch.Generator()), {"count": "[0 .. ]"}),
    (adaptive, {"threshold": "(0, inf)", "n_min": "[1 .. 3]", "n_max": "[1 .. ]"}),
    (SimulatedPreferenceEnv, {"success": "[0, 1]", "noise": "[0, inf)", "missing": "[0, 1)", "dim": "[1 .. ]",
                              "seed": f"[{-(2**63)} .. {2**64 - 1}]"}),
    (lambda k: SimulatedPreferenceEnv().sample(k), {"k": "[0 .. ]"}),
    (lambda noise: read_signal(GaussianBelief(), ["a"], step=1, reward_noise_variance=noise), {"noise": "[0, inf)"}),
    (budget, {"completions_min": "[0 .. 8]", "completions_max": "[2 .. 4096]", "max_rounds": "[1 .. ]",
              "coverage_steps": "[1 .. ]", "reward_noise_variance": "[0, inf)", "budget": "[2, 8]"}),
    (lambda k: budget(rounds=(k,)), {"k": "[1 .. ]"}),
    (lambda **given: price.Price(**{"budget": 4.0, **given}),
     {"budget": "(0, inf)", "rate": "(0, inf)", "value": "(0, inf)", "balance": "(-inf, inf)", "steps": "[0 .. ]"}),
    (lambda **given: price.Price(4.0, value=0.1).update(**{"mean": 3.0, "prompts": 2, **given}),
     {"mean": "[0, inf)", "prompts": "[1 .. ]"}),
    (lambda damping: sage.log_score(PAIR, damping), {"damping": "[0, inf)"}),
    (lambda **given: sage.score(PAIR, **given), {"limit": "[0, inf]", "penalty": "[0, inf)"}),
    (divided, {"n_min": "[0 .. 2]", "n_max": "[2 .. ]", "total": "[2 .. 6]"}),
    (lambda n_max: divide.gradient_gains(PAIR, n_max), {"n_max": "[1 .. ]"}),
    (lambda total: divide.divide(torch.rand(2, 2), total, LEAST, MOST), {"total": "[2 .. 4]"}),
    (lambda price: divide.divide_at_price(torch.rand(2, 2), price, LEAST, MOST), {"price": "[0, inf)"}),
]  # fmt: skip
WORDED = "(?s)^(?!None).+: got .+, expected (?!.*(?<!or )None\\Z)."
"""What every error says: the argument, what came, what would have been right."""

CASES = [(make, name, text) for make, named in RANGES for name, text in named.items()]


def ends(text: str) -> tuple[list[float], list[float]]:
    """Values at the ends that a range takes, and those that it refuses.

    >>> ends("[1 .. ]"), ends("[1 .. 4]")
    (([1], [0]), ([1, 4], [0, 5]))
    >>> ends("[0, 1)")
    ([0.0, 0.9999999999999999], [-5e-324, 1.0, nan])
    >>> ends("[0, inf]")
    ([0.0, inf], [-5e-324, nan])
    """
    if ".." in text:
        low, high = (part.strip() for part in text[1:-1].split(".."))
        upper = ([int(high)], [int(high) + 1]) if high else ([], [])
        return [int(low), *upper[0]], [int(low) - 1, *upper[1]]
    taken, refused = [], []
    for part, sign, closed in zip(text[1:-1].split(","), (-1, 1), (text[0] == "[", text[-1] == "]")):
        end = float(part)
        (taken if closed else refused).append(end)
        other = math.nextafter(end, sign * math.inf if closed else -sign * math.inf)
        if other != end:
            (refused if closed else taken).append(other)
    return taken, [*refused, math.nan]


@pytest.mark.parametrize(
    ("make", "name", "text"), CASES, ids=[f"{n}-{i}" for i, (_, n, _) in enumerate(CASES)]
)
def test_the_ends_of_a_range(make: Callable[..., Any], name: str, text: str) -> None:
    taken, refused = ends(text)
    for value in taken:
        make(**{name: value})
    for value in refused:
        with pytest.raises(KalmanRLError, match=WORDED):
            make(**{name: value})
