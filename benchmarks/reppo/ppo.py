"""Stable-baselines3's PPO with the zoo's settings, evaluated by the function that evaluates REPPO."""

from __future__ import annotations

from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benchmarks.reppo.plan import EPISODES, EVALUATIONS, ZOO
from kalman_rl.reppo.environments import Environments, evaluate
from kalman_rl.reppo.training import EVALUATION_SEED


def train(task: str, steps: int, seed: int) -> list[dict[str, float]]:
    """Rows of step and return, one per evaluation, as REPPO's ``train`` gives them."""
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    told = dict(ZOO[task])
    copies = told.pop("copies")
    network = dict(told.pop("policy_kwargs", {}))
    if "activation" in network:
        network["activation_fn"] = getattr(torch.nn, network.pop("activation"))
    for name, value in told.items():
        if isinstance(value, str):
            start = float(value.split()[1])
            told[name] = lambda left, start=start: start * left
    envs = VecNormalize(make_vec_env(task, copies, seed=seed), norm_reward=False)
    scaled = Scaled(task)
    rows: list[dict[str, float]] = []

    def score(model: Any, step: int) -> None:
        def act(seen: Tensor) -> Tensor:
            found, _ = model.predict(envs.normalize_obs(seen.numpy()), deterministic=True)
            return scaled(torch.as_tensor(found))

        returns = evaluate(task, act, episodes=EPISODES, seed=EVALUATION_SEED)
        rows.append({"step": step, "return": fmean(returns), "lowest": min(returns)})

    class Evaluate(BaseCallback):
        """At the end of the batch in which an evaluation falls due."""

        def _on_step(self) -> bool:
            return True

        def _on_rollout_start(self) -> None:
            last = rows[-1]["step"] if rows else 0
            every = steps / EVALUATIONS
            if self.num_timesteps // every > last // every:
                score(self.model, self.num_timesteps)

    model = PPO("MlpPolicy", envs, seed=seed, device="cpu", policy_kwargs=network, **told)
    model.learn(steps, callback=Evaluate())
    score(model, model.num_timesteps)
    return rows


class Scaled:
    """Actions of an environment's own bounds as :func:`evaluate` takes them, in (-1, 1); whole numbers stay."""

    def __init__(self, task: str) -> None:
        envs = Environments(task, 1, seed=0)
        self.discrete, self.space = envs.discrete, envs.vector.single_action_space
        envs.close()

    def __call__(self, action: Tensor) -> Tensor:
        if self.discrete:
            return action
        low, high = map(torch.as_tensor, (self.space.low, self.space.high))  # type: ignore[attr-defined]
        return (2 * (action - low) / (high - low) - 1).clamp(-1, 1)
