"""Advantages by definition, one completion at a time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kalman_rl.beliefs.advantage import JamesStein, Tracked
from kalman_rl.objectives import advantage
from kalman_rl.objectives.rollouts import Rollouts


def _z_score(part: advantage.GroupZScore, reward: float, group: list[float]) -> float:
    return (reward - statistics.fmean(group)) / (statistics.stdev(group) + part.epsilon)


def _centred(part: Any, reward: float, group: list[float]) -> float:
    return reward - statistics.fmean(group)


def _leave_one_out(part: Any, reward: float, group: list[float]) -> float:
    return reward - (sum(group) - reward) / (len(group) - 1)


def _relative(part: Any, reward: float, group: list[float]) -> float:
    return (reward - statistics.fmean(group)) / statistics.fmean(group)


def _constant(part: advantage.ConstantBaseline, reward: float, group: list[float]) -> float:
    return reward - part.value


BY_GROUP: dict[Any, Callable[[Any, float, list[float]], float]] = {
    advantage.GroupZScore: _z_score,
    advantage.group_centred: _centred,
    advantage.leave_one_out: _leave_one_out,
    advantage.group_relative: _relative,
    advantage.ConstantBaseline: _constant,
}
"""Advantages that look at one reward and the rewards of its group."""


def _rescaled(part: advantage.Rescaled, r: list[float], group: list[int], rollouts: Rollouts) -> Tensor:
    by_group = {g: [x for x, other in zip(r, group) if other == g] for g in group}
    teaching = sum(x != 0 if part.by_zeros else len(set(by_group[g])) > 1 for x, g in zip(r, group))
    alpha = len(r) / teaching
    return _float64([alpha * (x - statistics.fmean(by_group[g])) / part.norm for x, g in zip(r, group)])


def _length_weighted(part: Any, r: list[float], group: list[int], rollouts: Rollouts) -> Tensor:
    n, out = [int(row.sum()) for row in rollouts.mask], []
    for x, g in zip(r, group):
        members = [i for i, other in enumerate(group) if other == g]
        out.append(x - sum(n[i] * r[i] for i in members) / sum(n[i] for i in members))
    return _float64(out)


def _token_baseline(
    part: advantage.OptimalTokenBaseline, r: list[float], group: list[int], rollouts: Rollouts
) -> Tensor:
    assert rollouts.score_norm_squared is not None
    places = [row.nonzero().flatten().tolist() for row in rollouts.mask]
    out = torch.zeros_like(rollouts.logp_old)
    for i, g in enumerate(group):
        for rank, t in enumerate(places[i]):
            alive = [j for j, other in enumerate(group) if other == g and len(places[j]) > rank]
            gathered = [rollouts.score_norm_squared[j, places[j][: rank + 1]].sum().item() for j in alive]
            if len(alive) == 1:
                out[i, t] = 0.0 if part.silent_tail else r[i]
            else:
                out[i, t] = r[i] - sum(w * r[j] for w, j in zip(gathered, alive)) / sum(gathered)
    return out


def _group_filter(
    part: advantage.GroupFilter, r: list[float], group: list[int], rollouts: Rollouts
) -> Tensor:
    out = []
    for i, g in enumerate(group):
        others = [j for j, other in enumerate(group) if other == g]
        seen = [j for j in others if j != i] if part.invariant else [j for j in others if j <= i]
        m, p = 0.0, part.initial_variance
        for j in seen:
            p = p + (0.0 if part.invariant else part.process_noise)
            m, p = m + p / (p + part.observation_noise) * (r[j] - m), 1 / (1 / p + 1 / part.observation_noise)
        scale = math.sqrt(p + part.observation_noise) if part.invariant else math.sqrt(p) + part.epsilon
        out.append((r[i] - m) / scale)
    return _float64(out)


def _batch_filter(
    part: advantage.BatchFilter, r: list[float], group: list[int], rollouts: Rollouts
) -> Tensor:
    m, p, noise, states = 0.0, part.initial_variance, part.observation_noise, []
    for x in r:
        p = p + part.process_noise
        surprise = x - m
        m, p = m + p / (p + noise) * surprise, 1 / (1 / p + 1 / noise)
        noise = part.adapt * noise + (1 - part.adapt) * surprise**2
        states.append((m, p))
    used = states[-1:] * len(r) if part.final else states
    return _float64([(x - m) / (math.sqrt(p) + part.epsilon) for x, (m, p) in zip(r, used)])


def _first_visit(part: Any, r: list[float], group: list[int], rollouts: Rollouts) -> Tensor:
    """Leave-one-out James-Stein: the prior of a group from the other groups, then from its other members."""
    names = list(dict.fromkeys(group))
    families = {g: [x for x, other in zip(r, group) if other == g] for g in names}
    out = []
    for x, g in zip(r, group):
        others = [families[k] for k in names if k != g]
        means, sizes = [statistics.fmean(f) for f in others], [len(f) for f in others]
        freedom = sum(n - 1 for n in sizes)
        noise = sum(sum((y - m) ** 2 for y in f) for f, m in zip(others, means)) / freedom
        if len(others) > 1:
            spread = statistics.variance(means)
            value = max(0.0, spread - noise * statistics.fmean([1 / n for n in sizes]))
        else:
            value = math.inf
        n = len(families[g])
        rest = (sum(families[g]) - x) / (n - 1)
        trust = 1.0 if math.isinf(value) else value / (value + noise / (n - 1))
        out.append(x - (statistics.fmean(means) * (1 - trust) + rest * trust))
    return _float64(out)


def _tracked(part: Tracked, r: list[float], group: list[int], rollouts: Rollouts) -> Tensor:
    if part.belief == "spo":  # one success and one failure, half each
        return _float64([x - 0.5 for x in r])
    return _first_visit(part, r, group, rollouts)


def _batch_mean(part: Any, r: list[float], group: list[int], rollouts: Rollouts) -> Tensor:
    return _float64([x - (sum(r) - x) / (len(r) - 1) for x in r])


BY_BATCH: dict[Any, Callable[..., Tensor]] = {
    advantage.Rescaled: _rescaled,
    advantage.LengthWeighted: _length_weighted,
    advantage.OptimalTokenBaseline: _token_baseline,
    advantage.GroupFilter: _group_filter,
    advantage.BatchFilter: _batch_filter,
    JamesStein: _first_visit,
    Tracked: _tracked,
    advantage.batch_leave_one_out: _batch_mean,
}
"""Advantages that look at more than that."""


def by_definition(part: Any, rollouts: Rollouts) -> Tensor | None:
    """(B,) or (B, T) advantages of a batch without degenerate groups; None without a restatement."""
    assert rollouts.reward is not None and rollouts.group is not None
    r, group = rollouts.reward.tolist(), rollouts.group.tolist()
    key = part if part in BY_GROUP or part in BY_BATCH else type(part)
    if key in BY_GROUP:
        families = [[x for x, other in zip(r, group) if other == g] for g in group]
        return _float64([BY_GROUP[key](part, x, family) for x, family in zip(r, families)])
    return BY_BATCH[key](part, r, group, rollouts) if key in BY_BATCH else None


def _float64(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
