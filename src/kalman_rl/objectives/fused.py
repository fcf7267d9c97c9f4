"""Which methods a fused pass computes exactly, and the step from a method's parts to its numbers.

A part is recognised by being the very function, or of the very class (a subclass may differ). Everything else
takes the composed objective, which is the definition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from kalman_rl.kernels.loss import plan as recipe
from kalman_rl.kernels.loss.plan import Recipe
from kalman_rl.objectives import aggregate, ratio, trust
from kalman_rl.objectives.ratio.learned import AutoFiltered

Part = Callable[..., Any]


def recipe_of(transform: Part, region: Part, reduce: Part) -> Recipe | None:
    """The numbers of a composition, or None if a part has no fused form.

    >>> recipe_of(ratio.token, trust.Cap(5.0), aggregate.token_mean)
    Recipe(ratio=1, trust=3, aggregate=1, low=0.0, high=5.0, dual=inf, process=0.0, start=0.0, length=1.0)
    """
    try:
        return _recipe_of(transform, region, reduce)
    except TypeError:  # a part that cannot be hashed is none of ours
        return None


@functools.lru_cache(maxsize=64)
def _recipe_of(transform: Part, region: Part, reduce: Part) -> Recipe | None:
    parts = (_ratio(transform), _trust(region), _aggregate(reduce))
    if any(part is None for part in parts):
        return None
    numbers: dict[str, Any] = {}
    for part in parts:
        numbers |= part or {}
    return Recipe(**numbers)


def _ratio(part: Part) -> dict[str, Any] | None:
    if type(part) is AutoFiltered:
        part = part.start
    if type(part) is ratio.KalmanFiltered:
        noise = part.observation_noise
        units = {"process": part.process_noise / noise, "start": part.initial_variance / noise}
        return {"ratio": recipe.FILTERED, **units}
    kinds = ((ratio.one, recipe.ONE), (ratio.token, recipe.TOKEN), (ratio.sequence_mean, recipe.SEQUENCE))
    return next(({"ratio": kind} for known, kind in kinds if part is known), None)


def _trust(part: Part) -> dict[str, Any] | None:
    if type(part) is trust.Clip:
        dual = math.inf if part.dual is None else part.dual
        return {"trust": recipe.CLIP, "low": 1 - part.low, "high": 1 + part.high, "dual": dual}
    if type(part) is trust.Cap:
        return {"trust": recipe.CAP, "low": part.low, "high": part.high}
    if part is trust.unclipped:
        return {"trust": recipe.UNCLIPPED}
    return {"trust": recipe.LOG_LIKELIHOOD} if part is trust.log_likelihood else None


def _aggregate(part: Part) -> dict[str, Any] | None:
    if type(part) is aggregate.SequenceSum:
        return {"aggregate": recipe.SEQUENCE_SUM, "length": part.length}
    if part is aggregate.token_mean:
        return {"aggregate": recipe.TOKEN_MEAN}
    return {"aggregate": recipe.SEQUENCE_MEAN} if part is aggregate.sequence_mean else None
