"""What the belief begins with: solve rates from the rows, or completions of the start model before training."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict
from typing import Any

from kalman_rl.engine.config import TrainConfig
from kalman_rl.engine.evaluation import scores_of
from kalman_rl.engine.models.stops import StopTexts
from kalman_rl.engine.tasks import Row, Task, guard_reward, with_noise
from kalman_rl.errors import ConfigError, quote
from kalman_rl.sampling.priors import absorb_rewards, read_priors
from kalman_rl.sampling.tracking import Tracking


def prior_rows(rows: Sequence[Row], column: str | None) -> list[Row]:
    """The prior of each row as a trainer's dataset holds it; empty rows where there is no column.

    Raises: ConfigError for a column that no row has, and what :func:`read_priors` refuses.
    """
    if column is None:
        return [{} for _ in rows]
    if not any(column in row for row in rows):
        raise ConfigError(
            f"prior_column: got {quote(column)}, expected a column of the rows, which have {', '.join(rows[0])}"
        )
    values = [row.get(column) for row in rows]
    known = read_priors(range(len(rows)), values, column)
    return [{column: asdict(known[i]) if i in known else None} for i in range(len(rows))]


def measure_prior(
    config: TrainConfig,
    tracking: Tracking,
    model: Any,
    tokenizer: Any,
    task: Task,
    max_tokens: int,
    stops: StopTexts | None = None,
) -> dict[str, float]:
    """Sample ``measure_prior`` completions of every training prompt and let the belief begin with their rewards.

    Returns: ``prior/completions`` that were spent, and their mean reward ``prior/reward``.
    """
    rows = {str(row["prompt_id"]): row for row in task.train}
    names = [name for name in rows for _ in range(config.measure_prior)]
    found = scores_of(
        model,
        tokenizer,
        [rows[name] for name in names],
        with_noise(guard_reward(task.reward), config.reward_noise),
        ask=task.ask,
        stops=stops,
        max_completion_tokens=max_tokens,
        temperature=config.temperature,
        seed=config.seed,
    )
    rewards: dict[Hashable, list[float]] = {name: [] for name in rows}
    for name, score in zip(names, found, strict=True):
        rewards[name].append(math.nan if score is None else float(score))
    if tracking.sources is not None:
        column = str(config.source_column)
        tracking.sources.note(list(rows), [str(row[column]) for row in rows.values()])
    absorb_rewards(tracking, rewards)
    known = [score for score in found if score is not None]
    return {"prior/completions": float(len(names)), "prior/reward": sum(known) / max(len(known), 1)}
