"""Beliefs that watch a run: their errors against a belief fed by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kalman_rl.beliefs import RegressionBelief, make_belief
from kalman_rl.instruments.reproduce.watch import Record, Watched, squared_errors

ROWS: list[dict[str, Any]] = [
    {"prompt_id": name, "source": name[0], "features": torch.tensor([float(i), 1.0])}
    for i, name in enumerate(("ax", "ay", "bx", "by"))
]
RECORD: Record = [[(0, 1.0), (2, 0.0)], [(1, 1.0), (3, 0.0)], [(0, 1.0), (3, 1.0)]]
SUCCESS = [[0.5] * 4, [0.9, 0.8, 0.1, 0.2], [1.0, 0.9, 0.0, 0.5]]
BATCHES = (0, 2, 3)
"""After which success is known."""


@pytest.mark.parametrize("features", [False, True])
def test_errors_are_those_of_a_belief_fed_by_hand(features: bool) -> None:
    belief, names, found = RegressionBelief(), [row["prompt_id"] for row in ROWS], []
    x = torch.stack([row["features"] for row in ROWS]).double()
    for batch in range(4):
        if batch in BATCHES:
            told = belief.predict(names, step=2 * batch, features=x if features else None).mean
            p = torch.tensor(SUCCESS[BATCHES.index(batch)])
            found.append((told - p).square().mean().item())
        if batch < 3:
            places = [place for place, _ in RECORD[batch]]
            reward = torch.tensor([value for _, value in RECORD[batch]])
            own = x[places] if features else None
            belief.update([names[i] for i in places], reward, step=2 * batch, features=own)
    watched = Watched("it", features=features)
    assert squared_errors(watched, ROWS, RECORD, SUCCESS, BATCHES, 2) == pytest.approx(found, rel=1e-6)
    assert found[2] < found[0], "it learned nothing"


def test_options_and_sources_reach_the_belief() -> None:
    """A prompt of source b that was never rewarded is expected like b's other, not like all."""
    record: Record = [[(0, 1.0), (1, 1.0), (2, 0.0)]] * 2
    success = [[1.0, 1.0, 0.0, 0.0]]
    together, apart = (
        squared_errors(Watched("it", by_source=by_source), ROWS, record, success, (2,), 1)[0]
        for by_source in (False, True)
    )
    assert apart < together
    sharp = squared_errors(Watched("it", (("expected_noise", True),)), ROWS, record, success, (2,), 1)[0]
    belief = make_belief(expected_noise=True)
    for step in range(2):
        belief.update(["ax", "ay", "bx"], torch.tensor([1.0, 1.0, 0.0]), step=step)
    told = belief.predict(["ax", "ay", "bx", "by"], step=2).mean
    assert sharp == pytest.approx((told - torch.tensor(success[0])).square().mean().item(), rel=1e-6)
    assert sharp != together
