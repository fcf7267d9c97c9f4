"""The simulated pool of prompts that beliefs are measured on: every true value is known.

Prompt i has the success probability ``p = sigmoid(offset + trend + z_i . theta_t + u_it)``: a part that its
embedding shows (8 latent numbers inside 256 dimensions) and a private part. Both move while training goes on::

    theta_t: random walk, moves the feature part by ``feature_drift`` logits (sd) per epoch
    u_it:    random walk of ``walk`` logits (sd) per epoch, and jumps in the misspecified worlds
    trend:   every logit rises by ``trend`` per epoch
    reward = Bernoulli(p) + noise * e,   e standard normal (or heavy-tailed)

Details the source of the world leaves open, and what we chose: all drift happens in equal parts at every
step, not once per epoch; an epoch is a fresh permutation of the pool, so gaps between visits vary; the latent
numbers lie in a random 8-dimensional subspace and every one of the 256 coordinates carries a nuisance of
standard deviation 0.02 on top; Student noise is not rescaled to unit variance; an outlier is noise times ten.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

LATENT, WIDTH, ACTIONS = 8, 256, 8


@dataclass(frozen=True)
class Scenario:
    """One world. Rates of change are logits per epoch; the scored part starts at epoch ``scored_from``."""

    group: int = 8
    noise: float = 0.0
    walk: float = 0.3
    epochs: int = 10
    trend: float = 0.15
    feature_drift: float = 0.1
    share: float = 0.6
    spread: float = 2.0
    offset: float = -0.5
    jumps: float = 0.0
    tails: str = "normal"
    prompts: int = 512
    batch: int = 64
    scored_from: int = 3

    @property
    def per_epoch(self) -> int:
        return self.prompts // self.batch

    @property
    def steps(self) -> int:
        return self.per_epoch * self.epochs

    def but(self, **changes: object) -> Scenario:
        return replace(self, **changes)


class Visit(NamedTuple):
    """One training step in S parallel worlds: B prompts each, G samples per prompt."""

    step: int
    epoch: int
    ids: np.ndarray  # (S, B)
    reward: np.ndarray  # (S, B, G)
    value: np.ndarray  # (S, B) true success probability
    known: np.ndarray  # (S, B) logit without the private part, for the ceiling only
    mean_value: np.ndarray  # (S,) true mean over the whole pool
    features: np.ndarray  # (S, B, 256)
    action: np.ndarray  # (S, B, G) the action behind each sample, 0 = the correct one
    policy: np.ndarray  # (S, B, 8)


class World:
    """S independent worlds of one scenario. World s depends on its seed only, whatever S is.

    Args:
        scenario: what happens.
        seeds: one per world.
    """

    def __init__(self, scenario: Scenario, seeds: Sequence[int]) -> None:
        self.scenario, self.seeds = scenario, list(seeds)
        parts = [_one(scenario, seed) for seed in self.seeds]
        self._data = {key: np.stack([part[key] for part in parts]) for key in parts[0]}

    def __len__(self) -> int:
        return len(self.seeds)

    def __iter__(self) -> Iterator[Visit]:
        data, rows = self._data, np.arange(len(self))[:, None]
        for step in range(self.scenario.steps):
            ids = data["order"][:, step]
            yield Visit(
                step=step,
                epoch=step // self.scenario.per_epoch,
                ids=ids,
                reward=data["reward"][:, step],
                value=data["value"][:, step],
                known=data["known"][:, step],
                mean_value=data["mean_value"][:, step],
                features=data["features"][rows, ids],
                action=data["action"][:, step],
                policy=data["policy"][:, step],
            )


def _one(c: Scenario, seed: int) -> dict[str, np.ndarray]:
    """Everything that happens in one world. Each cause has a random stream of its own, so that worlds which
    differ in noise or group size share their prompts, their drift and their visiting order."""
    streams = {
        name: np.random.default_rng([seed, k])
        for k, name in enumerate(("prompts", "drift", "order", "reward", "noise", "jumps", "actions"))
    }
    z, u, theta, features = _prompts(c, streams["prompts"])
    order = np.stack([streams["order"].permutation(c.prompts) for _ in range(c.epochs)])
    order = order.reshape(c.steps, c.batch)
    pace = 1 / np.sqrt(c.per_epoch)
    value, known = np.empty((c.steps, c.batch)), np.empty((c.steps, c.batch))
    mean_value = np.empty(c.steps)
    for step in range(c.steps):
        if step:
            theta = theta + c.feature_drift * pace / np.sqrt(LATENT) * streams["drift"].normal(size=LATENT)
            u = u + c.walk * pace * streams["drift"].normal(size=c.prompts)
        if c.jumps and step and step % c.per_epoch == 0:
            hit = streams["jumps"].random(c.prompts) < c.jumps
            u = u + np.where(hit, 3.0 * streams["jumps"].choice([-1.0, 1.0], size=c.prompts), 0.0)
        base = c.offset + c.trend * step / c.per_epoch + z @ theta
        p = 1 / (1 + np.exp(-(base + u)))
        mean_value[step], value[step], known[step] = p.mean(), p[order[step]], base[order[step]]
    shape = (c.steps, c.batch, c.group)
    success = streams["reward"].random(shape) < value[..., None]
    reward = success + c.noise * _noise(c, streams["noise"], shape)
    wrong = streams["actions"].dirichlet(np.ones(ACTIONS - 1), size=c.prompts)[order]
    policy = np.concatenate([value[..., None], (1 - value[..., None]) * wrong], axis=-1)
    draw = streams["actions"].random(shape)
    other = 1 + (draw[..., None] > np.cumsum(wrong, -1)[..., None, :-1]).sum(-1)
    return {
        "features": features,
        "order": order,
        "value": value,
        "known": known,
        "mean_value": mean_value,
        "reward": reward,
        "action": np.where(success, 0, other).astype(np.int8),
        "policy": policy,
    }


def _prompts(c: Scenario, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    z = rng.normal(size=(c.prompts, LATENT))
    u = c.spread * np.sqrt(1 - c.share) * rng.normal(size=c.prompts)
    theta = rng.normal(size=LATENT)
    theta *= c.spread * np.sqrt(c.share) / np.linalg.norm(theta)
    subspace = np.linalg.qr(rng.normal(size=(WIDTH, LATENT)))[0]
    return z, u, theta, z @ subspace.T + 0.02 * rng.normal(size=(c.prompts, WIDTH))


def _noise(c: Scenario, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    if c.tails == "student":
        return rng.standard_t(2.2, size=shape)
    noise = rng.normal(size=shape)
    if c.tails == "outliers":
        noise = np.where(rng.random(shape) < 0.05, 10.0 * noise, noise)
    return noise
