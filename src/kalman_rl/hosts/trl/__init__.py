"""TRL: ``KalmanGRPOTrainer(GRPOTrainer)`` runs any :class:`kalman_rl.objectives.Method`.

The names below are imported when they are first used: ``hooks`` must be readable where a moved hook keeps the rest from
loading.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from kalman_rl.errors import extra

if TYPE_CHECKING:
    from kalman_rl.hosts.trl.config import KalmanGRPOConfig, check_host
    from kalman_rl.hosts.trl.dropout import switch_off_dropout
    from kalman_rl.hosts.trl.ranks import last_good_checkpoint
    from kalman_rl.hosts.trl.sample_size import SampleSizeRate
    from kalman_rl.hosts.trl.sinks import SafeSink, make_sinks
    from kalman_rl.hosts.trl.trainer import KalmanGRPOTrainer, TokenBatch

_HOMES = {
    "KalmanGRPOConfig": "config",
    "KalmanGRPOTrainer": "trainer",
    "SafeSink": "sinks",
    "SampleSizeRate": "sample_size",
    "TokenBatch": "trainer",
    "check_host": "config",
    "last_good_checkpoint": "ranks",
    "make_sinks": "sinks",
    "switch_off_dropout": "dropout",
}
__all__ = [
    "KalmanGRPOConfig",
    "KalmanGRPOTrainer",
    "SafeSink",
    "SampleSizeRate",
    "TokenBatch",
    "check_host",
    "last_good_checkpoint",
    "make_sinks",
    "switch_off_dropout",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        with extra("trl", __name__):
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
