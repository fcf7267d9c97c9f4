"""Metrics of a micro-batch, weighted so that verl's plain mean over micro-batches and ranks is the mean over tokens.

verl takes the mean of what the losses of an optimizer step return, over M micro-batches on each of D ranks. The step
has T trained tokens and this micro-batch n of them, so a value times ``n M D / T`` has the right mean. verl shows a
loss T, and M D as rows of the step by rows of the micro-batch, since all micro-batches have as many; not where
``use_dynamic_bsz`` packs them by tokens. There values come as ``weighted/NAME``, value times ``n D / T``, beside
``weighted/tokens``, which is ``n D / T``: one mean divided by the other is the mean over tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

WEIGHTED = "actor/weighted/"
TOKENS = "actor/weighted/tokens"


def weighted(
    metrics: Mapping[str, float], *, tokens: int, rows: int, info: Mapping[str, Any], dynamic: bool
) -> dict[str, float]:
    """What to hand to verl for the means ``metrics`` over the tokens of one micro-batch.

    Args:
        metrics: means over ``tokens``; without tokens they are not looked at.
        tokens: >= 0, trained tokens of the micro-batch.
        rows: >= 1, its rows.
        info: verl's numbers about the optimizer step; without them the micro-batch is taken for all of it.
        dynamic: micro-batches are packed by tokens.

    Returns: numbers by name, NaN where the step has no token.

    >>> weighted({"x": 2.0}, tokens=3, rows=1, info={"batch_num_tokens": 4, "global_batch_size": 2}, dynamic=False)
    {'x': 3.0}
    """
    everything: Any = info.get("global_batch_size")
    total = info.get("batch_num_tokens")
    if total is None:
        return {name: value if tokens else math.nan for name, value in metrics.items()}
    share = tokens / total if total else math.nan
    counted = everything is not None and not dynamic
    share *= everything / rows if counted else info.get("dp_size") or 1
    found = {name: value * share if tokens else share for name, value in metrics.items()}
    if counted:
        return found
    return {WEIGHTED + name.removeprefix("actor/"): value for name, value in found.items()} | {TOKENS: share}


def divided(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """verl's means of an optimizer step with every ``weighted/NAME`` divided into the mean over tokens, NAME.

    >>> divided({"actor/weighted/x": 1.5, "actor/weighted/tokens": 0.5, "actor/lr": 1.0})
    {'actor/lr': 1.0, 'actor/x': 3.0}
    """
    tokens = metrics.get(TOKENS)
    found = {name: value for name, value in metrics.items() if not name.startswith(WEIGHTED)}
    for name, value in metrics.items():
        if name.startswith(WEIGHTED) and name != TOKENS:
            found["actor/" + name.removeprefix(WEIGHTED)] = value / tokens if tokens else math.nan
    return found
