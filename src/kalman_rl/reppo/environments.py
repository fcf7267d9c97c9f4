"""Gymnasium environments as batches: rollouts with the true last observation of every episode, and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kalman_rl.errors import AdapterError, ConfigError, NumericError, did_you_mean, extra, one_line, quote
from kalman_rl.reppo.learner import Learner, Rollout

with extra("control", "kalman_rl.reppo"):
    import gymnasium
    import numpy as np
    from gymnasium.spaces import Box, Discrete
    from gymnasium.vector import AutoresetMode, SyncVectorEnv

LONGEST_EPISODE = 200_000
"""Steps after which an evaluation gives up: the episode would never end."""


class Environments:
    """Copies of one environment, stepped together; an episode that ends is begun again in the same step.

    Args:
        name: as gymnasium knows it. number: of copies. seed: copy i is seeded with seed + i.
        options: keyword arguments of ``gymnasium.make``.
    Raises: ConfigError for an unknown environment or spaces that are not supported; AdapterError where the
        environment needs a package that is missing.
    """

    def __init__(self, name: str, number: int, *, seed: int, options: dict[str, Any] | None = None) -> None:
        self.name, self.number = name, number
        self.vector = SyncVectorEnv(
            [partial(make, name, options or {}) for _ in range(number)],
            autoreset_mode=AutoresetMode.SAME_STEP,
        )
        space = self.vector.single_action_space
        self.discrete = isinstance(space, Discrete)
        self.actions = int(space.n) if isinstance(space, Discrete) else int(np.prod(space.shape))
        self.inputs = int(np.prod(self.vector.single_observation_space.shape))
        self.observation = self._seen(self.vector.reset(seed=seed)[0])
        self.running = torch.zeros(number, dtype=torch.float64)
        self.finished: list[float] = []
        """Returns of the episodes that ended, oldest first."""

    def rollout(self, learner: Learner, steps: int) -> Rollout:
        """``steps`` steps of every copy with the learner's policy."""
        rows: list[tuple[Tensor, ...]] = []
        for _ in range(steps):
            action, log_prob = learner.act(self.observation)
            before = self.observation
            reward, following, terminated, truncated = self.step(action)
            rows.append((before, action, log_prob, reward, following, terminated, truncated))
        return Rollout(*(torch.stack(column) for column in zip(*rows)))

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Reward, true successor, terminated, truncated (E) of one step; ``observation`` is where the next begins."""
        found, reward, terminated, truncated, info = self.vector.step(self._scaled(action))
        self.observation = following = self._seen(found)
        ended = terminated | truncated
        if ended.any():
            following = following.clone()
            for row in np.flatnonzero(ended):
                following[row] = self._seen(info["final_obs"][row][None])[0]
        rewards = torch.as_tensor(reward, dtype=torch.float64)
        if not torch.isfinite(rewards).all():
            raise NumericError(f"{self.name}: got a reward that is NaN or infinite, expected numbers")
        self.running += rewards
        over = torch.as_tensor(ended)
        self.finished += self.running[over].tolist()
        self.running[over] = 0.0
        return rewards.float(), following, torch.as_tensor(terminated), torch.as_tensor(truncated)

    def close(self) -> None:
        self.vector.close()

    def _scaled(self, action: Tensor) -> Any:
        space = self.vector.single_action_space
        if isinstance(space, Discrete):
            return action.numpy() + space.start
        assert isinstance(space, Box)
        share = 0.5 * (action.numpy().reshape(self.number, *space.shape) + 1)
        return (space.low + share * (space.high - space.low)).astype(space.dtype)

    def _seen(self, observation: Any) -> Tensor:
        seen = torch.as_tensor(np.asarray(observation, dtype=np.float32).reshape(len(observation), -1))
        if not torch.isfinite(seen).all():
            raise NumericError(f"{self.name}: got an observation that is NaN or infinite, expected numbers")
        return seen.clone()


def make(name: str, options: dict[str, Any]) -> Any:
    """One environment whose observations and actions this package can use.

    Raises: ConfigError for an unknown environment or spaces that are not supported; AdapterError where the
        environment needs a package that is missing.
    """
    try:
        env = gymnasium.make(name, **options)
    except gymnasium.error.DependencyNotInstalled as error:
        advice = "; pip install 'kalman-rl[control]'" if "mujoco" in str(error).lower() else ""
        raise AdapterError(
            f"{name}: got no package it needs ({one_line(error, 160)}), expected it to be installed{advice}"
        ) from error
    except (gymnasium.error.Error, ModuleNotFoundError) as error:
        elsewhere = isinstance(error, gymnasium.error.NamespaceNotFound | ModuleNotFoundError)
        near = "" if elsewhere else did_you_mean(name, gymnasium.registry)
        raise ConfigError(
            f"env: got {quote(name, 80)}, expected an environment of gymnasium ({one_line(error, 120)}){near}"
        ) from error
    seen, acts = env.observation_space, env.action_space
    if not (isinstance(seen, Box) and seen.shape and np.issubdtype(seen.dtype, np.number)):
        raise ConfigError(f"{name}: got observations {seen}, expected a Box of numbers; wrap the environment")
    bounded = isinstance(acts, Box) and acts.shape and bool(np.isfinite([acts.low, acts.high]).all())
    if not (isinstance(acts, Discrete) or bounded):
        raise ConfigError(
            f"{name}: got actions {acts}, expected Discrete or a Box with finite bounds; wrap it"
        )
    return env


def evaluate(name: str, act: Callable[[Tensor], Tensor], *, episodes: int, seed: int) -> list[float]:
    """Undiscounted returns of the first episode of ``episodes`` copies, seeded with seed, seed + 1, ...

    Args: act: raw observations (episodes, S) to actions, in (-1, 1) or whole numbers.
    Raises: ConfigError for an episode of more than LONGEST_EPISODE steps.
    """
    envs = Environments(name, episodes, seed=seed)
    total = torch.zeros(episodes, dtype=torch.float64)
    open_ = torch.ones(episodes, dtype=torch.bool)
    try:
        for _ in range(LONGEST_EPISODE):
            reward, _, terminated, truncated = envs.step(act(envs.observation))
            total += torch.where(open_, reward.double(), 0.0)
            open_ &= ~(terminated | truncated)
            if not open_.any():
                return total.tolist()
    finally:
        envs.close()
    raise ConfigError(
        f"{name}: got an episode of more than {LONGEST_EPISODE:,} steps, expected one that ends; register it with "
        "max_episode_steps"
    )
