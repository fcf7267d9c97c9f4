"""What a reward function returns, as one float or None per completion."""

from __future__ import annotations

import math
from typing import Any

from kalman_rl.errors import RewardError, quote


def numbers(name: str, returned: Any, count: int) -> list[float | None]:
    """The rewards of ``count`` completions; None, NaN and infinities are None, a missing observation.

    Booleans, integers, numpy numbers and 0-d tensors become floats.

    Args: name: of the reward function. returned: by it.
    Raises: RewardError for anything but one number, or None, per completion.

    >>> numbers("mine", [True, float("nan")], 2)
    [1.0, None]
    """
    expected = f"expected a list of {count} numbers, one per completion"
    if isinstance(returned, str | bytes | dict) or not hasattr(returned, "__iter__"):
        raise RewardError(f"reward: {name} returned a {type(returned).__name__}, {expected}")
    if getattr(returned, "ndim", 1) != 1:
        raise RewardError(f"reward: {name} returned shape {tuple(returned.shape)}, {expected}")
    items = list(returned)
    if len(items) != count:
        raise RewardError(f"reward: {name} returned {len(items)} values, {expected}")
    return [_number(name, index, item) for index, item in enumerate(items)]


def _number(name: str, index: int, item: Any) -> float | None:
    if item is None:
        return None
    if isinstance(item, str | bytes) or getattr(item, "ndim", 0) != 0:
        raise _not_a_number(name, index, item)
    try:
        value = float(item.item() if hasattr(item, "item") else item)
    except OverflowError:
        return None
    except (TypeError, ValueError) as error:
        raise _not_a_number(name, index, item) from error
    return value if math.isfinite(value) else None


def _not_a_number(name: str, index: int, item: Any) -> RewardError:
    return RewardError(
        f"reward: {name} returned {quote(item, 60)} ({type(item).__name__}) for completion {index}, "
        "expected a number, or None when there is no reward"
    )
