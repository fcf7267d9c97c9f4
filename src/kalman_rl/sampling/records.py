"""What is written down about beliefs after each generation batch: small, and enough to draw them over a run."""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Sequence
from statistics import NormalDist
from typing import Any

from torch import Tensor

from kalman_rl.numerics.kalman import Gaussian
from kalman_rl.sampling.rounds import Sampled
from kalman_rl.sampling.tracking import Tracking

MAX_PROMPTS = 64
"""Prompts written down per batch. Of more, those with the smallest checksum of their id, so that the same ones
are followed whenever they come up."""
LEVELS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
"""Central intervals whose coverage is counted, over all prompts of the batch."""
MAX_PROMPT = 200


def belief_record(
    tracking: Tracking,
    sampled: Sampled,
    first: tuple[Sequence[Hashable], Tensor],
    predicted: tuple[Gaussian, Gaussian],
    texts: dict[Hashable, str],
    *,
    step: int,
    rows: int,
) -> dict[str, Any]:
    """One generation batch, for JSON; call after the belief has absorbed it. Changes nothing but the list of
    prompts whose text is written.

    Args:
        first: ids and rewards of the first round.
        predicted: value and one new reward of each of ``sampled.prompts``, from before the batch.
        texts: what each prompt asks.
        rows: completions that a fixed allocation would have used.

    Returns: counts over the whole batch (``used``, ``groups`` with a completion, ``informative`` ones among them,
        ``judged`` first rounds and how many of them lay ``inside`` each of LEVELS), and lists over the prompts
        written down: ``id``, ``n`` completions, ``reward`` their mean, ``mixed`` ("1" if they differ), ``mean``
        and ``sd`` of the value as predicted, ``noise`` of one reward (sd), ``after`` and ``after_sd`` the
        posterior, ``next`` completions if the same prompts came up again (absent where all get the same).
    """
    names, counts = sampled.prompts, sampled.tau.tolist()
    rewards = _known(sampled.ids, sampled.reward)
    judged, inside = _coverage(_known(*first), names, predicted)
    chosen = sorted(range(len(names)), key=lambda i: (zlib.crc32(repr(names[i]).encode()), i))[:MAX_PROMPTS]
    followed = [names[i] for i in sorted(chosen)]
    place = {name: i for i, name in enumerate(names)}
    after = tracking.belief.predict(followed, step=step, features=tracking.known_features(followed))
    value, new = predicted
    record = {
        "step": step,
        "rows": rows,
        "allocation": tracking.budget.allocation,
        "rewards": tracking.budget.reward_range,
        "prompts": len(names),
        "used": sum(counts),
        "groups": sum(bool(found) for found in rewards.values()),
        "informative": sum(len(set(found)) > 1 for found in rewards.values()),
        "judged": judged,
        "levels": LEVELS,
        "inside": inside,
        "id": [str(name) for name in followed],
        "n": [counts[place[name]] for name in followed],
        "reward": [_short(_mean(rewards.get(name, []))) for name in followed],
        "mixed": "".join("1" if len(set(rewards.get(name, []))) > 1 else "0" for name in followed),
        "mean": [_short(float(value.mean[place[name]])) for name in followed],
        "sd": [_short(math.sqrt(float(value.variance[place[name]]))) for name in followed],
        "noise": [_short(_noise(value, new, place[name])) for name in followed],
        "after": [_short(m) for m in after.mean.tolist()],
        "after_sd": [_short(math.sqrt(v)) for v in after.variance.tolist()],
    }
    if tracking.budget.allocation != "fixed":
        following = tracking.expected_counts(names, step=step + 1, total=sum(counts))
        record["next"] = [following[name] for name in followed]
    fresh = [name for name in followed if name not in tracking.written]
    tracking.written.update(fresh)
    if fresh:
        record["texts"] = {str(name): texts.get(name, "")[:MAX_PROMPT] for name in fresh}
    return record


def _known(ids: Sequence[Hashable], reward: Tensor) -> dict[Hashable, list[float]]:
    found: dict[Hashable, list[float]] = {}
    for name, value in zip(ids, reward.tolist()):
        if not math.isnan(value):
            found.setdefault(name, []).append(value)
    return found


def _coverage(
    first: dict[Hashable, list[float]], names: Sequence[Hashable], predicted: tuple[Gaussian, Gaussian]
) -> tuple[int, list[int]]:
    """First rounds, and how many of their means lay in the predicted central interval of each level."""
    value, new = predicted
    place = {name: i for i, name in enumerate(names)}
    widths = [NormalDist().inv_cdf(0.5 + level / 2) for level in LEVELS]
    inside = [0] * len(LEVELS)
    for name, found in first.items():
        i = place[name]
        spread = math.sqrt(float(value.variance[i]) + _noise(value, new, i) ** 2 / len(found))
        off = abs(_mean(found) - float(value.mean[i]))
        inside = [count + (off <= width * spread) for count, width in zip(inside, widths)]
    return len(first), inside


def _noise(value: Gaussian, new: Gaussian, i: int) -> float:
    """Standard deviation of one reward around the value."""
    spread = float(new.variance[i]) - float(value.variance[i])
    return math.sqrt(spread) if spread > 0 else 0.0


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _short(value: float) -> float | None:
    return float(f"{value:.4g}") if math.isfinite(value) else None
