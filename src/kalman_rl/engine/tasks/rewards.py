"""Reward functions written by the user: finding them, and keeping their mistakes readable."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from functools import wraps
from typing import Any

from kalman_rl.engine.tasks.scoring import reply_text
from kalman_rl.engine.tasks.task import Reward
from kalman_rl.errors import ConfigError, RewardError
from kalman_rl.registry import imported


def load_reward(name: str) -> Reward:
    """Reward function ``"module:function"``, looked for from the current directory on.

    A function that takes ``solution_str`` and ``ground_truth`` is one of verl's and is adapted by
    `from_verl`.

    Raises:
        ConfigError: the name has another form, the module cannot be imported, or the function is missing or
            no function.
    """
    if not isinstance(name, str):
        raise ConfigError(f"reward: got {name!r}, expected a text, module:function")
    function = imported("reward", name)
    parameters = _parameters(function)
    return from_verl(function) if {"solution_str", "ground_truth"} <= parameters else function


def from_verl(compute_score: Callable[..., Any]) -> Reward:
    """TRL-style reward from verl's ``compute_score(data_source, solution_str, ground_truth, extra_info)``.

    The ground truth is the column ``ground_truth``, else ``reward_model["ground_truth"]``, else ``answer``.
    """

    @wraps(compute_score)
    def reward(completions: list[Any], **columns: Any) -> list[Any]:
        empty = [None] * len(completions)
        nested = [model["ground_truth"] for model in columns.get("reward_model", [])]
        truth = columns.get("ground_truth") or nested or columns.get("answer", empty)
        rows = zip(
            columns.get("data_source", empty),
            map(reply_text, completions),
            truth,
            columns.get("extra_info", empty),
            strict=True,
        )
        scores = [
            compute_score(data_source=source, solution_str=text, ground_truth=right, extra_info=extra)
            for source, text, right, extra in rows
        ]
        return [score["score"] if isinstance(score, dict) else score for score in scores]

    return reward


class GuardedReward:
    """A reward function whose result is always one float or None per completion; see `guard_reward`.

    Attributes:
        missing: replies so far without a reward (None, NaN or infinite).
        scored: replies so far with one.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.__name__ = getattr(function, "__name__", type(function).__name__)
        self.missing = 0
        self.scored = 0

    def __call__(self, completions: list[Any], **columns: Any) -> list[float | None]:
        try:
            returned = self.function(completions=completions, **columns)
        except Exception as error:
            raise RewardError(
                f"reward: {self.__name__} raised {type(error).__name__}: {error}; called with "
                f"{len(completions)} completions and the columns {', '.join(columns) or 'none'}"
            ) from error
        rewards = self._numbers(returned, len(completions))
        missing = rewards.count(None)
        self.missing += missing
        self.scored += len(rewards) - missing
        log_metric = columns.get("log_metric")
        if rewards and callable(log_metric):
            log_metric("reward/missing", missing / len(rewards))
        return rewards

    def _numbers(self, returned: Any, count: int) -> list[float | None]:
        expected = f"expected a list of {count} numbers, one per completion"
        if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__iter__"):
            raise RewardError(f"reward: {self.__name__} returned a {type(returned).__name__}, {expected}")
        if getattr(returned, "ndim", 1) != 1:
            raise RewardError(f"reward: {self.__name__} returned shape {tuple(returned.shape)}, {expected}")
        items = list(returned)
        if len(items) != count:
            raise RewardError(f"reward: {self.__name__} returned {len(items)} values, {expected}")
        return [self._number(index, item) for index, item in enumerate(items)]

    def _number(self, index: int, item: Any) -> float | None:
        if item is None:
            return None
        if isinstance(item, str | bytes) or getattr(item, "ndim", 0) != 0:
            raise self._not_a_number(index, item)
        try:
            value = float(item.item() if hasattr(item, "item") else item)
        except OverflowError:
            return None
        except (TypeError, ValueError) as error:
            raise self._not_a_number(index, item) from error
        return value if math.isfinite(value) else None

    def _not_a_number(self, index: int, item: Any) -> RewardError:
        return RewardError(
            f"reward: {self.__name__} returned {item!r:.60} ({type(item).__name__}) for completion {index}, "
            "expected a number, or None when there is no reward"
        )


def guard_reward(function: Callable[..., Any]) -> GuardedReward:
    """Wraps a reward function so that its mistakes are named and its missing values are counted.

    Booleans, integers, numpy numbers and 0-d tensors become floats; None, NaN and infinities become None, a
    missing observation, which is not zero.

    Args:
        function: TRL-style ``reward(completions, **columns)``, not async.

    Returns:
        The same function with attributes ``missing`` and ``scored`` and the name that TRL logs.

    Raises:
        ConfigError: ``function`` is async.
        RewardError: on a call, when the function raises (the cause is chained) or returns anything but one
            number, or None, per completion.

    >>> guard_reward(lambda completions, **columns: [True, float("nan")])(["a", "b"])
    [1.0, None]
    """
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigError(
            f"reward: got the async function {function!r}, expected an ordinary one; wrap asyncio.run"
        )
    return GuardedReward(function)


def with_noise(function: Reward, deviation: float) -> Reward:
    """The reward plus Gaussian noise of a standard deviation, from PyTorch's global generator.

    That generator is part of a trainer's checkpoint, so a resumed run sees the same noise. With 0 the function
    itself is returned, and nothing is drawn.
    """
    if not deviation:
        return function

    @wraps(function, assigned=("__name__", "__doc__"), updated=())
    def noisy(completions: list[Any], **columns: Any) -> list[float | None]:
        import torch

        rewards = function(completions, **columns)
        noise = (torch.randn(len(rewards)) * deviation).tolist()
        return [None if reward is None else reward + extra for reward, extra in zip(rewards, noise)]

    return noisy


def _parameters(function: Callable[..., Any]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return set()
