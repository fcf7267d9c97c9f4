"""``kalman-rl contract``: does your reward, method, belief or trust region keep what the trainers rely on?

The same promises hold for everything in this package; tests go through all of it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kalman_rl.beliefs import BELIEFS, Belief
from kalman_rl.errors import ConfigError, quote, unknown_name
from kalman_rl.instruments.contract import belief, method, reward
from kalman_rl.instruments.contract.promise import Promise
from kalman_rl.methods import METHODS
from kalman_rl.objectives.loss import Method
from kalman_rl.registry import imported

__all__ = ["Contracted", "Promise", "contract"]

ROWS = 3  # of the user's file


class Contracted(NamedTuple):
    """What a name turned out to be (``"reward"``, ``"method"``, ``"belief"``, ``"trust region"``), and its promises."""

    kind: str
    promises: list[Promise]


def contract(name: str, data: Path | None = None) -> Contracted:
    """Check what ``name`` leads to.

    Args:
        name: ``module:function``, or a method or belief by name (a method, where both have it).
        data: file with rows to score, for a reward; three made-up products where None.

    Raises: ConfigError for a name that leads to none of the four, and for bad rows.

    >>> found = contract("gaussian")
    >>> found.kind, all(promise.kept for promise in found.promises)
    ('belief', True)
    """
    function = _found(name)
    if _is_reward(function):
        return Contracted("reward", list(reward.promises(_reward(name), _rows(data))))
    if _is_trust(function):
        return Contracted("trust region", list(method.trust_promises(function)))
    made = _made(name, function)
    if isinstance(made, Method):
        return Contracted("method", list(method.promises(made)))
    if isinstance(made, Belief):
        return Contracted("belief", list(belief.promises(lambda: _made(name, function))))
    if callable(made) and _is_trust(made):
        return Contracted("trust region", list(method.trust_promises(made)))
    raise ConfigError(
        f"contract: got {quote(name)}, which gives a {type(made).__name__}; expected a reward (it takes "
        "completions), a "
        "trust region (it takes ratio, advantage, current and rollouts), or what gives a Method or a Belief"
    )


def _found(name: str) -> Callable[..., Any]:
    if ":" in name:
        return imported("contract", name)
    for table in (METHODS, BELIEFS):
        if name in table:
            builder: Callable[..., Any] = table[name]
            return builder
    raise unknown_name("contract", name, {*METHODS, *BELIEFS})


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # compiled
        return []


def _is_reward(function: Callable[..., Any]) -> bool:
    names = {parameter.name for parameter in _parameters(function)}
    return "completions" in names or {"solution_str", "ground_truth"} <= names


def _is_trust(function: Callable[..., Any]) -> bool:
    if isinstance(function, type):
        return False
    asked = [p for p in _parameters(function) if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    return len(asked) == 4


def _made(name: str, function: Callable[..., Any]) -> Any:
    try:
        return function()
    except Exception as error:
        raise ConfigError(
            f"contract: got {type(error).__name__} ({error}) from {quote(name)} called without arguments; "
            "expected a Method or a Belief; give every option a default"
        ) from error


def _reward(name: str) -> Callable[..., Any]:
    from kalman_rl.engine.tasks import load_reward

    return load_reward(name)


def _rows(data: Path | None) -> list[dict[str, Any]]:
    if data is None:
        return reward.MADE_UP
    from kalman_rl.engine.tasks import rows

    task = rows(data, reward=lambda completions, **columns: [0.0] * len(completions))
    return task.train[:ROWS]
