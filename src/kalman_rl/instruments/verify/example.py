"""A batch on which every restatement is tried, with all that a method may ask for."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.instruments.verify.place import CPU, Place
from kalman_rl.objectives.rollouts import Current, LastLayerStep, Rollouts


class Example(NamedTuple):
    """A batch of ragged rows with holes, and a policy that has moved away from the one that sampled it."""

    rollouts: Rollouts
    logp: Tensor
    top_logp: Tensor
    step: LastLayerStep

    def current(self, logp: Tensor | None = None) -> Current:
        """What a method may ask to know about the current policy."""
        return Current(self.logp if logp is None else logp, self.top_logp, self.step)


def example(
    seed: int = 0, rows: int = 12, length: int = 9, scale: float = 0.3, place: Place = CPU
) -> Example:
    """A batch in groups of three, moved so far (nats) that every trust region acts on some tokens.

    Rewards lie in [0, 1], where success counts are defined. Baselines that learn from other groups need
    several of them: with two there is no spread to shrink by. The numbers are the same in every place.
    """
    g, put = torch.Generator().manual_seed(seed), place.put

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    mask = torch.rand(rows, length, generator=g) < 0.75
    mask[:, 2] = True
    logits = normal(rows, length, 5)
    moved = logits + 2 * scale * normal(rows, length, 5)
    old, logp = logits.log_softmax(-1), moved.log_softmax(-1)  # token 0 was sampled
    rollouts = Rollouts(
        logp_old=put(old[..., 0]),
        mask=put(mask),
        reward=put(normal(rows).sigmoid()),
        group=put(torch.arange(rows) // 3),
        prompt_id=[f"prompt {row // 3}" for row in range(rows)],
        logp_behaviour=put(old[..., 0]),
        logp_reference=put(old[..., 0] + scale * normal(rows, length)),
        top_behaviour=put(old[..., :3]),
        sum_pi_squared=put(old.exp().square().sum(-1)),
        lag=put(torch.arange(length, dtype=torch.float64).remainder(4).expand(rows, length)),
    )
    along, curvature = normal(rows, length).abs() * 90, normal(rows, length).square() * 900
    step = LastLayerStep(put(along), put(curvature), 1e-4)
    return Example(rollouts, put(logp[..., 0]), put(logp[..., :3]), step)


def positions(rollouts: Rollouts) -> list[list[int]]:
    """Trained positions of each row."""
    return [row.nonzero().flatten().tolist() for row in rollouts.mask]
