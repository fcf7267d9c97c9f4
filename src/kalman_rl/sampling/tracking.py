"""Beliefs inside the trainer: what is thought of each prompt, how many completions it gets, what that cost.

Every rank holds the same belief and sees the same gathered rewards in the same order, so all ranks decide alike
and nothing is broadcast.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.by_source import Sources
from kalman_rl.beliefs.groups import check_id
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.checks import expect, is_whole, reading, saved
from kalman_rl.errors import ConfigError, RunError
from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling.advice import FACTOR, INFORMATIVE, MOST, informative_share, noise_factor
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.coverage import Coverage
from kalman_rl.sampling.gains import NINETY
from kalman_rl.sampling.rounds import RoundPlan, Sampled
from kalman_rl.sampling.stream import PromptStream

COVERAGE_SHARE = 0.1
"""Most of a batch that is spent on prompts because they waited long: in a large pool all have when they come up."""


@dataclass
class Tracking:
    """A belief with its clock, its books and the features of prompts.

    Args:
        belief: read and updated.
        budget: how completions are divided.
        stream: draws the prompts of every batch from the whole pool, where the budget says so.
        sources: the table that ``belief`` looks prompts up in, where it learns by source; saved with it.
        observers: receive a :func:`~kalman_rl.sampling.records.belief_record` after every batch.
        written: prompts whose text the observers have seen.
    """

    belief: Belief
    budget: Budget
    sources: Sources | None = None
    last_step: int = -1
    stream: PromptStream | None = None
    coverage: Coverage = field(init=False)
    skipped: set[Hashable] = field(default_factory=set, repr=False)
    features: dict[Hashable, Tensor] = field(default_factory=dict, repr=False)
    observers: list[Callable[[dict[str, Any]], None]] = field(default_factory=list)
    written: set[Hashable] = field(default_factory=set, repr=False)

    def __post_init__(self) -> None:
        self.coverage = Coverage(self.budget.coverage_steps, COVERAGE_SHARE)

    def next_step(self, global_step: int) -> int:
        """The step of the next generation batch: the trainer's, but never the same twice."""
        return max(global_step, self.last_step + 1)

    def tick(self, global_step: int) -> int:
        """Begin the next generation batch; returns its step."""
        self.last_step = self.next_step(global_step)
        return self.last_step

    def known_features(self, ids: Sequence[Hashable]) -> Tensor | None:
        """(n, F) features noted for these prompts; None if there are none."""
        return torch.stack([self.features[name] for name in ids]) if self.features else None

    def plan(self, ids: Sequence[Hashable], *, step: int, total: int) -> RoundPlan:
        """Who of the candidates is sampled how often in this batch, of ``total`` completions."""
        return self._plan(ids, step, total, in_rounds=self.budget.allocation == "rounds")

    def expected_counts(self, ids: Sequence[Hashable], *, step: int, total: int) -> dict[Hashable, int]:
        """Completions each prompt would get from what is believed now, all at once; changes nothing."""
        request = self._plan(ids, step, total, in_rounds=False).next_round()
        return dict.fromkeys(ids, 0) | dict(request or [])

    def _plan(self, ids: Sequence[Hashable], step: int, total: int, *, in_rounds: bool) -> RoundPlan:
        budget = self.budget
        return RoundPlan(
            self.belief,
            ids,
            step=step,
            total=total,
            rounds=budget.rounds,
            max_rounds=budget.max_rounds if in_rounds else None,
            n_min=budget.completions_min,
            n_max=max(budget.completions_max, -(-total // len(ids))),
            aim=budget.aim,
            weighting="tau" if in_rounds else "equal",
            features=self.known_features(ids),
            reward_range=budget.reward_range,
            reward_noise_variance=budget.reward_noise_variance,
            coverage=self.coverage,
        )

    def open_stream(self, pool: Sequence[Hashable], count: int, *, group: int = 1, seed: int = 0) -> None:
        """Let batches of ``count`` prompts be drawn from ``pool``, with ``group`` completions for each draw.

        Raises: ConfigError, ShapeError for what :class:`~kalman_rl.sampling.stream.PromptStream` refuses.
        """
        budget = self.budget
        self.stream = PromptStream(
            self.belief,
            pool,
            count,
            score=budget.select,
            floor=budget.select_floor,
            power=budget.select_power,
            most=max(budget.completions_max // group, 1),
            weights=budget.select_weights,
            reward_range=budget.reward_range,
            reward_noise_variance=budget.reward_noise_variance,
            seed=seed,
        )

    def before(self, ids: Sequence[Hashable], step: int) -> tuple[Gaussian, Gaussian]:
        """What was predicted of each prompt: its value, and one new reward."""
        features = self.known_features(ids)
        value = self.belief.predict(ids, step=step, features=features)
        return value, self.belief.predictive(ids, step=step, features=features)

    def note(self, sampled: Sampled) -> None:
        """Book which prompts were passed over."""
        for name, tau in zip(sampled.prompts, sampled.tau.tolist()):
            (self.skipped.discard if tau else self.skipped.add)(name)

    def state_dict(self) -> dict[str, Any]:
        """Everything a resumed run needs to go on as if nothing had happened."""
        names = list(self.features)
        return {
            "belief": self.belief.state_dict(),
            "sources": [] if self.sources is None else self.sources.state_dict(),
            "coverage": self.coverage.state_dict(),
            "last_step": self.last_step,
            "stream": None if self.stream is None else self.stream.state_dict(),
            "skipped": sorted(self.skipped, key=repr),
            "feature_ids": names,
            "features": torch.stack([self.features[n] for n in names]) if names else torch.zeros(0, 0),
        }

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Continue from a checkpoint. Raises: RunError if there is none, ConfigError if it does not fit."""
        if state is None:
            raise RunError(
                "checkpoint: got no beliefs about prompts, expected those of the run; it was saved without a belief, "
                "or the save was cut short (last_good_checkpoint finds the one before)"
            )
        with reading("checkpoint's beliefs", state):
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        what = "checkpoint's beliefs"
        names = ("belief", "coverage", "last_step", "skipped", "feature_ids", "features", "sources", "stream")
        belief, coverage, last_step, skipped, ids, features, sources, stream = saved(what, state, *names)
        expect(what, "last_step", is_whole(last_step, -1), last_step, "a step")
        expect(what, "skipped", isinstance(skipped, list), skipped, "a list of names")
        legal = isinstance(features, Tensor) and features.dim() == 2 and bool(features.isfinite().all())
        legal = legal and features.is_floating_point() and isinstance(ids, list) and len(ids) == len(features)
        expect(what, "features", legal, features, "a finite row for each of feature_ids")
        for name in (*skipped, *ids):
            check_id(what, name)
        books = Coverage(self.coverage.every, self.coverage.share)
        books.load_state_dict(coverage)
        table = Sources()
        table.load_state_dict(sources)
        if (stream is None) != (self.stream is None):
            raise ConfigError(
                f"select: got a checkpoint {'without' if stream is None else 'of'} a stream of prompts, expected the "
                "same selection as before; resume with the settings the run began with"
            )
        draws = copy.copy(self.stream)
        if draws is not None:
            draws.load_state_dict(stream)
        self.belief.load_state_dict(belief)
        self.stream = draws
        self.coverage.load_state_dict(coverage)
        if self.sources is not None:
            self.sources.load_state_dict(sources)
        self.last_step, self.skipped = last_step, set(skipped)
        self.features = dict(zip(ids, features))


def fixed_groups(
    tracking: Tracking, names: list[Hashable], reward: Tensor, step: int, *, equal: bool = False
) -> Sampled:
    """Groups whose sizes were fixed before sampling: advantages from the belief, which then absorbs them.

    A completion's weight is 1 or, with ``equal``, the mean group size over its group's, so that every prompt counts
    the same; 0 where the reward is missing.
    """
    features = tracking.known_features(names)
    found = tracking.belief.advantages(names, reward, step=step, features=features)
    tracking.belief.update(names, reward, step=step, features=features)
    prompts = list(dict.fromkeys(names))
    tracking.coverage.visit(prompts, step=step)
    known = ~reward.isnan()
    place = {name: i for i, name in enumerate(prompts)}
    row = torch.tensor([place[name] for name in names])
    size = torch.bincount(row[known], minlength=len(prompts))
    mean = size.sum().double() / (size > 0).sum().clamp(min=1)
    weight = mean / size.clamp(min=1)[row] if equal else 1.0
    return Sampled(
        ids=names,
        reward=reward,
        advantage=found.advantage,
        weight=torch.where(known, weight, 0.0).double(),
        round=torch.zeros(len(names), dtype=torch.long),
        prompts=prompts,
        tau=torch.bincount(row, minlength=len(prompts)),
        stop_reason=["planned"] * len(prompts),
        price=None,
    )


def outcome_metrics(
    sampled: Sampled,
    first: tuple[list[Hashable], Tensor],
    predicted: tuple[Gaussian, Gaussian],
    tracking: Tracking,
    rows: int,
) -> dict[str, float]:
    """Numbers about one generation batch.

    ``budget/used`` and ``budget/saved`` completions, ``budget/prompts`` that got any, ``budget/largest`` group;
    ``groups/informative`` share of sampled groups with different rewards, absent where every group is of one;
    ``belief/coverage_90`` share of first rounds whose mean lay in the predicted 90 % interval; ``belief/retired``
    prompts passed over that were sampled when they last came up, ``belief/returned`` the reverse;
    ``belief/noise_factor`` F of all prompts visited so far, ``belief/informative`` (0/1 rewards only), see
    :mod:`~kalman_rl.sampling.advice`. Call before :meth:`Tracking.note`, after the belief has absorbed the batch.

    Args:
        first: ids and rewards of the first round.
        predicted: :meth:`Tracking.before` of ``sampled.prompts``.
        rows: completions that a fixed allocation would have used.
    """
    tau = sampled.tau.tolist()
    place = {name: i for i, name in enumerate(sampled.prompts)}
    rewards: dict[Hashable, set[float]] = {}
    for name, reward in zip(sampled.ids, sampled.reward.tolist()):
        if reward == reward:
            rewards.setdefault(name, set()).add(reward)
    inside = []
    value, new = predicted
    for name in dict.fromkeys(first[0]):
        known = [r for n, r in zip(first[0], first[1].tolist()) if n == name and r == r]
        if known:
            i = place[name]
            noise = float(new.variance[i] - value.variance[i])
            spread = math.sqrt(float(value.variance[i]) + noise / len(known))
            inside.append(abs(sum(known) / len(known) - float(value.mean[i])) <= NINETY * spread)
    informative = sum(len(v) > 1 for v in rewards.values()) / max(len(rewards), 1)
    passed = {name for name, n in zip(sampled.prompts, tau) if not n}
    return {
        "budget/used": float(sum(tau)),
        "budget/saved": float(rows - sum(tau)),
        "budget/prompts": float(sum(n > 0 for n in tau)),
        "budget/largest": float(max(tau)),
        **({"groups/informative": informative} if max(tau) > 1 else {}),
        "belief/coverage_90": sum(inside) / max(len(inside), 1),
        "belief/retired": float(len(passed - tracking.skipped)),
        "belief/returned": float(len((set(sampled.prompts) - passed) & tracking.skipped)),
        **_what_teaches(sampled, tracking),
    }


def _what_teaches(sampled: Sampled, tracking: Tracking) -> dict[str, float]:
    known = sampled.reward[~sampled.reward.isnan()]
    binary = tracking.budget.reward_range == "unit" and bool(((known == 0) | (known == 1)).all())
    value, new = tracking.before(tracking.coverage.visited(MOST), tracking.last_step)
    factor = noise_factor(value, None if binary else (new.variance - value.variance).clamp(min=0.0))
    found = {} if factor is None else {FACTOR: factor}
    if binary:  # before the first rewards of all nothing is believed, hence the belief of now
        now, _ = tracking.before(sampled.prompts, tracking.last_step)
        found[INFORMATIVE] = informative_share(now, sampled.tau)
    return found
