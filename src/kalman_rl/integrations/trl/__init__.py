"""TRL: ``KalmanGRPOTrainer(GRPOTrainer)`` runs any :class:`kalman_rl.objectives.Method`."""

from kalman_rl.integrations.trl.config import KalmanGRPOConfig, check_host
from kalman_rl.integrations.trl.ranks import last_good_checkpoint
from kalman_rl.integrations.trl.sinks import SafeSink, make_sinks
from kalman_rl.integrations.trl.trainer import KalmanGRPOTrainer, TokenBatch

__all__ = [
    "KalmanGRPOConfig",
    "KalmanGRPOTrainer",
    "SafeSink",
    "TokenBatch",
    "check_host",
    "last_good_checkpoint",
    "make_sinks",
]
