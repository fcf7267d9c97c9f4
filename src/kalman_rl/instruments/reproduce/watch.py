"""Beliefs that see a run's rewards without taking part, and how far each is from the exact success at every point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kalman_rl.beliefs import make_belief
from kalman_rl.engine.tasks.task import Row

Record = list[list[tuple[int, float]]]
"""Of every generation batch, each completion's place in the pool and reward."""


@dataclass(frozen=True)
class Watched:
    """A belief to watch.

    Args:
        name: in the results. options: of the belief "auto".
        by_source: one belief for each row's ``source``. features: give it each row's ``features`` (F,).
    """

    name: str
    options: tuple[tuple[str, Any], ...] = ()
    by_source: bool = False
    features: bool = False


def squared_errors(
    watched: Watched,
    rows: Sequence[Row],
    record: Record,
    success: Sequence[Sequence[float]],
    batches: Sequence[int],
    updates: int,
) -> list[float]:
    """Mean over the pool of ``(predicted value - p)^2`` after so many ``batches``, p each time from ``success``.

    Args: updates: steps of the belief's clock in a generation batch.
    """
    source = {row["prompt_id"]: row.get("source") for row in rows}
    belief = make_belief(source=source.__getitem__ if watched.by_source else None, **dict(watched.options))
    names = [row["prompt_id"] for row in rows]
    features = torch.stack([row["features"] for row in rows]).double() if watched.features else None
    found = []
    for batch in range(len(record) + 1):
        step = batch * updates
        if batch in batches:
            p = torch.tensor(success[list(batches).index(batch)], dtype=torch.float64)
            told = belief.predict(names, step=step, features=features).mean
            found.append((told - p).square().mean().item())
        if batch < len(record):
            places = [place for place, _ in record[batch]]
            reward = torch.tensor([value for _, value in record[batch]], dtype=torch.float64)
            own = None if features is None else features[places]
            belief.update([names[place] for place in places], reward, step=step, features=own)
    return found
