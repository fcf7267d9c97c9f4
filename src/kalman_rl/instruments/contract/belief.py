"""What every belief about prompts promises; :class:`kalman_rl.beliefs.Belief` says it in words."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kalman_rl.beliefs import Belief
from kalman_rl.errors import KalmanRLError, quote
from kalman_rl.instruments.contract.promise import Promise, tried

IDS = ["a", "b", "a", "c", "b", "a", "new", "d"]
STEPS = 4
NOW = 3 * STEPS
TOLERANCE = 1e-9

Make = Callable[[], Belief]


def promises(make: Make) -> Iterator[Promise]:
    """Each promise on a belief that has seen four batches of 0/1 rewards."""
    first = tried("it reads, answers and learns in the shapes of the protocol", lambda: _shapes(make))
    yield first
    if not first.kept:
        return
    yield tried("the own reward of a completion never moves its own baseline", lambda: _own_reward(make))
    yield tried("the order of rows changes nothing", lambda: _order(make))
    yield tried("a missing reward (NaN) has advantage 0 and teaches nothing", lambda: _missing(make))
    yield tried("certainty fades with time, or stays", lambda: _fades(make))
    yield tried("one new reward is at least as uncertain as the value", lambda: _predictive(make))
    yield tried("looking changes nothing", lambda: _looking(make))
    yield tried("a batch cannot count twice: the same step and part is refused", lambda: _twice(make))
    yield tried("the same rewards give the same belief", lambda: _same(make(), make()))
    yield tried("a saved state goes on bit for bit", lambda: _saved(make))


def _rewards(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(torch.linspace(0.2, 0.8, len(IDS), dtype=torch.float64), generator=generator)


def _learned(belief: Belief, steps: int = STEPS) -> Belief:
    for step in range(steps):
        belief.update(IDS[:6], _rewards(step)[:6], step=3 * step)
    return belief


def _shapes(make: Make) -> str:
    belief = _learned(make())
    answers = {
        "predict": belief.predict(IDS, step=NOW),
        "predictive": belief.predictive(IDS, step=NOW),
        "advantages": belief.advantages(IDS, _rewards(9), step=NOW)[:2],
    }
    for name, answer in answers.items():
        for value in answer:
            if value.shape != (len(IDS),) or value.dtype != torch.float64 or value.requires_grad:
                got = f"shape {tuple(value.shape)}, {value.dtype}, gradient {value.requires_grad}"
                return f"{name} gave {got}, expected ({len(IDS)},), torch.float64 and no gradient"
            if not value.isfinite().all():
                return f"{name} gave {value.tolist()}, expected finite numbers"
    return ""


def _own_reward(make: Make) -> str:
    for steps in (0, STEPS):
        belief, reward = _learned(make(), steps), _rewards(9)
        before = belief.advantages(IDS, reward, step=NOW)
        for row, name in enumerate(IDS):
            other = reward.clone()
            other[row] = 1 - other[row]
            after = belief.advantages(IDS, other, step=NOW)
            moved = (after.baseline[row] - before.baseline[row]).abs().item()
            if moved > 1e-13 or not torch.equal(after.scale, before.scale):
                what = f"its baseline by {moved:.3g}" if moved else "the scale"
                where = f"row {row} (prompt {quote(name)}) after {steps} batches"
                return f"another reward of {where} moved {what}: the gradient is biased"
    return ""


def _order(make: Make) -> str:
    order = torch.randperm(len(IDS), generator=torch.Generator().manual_seed(3))
    reward, ids = _rewards(9), [IDS[row] for row in order.tolist()]
    one, other = _learned(make()), _learned(make())
    first = one.advantages(IDS, reward, step=NOW).advantage[order]
    second = other.advantages(ids, reward[order], step=NOW).advantage
    one.update(IDS, reward, step=NOW)
    other.update(ids, reward[order], step=NOW)
    far = max((first - second).abs().max().item(), _apart(one, other))
    return "" if far <= TOLERANCE else f"numbers {far:.3g} apart"


def _missing(make: Make) -> str:
    reward, known = _rewards(9), [row for row in range(len(IDS)) if row not in (1, 6)]
    reward[[1, 6]] = math.nan
    one, other = _learned(make()), _learned(make())
    advantage = one.advantages(IDS, reward, step=NOW).advantage
    if advantage[[1, 6]].abs().max() != 0:
        return f"advantages {advantage[[1, 6]].tolist()}, expected 0"
    one.update(IDS, reward, step=NOW)
    other.update([IDS[row] for row in known], reward[known], step=NOW)
    far = _apart(one, other)
    return "" if far <= TOLERANCE else f"the belief moved by {far:.3g}"


def _fades(make: Make) -> str:
    belief = _learned(make())
    soon, late = (belief.predict(IDS, step=NOW + gap).variance for gap in (0, 20))
    worst = (soon - late).max().item()
    return "" if worst <= TOLERANCE else f"a variance fell by {worst:.3g} in 20 steps without rewards"


def _predictive(make: Make) -> str:
    belief = _learned(make())
    value, reward = belief.predict(IDS, step=NOW), belief.predictive(IDS, step=NOW)
    if (value.mean - reward.mean).abs().max() > TOLERANCE:
        return "predict and predictive have different means"
    if value.variance.min() < 0:
        return f"a variance of {value.variance.min().item():.3g}"
    least = (reward.variance - value.variance).min().item()
    return "" if least >= -TOLERANCE else f"a reward's variance is {-least:.3g} below the value's"


def _looking(make: Make) -> str:
    belief = _learned(make())
    before = repr(belief.state_dict())
    belief.predict(IDS, step=NOW)
    belief.predictive(IDS, step=NOW)
    belief.advantages(IDS, _rewards(9), step=NOW)
    return (
        ""
        if repr(belief.state_dict()) == before
        else "the state changed in predict, predictive or advantages"
    )


def _twice(make: Make) -> str:
    belief = _learned(make())
    belief.update(IDS, _rewards(9), step=NOW)
    before = repr(belief.state_dict())
    try:
        belief.update(IDS, _rewards(9), step=NOW)
    except KalmanRLError:
        return "" if repr(belief.state_dict()) == before else "it was refused, but the state changed"
    return "it was taken; raise ConfigError for an id, step and part that came before"


def _saved(make: Make) -> str:
    one, other = _learned(make()), make()
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    return _same(one, other, learn=False)


def _same(one: Belief, other: Belief, *, learn: bool = True) -> str:
    for belief in (one, other):
        if learn:
            _learned(belief)
        belief.update(IDS, _rewards(9), step=NOW)
    far = _apart(one, other)
    return "" if far == 0 else f"beliefs {far:.3g} apart"


def _apart(one: Belief, other: Belief) -> float:
    pairs = zip(one.predict(IDS, step=NOW + 1), other.predict(IDS, step=NOW + 1))
    return max((left - right).abs().max().item() for left, right in pairs)
