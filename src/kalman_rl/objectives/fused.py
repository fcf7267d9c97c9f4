"""Which methods a fused pass computes exactly, and the step from a method's parts to its numbers.

A part is recognised by being the very function, or of the very class (a subclass may differ). Everything else
takes the composed objective, which is the definition.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

from kalman_rl.kernels.loss import plan
from kalman_rl.kernels.loss.plan import Plan
from kalman_rl.objectives import aggregate, ratio, trust
from kalman_rl.objectives.ratio.learned import AutoFiltered

Part = Callable[..., Any]


def plan_of(transform: Part, region: Part, reduce: Part) -> Plan | None:
    """The numbers of a composition, or None if a part has no fused form.

    >>> plan_of(ratio.token, trust.Cap(5.0), aggregate.token_mean)
    Plan(ratio=1, trust=3, aggregate=1, low=0.0, high=5.0, dual=inf, process=0.0, start=0.0, length=1.0)
    """
    try:
        return _plan_of(transform, region, reduce)
    except TypeError:  # a part that cannot be hashed is none of ours
        return None


@functools.lru_cache(maxsize=64)
def _plan_of(transform: Part, region: Part, reduce: Part) -> Plan | None:
    parts = (_ratio(transform), _trust(region), _aggregate(reduce))
    if any(part is None for part in parts):
        return None
    numbers: dict[str, Any] = {}
    for part in parts:
        numbers |= part or {}
    return Plan(**numbers)


def _ratio(part: Part) -> dict[str, Any] | None:
    if type(part) is AutoFiltered:
        part = part.start
    if type(part) is ratio.KalmanFiltered:
        noise = part.observation_noise
        units = {"process": part.process_noise / noise, "start": part.initial_variance / noise}
        return {"ratio": plan.FILTERED, **units}
    kinds = ((ratio.one, plan.ONE), (ratio.token, plan.TOKEN), (ratio.sequence_mean, plan.SEQUENCE))
    return next(({"ratio": kind} for known, kind in kinds if part is known), None)


def _trust(part: Part) -> dict[str, Any] | None:
    if type(part) is trust.Clip:
        dual = math.inf if part.dual is None else part.dual
        return {"trust": plan.CLIP, "low": 1 - part.low, "high": 1 + part.high, "dual": dual}
    if type(part) is trust.Cap:
        return {"trust": plan.CAP, "low": part.low, "high": part.high}
    if part is trust.unclipped:
        return {"trust": plan.UNCLIPPED}
    return {"trust": plan.LOG_LIKELIHOOD} if part is trust.log_likelihood else None


def _aggregate(part: Part) -> dict[str, Any] | None:
    if type(part) is aggregate.SequenceSum:
        return {"aggregate": plan.SEQUENCE_SUM, "length": part.length}
    if part is aggregate.token_mean:
        return {"aggregate": plan.TOKEN_MEAN}
    return {"aggregate": plan.SEQUENCE_MEAN} if part is aggregate.sequence_mean else None
