"""Advantages scaled by the batch, against plain loops over groups."""

from __future__ import annotations

import math

import pytest
import torch

from kalman_rl.errors import NumericError, ShapeError
from kalman_rl.objectives.advantage import BatchScaled, GroupZScore, NormalizeThenSum

GROUP = torch.tensor([0, 0, 0, 1, 1, 1])
REWARD = torch.tensor([1.0, 0.0, 2.0, 5.0, 5.0, 8.0], dtype=torch.float64)


def test_batch_scaled() -> None:
    mean = torch.tensor([1.0, 1.0, 1.0, 6.0, 6.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(BatchScaled(0.5)(REWARD, GROUP), (REWARD - mean) / (REWARD.std() + 0.5))


def test_missing_rewards_are_left_out() -> None:
    reward = REWARD.clone()
    reward[0] = math.nan
    known = reward[1:]
    found = BatchScaled(0.0)(reward, GROUP)
    mean = torch.tensor([1.0, 1.0, 6.0, 6.0, 6.0], dtype=torch.float64)
    torch.testing.assert_close(found[1:], (known - mean) / known.std())
    assert found[0] == 0


def test_equal_rewards_teach_nothing() -> None:
    assert not BatchScaled(0.0)(torch.full((6,), 0.1), GROUP).any()
    rewards = torch.full((6, 2), 0.1)
    assert not NormalizeThenSum(epsilon=0.0)(rewards.sum(1), GROUP, rewards=rewards).any()


def test_normalize_then_sum() -> None:
    """A missing number adds nothing to its sum; a completion with none at all has no advantage."""
    second = torch.tensor([3.0, 3.0, 9.0, 0.0, math.nan, math.nan], dtype=torch.float64)
    first = torch.tensor([1.0, 0.0, 2.0, 5.0, 8.0, math.nan], dtype=torch.float64)
    epsilon, total = 1e-3, torch.zeros(6, dtype=torch.float64)
    for weight, column in ((0.5, first), (2.0, second)):
        for rows in (slice(0, 3), slice(3, 6)):
            values = column[rows][~column[rows].isnan()]
            spread = values.std() if len(values) > 1 else 0.0
            total[rows] += weight * ((column[rows] - values.mean()) / (spread + epsilon)).nan_to_num()
    known = total[:5]
    expected = torch.cat([(known - known.mean()) / (known.std() + epsilon), torch.zeros(1)])
    rewards = torch.stack([first, second], 1)
    reward = (rewards * torch.tensor([0.5, 2.0])).nansum(1).masked_fill(rewards.isnan().all(1), math.nan)
    found = NormalizeThenSum((0.5, 2.0), epsilon)(reward, GROUP, rewards=rewards)
    torch.testing.assert_close(found, expected)


def test_scale_of_one_function_does_not_drown_another() -> None:
    small = torch.tensor([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    rewards = torch.stack([small, 1e6 * small.flip(0)], 1)
    part = NormalizeThenSum(epsilon=0.0)
    assert part(rewards.sum(1), GROUP, rewards=rewards).abs().max() < 1e-6  # they cancel
    assert GroupZScore(0.0)(rewards.sum(1), GROUP).abs().max() > 0.5


@pytest.mark.parametrize("part", [BatchScaled, NormalizeThenSum])
def test_bad_epsilon(part: type) -> None:
    with pytest.raises(NumericError, match="epsilon"):
        part(epsilon=-1.0)


def test_bad_shape() -> None:
    with pytest.raises(ShapeError, match="rewards"):
        NormalizeThenSum((1.0, 1.0))(REWARD, GROUP, rewards=REWARD[:, None])
