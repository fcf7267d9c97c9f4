"""What settings, counts and saved states must be before they are used."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Integral, Real
from typing import Any

from kalman_rl.errors import ConfigError, KalmanRLError, NumericError, ShapeError, quote

LARGEST_WHOLE = 2**63 - 1


def is_whole(value: object, low: int = 0, high: int | None = None) -> bool:
    """Whether a value is an integer (NumPy's too) in [low, high], and no bool; ``high=None`` is what a tensor holds.

    >>> is_whole(2, 1), is_whole(0, 1), is_whole(2.0), is_whole(True)
    (True, False, False, False)
    """
    return (
        isinstance(value, Integral)
        and not isinstance(value, bool)
        and low <= int(value)
        and int(value) <= (LARGEST_WHOLE if high is None else high)
    )


def is_real(*values: object) -> bool:
    """Whether all values are numbers that a float holds: no text, None, bool, tensor, NaN or 10**400.

    >>> is_real(2, 0.5, float("inf")), is_real("2"), is_real(float("nan")), is_real(10**400)
    (True, False, False, False)
    """
    return all(isinstance(v, Real) and not isinstance(v, bool) and _is_number(v) for v in values)


def _is_number(value: Real) -> bool:
    try:
        return float(value) == float(value)
    except (OverflowError, ValueError):
        return False


def expect_tensor(name: str, value: object, expected: str = "a tensor") -> None:
    """Raises: ShapeError unless the value is a tensor.

    >>> expect_tensor("x", [1.0])
    Traceback (most recent call last):
    kalman_rl.errors.ShapeError: x: got list, expected a tensor
    """
    if not hasattr(value, "dtype") or not hasattr(value, "detach"):
        raise ShapeError(f"{name}: got {type(value).__name__}, expected {expected}")


def broadcasts(shape: Sequence[int], to: Sequence[int]) -> bool:
    """Whether a tensor of ``shape`` is a number, a line or a table that broadcasts to the two axes ``to``.

    >>> broadcasts((), (2, 3)), broadcasts((2, 1), (2, 3)), broadcasts((2,), (2, 3))
    (True, True, False)
    """
    return len(shape) <= 2 and all(size in (1, wanted) for size, wanted in zip(shape[::-1], to[::-1]))


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


@contextmanager
def reading(what: str, state: Any) -> Iterator[None]:
    """Turn whatever a damaged state makes fail inside the block into a ConfigError, and refuse NaN at once.

    Raises: ConfigError, NumericError for NaN anywhere in the state, and what the block raises on purpose.

    >>> with reading("price state", {"value": "x"}):  # doctest: +ELLIPSIS
    ...     float("x")
    Traceback (most recent call last):
    ...
    kalman_rl.errors.ConfigError: price state: got a damaged one (ValueError: could not convert ...
    """
    _refuse_nan(what, state, "")
    try:
        yield
    except KalmanRLError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        line = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"{what}: got a damaged one ({type(error).__name__}: {line}), expected what state_dict() gave; take an "
            "older checkpoint"
        ) from error


def expect(what: str, name: str, legal: bool, value: object, expected: str) -> None:
    """Raises: ConfigError unless an entry of a saved state is ``legal``."""
    if not legal:
        raise ConfigError(f"{what}: got {quote(value, 80)} as {name}, expected {expected}")


def _refuse_nan(what: str, value: Any, path: str) -> None:
    if isinstance(value, dict):
        for name, part in value.items():
            _refuse_nan(what, part, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            _refuse_nan(what, part, path)
    elif isinstance(value, float) or hasattr(value, "isnan"):
        found = value != value
        if bool(found.any() if hasattr(found, "any") else found):
            raise NumericError(f"{what}: got NaN in {path}, expected numbers")
