"""Section 4 and the gradient part of section 5: every method sees the same visits of the same worlds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.beliefs.beta_bank import BetaCompetitor
from benchmarks.beliefs.competitors import (
    Ceiling,
    Competitor,
    Constant,
    Ebpo,
    GroupMean,
    GroupStd,
    JamesStein,
    Kgrpo,
    Krpo,
    LeaveOneOut,
    Oracle,
    Spo,
)
from benchmarks.beliefs.world import Scenario, Visit, World
from kalman_rl.sampling.gains import NINETY

Build = Callable[[Scenario, int], list[Competitor]]
Stats = dict[str, dict[str, np.ndarray]]


class Ours(Competitor):
    """A belief of the package, one per world, through its public methods only.

    ``estimate`` gives two rows: the leave-one-out baseline under ``name`` and, if ``predictive`` is set, the
    prediction from earlier visits alone under that name. Without ``predictive`` the belief is not asked for
    its interval either, which saves a third of the time.
    """

    def __init__(
        self,
        name: str,
        make: Callable[[], Any],
        worlds: int,
        *,
        features: bool = False,
        predictive: str | None = None,
    ) -> None:
        self.name, self.features, self.predictive = name, features, predictive
        self.beliefs = [make() for _ in range(worlds)]
        self._interval: tuple[np.ndarray, np.ndarray] | None = None

    def estimate(self, visit: Visit) -> dict[str, np.ndarray]:
        baseline = np.empty(visit.reward.shape)
        mean, variance = np.empty(visit.ids.shape), np.empty(visit.ids.shape)
        for s, belief in enumerate(self.beliefs):
            ids, reward, known = self._batch(visit, s)
            baseline[s] = belief.advantages(ids, reward, step=visit.step, **known).baseline.view(
                *baseline[s].shape
            )
            if not self.predictive:
                continue
            once = {"features": torch.from_numpy(visit.features[s])} if self.features else {}
            value = belief.predict(visit.ids[s].tolist(), step=visit.step, **once)
            mean[s], variance[s] = value.mean, value.variance
        self._interval = (mean, variance) if self.predictive else None
        return {self.name: baseline} | ({self.predictive: mean[..., None]} if self.predictive else {})

    def interval(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean and variance of the values before the visit last estimated, (S, B) each."""
        return self._interval

    def absorb(self, visit: Visit) -> None:
        for s, belief in enumerate(self.beliefs):
            ids, reward, known = self._batch(visit, s)
            belief.update(ids, reward, step=visit.step, **known)

    def _batch(self, visit: Visit, s: int) -> tuple[list[int], torch.Tensor, dict[str, torch.Tensor]]:
        group = visit.reward.shape[-1]
        ids = np.repeat(visit.ids[s], group).tolist()
        reward = torch.from_numpy(visit.reward[s].reshape(-1).astype(float))
        if not self.features:
            return ids, reward, {}
        return ids, reward, {"features": torch.from_numpy(np.repeat(visit.features[s], group, axis=0))}


def numpy_methods(c: Scenario, worlds: int, *, ceiling: bool = True, kgrpo: bool = False) -> list[Competitor]:
    """Every competitor; the published K-GRPO filters and the ceiling only where asked for."""
    methods: list[Competitor] = [GroupMean(), LeaveOneOut(), Constant(), Krpo(), JamesStein(), Ebpo()]
    methods += [Spo(c, worlds), Spo(c, worlds, 0.96), BetaCompetitor(c, worlds)]
    methods += [Kgrpo(64, 0.01), Kgrpo(128, 1.0)] if kgrpo else []
    return methods + ([Ceiling(c, worlds)] if ceiling else [])


def run(scenario: Scenario, seeds: Sequence[int], build: Build, *, gradients: bool = False) -> Stats:
    """Play one scenario.

    Returns:
        For every row name a dict of per-world numbers (S,): ``mse`` over the scored epochs, ``first`` over epoch
        0, ``coverage`` of the 90 % interval of the value (where the method has one) and, with ``gradients``,
        ``cosine`` with the true batch gradient, ``error`` (squared, of the batch gradient) and ``largest``
        (absolute advantage).
    """
    world = World(scenario, seeds)
    methods = build(scenario, len(world))
    methods += [GroupStd(), Oracle()] if gradients else []
    sums: dict[str, dict[str, list[np.ndarray]]] = {}
    for visit in world:
        truth = _gradient_inputs(visit) if gradients else None
        scored = visit.epoch >= scenario.scored_from
        for method in methods:
            for name, baseline in method.estimate(visit).items():
                into = sums.setdefault(name, {})
                error = (baseline - visit.value[..., None]) ** 2
                if visit.epoch == 0:
                    into.setdefault("first", []).append(error.mean((1, 2)))
                if not scored:
                    continue
                into.setdefault("mse", []).append(error.mean((1, 2)))
                if truth is not None and baseline.shape[-1] in (1, scenario.group):  # the ceiling has two
                    for key, value in _gradient(visit, method, baseline, *truth).items():
                        into.setdefault(key, []).append(value)
                if name == method.name and (interval := method.interval()) is not None:
                    inside = np.abs(visit.value - interval[0]) <= NINETY * np.sqrt(interval[1])
                    into.setdefault("coverage", []).append(inside.mean(1))
            method.absorb(visit)
    return {
        name: {key: np.max(v, axis=0) if key == "largest" else np.mean(v, axis=0) for key, v in stats.items()}
        for name, stats in sums.items()
    }


def gains(stats: Stats, key: str = "mse", reference: str = "group_mean") -> dict[str, np.ndarray]:
    """MSE of the reference over MSE of each method, per world."""
    return {name: stats[reference][key] / s[key] for name, s in stats.items() if key in s}


def _gradient_inputs(visit: Visit) -> tuple[np.ndarray, np.ndarray]:
    """Score of every sample ``e_a - pi`` (S, B, G, 8) and the true gradient ``p (e_0 - pi)`` (S, B, 8)."""
    actions = visit.policy.shape[-1]
    score = np.eye(actions)[visit.action] - visit.policy[:, :, None]
    return score, visit.value[..., None] * (np.eye(actions)[0] - visit.policy)


def _gradient(
    visit: Visit, method: Competitor, baseline: np.ndarray, score: np.ndarray, true: np.ndarray
) -> dict[str, np.ndarray]:
    """Of the batch gradient, the prompts' gradients side by side in one long vector.

    The cosine and the largest advantage belong to the method's own advantage. The squared error belongs to
    ``r - b``, because a rescaled advantage is not an estimate of this gradient.
    """
    advantage = method.advantage(visit, baseline)
    got = _batch_gradient(advantage, score)
    raw = _batch_gradient(visit.reward - baseline, score)
    inner, size, truth = ((a * b).sum((1, 2)) for a, b in ((got, true), (got, got), (true, true)))
    return {
        "cosine": inner / np.sqrt(np.maximum(size, 1e-300) * truth),
        "error": ((raw - true) ** 2).sum((1, 2)),
        "largest": np.abs(advantage).max((1, 2)),
    }


def _batch_gradient(advantage: np.ndarray, score: np.ndarray) -> np.ndarray:
    return np.matmul(advantage[:, :, None], score)[:, :, 0] / advantage.shape[-1]
