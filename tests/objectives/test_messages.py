"""What a refusal says, word for word: the argument, the place of the first bad number, what is expected, who asks."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kalman_rl.errors import KalmanRLError
from kalman_rl.methods import make_method
from kalman_rl.objectives import advantage, ratio
from kalman_rl.objectives.correction import Rejected, mismatch
from kalman_rl.objectives.inputs import INPUTS, required
from kalman_rl.objectives.loss import policy_loss
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts
from kalman_rl.objectives.trust import MAX_POINTS, Balance, Clip, CurvatureMask, top_k_kl

MASK = torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
MINUS, ONES = torch.full((2, 3), -1.0), torch.ones(2)
BARE = Rollouts(MINUS, MASK)


def numbers(*bad: float, fill: float = 0.0) -> Tensor:
    """(2, 3) numbers of which the last trained ones, from row 1, token 1, are bad; what is not trained is worse."""
    values = torch.where(MASK, fill, -math.inf)
    values[1, 1 : 1 + len(bad)] = torch.tensor(bad)
    return values


def loss(name: str, logp: Tensor | Current = MINUS, rollouts: Rollouts = BARE, **given: Any) -> Any:
    return policy_loss(make_method(name), rollouts, logp, **given)


PLACES: dict[str, tuple[Callable[[], Any], str]] = {
    "advantage": (
        lambda: loss("grpo", advantage=numbers(math.nan, math.nan)),
        "advantage: got nan at row 1, token 1 (2 such tokens), expected finite numbers where the mask is True; "
        "0 skips a token",
    ),
    "logp": (
        lambda: loss("grpo", numbers(math.inf, 0.0, fill=-1.0), advantage=ONES),
        "logp: got inf at row 1, token 1 (1 such tokens), expected finite log-probabilities where the mask is True; "
        "mask the token out, or look for a token that the policy gives probability 0",
    ),
    "lag": (
        lambda: Rollouts(MINUS, MASK, lag=numbers(-1.0, -2.0)),
        "lag: got -1.0 at row 1, token 1, expected optimizer steps >= 0 since the token was sampled, where the mask "
        "is True",
    ),
    "lag NaN": (
        lambda: Rollouts(MINUS, MASK, lag=numbers(math.nan)),
        "lag: got nan at row 1, token 1 (1 such tokens), expected optimizer steps >= 0 since the token was sampled, "
        "where the mask is True",
    ),
    "sum_pi_squared": (
        lambda: Rollouts(MINUS, MASK, sum_pi_squared=numbers(2.0, -1.0)),
        "sum_pi_squared: got 2.0 at row 1, token 1 (2 such tokens), expected a sum of squared probabilities, 0 to 1, "
        "where the mask is True",
    ),
    "sum_pi_squared NaN": (
        lambda: Rollouts(MINUS, MASK, sum_pi_squared=numbers(math.nan)),
        "sum_pi_squared: got nan at row 1, token 1 (1 such tokens), expected a sum of squared probabilities, 0 to 1, "
        "where the mask is True",
    ),
    "calibrate": (
        lambda: ratio.calibrate(numbers(math.nan), MINUS, MASK),
        "log_ratio: got nan at row 1, token 1 (1 such tokens), expected finite log-ratios where the mask is True",
    ),
    "calibrate's p": (
        lambda: ratio.calibrate(MINUS, numbers(math.nan), MASK),
        "logp_old: got nan at row 1, token 1 (1 such tokens), expected finite log-probabilities where the mask is "
        "True; mask the token out, or look for a token that the policy gives probability 0",
    ),
}
SEEN = Rollouts(MINUS, MASK, logp_behaviour=MINUS)
ASKED: dict[str, tuple[Callable[[], Any], str, str]] = {
    "behaviour": (lambda: ratio.BehaviourToken()(MINUS, BARE), "logp_behaviour", "a ratio to the behaviour policy"),
    "lagged": (lambda: ratio.Lagged()(MINUS, SEEN), "lag", "a ratio to a policy between two versions"),
    "correction": (lambda: mismatch(BARE, "token"), "logp_behaviour", "an importance correction"),
    "old top": (lambda: top_k_kl(Current(MINUS), SEEN), "top_behaviour", "a top-k divergence"),
    "top": (
        lambda: top_k_kl(Current(MINUS), Rollouts(MINUS, MASK, top_behaviour=MINUS[..., None])),
        "top_logp",
        "a top-k divergence",
    ),
    "step": (
        lambda: CurvatureMask(1.0, 1.0, Clip())(ratio.token(MINUS, BARE), MINUS, Current(MINUS), BARE),
        "step",
        "the curvature mask (CAPO)",
    ),
    "reward": (lambda: loss("rloo"), "reward", "rloo"),
    "group": (lambda: loss("rloo", rollouts=Rollouts(MINUS, MASK, reward=ONES)), "group", "rloo"),
    "extra": (
        lambda: loss("otb", rollouts=Rollouts(MINUS, MASK, reward=ONES, group=ONES.long())),
        "score_norm_squared",
        "otb",
    ),
}  # fmt: skip
TYPES: dict[str, tuple[Callable[[], Any], str]] = {
    "method": (lambda: policy_loss("grpo", BARE, MINUS), "method: got str, expected a Method"),  # type: ignore[arg-type]
    "rollouts": (lambda: loss("grpo", rollouts=MINUS), "rollouts: got Tensor, expected a Rollouts"),  # type: ignore[arg-type]
    "logp's type": (
        lambda: loss("grpo", [[-1.0]]),  # type: ignore[arg-type]
        "logp: got list, expected a tensor (B, T), or a Current",
    ),
    "advantage's type": (
        lambda: loss("grpo", advantage=[1.0, 1.0]),
        "advantage: got list, expected a tensor (B,) or (B, T)",
    ),
}
WITH_STEP = Current(MINUS, step=LastLayerStep(MINUS, MINUS[:1], 1.0))
RANGES: dict[str, tuple[Callable[[], Any], str]] = {
    "filter's Q": (
        lambda: ratio.KalmanFiltered(-1.0),
        "process_noise: got -1.0, expected 0 <= value <= inf (a variance, in nats^2)",
    ),
    "filter's P0": (
        lambda: ratio.KalmanFiltered(initial_variance=-1.0),
        "initial_variance: got -1.0, expected 0 <= value <= inf (a variance, in nats^2)",
    ),
    "filter's R": (
        lambda: ratio.KalmanFiltered(observation_noise=0.0),
        "observation_noise: got 0.0, expected 0 < R < inf (a variance, in nats^2)",
    ),
    "low of a grid": (
        lambda: Balance(low=-0.5),
        "low, low_end: got -0.5, 0.9, step 0.02, expected 0 <= low <= low_end <= 1 and a finite step > 0 with fewer "
        "than 10000 steps in between",
    ),
    "high of a grid": (
        lambda: Balance(high=0.5),
        "high, high_end: got 0.5, 3.0, step 0.05, expected 1 <= high <= high_end < inf and a finite step > 0 with "
        "fewer than 10000 steps in between",
    ),
    "end of a grid": (
        lambda: Balance(high_end=math.inf),
        "high, high_end: got 1.2, inf, step 0.05, expected 1 <= high <= high_end < inf and a finite step > 0 with "
        "fewer than 10000 steps in between",
    ),
    "steps of a grid": (
        lambda: Balance(high=1.0, high_end=1 + MAX_POINTS / 8192, high_step=1 / 8192),
        f"high, high_end: got 1.0, {1 + MAX_POINTS / 8192}, step {1 / 8192}, expected 1 <= high <= high_end < inf and "
        "a finite step > 0 with fewer than 10000 steps in between",
    ),
    "statistic": (lambda: Rejected("k4"), "statistic: got 'k4', expected one of k1, k2, k3"),  # type: ignore[arg-type]
    "over": (lambda: Rejected(over="row"), "over: got 'row', expected one of token, sum, mean, max"),  # type: ignore[arg-type]
    "step's shapes": (
        lambda: CurvatureMask(1.0, 1.0, Clip())(ratio.token(MINUS, BARE), MINUS, WITH_STEP, BARE),
        "step: got shapes (2, 3), (1, 3), expected (2, 3) like the mask",
    ),
    "token baseline's shapes": (
        lambda: advantage.OptimalTokenBaseline()(ONES, ONES, score_norm_squared=MINUS[:1], mask=MASK),
        "score_norm_squared, mask: got shapes (1, 3), (2, 3), expected (2, T) both",
    ),
    "nobody in particular": (
        lambda: required("lag", None),
        f"lag: got None for this method, expected {INPUTS['lag']}",
    ),
}
VARIANCE = "expected a finite variance"
SETTINGS: dict[str, tuple[Callable[[], Any], str]] = {
    f"{kind.__name__} {name}": (lambda kind=kind, name=name: kind(**{name: -1.0}), f"{name}: got -1.0, {text}")
    for kind, named in {
        advantage.GroupFilter: {"process_noise": f"{VARIANCE} >= 0", "observation_noise": f"{VARIANCE} > 0",
                                "initial_variance": f"{VARIANCE} > 0", "epsilon": "expected a finite number >= 0"},
        advantage.BatchFilter: {"process_noise": f"{VARIANCE} >= 0", "observation_noise": f"{VARIANCE} > 0",
                                "initial_variance": f"{VARIANCE} > 0", "epsilon": "expected a finite number >= 0",
                                "adapt": "expected a number in (0, 1]"},
    }.items()
    for name, text in named.items()
}  # fmt: skip
SAID = (
    PLACES
    | TYPES
    | RANGES
    | SETTINGS
    | {
        f"asks {name}": (call, f"{asked}: got None for {who}, expected {INPUTS[asked]}")
        for name, (call, asked, who) in ASKED.items()
    }
)


@pytest.mark.parametrize("case", SAID)
def test_it_is_said(case: str) -> None:
    call, message = SAID[case]
    with pytest.raises(KalmanRLError) as caught:
        call()
    assert str(caught.value) == message
