"""The stream of prompts: each batch is drawn from the whole pool, in proportion to what a prompt teaches.

No batch is drawn before the rewards of the one before it are known, and every prompt keeps a share, so all return.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kalman_rl.beliefs.groups import expect_names, places_of
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.checks import expect, expect_tensor, is_whole, reading, saved
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote, unknown_name
from kalman_rl.sampling.budget import check_select, check_shares
from kalman_rl.sampling.learnability import read_signal
from kalman_rl.sampling.sage import score, success_margin

SCORES = ("stream", "sage")
CANDIDATES = 16
"""In a larger pool the rule is applied to so many random candidates for each prompt of a batch."""
CONFIDENT = 3.0
"""Logits of failure from which SAGE's score takes a prompt for hopeless: success below 0.047."""


class Drawn(NamedTuple):
    """A batch of B: ``place`` (B,) in the pool, int64, and ``weight`` (B,) float64 of each one's loss, 1 on average."""

    place: Tensor
    weight: Tensor


class PromptStream:
    """Draws the B prompts of a batch; one of score s comes up ``pi`` times on average, rounded up or down,

    ``pi = min(most, c q)``, ``q = (1 - floor) s^power / sum s^power + floor / N``, c such that they sum to B.

    With ``most=1`` they are B different prompts. More lets draws concentrate where fewer than B prompts teach: in
    simulated pools of 256 with 77, 25 and 12 such prompts, accuracy over a run rose by 0.030 +- 0.004, 0.093 +- 0.011
    and 0.149 +- 0.023 with batches of 128 (``benchmarks/learning/concentrate.py``).

    The score ``stream`` is ``v = E[p (1 - p)]`` under the belief, the variance of a 0/1 reward. For graded rewards it
    is the part of the posterior predictive variance ``P + R`` of a reward that the policy can move, ``R`` less the
    scorer's noise: P is our own doubt about the prompt's value, and noise of the scorer teaches nothing. With
    ``reward_range="unit"`` that is bounded by ``m (1 - m) - P`` from the belief N(m, P); with "real" it is the belief's
    R, which ``auto`` pools over the prompts of a source, so that the stream then tells sources apart and no more.

    The score ``sage`` is :func:`~kalman_rl.sampling.sage.score` at the margin ``log(m / (1 - m))``, with the
    variance of the logit of ``Beta(a, b)``, ``psi'(a) + psi'(b)``, and 0 for errors of more than 3 logits.

    In a pool of more than 16 B prompts, 16 B candidates are drawn at random first and N stands for their number.

    Args:
        belief: read at every draw, never changed.
        pool: N different prompt ids. count: B, prompts per batch, 1 <= B <= N.
        score: stream or sage.
        floor: share f in (0, 1] drawn uniformly; each prompt comes with probability >= ``f B / N`` a batch.
        power: a >= 0 of the score; 0 is uniform.
        most: draws of one prompt in a batch, >= 1.
        weights: equal (the loss of what was drawn), or unbiased: ``B / (N pi)``, so that the batch estimates the
            uniform mean over the pool without bias.
        reward_range, reward_noise_variance: as :func:`~kalman_rl.sampling.learnability.read_signal` takes them.
        seed: of the own generator; the global one is not touched.

    Raises: ConfigError for an empty pool, repeated ids, or a setting out of range. ShapeError for a pool that is no
        list of names.

    >>> from kalman_rl.beliefs import make_belief
    >>> stream = PromptStream(make_belief("auto"), ["a", "b", "c"], 2)
    >>> sorted(stream.pool[i] for i in stream.draw(step=0).place) <= ["a", "b", "c"]
    True
    """

    def __init__(
        self,
        belief: Belief,
        pool: Sequence[Hashable],
        count: int,
        *,
        score: str = "stream",
        floor: float = 0.1,
        power: float = 1.0,
        most: int = 1,
        weights: str = "equal",
        reward_range: str = "unit",
        reward_noise_variance: float = 0.0,
        seed: int = 0,
    ) -> None:
        if score not in SCORES:
            raise unknown_name("score", score, SCORES)
        check_select(score, weights, reward_range)
        check_shares(floor, power)
        expect_names(pool, "pool")
        if not len(pool):
            raise ConfigError("pool: got no prompts, expected at least one to draw from")
        different = len(places_of(pool, "pool")[0])
        if different != len(pool):
            raise ConfigError(f"pool: got {len(pool)} ids, {different} different, expected different ids")
        if not is_whole(count, 1, len(pool)):
            raise ConfigError(
                f"count: got {quote(count)} prompts per batch, expected 1 to the pool's {len(pool)}; add "
                "prompts, or take fewer of them per batch"
            )
        if not is_whole(most, 1):
            raise ConfigError(f"most: got {quote(most)} draws of one prompt, expected a whole number >= 1")
        if not is_whole(seed):
            raise ConfigError(f"seed: got {quote(seed, 80)}, expected an integer >= 0")
        self.belief, self.pool, self.count = belief, list(pool), int(count)
        self.score, self.floor, self.power, self.most, self.weights = score, floor, power, most, weights
        self.reward_range, self.reward_noise_variance = reward_range, reward_noise_variance
        self._generator = torch.Generator().manual_seed(seed)
        self._draws = 0

    def draw(
        self,
        *,
        step: int,
        count: int | None = None,
        features: Callable[[Sequence[Hashable]], Tensor | None] | None = None,
    ) -> Drawn:
        """The next batch, in random order.

        Args:
            step: at which the belief is asked.
            count: prompts of this batch; None = as set.
            features: of prompts by id, (n, F), where the belief reads them.

        Raises: ConfigError for another count or features that are no function, and what the belief raises.
        """
        count = self.count if count is None else count
        if not is_whole(count, 1, len(self.pool)):
            raise ConfigError(f"count: got {quote(count)}, expected 1 to the pool's {len(self.pool)} prompts")
        if not callable(features) and features is not None:
            raise ConfigError(
                f"features: got {type(features).__name__}, expected a function of ids that returns (n, F) numbers"
            )
        candidate = some_of(len(self.pool), CANDIDATES * count, self._generator)
        ids = [self.pool[i] for i in candidate.tolist()]
        taught = self._scores(ids, step, None if features is None else features(ids)) ** self.power
        share = torch.full_like(taught, 1 / len(ids))
        if float(taught.sum()) > 0:
            share = (1 - self.floor) * taught / taught.sum() + self.floor * share
        mean = mean_draws(share, count, self.most)
        place = systematic(mean, self._generator)
        self._draws += 1
        weight = torch.ones(count, dtype=torch.float64)
        if self.weights == "unbiased":
            weight = count / (len(ids) * mean[place])
        return Drawn(candidate[place], weight)

    def _scores(self, ids: list[Hashable], step: int, features: Tensor | None) -> Tensor:
        signal = read_signal(
            self.belief,
            ids,
            step=step,
            features=features,
            reward_range=self.reward_range,
            reward_noise_variance=self.reward_noise_variance,
        )
        if self.score == "stream":
            return signal.variance
        assert signal.a is not None and signal.b is not None
        margin = success_margin(signal.a / (signal.a + signal.b))
        spread = torch.polygamma(1, signal.a) + torch.polygamma(1, signal.b)
        return score(margin, variance=spread, limit=CONFIDENT)

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands, and of which pool; :meth:`load_state_dict` goes on with the same draws."""
        return {
            "format": 1,
            "draws": self._draws,
            "generator": self._generator.get_state(),
            "prompts": len(self.pool),
            "pool": self._digest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the saved stream was. Raises: ConfigError for a damaged state, or that of another pool."""
        with reading("stream state", state):
            names = ("format", "draws", "generator", "prompts", "pool")
            form, draws, generator, prompts, pool = saved("stream state", state, *names)
            expect("stream state", "format", form == 1, form, "1")
            expect("stream state", "draws", is_whole(draws), draws, "a count")
            if (prompts, pool) != (len(self.pool), self._digest()):
                raise ConfigError(
                    f"pool: got {len(self.pool)} prompts that are not the {prompts} the run began with, expected the "
                    "same ids in the same order because draws go on by their place; resume with the old data, or "
                    "start a new run"
                )
            fresh = torch.Generator()
            fresh.set_state(generator)  # refuses what is no state before anything is written
            self._generator, self._draws = fresh, int(draws)

    def _digest(self) -> str:
        found = hashlib.sha256()
        for name in self.pool:
            found.update(repr(name).encode() + b"\n")
        return found.hexdigest()


