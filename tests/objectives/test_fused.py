"""The numbers that a fused pass is given are those of the method's parts, and what it does not know it leaves alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest

from kalman_rl.kernels import jit
from kalman_rl.kernels.loss import plan
from kalman_rl.objectives import aggregate, ratio, trust
from kalman_rl.objectives.fused import plan_of
from kalman_rl.objectives.loss import Method, policy_loss
from tests.oracles.batches import CASES, make_batch

PLAIN = (ratio.token, trust.unclipped, aggregate.token_mean)
PLANS: dict[str, tuple[int, Any, dict[str, float]]] = {
    "token": (0, ratio.token, {"ratio": plan.TOKEN}),
    "one": (0, ratio.one, {"ratio": plan.ONE}),
    "sequence": (0, ratio.sequence_mean, {"ratio": plan.SEQUENCE}),
    "filtered": (
        0,
        ratio.KalmanFiltered(0.5, 0.25, 2.0),
        {"ratio": plan.FILTERED, "process": 2.0, "start": 8.0},
    ),
    "learned": (
        0,
        ratio.AutoFiltered(0.5, 0.25),
        {"ratio": plan.FILTERED, "process": 2.0, "start": math.inf},
    ),
    "unclipped": (1, trust.unclipped, {"trust": plan.UNCLIPPED}),
    "score": (1, trust.log_likelihood, {"trust": plan.LOG_LIKELIHOOD}),
    "clip": (1, trust.Clip(0.25, 0.5), {"trust": plan.CLIP, "low": 0.75, "high": 1.5}),
    "dual": (1, trust.Clip(0.25, 0.5, 3.0), {"trust": plan.CLIP, "low": 0.75, "high": 1.5, "dual": 3.0}),
    "cap": (1, trust.Cap(4.0, 0.5), {"trust": plan.CAP, "low": 0.5, "high": 4.0}),
    "token mean": (2, aggregate.token_mean, {"aggregate": plan.TOKEN_MEAN}),
    "sequence mean": (2, aggregate.sequence_mean, {"aggregate": plan.SEQUENCE_MEAN}),
    "sum": (2, aggregate.SequenceSum(7.0), {"aggregate": plan.SEQUENCE_SUM, "length": 7.0}),
}


@pytest.mark.parametrize("case", PLANS)
def test_the_numbers_of_a_part(case: str) -> None:
    place, part, own = PLANS[case]
    found, plain = plan_of(*(part if i == place else known for i, known in enumerate(PLAIN))), plan_of(*PLAIN)
    assert found is not None and plain is not None
    assert found == plain._replace(**own)


@dataclass
class Own:
    """A part that cannot be hashed."""


class Finer(trust.Clip):
    """A part that may differ from the one it comes from."""


@pytest.mark.parametrize(
    "part", [Own(), Finer(), ratio.RobustFiltered()], ids=lambda part: type(part).__name__
)
@pytest.mark.parametrize("place", range(3))
def test_a_part_that_is_not_known_takes_the_definition(place: int, part: Any) -> None:
    assert plan_of(*(part if i == place else known for i, known in enumerate(PLAIN))) is None


@pytest.mark.skipif(not jit.usable(), reason="numba is not installed or switched off")
def test_the_pass_is_taken_where_it_is_known_and_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(0)
    corrected = CASES["grpo+truncated"]

    def fused(method: Method, **given: Any) -> float:
        return policy_loss(method, batch.rollouts(), batch.logp, **given).metrics["objective/fused"].item()

    for switch, default in (("1", 1), ("0", 0)):
        monkeypatch.setenv("KALMAN_RL_FUSED", switch)
        wanted = [fused(CASES["grpo"]), *(fused(CASES["grpo"], fused=choice) for choice in (True, False))]
        assert wanted == [default, 1, 0]
        assert fused(corrected, fused=True) == fused(CASES["gmpo"], fused=True) == 0
