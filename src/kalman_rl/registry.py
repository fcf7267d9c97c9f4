"""From a name and options, as they come from a command line or a file, to an object of a table."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from kalman_rl.errors import ConfigError, unknown_name

T = TypeVar("T")


def make(kind: str, table: Mapping[str, Callable[..., T]], name: str, options: Mapping[str, object]) -> T:
    """Call ``table[name]`` with options whose names and types its signature knows.

    Options are numbers; one whose default is None may be None; one whose default is true or false takes
    true, false, 1 or 0; one whose default is a text takes a text.

    Raises: ConfigError for an unknown name or option, naming the nearest one, for another type, and for an
    option without a default that was not given.
    """
    if name not in table:
        raise unknown_name(kind, name, table)
    known = inspect.signature(table[name]).parameters
    read = {}
    for option, value in options.items():
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1, cutoff=0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            choice = f"one of {', '.join(known)}" if known else "none, it has no options"
            raise ConfigError(f"{kind} option: got {option!r} for {name}, expected {choice}{hint}")
        default = known[option].default
        if isinstance(default, bool):
            legal, expected = (
                isinstance(value, (bool, int, float)) and value in (0, 1),
                "true or false (1 or 0)",
            )
            value = bool(value) if legal else value
        elif isinstance(default, str):
            legal, expected = isinstance(value, str), "a text"
        else:
            legal = isinstance(value, (int, float)) and not isinstance(value, bool)
            legal, expected = legal or (value is None and default is None), "a number"
        if not legal:
            raise ConfigError(f"{kind} option {option}: got {value!r} for {name}, expected {expected}")
        read[option] = value
    for option, parameter in known.items():
        if parameter.default is parameter.empty and option not in read:
            raise ConfigError(f"{kind} option {option}: got nothing for {name}, expected a number")
    return table[name](**read)
