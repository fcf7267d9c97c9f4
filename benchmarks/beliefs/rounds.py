"""The package's own loop in the allocation pools: RoundPlan, Price and BetaBelief, one world after another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.beliefs.allocation import REFERENCE, Pool, _Truth
from kalman_rl.beliefs.beta import BetaBelief
from kalman_rl.sampling.price import Price
from kalman_rl.sampling.rounds import RoundPlan

POINTS = {"gradient": (2.5, 4.0, 6.0), "mixed_groups": (2.0, 3.0, 4.5)}


def play_rounds(
    pool: Pool, seeds: Sequence[int], aim: str, budgets: Sequence[float], k: int = 2
) -> dict[str, np.ndarray]:
    """Savings' ingredients for the default weighting "tau", each (budgets, seeds): n, mixed, cosine.

    The price is met by its own dual update, so the mean count is what was used and not the budget.
    """
    out = np.array([[_world(pool, seed, aim, budget, k) for seed in seeds] for budget in budgets])
    return {"n": out[..., 0], "mixed": out[..., 1], "cosine": out[..., 2]}


def _world(pool: Pool, seed: int, aim: str, budget: float, k: int) -> tuple[float, float, float]:
    truth, rng = _Truth(pool, seed), np.random.default_rng([seed, 31])
    belief, price = BetaBelief(scale=False), Price(budget)
    warm, scored = (e * pool.prompts // pool.batch for e in pool.epochs)
    rows = []
    for step in range(warm + scored):
        ids, policy = truth.step()
        if step < warm:
            reward = rng.random((len(ids), REFERENCE)) < policy[:, :1]
            belief.update(
                np.repeat(ids, REFERENCE).tolist(), torch.from_numpy(reward.ravel() * 1.0), step=step
            )
            continue
        plan = RoundPlan(
            belief,
            ids.tolist(),
            step=step,
            price=price,
            rounds=(2, k),
            n_min=0,
            aim=aim,
            weighting="tau",
        )
        rows.append(_step(plan, dict(zip(ids.tolist(), range(len(ids)))), policy, rng))
    return tuple(np.mean(rows, axis=0).tolist())


def _step(
    plan: RoundPlan, place: dict[int, int], policy: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, float]:
    actions = []
    edges = np.cumsum(policy, axis=1)[:, :-1]
    while (request := plan.next_round()) is not None:
        told = [name for name, n in request for _ in range(n)]
        rows = np.array([place[name] for name in told])
        action = (rng.random((len(told), 1)) > edges[rows]).sum(1)
        actions.append(action)
        plan.tell(told, torch.from_numpy((action == 0) * 1.0))
    batch = plan.result()
    rows = np.array([place[name] for name in batch.ids], dtype=int)
    action = np.concatenate(actions) if actions else np.empty(0, dtype=int)
    coefficient = (batch.weight * batch.advantage).numpy()
    got = np.zeros(policy.shape)
    np.add.at(got, rows, coefficient[:, None] * (np.eye(policy.shape[1])[action] - policy[rows]))
    true = policy[:, :1] * (np.eye(policy.shape[1])[0] - policy)
    size = np.sqrt((got**2).sum() * (true**2).sum())
    wins, n = np.zeros(len(policy)), np.zeros(len(policy))
    np.add.at(wins, rows, action == 0)
    np.add.at(n, rows, 1)
    return n.mean(), ((wins > 0) & (wins < n)).mean(), float((got * true).sum() / max(size, 1e-300))
