"""Environments small enough to know every number of."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete


class Counter(gymnasium.Env[Any, Any]):
    """Observes how many steps were made; reward = the action, or its number; stops after three or four."""

    def __init__(
        self,
        discrete: bool = False,
        terminates: bool = False,
        bad: str = "",
        space: Any = None,
        seen: Any = None,
    ) -> None:
        self.observation_space = seen or Box(-np.inf, np.inf, (1,), np.float32)
        self.action_space = space or (Discrete(3, start=5) if discrete else Box(-2.0, 6.0, (1,), np.float32))
        self.terminates, self.bad = terminates, bad
        self.count = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        reward = float("nan") if self.bad == "reward" else float(np.sum(action))
        ended = self.count == 3 + self.terminates
        return self._seen(), reward, ended and self.terminates, ended and not self.terminates, {}

    def _seen(self) -> Any:
        bad = self.bad == "observation" and self.count == 2
        return np.array([np.nan if bad else self.count], dtype=np.float32)


class Bandit(gymnasium.Env[Any, Any]):
    """One step; reward -(a - 0.5)^2, or 1 for the second of three arms."""

    def __init__(self, discrete: bool = False) -> None:
        self.observation_space = Box(-1.0, 1.0, (1,), np.float32)
        self.action_space = Discrete(3) if discrete else Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        good = (
            float(action == 1) if isinstance(self.action_space, Discrete) else -float((action[0] - 0.5) ** 2)
        )
        return np.zeros(1, np.float32), good, True, False, {}


def register() -> None:
    """Make them known as ``test/...``; again does nothing."""
    spaces = {"Many": {"space": MultiDiscrete([2, 2])}, "Free": {"space": Box(-np.inf, np.inf, (1,))}}
    worlds: dict[str, tuple[type[gymnasium.Env[Any, Any]], dict[str, Any]]] = {
        "Counter": (Counter, {}),
        "Arms": (Counter, {"discrete": True}),
        "Ends": (Counter, {"terminates": True}),
        "BadReward": (Counter, {"bad": "reward"}),
        "BadObservation": (Counter, {"bad": "observation"}),
        "Mapping": (Counter, {"seen": Dict({"x": Box(-1.0, 1.0, (1,))})}),
        "Bandit": (Bandit, {}),
        "DiscreteBandit": (Bandit, {"discrete": True}),
    } | {name: (Counter, kwargs) for name, kwargs in spaces.items()}
    for name, (kind, kwargs) in worlds.items():
        if f"test/{name}-v0" not in gymnasium.registry:
            gymnasium.register(f"test/{name}-v0", kind, kwargs=kwargs, disable_env_checker=True)
