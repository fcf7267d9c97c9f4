"""One training run: sample, score, estimate advantages, update, and compute how often the policy is right.

A short loop that only joins the package's parts: a method of the catalogue, a belief with its books (``Tracking``),
``policy_loss``. AdamW (0.9, 0.95), gradient norm at most 1, no decay; the rate rises linearly for 20 updates and then
stays.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import Tracked
from kalman_rl.beliefs.protocol import Belief
from kalman_rl.engine.models.weights import rounded
from kalman_rl.engine.tasks.task import Row
from kalman_rl.errors import ConfigError, quote
from kalman_rl.instruments.reproduce.policy import Policy, Replies, joined
from kalman_rl.instruments.reproduce.pool import KINDS, MATHS, Mix, Pool, World, draw_pool
from kalman_rl.instruments.reproduce.watch import Record, Watched, squared_errors
from kalman_rl.methods import make_method
from kalman_rl.objectives.diagnostics import sample_sizes, share_left
from kalman_rl.objectives.loss import Method, policy_loss
from kalman_rl.objectives.rollouts import Rollouts
from kalman_rl.sampling.budget import Budget
from kalman_rl.sampling.stream import PromptStream, mean_draws, systematic
from kalman_rl.sampling.tracking import Tracking, fixed_groups

BETAS, NORM = (0.9, 0.95), 1.0
SIZE = "effective_sample_size/sequences_raw"
FLOOR = 0.1
"""Share of draws that are uniform, of the stream and with the exact p."""


@dataclass(frozen=True)
class Setting:
    """What all arms of an experiment have in common.

    Args:
        mix: shares of hopeless, in between and solved questions. size: of the pool.
        budget: completions of a run.
        updates: optimizer steps per pass over a generation batch. passes: over each batch.
        noise: standard deviation added to every reward. offset: of a constant per question.
        lag: generation batches by which the sampler's weights are behind.
        bits: of the sampler's weights; 0 = as they are.
        warm_up: updates in which the rate rises linearly.
        points: equally spaced measurements of a run, beside the one at its start.
        watched: beliefs that see the rewards without taking part; then every completion's question and reward and
            every question's success at each point are kept as well.
    """

    mix: Mix = MATHS
    size: int = 256
    budget: int = 8192
    updates: int = 4
    passes: int = 1
    noise: float = 0.0
    offset: float = 0.0
    lag: int = 0
    bits: int = 0
    warm_up: int = 20
    points: int = 16
    watched: tuple[Watched, ...] = ()


class Draw(Protocol):
    """A way to draw questions by the belief; its ``repr`` says all that decides it."""

    def stream(self, belief: Belief, names: Sequence[Hashable], count: int, seed: int) -> PromptStream:
        """The stream of a run; ``count`` questions a batch."""
        ...

    def source(self, rows: Sequence[Row]) -> Callable[[Hashable], Hashable] | None:
        """Id -> what has a belief of its own; None = one belief for all."""
        ...


@dataclass(frozen=True)
class Arm:
    """What one arm does its own way.

    Args:
        method: name of the catalogue: ratio, clip and aggregation. options: of the method.
        advantage: the method whose advantage is taken; "" = its own; "true" = reward minus the exact success.
        group: completions per question. batch: completions per generation batch.
        rate: learning rate. end_rate: reached linearly; 0 = constant.
        belief: options of the belief of a tracked advantage.
        draw: "passes" over the pool, "stream" by the belief's E[p (1 - p)], "sage" by SAGE's score, "true" by the
            exact p (1 - p), or a stream of its own.
        allocation: as in :class:`~kalman_rl.sampling.budget.Budget`. candidates: questions it chooses among.
        old: what the ratio is taken to: the "trainer"'s own policy before the update, or the "sampler".
        correction: of the sampler's mismatch, for an ``old`` that is the trainer's; None = none.
    """

    method: str = "grpo"
    options: tuple[tuple[str, float], ...] = ()
    advantage: str = ""
    group: int = 8
    batch: int = 128
    rate: float = 1e-4
    end_rate: float = 0.0
    belief: tuple[tuple[str, Any], ...] = ()
    draw: Literal["passes", "stream", "sage", "true"] | Draw = "passes"
    allocation: Literal["fixed", "predictive", "rounds"] = "fixed"
    candidates: int = 0
    old: Literal["trainer", "sampler"] = "sampler"
    correction: Callable[[Rollouts], Tensor] | None = None


@dataclass(frozen=True)
class Training:
    """A trial: one arm in one setting.

    ``rates`` and ``clips`` (of both sides) are tried on tuning seeds, each rate with each clip; where none are, the
    arm's own stands.
    """

    setting: Setting
    arm: Arm
    rates: tuple[float, ...] = field(default=(), repr=False)
    clips: tuple[float, ...] = field(default=(), repr=False)

    def run(self, worlds: Callable[[], World], seed: int) -> dict[str, Any]:
        """See :func:`train`."""
        return train(worlds(), self.setting, self.arm, seed)

    def variants(self) -> dict[str, Training]:
        """One trial for each that is tried, called by what differs."""
        tried = {"": self.arm}
        if self.rates:
            tried = {f"{rate:g}": replace(self.arm, rate=rate) for rate in self.rates}
        if self.clips:
            tried = {
                f"{name}{' ' if name else ''}clip {clip:g}": clipped(arm, clip)
                for name, arm in tried.items()
                for clip in self.clips
            }
        return {name: Training(self.setting, arm) for name, arm in tried.items() if name}


def clipped(arm: Arm, clip: float) -> Arm:
    """The arm with this distance of the clip's two ends from a ratio of 1."""
    others = tuple(option for option in arm.options if option[0] not in ("low", "high"))
    return replace(arm, options=(*others, ("low", clip), ("high", clip)))


