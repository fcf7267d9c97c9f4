"""What settings, counts and saved states must be before they are used."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

from kalman_rl.errors import ConfigError


def is_whole(value: object, low: int = 0, high: int | None = None) -> bool:
    """Whether a value is an integer (NumPy's too) in [low, high], and no bool; ``high=None`` is no bound.

    >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.0), is_whole(True)
    (True, False, False, False)
    """
    return (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and low <= int(value)
        and (high is None or int(value) <= high)
    )


def is_real(*values: object) -> bool:
    """Whether all values are numbers that can be compared: no text, None, bool, tensor or NaN.

    >>> is_real(2, 0.5, float("inf")), is_real("2"), is_real(float("nan"))
    (True, False, False)
    """
    return all(isinstance(v, Real) and not isinstance(v, bool) and v == v for v in values)


def saved(what: str, state: Any, *names: str) -> tuple[Any, ...]:
    """Entries of a saved state, in the order of ``names``.

    Raises: ConfigError if the state is no dictionary or lacks one of them.

    >>> saved("price state", {"format": 1, "value": 0.5}, "value")
    (0.5,)
    """
    if not isinstance(state, dict):
        raise ConfigError(
            f"{what}: got {type(state).__name__}, expected the dictionary that state_dict() gave"
        )
    missing = [name for name in names if name not in state]
    if missing:
        raise ConfigError(
            f"{what}: got no {', '.join(missing)}, expected what state_dict() gave; was it cut short or saved "
            "by another version?"
        )
    return tuple(state[name] for name in names)
