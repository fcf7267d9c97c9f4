"""One formula and its parts: every objective is an advantage, a ratio, a trust region, an aggregation, a penalty and a
correction, put together by :class:`Method` and computed by :func:`policy_loss`."""

from kalman_rl.objectives import advantage, aggregate, correction, penalty, ratio, trust
from kalman_rl.objectives.loss import Loss, Method, policy_loss
from kalman_rl.objectives.rollouts import Current, Rollouts

__all__ = [
    "Current",
    "Loss",
    "Method",
    "Rollouts",
    "advantage",
    "aggregate",
    "correction",
    "penalty",
    "policy_loss",
    "ratio",
    "trust",
]
