"""What happens at a bound itself, and on which side an advantage of 0 is: as the documents say, ``>`` or ``>=``."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.objectives.correction import Masked, Rejected
from kalman_rl.objectives.ratio import Ratio
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts
from kalman_rl.objectives.trust import (
    MAX_POINTS,
    Balance,
    Band,
    Clip,
    CurvatureMask,
    DivergenceMask,
    Gamma,
    GeometricClip,
    PrefixBudget,
    SoftGate,
    unclipped,
)


def number(value: float) -> Tensor:
    return torch.tensor([[value]], dtype=torch.float64)


TWO, HALF = math.log(2), -math.log(2)
TWICE, HALVED = number(TWO).exp().item(), number(HALF).exp().item()  # 2 and 1/2, as this machine rounds them


def judged(part: Any, log_weight: float, advantage: float, step: LastLayerStep | None = None) -> Any:
    """What a trust region says of one token, certain under the current policy."""
    behaviour = number(-log_weight if log_weight > 0 else 0.0)
    rollouts = Rollouts(behaviour, logp_behaviour=behaviour)
    current = Current(behaviour + log_weight, step=step)
    ratio = Ratio(number(log_weight), number(log_weight))
    return part(ratio, number(advantage), current, rollouts)


def distance(value: float) -> Any:
    return lambda current, rollouts: number(value)


STEP = LastLayerStep(number(1.0), number(1.0), 1.0)  # m_H = A, m_F = 1/2
KEPT: dict[str, tuple[Any, float, float]] = {
    "clip, high": (Clip(0.0, TWICE - 1), TWO, 1.0),
    "clip, low": (Clip(1 - HALVED, 0.0), HALF, -1.0),
    "clip, dual": (Clip(0.0, 0.0, TWICE), TWO, -1.0),
    "band, high": (Band(0.0, TWO), TWO, 1.0),
    "band, low": (Band(TWO, 0.0), HALF, 1.0),
    "geometric clip, high": (GeometricClip(0.0, TWO), TWO, 1.0),
    "geometric clip, low": (GeometricClip(TWO, 0.0), HALF, -1.0),
    "divergence, high": (DivergenceMask(distance(0.5), 0.0, 0.5), TWO, 1.0),
    "divergence, low": (DivergenceMask(distance(0.5), 0.5, 0.0), HALF, -1.0),
    "divergence of a token that has not moved": (DivergenceMask(distance(0.5), 0.0, 0.0), 0.0, -1.0),
    "prefix": (PrefixBudget(1 - HALVED), TWO, 1.0),
}


@pytest.mark.parametrize("case", KEPT)
def test_a_token_at_its_bound_is_kept(case: str) -> None:
    part, log_weight, advantage = KEPT[case]
    assert judged(part, log_weight, advantage).keep.item()


BEYOND = {
    "clip, high": (Clip(0.0, TWICE - 1 - 1e-15), TWO, 1.0),
    "clip, low": (Clip(1 - HALVED - 1e-15, 0.0), HALF, -1.0),
    "clip, dual": (Clip(0.0, 0.0, math.nextafter(TWICE, 0)), TWO, -1.0),
    "band, high": (Band(0.0, math.nextafter(TWO, 0)), TWO, 1.0),
    "band, low": (Band(math.nextafter(TWO, 0), 0.0), HALF, 1.0),
    "geometric clip, high": (GeometricClip(0.0, math.nextafter(TWO, 0)), TWO, 1.0),
    "geometric clip, low": (GeometricClip(math.nextafter(TWO, 0), 0.0), HALF, -1.0),
    "divergence, high": (DivergenceMask(distance(0.5), 1.0, math.nextafter(0.5, 0)), TWO, 1.0),
    "divergence, low": (DivergenceMask(distance(0.5), math.nextafter(0.5, 0), 1.0), HALF, -1.0),
    "divergence without an advantage": (DivergenceMask(distance(0.5), 0.0, 1.0), HALF, 0.0),
    "prefix": (PrefixBudget(1 - HALVED - 1e-15), TWO, 1.0),
}


@pytest.mark.parametrize("case", BEYOND)
def test_a_token_beyond_its_bound_is_not(case: str) -> None:
    part, log_weight, advantage = BEYOND[case]
    assert not judged(part, log_weight, advantage).keep.item()


@pytest.mark.parametrize(
    "part",
    [
        Clip(0.0, 0.0, 1.5),
        GeometricClip(0.0, 0.0),
        PrefixBudget(1e-3),
        DivergenceMask(distance(1.0), 1.0, 0.0),
    ],
    ids=lambda part: type(part).__name__,
)
@pytest.mark.parametrize("log_weight", [TWO, HALF])
def test_without_an_advantage_nothing_is_dropped(part: Any, log_weight: float) -> None:
    assert judged(part, log_weight, 0.0).keep.item()


def test_an_effect_at_its_bound_is_too_much() -> None:
    above = math.nextafter
    for bounds, kept in (
        ((1.0, 1.0), False),
        ((above(1.0, 2), 0.5), False),
        ((above(1.0, 2), above(0.5, 1)), True),
    ):
        for advantage in (1.0, -1.0):
            assert judged(CurvatureMask(*bounds, unclipped), 0.0, advantage, STEP).keep.item() == kept


def test_the_side_of_an_advantage_of_zero() -> None:
    gamma = Gamma(1.0, 1.0, 5.0, 5.0)
    assert judged(gamma, TWO, 0.0).weight == judged(gamma, TWO, 1.0).weight != judged(gamma, TWO, -1.0).weight
    gate = SoftGate(1.0, 3.0)
    assert judged(gate, TWO, 0.0).weight == judged(gate, TWO, -1.0).weight != judged(gate, TWO, 1.0).weight


@pytest.mark.parametrize("gradient", [False, True])
def test_a_weight_at_a_bound_of_the_grid_counts(gradient: bool) -> None:
    part = Balance(low=HALVED, low_end=HALVED, high=TWICE, high_end=TWICE, gradient=gradient)
    for log_weight, advantage, expected in (
        (TWO, 3.0, [3 * TWICE, 0.0]),
        (HALF, -3.0, [0.0, 3 * HALVED]),
        (TWO, 0.0, [0.0, 0.0]),
    ):
        rollouts = Rollouts(number(-1.0))
        ratio = Ratio(number(log_weight), number(log_weight))
        assert part.statistics(ratio, number(advantage), Current(number(0.0)), rollouts).tolist() == expected


@pytest.mark.parametrize("measure, target, met", [("share", 0.25, True), ("share", 0.26, False),
                                                   ("quotient", 0.5, True), ("quotient", 0.51, False)])  # fmt: skip
def test_a_target_that_is_just_met_is_met(measure: Any, target: float, met: bool) -> None:
    part = Balance(target, measure, low=0.5, low_end=0.75, low_step=0.25, high=2.0, high_end=2.0)
    positive = 1.0 if measure == "share" else 1.5
    found = part.fitted(torch.tensor([positive, 3.0, 3.0], dtype=torch.float64))
    assert found.bounds["low"] == (0.5 if met else 0.75)


def test_a_grid_has_fewer_steps_than_its_limit() -> None:
    part = Balance(high=1.0, high_end=1 + (MAX_POINTS - 1) / 8192, high_step=1 / 8192)
    assert len(part.grid("high")) == MAX_POINTS and part.grid("high")[-1] == part.high_end


def test_settings_are_not_rounded_to_float32() -> None:
    power, decay = 0.1, 0.3
    part = Gamma(power, decay, power, decay)
    for advantage in (1.0, -1.0):
        expected = math.exp(decay + power * TWO - decay * 2)
        assert judged(part, TWO, advantage).weight.item() == pytest.approx(expected, rel=1e-14)


def test_corrections_keep_what_lies_at_their_bounds() -> None:
    for log_weight in (TWO, HALF):
        rollouts = Rollouts(number(log_weight), logp_behaviour=number(0.0))
        assert Masked(HALVED, TWICE)(rollouts).item() == number(log_weight).exp().item()
        assert Rejected("k1", "token", high=TWO, low=TWO)(rollouts).item() == 1
        assert (
            Rejected("k1", "token", high=math.nextafter(TWO, 0), low=math.nextafter(TWO, 0))(rollouts).item()
            == 0
        )
