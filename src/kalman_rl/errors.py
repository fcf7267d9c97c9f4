"""Errors of this package: each contains what was given, what was expected, where, and what to do.

Every error is a :class:`KalmanRLError` and also the standard exception it refines, so that both
``except KalmanRLError`` and ``except ValueError`` work.
"""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterable, Iterator

from kalman_rl.terminal import printable, without_secrets


class KalmanRLError(Exception):
    """Base of every error raised on purpose by this package."""


class ConfigError(KalmanRLError, ValueError):
    """A setting, name or option is unknown or out of range."""


class ShapeError(KalmanRLError, ValueError):
    """A tensor has the wrong shape, or a row of it is empty."""


class NumericError(KalmanRLError, ArithmeticError):
    """A number is NaN, infinite or outside the domain of a formula."""


class RewardError(KalmanRLError, RuntimeError):
    """A reward function failed or returned something that is not one number per completion."""


class RunError(KalmanRLError, OSError):
    """A run directory cannot be created, read or continued."""


class PlaceError(RunError):
    """A path that somebody gave is not what is asked for, or no place where that can be written."""


class NoSpaceError(RunError):
    """A disk is full, or what is to be written does not fit on it."""


class AdapterError(KalmanRLError, ImportError):
    """A host library (TRL, verl, a model package) is missing or of an untested version."""


def exit_code(error: Exception) -> int:
    """The exit code of a command that ends with an error: 2 where what was given to it is wrong, else 1.

    >>> exit_code(ConfigError("steps: ...")), exit_code(NoSpaceError("disk: ..."))
    (2, 1)
    """
    return 2 if isinstance(error, ConfigError | PlaceError) else 1


@contextlib.contextmanager
def extra(name: str, user: str) -> Iterator[None]:
    """Turn the failed import of a package that is not installed into a sentence that names the extra.

    Args:
        name: of the extra.
        user: what needs it.

    Raises: AdapterError.

    >>> with extra("app", "kalman-rl"):  # doctest: +ELLIPSIS
    ...     import no_such_package
    Traceback (most recent call last):
    kalman_rl.errors.AdapterError: kalman-rl: got no package 'no_such_package', ...; pip install 'kalman-rl[app]'
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "kalman_rl"):
            raise
        raise AdapterError(
            f"{user}: got no package {quote(package)}, expected it to be installed; pip install 'kalman-rl[{name}]'"
        ) from error


def one_line(text: object, limit: int | None = None) -> str:
    r"""Text as :func:`printable` makes it, on one line; cut at ``limit`` characters.

    >>> one_line("a\n\x1b[31mb")
    'a  [31mb'
    """
    flat = printable(" ".join(without_secrets(str(text)).split()))
    return flat if limit is None or len(flat) <= limit else flat[: limit - 3] + "..."


def quote(value: object, limit: int = 200) -> str:
    """A value as it would be written in Python, on one line of at most ``limit`` characters, whatever it is.

    >>> quote("a"), quote(1.5), quote(10**5000)
    ("'a'", '1.5', 'an int that cannot be written out')
    """
    try:
        return one_line(repr(value), limit)
    except Exception:  # a whole number of thousands of digits, or a __repr__ of somebody's own
        name = type(value).__name__
        return f"a{'n' if name[0] in 'aeiou' else ''} {name} that cannot be written out"


def unknown_name(kind: str, name: object, known: Iterable[str]) -> ConfigError:
    """Error for a name that is not in a table, pointing at the nearest one.

    >>> str(unknown_name("method", "kop", ["kpo", "grpo"]))
    "method: got 'kop', expected one of grpo, kpo; did you mean 'kpo'?"
    """
    names, text = sorted(known), name if isinstance(name, str) else quote(name)
    return ConfigError(
        f"{kind}: got {quote(text, 120)}, expected one of {', '.join(names)}{did_you_mean(text, names)}"
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End of a sentence that points at the nearest known word, capitals or not; empty where none is near.

    >>> did_you_mean("KPO", ["grpo", "kpo"])
    "; did you mean 'kpo'?"
    """
    spelt = {name.casefold(): name for name in known}
    near = difflib.get_close_matches(word[:120].casefold(), list(spelt), n=1, cutoff=0.4)
    return f"; did you mean {quote(spelt[near[0]])}?" if near else ""
