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
from kalman_rl.instruments.verify.place import place_of
from kalman_rl.methods import METHODS, make_method

__all__ = ["Check", "verify"]


def verify(names: Iterable[str] | None = None, *, device: str = "cpu") -> list[Check]:
    """Run every check of the named methods, of all methods by default, with their default options.

    Args:
        names: names of methods.
        device: ``cpu``, ``cuda`` or ``mps``; on the last the numbers are float32, and tolerances follow.

    Raises: ConfigError for an unknown name or a device that is not there.

    >>> all(check.passed for check in verify(["rloo"]))
    True
    """
    names = list(METHODS if names is None else names)
    for name in names:
        if name not in METHODS:
            raise unknown_name("method", name, METHODS)
    place = place_of(device)
    return [
        check
        for name in names
        for check in (*golden.checks(make_method(name), place), *oracles.checks(make_method(name), place))
    ]
