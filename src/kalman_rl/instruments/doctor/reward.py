"""The user's settings and reward, tried on three rows before hours are spent on them."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Iterator
from typing import Any

from kalman_rl.errors import ConfigError, RewardError, one_line
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain

ROWS = 3
SLOW = 1.0  # seconds per reward
EXPLANATION = "a missing reward is left out of its group, it is not 0"


def settings(plan: PlannedRun) -> Iterator[Finding]:
    """The TOML file of the planned run: does it read, and is every value allowed?"""
    if plan.config is None:
        return
    try:
        from kalman_rl.engine.config import TrainConfig, build, load_toml, notes, validate
    except ImportError as error:
        yield Finding(
            "settings", "warning", f"not looked at: {explain(error)}", "pip install 'kalman-rl[app]'"
        )
        return
    try:
        config = build(TrainConfig, load_toml(plan.config))
        given: dict[str, Any] = {"task": plan.task, "data": plan.data, "reward": plan.reward}
        config = dataclasses.replace(
            config, **{key: value for key, value in given.items() if value is not None}
        )
        validate(config)
    except ConfigError as error:
        yield Finding("settings", "problem", str(error), f"correct {plan.config}")
        return
    plan.reward = plan.reward or config.reward
    plan.data = plan.data or config.data
    plan.task = plan.task or (None if plan.data else config.task)
    plan.run = config.run or plan.run
    yield Finding("settings", "ok", f"{plan.config}: every value is allowed")
    yield from (
        Finding("settings", "warning", text, "change it if it is not meant") for text in notes(config)
    )


def dry_run(plan: PlannedRun) -> Iterator[Finding]:
    """Reward of three rows: the row's own answer as a reply, and an empty reply."""
    if plan.task is None and plan.data is None:
        asked = "not asked for; --data rows.jsonl --reward module:function tries it on three rows"
        if plan.reward is None:
            yield Finding("reward", "ok", asked)
        else:
            yield Finding(
                "reward", "warning", f"{plan.reward} needs rows to be tried on", "add --data or --task"
            )
        return
    from kalman_rl.engine.tasks import guard_reward, prompt_text

    try:
        task = _task(plan)
        guarded = guard_reward(task.reward)
    except ConfigError as error:
        yield Finding("reward", "problem", str(error))
        return
    rows = task.train[:ROWS]
    known = all(row.get("answer") for row in rows)
    replies = [task.target(row) if known else "42" for row in rows]
    start = time.perf_counter()
    try:
        right = _scores(guarded, rows, replies)
        empty = _scores(guarded, rows, [""] * len(rows))
    except RewardError as error:
        place = _place(error.__cause__)
        yield Finding(
            "reward", "problem", f"{error}{place}", "correct the reward; training stops at such an error"
        )
        return
    seconds = (time.perf_counter() - start) / (2 * len(rows))
    for row, reply, score, nothing in zip(rows, replies, right, empty):
        found = (
            f"{_show(prompt_text(row['prompt']))} reply {_show(reply)} -> {score}; empty reply -> {nothing}"
        )
        missing = None in (score, nothing)
        yield Finding("reward", "warning" if missing else "ok", found, EXPLANATION if missing else "")
    yield from _judge(right, empty, known)
    yield _speed(seconds)


def _judge(right: list[float | None], empty: list[float | None], known: bool) -> Iterator[Finding]:
    scores = {score for score in (*right, *empty) if score is not None}
    if known and len(scores) == 1:
        yield Finding(
            "reward",
            "warning",
            f"{scores.pop()} for every right answer and every empty reply alike: nothing can be learned from it",
            "look at the form the reward expects of a reply; the answer alone was tried, as the row gives it",
        )


def _speed(seconds: float) -> Finding:
    found = f"{seconds:.2g} s per reward, measured on {2 * ROWS} or fewer"
    if seconds < SLOW:
        return Finding("reward", "ok", found)
    return Finding("reward", "warning", found, "training waits for it; score several completions at a time")


def _task(plan: PlannedRun) -> Any:
    from kalman_rl.engine.tasks import load_reward, load_task, rows

    reward = load_reward(plan.reward) if plan.reward else None
    if plan.data is not None:
        return rows(plan.data, reward=reward)
    assert plan.task is not None
    task = load_task(plan.task)
    return task if reward is None else dataclasses.replace(task, reward=reward)


def _scores(reward: Any, rows: list[dict[str, Any]], replies: list[str]) -> list[float | None]:
    """Called as in training."""
    from kalman_rl.engine.tasks import score_replies

    scores: list[float | None] = score_replies(reward, rows, replies, [[] for _ in rows])
    return scores


def _place(error: BaseException | None) -> str:
    frames = traceback.extract_tb(error.__traceback__) if error is not None else []
    return f"; at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""


def _show(text: str) -> str:
    return repr(one_line(text, 40))
