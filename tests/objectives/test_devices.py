"""What an objective makes goes to the device of its batch, wherever the default device is.

The default device is ``meta`` here: a tensor that is made without a device has no numbers, and cannot meet those of
the batch. So a fault that only a GPU would show is seen without one.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from kalman_rl.objectives import diagnostics
from kalman_rl.objectives.learning import LearnedState, step_statistics
from kalman_rl.objectives.loss import estimate_advantage
from kalman_rl.objectives.ratio.learned import AutoFiltered
from kalman_rl.objectives.ratio.robust import RobustFiltered
from kalman_rl.objectives.ratio.token_noise import NoiseFiltered
from kalman_rl.objectives.rollouts import Rollouts
from tests.oracles.batches import CASES, advantage_of, has_own_baseline, is_filtered, make_batch, run

COMPOSED = [name for name, method in CASES.items() if not is_filtered(method) and "filtered" not in name]
"""Methods that no filter runs for: the filter's kernel on the CPU is of the CPU."""


@pytest.mark.parametrize("name", COMPOSED)
def test_losses_and_advantages(name: str) -> None:
    method, batch = CASES[name], make_batch(3)
    packed = dataclasses.replace(batch, segment=(torch.arange(9) // 4).expand(6, 9))
    given = advantage_of(method, batch)
    wide = (given if given.dim() == 2 else given[:, None].expand(6, 9)).contiguous()
    expected = [run(method, one, advantage=wide, fused=False) for one in (batch, packed)]
    statistics = step_statistics(method, batch.rollouts(), batch.current(batch.logp), advantage=wide)
    with torch.device("meta"):
        found = [run(method, one, advantage=wide, fused=False) for one in (batch, packed)]
        again = step_statistics(method, batch.rollouts(), batch.current(batch.logp), advantage=wide)
        if not has_own_baseline(method):
            assert torch.equal(estimate_advantage(method, batch.rollouts()), given)
    for before, after in zip(expected, found):
        assert torch.equal(before.gradient, after.gradient) and before.metrics == after.metrics
    assert (again is None) == (statistics is None) or torch.equal(again, statistics)


@pytest.mark.parametrize(
    "part", [AutoFiltered(), RobustFiltered(), NoiseFiltered(), NoiseFiltered(behaviour=True)], ids=repr
)
@pytest.mark.parametrize("trained", [True, False])
def test_statistics_of_ratios_that_learn(part: Any, trained: bool) -> None:
    batch = make_batch(5)
    mask = batch.mask if trained else torch.zeros_like(batch.mask)
    expected = part.statistics(batch.logp, batch.rollouts(mask=mask, allow_empty=True))
    with torch.device("meta"):
        found = part.statistics(batch.logp, batch.rollouts(mask=mask, allow_empty=True))
        learned = LearnedState(dataclasses.replace(CASES["kpo_auto"], ratio=part), lambda value: value)
        learned.observe(batch.logp, batch.rollouts(mask=mask, allow_empty=True))
        learned.end_step()
    assert torch.equal(found, expected)
    assert learned.state is not None and torch.equal(learned.state, expected)


def test_metrics() -> None:
    batch = make_batch(7)
    with torch.device("meta"):
        rollouts = Rollouts(batch.logp_old, batch.mask)
        sums = diagnostics.sample_sizes(batch.logp - batch.logp_old, batch.share, rollouts)
        nothing = diagnostics.sums_of(batch.logp[:0], batch.mask[:0])
    assert all(value.device == batch.logp.device for value in (*sums.values(), nothing))