def some_of(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, int64, every set alike probable; all in order where ``count`` is not
    below ``size``.

    >>> some_of(3, 5, torch.Generator())
    tensor([0, 1, 2])
    """
    if not (is_whole(size) and is_whole(count)):
        raise ConfigError(
            f"size, count: got {quote(size, 80)}, {quote(count, 80)}, expected whole numbers >= 0"
        )
    if count >= size:
        return torch.arange(size)
    if 4 * count > size:
        return torch.randperm(size, generator=generator)[:count]
    found = torch.zeros(0, dtype=torch.long)
    while len(found) < count:  # the first different ones of independent draws; few draws repeat
        more = torch.cat((found, torch.randint(size, (2 * count,), generator=generator)))
        order = more.argsort(stable=True)
        first = torch.ones(len(more), dtype=torch.bool)
        first[order[1:]] = more[order][1:] != more[order][:-1]
        found = more[first]
    return found[:count]


def mean_draws(share: Tensor, count: int, most: int = 1) -> Tensor:
    """Draws ``min(most, c q)`` (N,) float64 of each prompt on average, c such that they sum to B.

    Args: share: q (N,), > 0, finite; only their ratios count. count: B, from 1 to N most.
    Raises: NumericError for a share out of range, ConfigError for another count.

    >>> mean_draws(torch.tensor([5.0, 1.0, 1.0]), 2)
    tensor([1.0000, 0.5000, 0.5000], dtype=torch.float64)
    """
    expect_tensor("share", share, "a tensor (N,)")
    if share.is_complex() or share.dim() != 1:
        raise ShapeError(f"share: got {share.dtype}, shape {tuple(share.shape)}, expected real (N,)")
    if not is_whole(most, 1):
        raise ConfigError(f"most: got {quote(most, 80)}, expected a number of draws >= 1")
    share = share.double()
    if not ((share > 0) & share.isfinite()).all():
        raise NumericError("share: got one that is not > 0 and finite, expected shares that all prompts have")
    if not is_whole(count, 1, len(share) * most):
        raise ConfigError(f"count: got {quote(count)}, expected 1 to {len(share) * most}")
    ordered, order = share.sort(descending=True)
    rest = ordered.flip(0).cumsum(0).flip(0)  # what the k largest leave
    factor = (count - most * torch.arange(len(share), dtype=torch.float64)) / rest
    free = (
        factor * ordered <= most
    )  # whether the k-th largest is below the bound once those before it are at it
    bound = int(free.long().argmax()) if free.any() else len(share)
    found = torch.full_like(ordered, float(most))
    found[bound:] = factor[bound : bound + 1] * ordered[bound:]
    return torch.empty_like(found).index_copy_(0, order, found)


def systematic(mean: Tensor, generator: torch.Generator) -> Tensor:
    """Places (B,) int64, each of them its mean number of times, rounded up or down at random: exactly that on average.

    Systematic sampling in random order: the means stand end to end on a line of length B, and a place is taken for
    each of the points u, u + 1, ..., u + B - 1 that falls on it, u uniform in [0, 1).

    Args: mean: (N,), >= 0, of a whole sum B. Source: Madow (1949).
    """
    expect_tensor("mean", mean, "a tensor (N,)")
    order = torch.randperm(len(mean), generator=generator)
    start = torch.rand((), generator=generator, dtype=torch.float64)
    found = order[points(mean[order], round(float(mean.sum())), start)]
    return found[torch.randperm(len(found), generator=generator)]


def points(mean: Tensor, count: int, start: Tensor | float) -> Tensor:
    """Places (count,) on which ``start, start + 1, ...`` fall when the means stand end to end.

    >>> points(torch.tensor([0.5, 0.5, 1.0]), 2, 0.6)
    tensor([1, 2])
    """
    edge = mean.double().cumsum(0)
    edge = edge * (count / edge[-1])  # rounding of the sum
    at = start + torch.arange(count, dtype=torch.float64)
    return torch.searchsorted(edge, at, right=True).clamp(max=len(edge) - 1)
