"""Settings read by pydantic without guessing ("3" is no number, 3.0 no whole number), its findings in our words.

pydantic is imported by the first value that is read, not by ``--help``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

from annotated_types import Predicate

from kalman_rl.checks import is_real
from kalman_rl.errors import ConfigError, quote, unknown_name

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

C = TypeVar("C")

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "is_instance_of": "a path",
    "tuple_type": "a list",
    "dict_type": "options by name, as KEY=VALUE",
    "literal_error": "one of {expected}",
    "greater_than_equal": "at least {ge:,}",
    "less_than_equal": "at most {le:,}",
    "_is_writable": "text in UTF-8 without NUL",
    "_not_nan": "a number",
    "_is_option": "a number, true or false, a text, or a list of numbers",
}
"""What pydantic's kinds of errors and our own predicates expect."""


def _is_writable(value: Any) -> bool:
    return not re.search("[\0\ud800-\udfff]", str(value))


def _not_nan(value: float) -> bool:
    return value == value


def _is_option(value: Any) -> bool:
    items = value if isinstance(value, list | tuple) else [value]
    return is_real(*items) or isinstance(value, bool) or (isinstance(value, str) and _is_writable(value))


Text = Annotated[str, Predicate(_is_writable)]
Place = Annotated[Path, Predicate(_is_writable)]
Number = Annotated[float, Predicate(_not_nan)]
Option = Annotated[Any, Predicate(_is_option)]


def read(kind: type[C], values: Mapping[str, Any]) -> C:
    """A dataclass of settings from values; a list is read as a tuple, a text as a path where one is wanted.

    Raises: ConfigError ``name: got X, expected Y`` about the first value that is wrong by itself.
    """
    from pydantic import ValidationError

    reader: Any = _reader
    make, paths = reader(kind)
    given = dict(values)
    for name, value in values.items():
        if isinstance(value, list):
            given[name] = tuple(value)
        elif isinstance(value, str) and name in paths:
            given[name] = Path(value)
    try:
        return kind(**vars(make(**given)))
    except ValidationError as error:
        raise _sentence(kind, error.errors(include_url=False)[0]) from None


@cache
def _reader(kind: Any) -> tuple[Any, set[str]]:
    """The same dataclass, whose values pydantic checks as it is made; and which fields are paths."""
    from pydantic import ConfigDict, dataclasses

    config = ConfigDict(strict=True, extra="forbid")
    paths = {name for name, hint in get_type_hints(kind).items() if Path in (hint, *get_args(hint))}
    return dataclasses.dataclass(kind, frozen=True, config=config), paths


def lists_of_one(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a layer, where one text may stand for a list of texts."""
    hints = get_type_hints(kind)
    return {
        name: (value,)
        if isinstance(value, str) and get_origin(hint := hints.get(name)) is tuple and str in get_args(hint)
        else value
        for name, value in values.items()
    }


def _sentence(kind: Any, error: ErrorDetails) -> ConfigError:
    name = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    value, context, fault = error["input"], error.get("ctx", {}), error["type"]
    if fault == "unexpected_keyword_argument":
        return unknown_name("key", name, [spec.name for spec in fields(kind)])
    if fault == "literal_error" and isinstance(value, str):
        return unknown_name(name, value, re.findall(r"'(\w+)'", context["expected"]))
    if fault == "predicate_failed":
        fault = error["msg"].split("'")[1]
    expected = EXPECTED.get(fault, error["msg"]).format(**context)
    if isinstance(value, float) and not math.isfinite(value) and fault.endswith("than_equal"):
        expected = "a finite number"
    return ConfigError(f"{name}: got {show(value)}, expected {expected}")


def show(value: Any) -> str:
    """A value as it would be written, on one line of at most 80 characters; a tuple is written as a list."""
    return quote(list(value) if isinstance(value, tuple) else value, 80)
