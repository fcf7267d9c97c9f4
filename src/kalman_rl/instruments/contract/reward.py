"""What a reward function promises to the trainers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kalman_rl.engine.tasks import guard_reward, score_replies
from kalman_rl.engine.tasks.task import Row
from kalman_rl.errors import RewardError, quote
from kalman_rl.instruments.contract.promise import Promise, tried

MADE_UP: list[Row] = [
    {"prompt": f"{a} * {b} =", "prompt_id": f"{a}x{b}", "answer": str(a * b)}
    for a, b in ((2, 3), (4, 5), (7, 8))
]
"""Rows where the user names none."""
ODD = (
    "",
    " ",
    "\n\n",
    "0",
    "-1e999",
    "nan",
    "\\boxed{",
    "{",
    "<think>",
    "ответ 四十二 🙂",
    "7" * 5000,
    "\x00",
)

Rewards = list[float | None]


def promises(reward: Callable[..., Any], rows: Sequence[Row]) -> Iterator[Promise]:
    """Each promise on rows with their own answers and with odd replies.

    Args:
        reward: TRL's signature.
        rows: of a task; three are enough.
    """
    guarded = guard_reward(reward)
    asked = [row for row in rows for _ in range(2)]
    replies = [reply for row in rows for reply in (str(row.get("answer") or "42"), "")]

    def score(rows: Sequence[Row], replies: Sequence[str]) -> Rewards:
        scores: Rewards = score_replies(guarded, rows, replies, [[] for _ in rows])
        return scores

    def again() -> str:
        first, second = score(asked, replies), score(asked, replies)
        return _differ(first, second, "twice the same call")

    def order() -> str:
        turned = score(asked[::-1], replies[::-1])[::-1]
        return _differ(score(asked, replies), turned, "in the other order")

    def alone() -> str:
        single = [score([row], [reply])[0] for row, reply in zip(asked, replies)]
        return _differ(score(asked, replies), single, "one at a time")

    first = tried("it gives one number, or None, per completion", lambda: _shape(score, asked, replies))
    yield first
    if not first.kept:
        return
    yield tried("odd replies raise nothing", lambda: _odd(score, rows))
    yield tried("the same replies get the same rewards", again)
    yield tried("the order of rows changes nothing", order)
    yield tried("a reply gets the same reward alone as in a batch", alone)
    yield tried("what it is given stays as it was", lambda: _untouched(reward, asked, replies))


def _shape(score: Callable[..., Rewards], rows: Sequence[Row], replies: Sequence[str]) -> str:
    scores = score(rows, replies)
    return "no reply got a number" if all(value is None for value in scores) else ""


def _odd(score: Callable[..., Rewards], rows: Sequence[Row]) -> str:
    for reply in ODD:
        try:
            score(rows, [reply] * len(rows))
        except RewardError as error:
            return f"{quote(reply, 30)}: {error}"
    return ""


def _untouched(reward: Callable[..., Any], rows: Sequence[Row], replies: Sequence[str]) -> str:
    """Called as by a trainer that does not copy."""
    completions: list[Any] = [
        reply if isinstance(row["prompt"], str) else [{"role": "assistant", "content": reply}]
        for row, reply in zip(rows, replies)
    ]
    columns: dict[str, Any] = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    given = {"prompts": [row["prompt"] for row in rows], "completions": completions, **columns}
    before = copy.deepcopy(given)
    reward(**given, completion_ids=[[] for _ in rows], trainer_state=None, log_extra=_no, log_metric=_no)
    changed = [name for name, value in given.items() if value != before[name]]
    return f"{', '.join(changed)} changed" if changed else ""


def _no(*anything: Any) -> None:
    """Stands in for the trainer's logging functions."""


def _differ(one: Rewards, other: Rewards, how: str) -> str:
    wrong = [(left, right) for left, right in zip(one, other) if left != right]
    return (
        f"{len(wrong)} of {len(one)} rewards differ {how}, such as {wrong[0][0]} and {wrong[0][1]}"
        if wrong
        else ""
    )
