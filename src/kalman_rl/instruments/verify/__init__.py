"""Checks of every method that run on the user's machine in seconds: ``kalman-rl methods NAME --verify``.

``golden`` compares our composition with recorded outputs of published code (``README.md`` describes the
record); ``oracles`` compares with plain restatements of the definitions, autograd of the literal loss, and
limits in which one method becomes another. Tests use the same functions.
"""

from __future__ import annotations

from collections.abc import Iterable

from kalman_rl.instruments.verify import golden, oracles
from kalman_rl.instruments.verify.check import Check
from kalman_rl.instruments.verify.place import place_of
from kalman_rl.methods import METHODS, make_method

__all__ = ["Check", "verify"]


def verify(names: Iterable[str] | None = None, *, device: str = "cpu") -> list[Check]:
    """Run every check of the named methods, of all that are ours by default, with their default options.

    Args:
        names: names of methods.
        device: ``cpu``, ``cuda`` or ``mps``; on the last the numbers are float32, and tolerances follow.

    Raises: ConfigError for an unknown name or a device that is not there.

    >>> all(check.passed for check in verify(["rloo"]))
    True
    """
    place = place_of(device)
    methods = [make_method(name) for name in (METHODS.table if names is None else names)]
    return [
        check
        for method in methods
        for check in (*golden.checks(method, place), *oracles.checks(method, place))
    ]