def train(world: World, setting: Setting, arm: Arm, seed: int, *, signals: bool = False) -> dict[str, Any]:
    """One run from the world's start; the policy is left as trained.

    Args: signals: keep two numbers of every update: ``grad_norm`` before clipping, and ``size``, the effective sample
        size of the sequences' ratios, as a share.

    Returns: ``spent`` completions and ``accuracy`` on the pool at the start and ``points`` times; ``mean`` and
        ``final`` of it, and ``kept``, final over best; ``held_out``; final accuracy by kind; every batch's ``reward``,
        its share of right replies; ``apart``, the mean distance of trainer and sampler in nats a token, where they
        differ; ``watched`` beliefs' squared errors at every point; with a belief ``calibration``, squared errors of its
        predictions over the variance it predicted; ``seconds``.
    """
    run = _Run(world, setting, arm, seed)
    start = time.monotonic()
    batches = setting.budget // arm.batch
    measured = [round(batches * point / setting.points) for point in range(setting.points + 1)]
    found: dict[str, Any] = {"spent": [], "accuracy": [], "reward": []}
    for batch in range(batches + 1):
        if batch in measured:
            success = run.policy.success(run.pool.rows)
            found["spent"].append(batch * arm.batch)
            found["accuracy"].append(success.mean().item())
            if setting.watched:
                found.setdefault("success", []).append(success.tolist())
        if batch < batches:
            found["reward"].append(run.batch(batch, batches))
    found["mean"] = sum(found["accuracy"][1:]) / len(found["accuracy"][1:])
    found["final"] = found["accuracy"][-1]
    found["kept"] = found["final"] / max(found["accuracy"])
    found["held_out"] = run.policy.success(run.pool.held_out).mean().item()
    for kind, name in enumerate(KINDS):
        if (run.pool.kind == kind).any():
            found[name] = success[run.pool.kind == kind].mean().item()
    if run.surprise:
        expected = sum(variance for _, variance in run.surprise)
        found["calibration"] = sum(error for error, _ in run.surprise) / expected
    if setting.watched:
        clock = setting.updates * setting.passes
        found["record"] = run.record
        found["watched"] = {
            watched.name: squared_errors(
                watched, run.pool.rows, run.record, found["success"], measured, clock
            )
            for watched in setting.watched
        }
    if signals:
        found |= run.signals
    if run.apart:
        found["apart"] = sum(run.apart) / len(run.apart)
    return found | {"seconds": time.monotonic() - start}


