"""The user's settings and reward, tried on three rows before hours are spent on them."""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kalman_rl.errors import ConfigError, RewardError, one_line
from kalman_rl.instruments.doctor.finding import Finding, PlannedRun, explain

ROWS = 3
SLOW = 1.0  # seconds per reward
LONGEST = 10.0  # seconds that a call may take here; training may allow more


def settings(plan: PlannedRun) -> Iterator[Finding]:
    """The TOML file of the planned run: does it read, and is every value allowed? The plan takes over its values."""
    if plan.config is None:
        return
    try:
        from kalman_rl.engine.config import TrainConfig, build, load_toml, notes, validate
    except ImportError as error:
        found = f"not looked at: {explain(error)}"
        yield Finding("settings", "warning", found, "pip install 'kalman-rl[app]'")
        return
    given = {name: value for name in ("task", "data", "reward") if (value := getattr(plan, name))}
    try:
        config = build(TrainConfig, load_toml(plan.config), given)
        validate(config)
    except ConfigError as error:
        yield Finding("settings", "problem", str(error), f"correct {plan.config}")
        return
    plan.settings = config
    plan.reward, plan.data, plan.run = config.reward, config.data, config.run or plan.run
    plan.task = plan.task or (None if plan.data else config.task)
    yield Finding("settings", "ok", f"{plan.config}: every value is allowed")
    for text in notes(config):
        yield Finding("settings", "warning", text, "change it if it is not meant")


def dry_run(plan: PlannedRun) -> Iterator[Finding]:
    """Reward of three rows, called as in training: the row's own answer as a reply, and an empty reply."""
    if plan.task is None and plan.data is None:
        if not plan.reward:
            found = "not asked for; --data rows.jsonl --reward module:function tries it on three rows"
            yield Finding("reward", "ok", found)
        else:
            found = f"{', '.join(plan.reward)} needs rows to be tried on"
            yield Finding("reward", "warning", found, "add --data or --task")
        return
    for number, name in enumerate(plan.reward or (None,)):
        yield from _tried(plan, name, first=number == 0)


def _tried(plan: PlannedRun, name: str | None, *, first: bool) -> Iterator[Finding]:
    """One reward function, or the task's own; the columns are told with the first."""
    from kalman_rl.engine.tasks import guard_reward, prompt_text, score_replies
    from kalman_rl.hosts.rewards import SupervisedReward

    said: list[str] = []
    try:
        task = _task(plan, name)
        guarded = guard_reward(task.reward)
        if isinstance(guarded, SupervisedReward):
            guarded.say = said.append
    except ConfigError as error:
        yield Finding("reward", "problem", str(error))
        return
    if first and plan.data is not None:
        yield columns([*task.train, *task.test])
    rows = task.train[:ROWS]
    known = all(row.get("answer") for row in rows)
    replies = [task.target(row) if known else "42" for row in rows]
    start = time.perf_counter()
    try:
        right, empty = (
            score_replies(guarded, rows, texts, [[] for _ in rows]) for texts in (replies, [""] * len(rows))
        )
    except RewardError as error:  # of a built-in task's reward, or of a result that is no list of numbers
        frames = traceback.extract_tb(error.__cause__.__traceback__) if error.__cause__ else []
        place = f"; at {frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        advice = "correct the reward; training stops at such an error"
        yield Finding("reward", "problem", f"{error}{place}", advice)
        return
    spent = guarded.seconds if isinstance(guarded, SupervisedReward) else time.perf_counter() - start
    seconds = spent / (2 * len(rows))
    for text in said:
        advice = (
            "correct the reward; in training such a completion has no reward, and many of them end the run"
        )
        failed = " has no reward" in text
        yield Finding(
            "reward", "problem" if failed else "ok", text.partition("\n")[0], advice if failed else ""
        )
    if len(plan.reward) > 1:
        yield Finding("reward", "ok", f"{name}:")
    for row, reply, score, nothing in zip(rows, replies, right, empty):
        prompt, text = (repr(one_line(text, 40)) for text in (prompt_text(row["prompt"]), reply))
        found = f"{prompt} reply {text} -> {score}; empty reply -> {nothing}"
        if None in (score, nothing):
            advice = "a missing reward is left out of its group, it is not 0"
            yield Finding("reward", "warning", found, advice)
        else:
            yield Finding("reward", "ok", found)
    scores = {*right, *empty} - {None}
    if not scores:  # then no time was measured either
        return
    if known and len(scores) == 1:
        found = f"{scores.pop()} for every right answer and every empty reply alike: nothing can be learned from it"
        advice = (
            "look at the form the reward expects of a reply; the answer alone was tried, as the row gives it"
        )
        yield Finding("reward", "warning", found, advice)
    found = f"{seconds:.2g} s per reward, measured on {2 * len(rows)}"
    if seconds < SLOW:
        yield Finding("reward", "ok", found)
    else:
        advice = "training waits for it; score several completions at a time"
        yield Finding("reward", "warning", found, advice)


def columns(rows: Sequence[Mapping[str, Any]]) -> Finding:
    """The kinds of values in each column that a reward is given; a column of several kinds is a warning.

    >>> columns([{"prompt": "a", "answer": "7"}, {"prompt": "b", "answer": 7}]).found
    'answer: text (1), number (1)'
    """
    kinds = {
        name: Counter(_kind(row[name]) for row in rows)
        for name in rows[0]
        if name not in ("prompt", "prompt_id")
    }
    mixed = {name: count for name, count in kinds.items() if len(count) > 1}
    if not mixed:
        return Finding(
            "columns", "ok", ", ".join(f"{name}: {next(iter(count))}" for name, count in kinds.items())
        )
    found = "; ".join(
        f"{name}: " + ", ".join(f"{kind} ({number})" for kind, number in count.items())
        for name, count in mixed.items()
    )
    advice = "give each column one kind, or let your reward take all of them: it sees every value as the file has it"
    return Finding("columns", "warning", found, advice)


def _kind(value: object) -> str:
    names: dict[type, str] = {
        bool: "true or false",
        int: "number",
        float: "number",
        str: "text",
        type(None): "missing",
    }
    names |= {list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def _task(plan: PlannedRun, name: str | None) -> Any:
    from kalman_rl.engine.tasks import load_task, rows, supervised_reward
    from kalman_rl.hosts.rewards.supervised import MEMORY

    settings = plan.settings
    seconds = min(LONGEST, settings.reward_timeout) if settings else LONGEST
    memory = settings.reward_memory if settings else MEMORY
    reward = supervised_reward(name, seconds=seconds, memory=memory) if name else None
    if plan.data is not None:
        share = {"test_share": settings.test_share} if settings else {}
        return rows(plan.data, reward=reward, **share)
    task = load_task(plan.task or "")
    return task if reward is None else dataclasses.replace(task, reward=reward)
