"""verl: objectives as policy losses, advantages as estimators, a trainer with beliefs about prompts.

verl finds the losses and estimators by itself, through the entry point ``verl.plugins``. The names below are
imported when they are first used, so that loading the plugin stays cheap.
"""

from __future__ import annotations

import importlib
from typing import Any

from kalman_rl.errors import extra

_HOMES = {
    "KalmanPPOTrainer": "trainer",
    "KalmanPolicyLossConfig": "config",
    "check_host": "plugin",
    "register": "plugin",
    "registered": "plugin",
}
__all__ = ["KalmanPPOTrainer", "KalmanPolicyLossConfig", "check_host", "register", "registered"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        with extra("verl", __name__):
            return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
