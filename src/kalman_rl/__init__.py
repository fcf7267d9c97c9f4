"""Kalman-RL: noise-aware estimators for reinforcement learning of language models."""

from importlib.metadata import PackageNotFoundError, version

from kalman_rl.aggregate import Totals
from kalman_rl.errors import KalmanRLError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objective import Loss, Method, policy_loss
from kalman_rl.rollouts import Rollouts

try:
    __version__ = version("kalman-rl")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "METHODS",
    "KalmanRLError",
    "Loss",
    "Method",
    "Rollouts",
    "Totals",
    "__version__",
    "make_method",
    "policy_loss",
]