class _Run:
    """The state of a run."""

    def __init__(self, world: World, setting: Setting, arm: Arm, seed: int) -> None:
        self.setting, self.arm = setting, arm
        self.policy: Policy = world.policy
        self.policy.load(world.start)
        self.pool: Pool = draw_pool(world, setting.mix, setting.size, seed)
        self.names: list[Hashable] = [row["prompt_id"] for row in self.pool.rows]
        self.place = {name: i for i, name in enumerate(self.names)}
        self.generator = torch.Generator().manual_seed(seed)
        self.order = _passes(len(self.names), random.Random(f"order {seed}"))
        offsets = torch.randn(len(self.names), generator=torch.Generator().manual_seed(seed + 1))
        self.offset = setting.offset * offsets
        self.method = method_of(arm)
        self.estimator = make_method(arm.advantage).advantage if arm.advantage not in ("", "true") else None
        if arm.belief:
            self.estimator = Tracked(options=arm.belief)
        self.tracking: Tracking | None = None
        advantage = self.estimator or self.method.advantage
        if isinstance(advantage, Tracked) and arm.advantage != "true":
            source = None if isinstance(arm.draw, str) else arm.draw.source(self.pool.rows)
            self.tracking = Tracking(advantage.make(source), Budget(allocation=arm.allocation))
        self.stream: PromptStream | None = None
        if arm.draw not in ("passes", "true"):
            if self.tracking is None:
                raise ConfigError(
                    f"draw: got {quote(arm.draw)} with advantage {quote(arm.advantage)}, expected a tracked one"
                )
            belief, count = self.tracking.belief, arm.batch // arm.group
            if isinstance(arm.draw, str):
                self.stream = PromptStream(belief, self.names, count, score=arm.draw, floor=FLOOR, seed=seed)
            else:
                self.stream = arm.draw.stream(belief, self.names, count, seed)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), arm.rate, BETAS, weight_decay=0.0)
        self.past: deque[dict[str, Tensor]] = deque([world.start], setting.lag + 1)
        self.step = 0
        self.surprise: list[tuple[float, float]] = []
        self.apart: list[float] = []
        self.record: Record = []
        self.signals: dict[str, list[float]] = {"grad_norm": [], "size": []}

    def batch(self, number: int, batches: int) -> float:
        """Sample a generation batch and update on it; returns the share of right replies."""
        if self.arm.allocation != "fixed":
            names, replies, advantage = self._allocated()
        else:
            exact = "true" in (self.arm.draw, self.arm.advantage)
            success = self.policy.success(self.pool.rows) if exact else None
            names = self._drawn(success)
            replies = self._sample(names)
            advantage = self._advantage(names, replies, success)
        old = replies.logp
        if self.setting.lag or self.setting.bits:
            with torch.no_grad():
                now = self.policy.logp(replies)
            self.apart.append((now - old)[replies.mask].abs().mean().item())
            old = now if self.arm.old == "trainer" else old
        rollouts = Rollouts(old, replies.mask, logp_behaviour=replies.logp)
        total = batches * self.setting.updates * self.setting.passes
        for _ in range(self.setting.passes):
            order = torch.randperm(len(names), generator=self.generator)
            for rows in order.chunk(self.setting.updates):
                self._update(replies.rows(rows), _rows(rollouts, rows), advantage[rows], total)
        if self.setting.lag:
            self.past.append(self.policy.state())
        return replies.right.mean().item()

    def _update(self, replies: Replies, rollouts: Rollouts, advantage: Tensor, total: int) -> None:
        rate, end = self.arm.rate, self.arm.end_rate or self.arm.rate
        rate = (rate + (end - rate) * self.step / total) * min(1.0, (self.step + 1) / self.setting.warm_up)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = policy_loss(self.method, rollouts, self.policy.logp(replies), advantage=advantage)
        self.optimizer.zero_grad()
        loss.value.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), NORM)
        self.optimizer.step()
        self.signals["grad_norm"].append(norm.item())
        sizes = sample_sizes(loss.tokens.log_ratio, loss.tokens.coefficient, rollouts)
        self.signals["size"].append(share_left(sizes[SIZE]).item())
        self.step += 1

    def _drawn(self, success: Tensor | None) -> list[Hashable]:
        """The question of every completion of a batch; ``success`` (N,) of the pool, where the arm knows it."""
        prompts = self.arm.batch // self.arm.group
        if self.arm.draw == "passes":
            chosen = [next(self.order) for _ in range(prompts)]
        elif self.arm.draw == "true":
            assert success is not None
            chosen = drawn(success * (1 - success), prompts, self.generator)
        else:
            assert self.stream is not None
            chosen = self.stream.draw(step=self.step).place.tolist()
        return [self.names[i] for i in chosen for _ in range(self.arm.group)]

    def _sample(self, names: list[Hashable]) -> Replies:
        rows = [self.pool.rows[self.place[name]] for name in names]
        if not (self.setting.lag or self.setting.bits):
            return self.policy.sample(rows, self.generator)
        now = self.policy.state()
        sampler = self.past[0] if self.setting.lag else now
        self.policy.load(rounded(sampler, self.setting.bits) if self.setting.bits else sampler)
        replies = self.policy.sample(rows, self.generator)
        self.policy.load(now)
        return replies

    def _reward(self, names: list[Hashable], replies: Replies) -> Tensor:
        places = torch.tensor([self.place[name] for name in names])
        noise = torch.randn(len(names), generator=self.generator)
        reward = (replies.right + self.offset[places] + self.setting.noise * noise).double()
        if self.setting.watched:
            self.record.append(list(zip(places.tolist(), reward.tolist())))
        return reward

    def _advantage(self, names: list[Hashable], replies: Replies, success: Tensor | None) -> Tensor:
        reward = self._reward(names, replies)
        if self.arm.advantage == "true":
            assert success is not None
            return (reward - success[[self.place[name] for name in names]]).float()
        if self.tracking is not None:
            self._note(self.tracking.belief, names, reward)
            step = self.tracking.tick(self.step)
            return fixed_groups(self.tracking, names, reward, step).advantage.float()
        group = torch.tensor([self.place[name] for name in names])
        return (self.estimator or self.method.advantage)(reward, group).float()

    def _note(self, belief: Belief, names: list[Hashable], reward: Tensor) -> None:
        """How far one reward of each question was from its prediction, and how far it was expected to be."""
        first = [names.index(name) for name in dict.fromkeys(names)]
        told = belief.predictive([names[i] for i in first], step=self.step)
        if self.step:
            self.surprise.append(
                ((reward[first] - told.mean).square().sum().item(), told.variance.sum().item())
            )

    def _allocated(self) -> tuple[list[Hashable], Replies, Tensor]:
        """A batch whose completions are divided among candidates by the belief."""
        assert self.tracking is not None
        candidates = [self.names[next(self.order)] for _ in range(self.arm.candidates)]
        candidates = list(dict.fromkeys(candidates))
        step = self.tracking.tick(self.step)
        plan = self.tracking.plan(candidates, step=step, total=self.arm.batch)
        parts: list[Replies] = []
        while (request := plan.next_round()) is not None:
            names = [name for name, count in request for _ in range(count)]
            parts.append(self._sample(names))
            plan.tell(names, self._reward(names, parts[-1]))
        sampled = plan.result()
        return sampled.ids, joined(parts), (sampled.advantage * sampled.weight).float()


def method_of(arm: Arm) -> Method:
    """The arm's method, with its correction."""
    return replace(make_method(arm.method, **dict(arm.options)), correction=arm.correction)


def drawn(variance: Tensor, count: int, generator: torch.Generator) -> list[int]:
    """``count`` different places, drawn as :class:`PromptStream` does, by exact variances (N,) in place of a belief."""
    share = variance / variance.sum() if variance.sum() > 0 else torch.full_like(variance, 1 / len(variance))
    share = (1 - FLOOR) * share + FLOOR / len(variance)
    chosen: list[int] = systematic(mean_draws(share, count, 1), generator).tolist()
    return chosen


def _rows(rollouts: Rollouts, rows: Tensor) -> Rollouts:
    behaviour = rollouts.logp_behaviour
    assert behaviour is not None
    return Rollouts(rollouts.logp_old[rows], rollouts.mask[rows], logp_behaviour=behaviour[rows])


def _passes(size: int, rng: random.Random) -> Iterator[int]:
    """Places of a pool, in a new order in every pass."""
    while True:
        yield from rng.sample(range(size), size)
