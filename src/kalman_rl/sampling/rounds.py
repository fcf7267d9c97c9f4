"""Sampling a batch in rounds: look at the rewards, then decide who gets more, without bending the gradient.

A number of completions that depends on rewards is a stopping time, and the usual estimates over such a group
are
biased: "mean over tau" minus the group's mean over-weights prompts that are hard or easy by 2.4x
(`benchmarks/beliefs/implied.py`). Here the samples of a round take their baseline from the belief, from
*earlier* rounds and, leaving themselves out, from their own round, and it is decided between rounds who goes
on. Then every term of a round has mean ``g``, the prompt's gradient, whatever was decided before, and by
Wald's identity

    E[sum_j A_j grad log pi_j] = E[tau] g                       exactly, for every prompt

so the direction is right and the weight of a prompt is the expected number of its completions, E[tau].
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kalman_rl.beliefs.base import check_features
from kalman_rl.beliefs.groups import places_of
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.checks import is_whole
from kalman_rl.errors import ConfigError, NumericError, ShapeError, quote, unknown_name
from kalman_rl.sampling.allocate import (
    TIE_BREAK,
    check_books,
    check_bounds,
    gain_table,
    least_counts,
)
from kalman_rl.sampling.budget import check_aim, check_rounds
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.divide import divide, gradient_gains
from kalman_rl.sampling.gains import gradient_gain, mixed_group_gain, remaining_mixed_group_gains
from kalman_rl.sampling.learnability import Signal, read_signal
from kalman_rl.sampling.price import Price

WEIGHTINGS = ("tau", "equal", "mean")

Request = list[tuple[Hashable, int]]
"""Completions to sample next, as (prompt id, number > 0), in the order of the plan's ids."""


class Sampled(NamedTuple):
    """A finished plan.

    Per completion, in the order they were told, (n,): ``ids``, ``reward`` (NaN = missing), ``advantage`` (0
    where missing), ``weight`` (mean 1 over known rewards, 0 where missing; the gradient estimate is the mean
    over known completions of ``weight * advantage * grad log pi``), ``round``.
    Per prompt (u,): ``prompts`` as the plan was given them, ``tau`` completions sampled, ``stop_reason``:
    "gain" (worth less than the price), "mixed" (mixed groups, nothing left to gain), "n_max", "budget"
    (the total, or what a price's window allows, was used up elsewhere), "planned" (counts fixed before
    sampling) or "skipped" (none at all).
    ``price``: gain a completion had to be worth; None with a total.
    """

    ids: list[Hashable]
    reward: Tensor
    advantage: Tensor
    weight: Tensor
    round: Tensor
    prompts: list[Hashable]
    tau: Tensor
    stop_reason: list[str]
    price: float | None


