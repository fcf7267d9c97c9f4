"""Reward functions written by the user: finding them, and keeping their mistakes readable."""

from __future__ import annotations

import inspect
import pickle
from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from kalman_rl.engine.tasks.scoring import reply_text
from kalman_rl.engine.tasks.task import Reward
from kalman_rl.engine.tasks.weighted import WeightedReward, joined
from kalman_rl.errors import ConfigError, RewardError, quote
from kalman_rl.hosts.rewards import SupervisedReward
from kalman_rl.hosts.rewards.values import numbers
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
        raise ConfigError(f"reward: got {quote(name)}, expected a text, module:function")
    function = imported("reward", name)
    parameters = _parameters(function)
    return from_verl(function) if {"solution_str", "ground_truth"} <= parameters else function


def supervised_reward(
    *names: str, weights: Sequence[float] = (), seconds: float, memory: float
) -> SupervisedReward | WeightedReward:
    """The functions that :func:`load_reward` finds, each imported and called in a watched process.

    Args: weights: of the functions; none is 1 for all. seconds: longest call. memory: GiB.
    Raises: ConfigError as load_reward does.
    """
    made = [
        SupervisedReward(pickle.dumps(partial(load_reward, name)), seconds=seconds, memory=memory)
        for name in names
    ]
    found: SupervisedReward | WeightedReward = joined(names, made, weights)
    return found


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
        rewards = numbers(self.__name__, returned, len(completions))
        missing = rewards.count(None)
        self.missing += missing
        self.scored += len(rewards) - missing
        log_metric = columns.get("log_metric")
        if rewards and callable(log_metric):
            log_metric("reward/missing", missing / len(rewards))
        return rewards


def guard_reward(function: Callable[..., Any]) -> GuardedReward | SupervisedReward | WeightedReward:
    """Wraps a reward function so that its mistakes are named and its missing values are counted; a supervised one does
    that itself, and of a weighted sum each part is wrapped.

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
    if isinstance(function, SupervisedReward):
        return function
    if isinstance(function, WeightedReward):
        return WeightedReward(
            tuple(part._replace(function=guard_reward(part.function)) for part in function.parts)
        )
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        raise ConfigError(
            f"reward: got the async function {quote(function)}, expected an ordinary one; wrap asyncio.run"
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
