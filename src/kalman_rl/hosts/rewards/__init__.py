"""Rewards are other people's code: they are called in processes that can be ended without ending the run."""

from kalman_rl.hosts.rewards.record import RewardRecord
from kalman_rl.hosts.rewards.supervised import SupervisedReward

__all__ = ["RewardRecord", "SupervisedReward"]
