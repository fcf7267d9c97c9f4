"""An advantage that remembers: the baseline is a belief about the prompt, kept from step to step.

As a part of a :class:`kalman_rl.objectives.Method` it is only a name with options, so that methods stay frozen
and can travel; the belief itself lives where prompts have names, in a trainer.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs import make_belief
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.beliefs.regression import RegressionBelief
from kalman_rl.errors import ConfigError


@dataclass(frozen=True)
class Tracked:
    """``A = (r - b) / scale``, b the leave-one-out prediction of the prompt's value (B,).

    Args:
        belief: a name that :func:`kalman_rl.beliefs.make_belief` knows.
        options: its options, as (name, value) pairs.

    Called on rewards and groups alone, every group is a prompt never seen before: the first batch of a run.
    Raises: ConfigError for an unknown belief or option.
    """

    belief: str = "auto"
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self.make()

    def make(self, source: Callable[[Any], Hashable] | None = None) -> Belief:
        """A new belief that has seen nothing; with ``source`` (prompt id -> source), one for each source."""
        options = dict(self.options)
        if source is not None and "source" in options:
            raise ConfigError("options: got a source beside the one of the dataset, expected one of the two")
        return make_belief(self.belief, **(options if source is None else options | {"source": source}))

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        return _first_batch(self.make(), reward, group)


@dataclass(frozen=True)
class JamesStein:
    """The first batch of :class:`Tracked`, every time: each group's mean drawn towards those of the other groups.

        b_j = (m / P + (S - r_j) / R) / (1 / P + (n - 1) / R)

    m, P: mean and spread of the other groups' means beyond noise; R: their pooled variance within groups. Needs no
    memory and no names; with one group it is leave-one-out. Source: James-Stein baselines (arXiv 2511.03710), here
    with no reward in its own baseline.
    """

    def __call__(self, reward: Tensor, group: Tensor) -> Tensor:
        return _first_batch(RegressionBelief(scale=False), reward, group)


def _first_batch(belief: Belief, reward: Tensor, group: Tensor) -> Tensor:
    dtype = torch.promote_types(reward.dtype, torch.float32)
    if not len(reward):
        return reward.detach().to(dtype)
    found = belief.advantages(group.tolist(), reward.detach().double().cpu(), step=0).advantage
    return found.to(reward.device, dtype)
