"""Advantages: how much better a completion did than expected, from rewards and groups."""

from kalman_rl.objectives.advantage.filtered import BatchFilter, GroupFilter
from kalman_rl.objectives.advantage.group import (
    ConstantBaseline,
    GroupStatistics,
    GroupZScore,
    LengthWeighted,
    OptimalTokenBaseline,
    Rescaled,
    batch_leave_one_out,
    group_centred,
    group_relative,
    group_statistics,
    known_rewards,
    leave_one_out,
    only_known,
)
from kalman_rl.objectives.advantage.scaled import BatchScaled, NormalizeThenSum

__all__ = [
    "BatchFilter",
    "BatchScaled",
    "ConstantBaseline",
    "GroupFilter",
    "GroupStatistics",
    "GroupZScore",
    "LengthWeighted",
    "NormalizeThenSum",
    "OptimalTokenBaseline",
    "Rescaled",
    "batch_leave_one_out",
    "group_centred",
    "group_relative",
    "group_statistics",
    "known_rewards",
    "leave_one_out",
    "only_known",
]
