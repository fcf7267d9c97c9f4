"""Settings for known environments: ranges that hold every return, and what short runs on a CPU need.

Chosen on seeds from 900 on. The paper's step size of the dual variables fits runs of 10^5 updates and more; these have
a few thousand.
"""

from __future__ import annotations

from typing import Any

_SHORT: dict[str, Any] = {"dual_lr": 1e-2, "alpha": 0.1, "beta": 1.0, "lr": 1e-3, "hidden": 128}
_LARGE: dict[str, Any] = _SHORT | {"hidden": 64, "horizon": 512, "minibatches": 16, "epochs": 8}
"""Without a sampled action's noise the actor chases the critic's; larger batches make differences of Q exact enough."""
PRESETS: dict[str, dict[str, Any]] = {
    "CartPole-v1": _LARGE | {"low": -5.0, "high": 115.0},
    "Acrobot-v1": _LARGE | {"low": -110.0, "high": 5.0},
    "MountainCar-v0": _LARGE | {"low": -110.0, "high": 5.0},
    "MountainCarContinuous-v0": _SHORT | {"low": -15.0, "high": 110.0},
    "Pendulum-v1": _SHORT | {"low": -40.0, "high": 5.0, "reward_scale": 0.1, "gamma": 0.95},
    "Hopper-v5": _SHORT | {"low": -10.0, "high": 90.0, "reward_scale": 0.2},
    "HalfCheetah-v5": _SHORT | {"low": -30.0, "high": 120.0, "reward_scale": 0.1},
}
"""Environment -> settings of the learner, and the steps of each copy in a batch as ``horizon``."""
