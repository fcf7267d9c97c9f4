"""The trainer's reward functions in supervised processes, asked for by ``reward_timeout``."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import cloudpickle
from torch import nn

from kalman_rl.errors import ConfigError, one_line
from kalman_rl.hosts.rewards import RewardRecord, SupervisedReward
from kalman_rl.hosts.rewards.worker import given


def supervised(functions: Any, args: Any) -> Any:
    """Reward functions as TRL takes them, each behind a :class:`SupervisedReward` where ``args.reward_timeout`` is set.

    Models and names of models stay in the trainer's process. Functions are sent by name where they can be imported,
    and by value where not: closures, lambdas, functions of a script. Async ones run in the worker, one after another.

    Raises: ConfigError for a function that cannot be sent, or limits out of range.
    """
    seconds = getattr(args, "reward_timeout", None)
    if seconds is None or functions is None:
        return functions
    if not isinstance(functions, list):
        return supervised([functions], args)
    return [_supervised(function, args) for function in functions]


def _supervised(function: Any, args: Any) -> Any:
    if isinstance(function, str | nn.Module | SupervisedReward):
        return function
    try:
        make = cloudpickle.dumps(functools.partial(given, function))
    except Exception as error:
        name = getattr(function, "__name__", type(function).__name__)
        raise ConfigError(
            f"reward_timeout: got the reward {name} that cannot be sent to a worker ({one_line(error, 200)}), expected "
            "a function of a module, or one that holds plain values; leave reward_timeout unset to call it in place"
        ) from error
    return SupervisedReward(make, seconds=args.reward_timeout, memory=args.reward_memory)


def watched(trainer: Any) -> list[SupervisedReward]:
    """The supervised ones among a trainer's reward functions; each records what it scores beside the checkpoints."""
    found = [function for function in trainer.reward_funcs if isinstance(function, SupervisedReward)]
    for i, function in enumerate(found):
        name = f"{i}-rank{trainer.accelerator.process_index}.jsonl"
        function.record = RewardRecord(Path(trainer.args.output_dir) / "rewards" / name)
    return found
