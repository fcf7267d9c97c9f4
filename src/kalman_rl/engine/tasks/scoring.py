"""How replies are scored: the reward sees the row of the file, in training, evaluation and the doctor alike.

Tables unify what they hold (a key that one row lacks is filled with None, 7 becomes 7.0), so only the prompt and its
id travel through the trainer's dataset, and the row is looked up when its replies are scored.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

from kalman_rl.engine.tasks.task import Prompt, Row, plain_prompt


def trainer_rows(
    rows: Sequence[Row], *columns: str, ask: Callable[[Prompt], Prompt] = plain_prompt
) -> list[Row]:
    """What a trainer's dataset holds of each row: the prompt as the model is asked, the id by which :func:`by_row`
    finds the rest, and the ``columns`` that the trainer reads itself, as texts.

    >>> trainer_rows([{"prompt": "2 * 3 =", "prompt_id": 7, "answer": {"value": 6}}])
    [{'prompt': '2 * 3 =', 'prompt_id': '7'}]
    """
    texts = ("prompt_id", *columns)
    return [{"prompt": ask(row["prompt"])} | {name: str(row[name]) for name in texts} for row in rows]


def by_row(reward: Callable[..., Any], rows: Sequence[Row]) -> Callable[..., Any]:
    """The reward for a trainer whose dataset is :func:`trainer_rows` of the same rows; it gets replies in the form of
    the row's prompt, also where a text was asked as a chat."""
    found = {str(row["prompt_id"]): row for row in rows}

    @wraps(reward, assigned=("__name__", "__doc__"), updated=())
    def scored(completions: list[Any], prompt_id: list[str], **trainer: Any) -> Any:
        asked = [found[name] for name in prompt_id]
        rest = {name: value for name, value in trainer.items() if name not in ("prompts", *asked[0])}
        replies = [
            reply_text(reply) if isinstance(row["prompt"], str) else reply
            for row, reply in zip(asked, completions, strict=True)
        ]
        return call_reward(reward, asked, replies, **rest)

    return scored


def score_replies(
    reward: Callable[..., Any],
    rows: Sequence[Row],
    replies: Sequence[str],
    completion_ids: Sequence[list[int]],
) -> Any:
    """Rewards of replies outside of a trainer, called with all that a trainer passes.

    Args:
        reward: TRL's signature.
        rows: of the task, one per reply.
        replies: texts; to a chat the reward gets each as a message of the assistant, as in training.
        completion_ids: tokens of the replies.
    """
    completions = [
        reply if isinstance(row["prompt"], str) else [{"role": "assistant", "content": reply}]
        for row, reply in zip(rows, replies, strict=True)
    ]
    return call_reward(
        reward,
        rows,
        completions,
        completion_ids=list(completion_ids),
        trainer_state=None,
        log_extra=_ignore,
        log_metric=_ignore,
    )


def call_reward(
    reward: Callable[..., Any], rows: Sequence[Row], completions: Sequence[Any], **trainer: Any
) -> Any:
    """The reward of completions of rows. Each gets its own copy of the row, so a reward changes only what it sees."""
    fresh = [copy.deepcopy(row) for row in rows]
    columns = {name: [row[name] for row in fresh] for name in fresh[0] if name != "prompt"}
    prompts = [row["prompt"] for row in fresh]
    return reward(prompts=prompts, completions=list(completions), **columns, **trainer)


def reply_text(completion: Any) -> str:
    """Text of a completion as a reward gets it: the text itself, or the last message of a chat.

    >>> reply_text("42"), reply_text([{"role": "assistant", "content": "42"}])
    ('42', '42')
    """
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def _ignore(*anything: Any) -> None:
    """Stands in for the trainer's logging functions."""
