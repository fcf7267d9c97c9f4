"""What every belief about prompts can do: the one protocol that training and sampling rely on.

A *belief* holds, per prompt id, what we think of the prompt's mean reward under the current policy, its
*value*. Values drift while the policy is trained, so certainty fades with the number of steps since the last
visit.

How a sampling rule uses a belief (rounds inside one training step)::

    before = belief.predictive(ids, step=t)            # of one new reward: mean and variance P + R
    ...choose counts, sample round 0, get rewards...
    a = belief.advantages(ids, rewards, step=t)        # needs no update; own reward never moves own baseline
    belief.update(ids, rewards, step=t, part=0)        # absorbs round 0
    belief.predict(unique_ids, step=t)                 # width after round 0: continue or stop?
    belief.update(more_ids, more, step=t, part=1)      # a later round of the same step counts its parts up

No time passes between the parts of a step. The width of a scalar Gaussian with fixed noise depends on
counts only; a
rule that should tell easy from hard must read a belief whose width depends on the rewards: every belief made
by ``make_belief`` does (0/1 rewards: R = m(1-m); others: pooled R), and so does
:class:`~kalman_rl.numerics.feature_filter.KalmanPreferenceTracker` (its R is learned).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from kalman_rl.numerics.kalman import Gaussian


class Advantages(NamedTuple):
    """``advantage = (reward - baseline) / scale``.

    ``advantage`` (n,), 0 where the reward is missing; ``baseline`` (n,) in reward units; ``scale`` the lagged
    pooled standard deviation that was divided by: () or, where sources have their own, (n,); 1 when off or
    when nothing was seen yet. All float64 and detached.
    """

    advantage: Tensor
    baseline: Tensor
    scale: Tensor


class Observed(NamedTuple):
    """What an update absorbed, one entry per visited id (ids without a known reward are left out).

    ``ids`` k names; ``size`` (k,) known rewards; ``mean`` (k,) their mean; ``innovation`` (k,) that mean
    minus what was predicted; ``innovation_variance`` (k,) of the innovation, P + R/n.
    """

    ids: list[Hashable]
    size: Tensor
    mean: Tensor
    innovation: Tensor
    innovation_variance: Tensor


@runtime_checkable
class Belief(Protocol):
    """A belief about the values of prompts.

    Common to all methods. ``ids``: n hashable names, one per completion; repeats are one group, in any order.
    ``reward``: (n,) numbers, NaN = missing. ``step``: integer >= 0, optimizer steps or visits; process noise
    grows with the gap since the last visit. ``features``: None or (n, F) floating, equal for all rows of an id.
    Results are float64 on the CPU; no gradient flows, tensors are detached. Raises: ShapeError, NumericError,
    ConfigError, before anything is written.
    """

    def predict(self, ids: Sequence[Hashable], *, step: int, features: Tensor | None = None) -> Gaussian:
        """Belief about the value of each id at ``step``, (n,) float64; changes nothing."""
        ...

    def predictive(self, ids: Sequence[Hashable], *, step: int, features: Tensor | None = None) -> Gaussian:
        """Of one new reward of each id: the same mean, variance P + R; changes nothing."""
        ...

    def advantages(
        self, ids: Sequence[Hashable], reward: Tensor, *, step: int, features: Tensor | None = None
    ) -> Advantages:
        """Reward minus the leave-one-out predictive mean; changes nothing.

        ``b_j = (m/P + (S - r_j)/R) / (1/P + (n - 1)/R)`` with the belief N(m, P) from before these
        rewards: RLOO for P = inf, a tracked constant for P = 0, the prediction for a group of one.
        Everything but S - r_j comes from earlier updates (or, in the first batch ever, from other
        prompts), so a reward never moves its own baseline and the policy gradient stays unbiased.
        """
        ...

    def update(
        self,
        ids: Sequence[Hashable],
        reward: Tensor,
        *,
        step: int,
        features: Tensor | None = None,
        part: int = 0,
    ) -> Observed:
        """Absorb the known rewards of a batch.

        ``part`` numbers the rounds of one step. The same (id, step, part) twice is refused, so a replayed
        batch cannot count double. A batch of an earlier step than the id's last visit is *late*: it is
        absorbed as an observation of today's value with the process noise of the time between added to its
        variance, and the clock of the prompt does not move.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything learned, as tensors and plain Python; continues bit for bit after loading."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become the saved belief. ConfigError for another kind or format; then nothing has changed."""
        ...
