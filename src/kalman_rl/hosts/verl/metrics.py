"""Metrics of a micro-batch, weighted so that verl's plain mean over micro-batches and ranks is the mean over tokens.

verl takes the mean of what the losses of an optimizer step return, over M micro-batches on each of D ranks. The step
has T trained tokens and this micro-batch n of them, so a value times ``n M D / T`` has the right mean. verl shows a
loss T, and M D as rows of the step by rows of the micro-batch, since all micro-batches have as many; not where
``use_dynamic_bsz`` packs them by tokens. There values come as ``weighted/NAME``, value times ``n D / T``, beside
``weighted/tokens``, which is ``n D / T``: one mean divided by the other is the mean over tokens.

Variances, effective sample sizes and shares of pairs are no means over tokens. Beside them go the sums they are made
of, ``weighted/NAME/count``, ``.../sum`` and ``.../squares``: verl's mean divides all three by the same number, which
cancels in NAME.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from kalman_rl.objectives.diagnostics import effective_sample_size, metric, read_by, share_left, variance

WEIGHTED = "actor/weighted/"
TOKENS = "actor/weighted/tokens"


PARTS = ("count", "sum", "squares")
"""What the names of :func:`made_of_sums` are made of."""


def made_of_sums(name: str) -> bool:
    """Whether a metric is neither a mean over tokens nor an extreme.

    >>> [made_of_sums(name) for name in ("ratio/raw_log_variance", "ratio/raw_sign_switch", "trust/kept")]
    [True, True, False]
    """
    quotients = (variance, effective_sample_size, share_left)
    return read_by(name) in quotients or name.endswith("sign_switch")


def parts(sums: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The sums of one micro-batch by the names that verl is to average them under."""
    return {
        f"weighted/{name}/{part}": value
        for name, of in sums.items()
        if made_of_sums(name)
        for part, value in zip(PARTS, of, strict=False)
    }


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
    """verl's means of an optimizer step with every ``weighted/NAME`` divided into the mean over tokens, NAME, and
    every name with sums beside it read from them.

    >>> divided({"actor/weighted/x": 1.5, "actor/weighted/tokens": 0.5, "actor/lr": 1.0})
    {'actor/lr': 1.0, 'actor/x': 3.0}
    """
    tokens = metrics.get(TOKENS)
    found = {name: value for name, value in metrics.items() if not name.startswith(WEIGHTED)}
    sums: dict[str, list[float]] = {}
    for name, value in metrics.items():
        if not name.startswith(WEIGHTED) or name == TOKENS:
            continue
        whole, _, part = name.removeprefix(WEIGHTED).rpartition("/")
        if part in PARTS:
            sums.setdefault(whole, [0.0] * 4)[PARTS.index(part)] = float(value)
        else:
            found["actor/" + name.removeprefix(WEIGHTED)] = value / tokens if tokens else math.nan
    for name, of in sums.items():
        value = metric(name, torch.tensor(of, dtype=torch.float64)).item()
        found["actor/" + name] = value if of[0] > 0 else math.nan
    return found