class RoundPlan:
    """Decides, samples nothing itself::

        plan = RoundPlan(belief, ids, step=step, total=64)
        while (request := plan.next_round()) is not None:
            told = [name for name, k in request for _ in range(k)]
            plan.tell(told, sample_and_score(told))
        batch = plan.result()

    The belief absorbs every round in :meth:`tell` (``part`` = number of the round), so do not update it
    again.

    Args:
        belief: read and updated.
        ids: N different prompt ids. step: the current step.
        budget: mean completions per prompt, for this plan alone up to twice that; or
        price: the same with a :class:`~kalman_rl.sampling.price.Price` that is kept from step to step; or
        total: completions in all, used exactly. Exactly one of the three.
        rounds: completions per prompt and round; the last entry repeats.
        n_min, n_max: bounds on tau, 0 <= n_min <= n_max; with n_min 0 prompts can be skipped.
        aim: "gradient" or "mixed_groups", see :mod:`~kalman_rl.sampling.gains`.
        weighting: "tau" = the sum over samples divided by the mean tau of the batch. Exact direction, weight
            of a prompt E[tau] over the mean tau (exact with ``total``; otherwise up to the covariance of tau
            and its batch mean, which shrinks like 1/N).
            "equal" = counts are fixed from the belief before sampling (one round), each group divided by its
            own size: exactly unbiased with weight 1 for every prompt that is sampled.
            "mean" = rounds, each group divided by its own tau. Not exact: a prompt whose tau varies weighs
            more than 1 (2.4 at p = 0.02 where sampling stops at the first mixed group); see
            ``implied_weight`` of `benchmarks/beliefs/implied.py`.
        max_rounds: None, or the number of rounds after which a plan with a total must be done; the last one
            asks for all that is left.
        features: None or (N, F), in the order of ids.
        reward_range, reward_noise_variance: see :func:`~kalman_rl.sampling.learnability.read_signal`.
        coverage: prompts that are due are sampled at least once; visits are noted in it.

    Raises: ConfigError for an option out of range, an empty pool, or a total that no counts can meet. ShapeError for
        ids that are no list of names, or features of another shape.
    """

    def __init__(
        self,
        belief: Belief,
        ids: Sequence[Hashable],
        *,
        step: int,
        budget: float | None = None,
        total: int | None = None,
        price: Price | None = None,
        rounds: Sequence[int] = (2, 4),
        n_min: int = 2,
        n_max: int = 32,
        aim: str = "gradient",
        weighting: str = "tau",
        max_rounds: int | None = None,
        features: Tensor | None = None,
        reward_range: str = "unit",
        reward_noise_variance: float = 0.0,
        coverage: Coverage | None = None,
    ) -> None:
        check_aim(aim, reward_range)
        check_bounds(ids, n_min, n_max)
        check_rounds(rounds)
        check_books(price, coverage)
        check_features(features, len(ids))
        _check_options(weighting, max_rounds, (budget, total, price))
        if total is not None:
            _check_total(total, len(ids), n_min, n_max)
        self.belief, self.ids, self.step, self.total = belief, list(ids), step, total
        self.rounds, self.max_rounds, self.n_max = tuple(rounds), max_rounds, n_max
        self.aim, self.weighting, self.coverage = aim, weighting, coverage
        self.price = Price(budget) if budget is not None else price
        self._features, self._kind, self._noise = features, reward_range, reward_noise_variance
        self._place = {name: i for i, name in enumerate(self.ids)}
        self._least = least_counts(self.ids, step, n_min, n_max, total, aim, coverage)
        self._tau = torch.zeros(len(ids), dtype=torch.long)
        self._low = torch.full((len(ids),), torch.inf, dtype=torch.float64)
        self._high = -self._low
        self._stopped: dict[int, str] = {}
        self._told: list[tuple[list[Hashable], Tensor, Tensor]] = []  # ids, rewards, advantages of each round
        self._request: Request | None = None
        self._finished = False
        # One scale for the whole step, from before it: a scale that moved between rounds would be a weight.
        nothing = torch.full((len(ids),), torch.nan, dtype=torch.float64)
        scale = belief.advantages(self.ids, nothing, step=step, features=features).scale
        self._scale = scale.expand(len(ids)) if scale.dim() == 0 else scale
        self._price = None if self.price is None else self._starting_price(self.price)

    # ---- the loop

    def next_round(self) -> Request | None:
        """What to sample next, or None when the plan is finished.

        Raises: ConfigError if the last request was not answered by :meth:`tell`.
        """
        if self._request is not None:
            raise ConfigError(f"next_round: got a call before tell() for round {len(self._told)}")
        if self._finished:
            return None
        more = self._choose().tolist()
        self._request = [(name, n) for name, n in zip(self.ids, more) if n] or None
        if self._request is None:
            self._finish()
        return self._request

    def tell(self, ids: Sequence[Hashable], reward: Tensor) -> None:
        """Rewards of the requested completions, in any order; the belief absorbs them.

        Args:
            ids: the prompt of each completion; as many of each as requested.
            reward: (n,) numbers, NaN = missing (it was sampled all the same, and counts).

        Raises:
            ConfigError: nothing was requested, or other completions were. ShapeError, NumericError: from the
            belief, or a reward outside [0, 1] with ``reward_range="unit"``. Nothing has changed then.
        """
        if self._request is None:
            raise ConfigError("tell: got rewards that were not requested, expected next_round() before")
        places_of(ids)
        got, wanted = Counter(ids), Counter(dict(self._request))
        if got != wanted:
            name = next(iter((got - wanted) + (wanted - got)))
            raise ConfigError(
                f"tell: got {got[name]} completions of prompt {quote(name)}, expected {wanted[name]}; tell "
                "every requested completion, a failed one with reward NaN"
            )
        self._check_rewards(reward, len(ids))
        rows = torch.tensor([self._place[name] for name in ids])
        features = None if self._features is None else self._features[rows]
        reward = reward.detach().to(device="cpu", dtype=torch.float64)
        found = self.belief.advantages(ids, reward, step=self.step, features=features)
        self.belief.update(ids, reward, step=self.step, features=features, part=len(self._told))
        known = ~reward.isnan()
        some = known & (found.advantage != 0)  # what the belief takes for rounding stays 0
        advantage = torch.where(some, (reward - found.baseline) / self._scale[rows], 0.0)
        self._tau += torch.bincount(rows, minlength=len(self.ids))
        self._low.scatter_reduce_(0, rows[known], reward[known], "amin")
        self._high.scatter_reduce_(0, rows[known], reward[known], "amax")
        self._told.append((list(ids), reward, advantage))
        self._request = None

    def result(self) -> Sampled:
        """The batch. Raises: ConfigError before the plan is finished."""
        if not self._finished:
            raise ConfigError(
                "result: got a call before the plan is finished, expected next_round() to be None"
            )
        ids = [name for names, _, _ in self._told for name in names]
        empty = torch.zeros(0, dtype=torch.float64)
        reward = torch.cat([r for _, r, _ in self._told] or [empty])
        sizes = [len(names) for names, _, _ in self._told]
        number = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes, dtype=torch.long))
        return Sampled(
            ids=ids,
            reward=reward,
            advantage=torch.cat([a for _, _, a in self._told] or [empty]),
            weight=self._weights(ids, ~reward.isnan()),
            round=number,
            prompts=list(self.ids),
            tau=self._tau.clone(),
            stop_reason=[self._reason(i) for i in range(len(self.ids))],
            price=self._price,
        )

    # ---- decisions

    def _choose(self) -> Tensor:
        """(N,) completions of the next round."""
        number = len(self._told)
        k = self.rounds[min(number, len(self.rounds) - 1)]
        if self.weighting == "equal":
            return self._planned() if number == 0 else torch.zeros_like(self._tau)
        if self.total is None:
            return self._worth_it(k)
        if int(self._tau.sum()) == self.total:
            return torch.zeros_like(self._tau)
        counts = self._divided(self.total, torch.maximum(self._tau, self._least))
        last = self.max_rounds is not None and number + 1 >= self.max_rounds
        return counts - self._tau if last else (counts - self._tau).clamp(max=k)

    def _planned(self) -> Tensor:
        """Counts from the belief before sampling."""
        if self.total is not None:
            return self._divided(self.total, self._least)
        assert self.price is not None
        table = gain_table(self._signal(), self.aim, self.n_max)
        return self.price.divide(table, self._least, self._most()).counts

    def _divided(self, total: int, least: Tensor) -> Tensor:
        """All of a total, given what is known now; only the next k of it will be sampled."""
        return divide(self._gains_from_here(), total, least, self._most()).counts

    def _worth_it(self, k: int) -> Tensor:
        """k more for prompts that are worth the price or below their minimum; the others stop for good.

        Where that is more or less than the budget allows, the best go on, as with a total.
        """
        assert self.price is not None and self._price is not None
        signal = self._signal()
        room = self.n_max - self._tau
        more = torch.zeros_like(self._tau)
        for size in sorted(set(room.clamp(max=k).tolist()) - {0}):
            rows = room.clamp(max=k) == size
            go_on = rows & ((self._gain(signal, size) >= self._price) | (self._tau < self._least))
            more[go_on] = size
        more[list(self._stopped)] = 0
        mixed = self._high > self._low
        for i in (more == 0).nonzero().flatten().tolist():
            done = self.aim == "mixed_groups" and bool(mixed[i])
            self._stopped.setdefault(i, "n_max" if room[i] == 0 else "mixed" if done else "gain")
        low, high = self.price.window(self._least, self._most())
        spent, wanted = int(self._tau.sum()), int(more.sum())
        floor = torch.maximum(self._tau, self._least)
        if spent + wanted > high:
            allowed = self._divided(max(high, int(floor.sum())), floor) - self._tau
            return torch.minimum(more, allowed)
        if not wanted and spent < low:
            return (self._divided(low, floor) - self._tau).clamp(max=k)
        return more

    def _gain(self, signal: Signal, k: int) -> Tensor:
        if self.aim == "gradient" or signal.a is None or signal.b is None:
            return gradient_gain(signal.variance, self._tau, k)
        return mixed_group_gain(signal.a, signal.b, *self._outcomes(), k)

    def _gains_from_here(self) -> Tensor:
        """(N, n_max) gain table that knows the rewards so far; entries before tau are not for sale."""
        signal = self._signal()
        gradient = gradient_gains(signal.variance, self.n_max)
        if self.aim == "gradient" or signal.a is None or signal.b is None:
            return gradient
        ahead = remaining_mixed_group_gains(signal.a, signal.b, *self._outcomes(), self.n_max)
        place = (torch.arange(self.n_max) - self._tau[:, None]).clamp(min=0)
        gradient[self._tau == 0, 0] = 0.0  # one alone is never mixed
        return ahead.gather(1, place) + TIE_BREAK * gradient

    def _outcomes(self) -> tuple[Tensor, Tensor]:
        """(N,) bool each: some reward was a success; some was a failure."""
        seen, mixed = self._high >= self._low, self._high > self._low
        return mixed | (seen & (self._high > 0.5)), mixed | (seen & (self._high <= 0.5))

    def _signal(self) -> Signal:
        return read_signal(
            self.belief,
            self.ids,
            step=self.step,
            features=self._features,
            reward_range=self._kind,
            reward_noise_variance=self._noise,
        )

    def _starting_price(self, price: Price) -> float:
        return price.start(gain_table(self._signal(), self.aim, self.n_max), self._least, self._most())

    def _most(self) -> Tensor:
        return torch.full_like(self._tau, self.n_max)

    def _finish(self) -> None:
        self._finished = True
        if self.price is not None:
            self.price.update(self._tau.double().mean().item(), len(self.ids))
        if self.coverage is not None:
            self.coverage.visit([self.ids[i] for i in self._tau.nonzero().flatten().tolist()], step=self.step)

    def _reason(self, i: int) -> str:
        if self._tau[i] == 0:
            return "skipped"
        if self.weighting == "equal":
            return "planned"
        if i in self._stopped or self._tau[i] == self.n_max:
            return self._stopped.get(i, "n_max")
        return "mixed" if self.aim == "mixed_groups" and self._high[i] > self._low[i] else "budget"

    def _weights(self, ids: list[Hashable], known: Tensor) -> Tensor:
        if self.weighting == "tau" or not known.any():
            return known.double()
        rows = torch.tensor([self._place[name] for name in ids])
        size = torch.bincount(rows[known], minlength=len(self.ids))
        mean = size.sum().double() / (size > 0).sum()
        return torch.where(known, mean / size.clamp(min=1)[rows], 0.0)

    def _check_rewards(self, reward: Tensor, n: int) -> None:
        if not isinstance(reward, Tensor) or reward.shape != (n,):
            got = tuple(reward.shape) if isinstance(reward, Tensor) else type(reward).__name__
            raise ShapeError(f"reward: got {got}, expected a tensor ({n},): one number per id")
        bad = (reward < 0) | (reward > 1) if self._kind == "unit" else reward.isinf()
        if bad.any():
            row = int(bad.nonzero()[0])
            unit = "[0, 1], or NaN for missing; rescale, or choose reward_range='real'"
            expected = unit if self._kind == "unit" else "a finite number, or NaN for missing"
            raise NumericError(f"reward: got {reward[row].item()} at row {row}, expected {expected}")


def _check_options(weighting: str, max_rounds: int | None, budgets: tuple[object, ...]) -> None:
    if weighting not in WEIGHTINGS:
        raise unknown_name("weighting", weighting, WEIGHTINGS)
    if sum(value is not None for value in budgets) != 1:
        raise ConfigError(
            f"budget, total, price: got {', '.join(map(repr, budgets))}, expected exactly one of them"
        )
    if max_rounds is not None and (not is_whole(max_rounds, 1) or budgets[1] is None):
        raise ConfigError(
            f"max_rounds: got {quote(max_rounds)}, expected None, or an integer >= 1 together with total"
        )


def _check_total(total: int, prompts: int, n_min: int, n_max: int) -> None:
    low, high = prompts * n_min, prompts * n_max
    if not is_whole(total, max(low, 1), high):
        raise ConfigError(
            f"total: got {quote(total)} completions for {prompts} prompts, expected {max(low, 1)} to {high} "
            f"(n_min {n_min} to n_max {n_max} each); change the total, n_min, n_max or the number of prompts"
        )
