"""Checks of every method that run on the user's machine in seconds: ``kalman-rl methods NAME --verify``.

``golden`` compares our composition with recorded outputs of published code (``README.md`` describes the
record); ``oracles`` compares with plain restatements of the definitions, autograd of the literal loss, and
limits in which one method becomes another. Tests use the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable

from kalman_rl.errors import unknown_name
from kalman_rl.instruments.verify import golden, oracles
from kalman_rl.instruments.verify.check import Check
from kalman_rl.methods import METHODS, make_method

__all__ = ["Check", "verify"]


def verify(names: Iterable[str] | None = None) -> list[Check]:
    """Run every check of the named methods, of all methods by default, with their default options.

    Raises: ConfigError for an unknown name.

    >>> all(check.passed for check in verify(["rloo"]))
    True
    """
    names = list(METHODS if names is None else names)
    for name in names:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    return [
        check
        for name in names
        for check in (*golden.checks(make_method(name)), *oracles.checks(make_method(name)))
    ]
