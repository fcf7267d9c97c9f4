"""Settings read by pydantic without guessing ("3" is no number, 3.0 no whole number), its findings in our words."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, dataclasses
from pydantic_core import ErrorDetails, PydanticCustomError

from kalman_rl.errors import ConfigError, one_line, unknown_name

C = TypeVar("C")

EXPECTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
    "tuple_type": "a list",
    "dict_type": "a table of numbers",
    "literal_error": "one of {expected}",
    "greater_than_equal": "at least {ge:,}",
    "less_than_equal": "at most {le:,}",
}
"""What pydantic's kinds of errors expect."""


def _writable(value: Any) -> Any:
    if re.search("[\0\ud800-\udfff]", str(value)):
        raise PydanticCustomError("text", "text in UTF-8 without NUL")
    return value


def _not_nan(value: float) -> float:
    if value != value:
        raise PydanticCustomError("nan", "a number")
    return value


Text = Annotated[str, AfterValidator(_writable)]
Place = Annotated[Path, Field(strict=False), AfterValidator(_writable)]
Number = Annotated[float, AfterValidator(_not_nan)]


def read(kind: type[C], values: Mapping[str, Any]) -> C:
    """A dataclass of settings from values; a list is read as a tuple.

    Raises: ConfigError ``name: got X, expected Y`` about the first value that is wrong by itself.
    """
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    reader: Any = _reader
    try:
        return kind(**vars(reader(kind)(**tuples)))
    except ValidationError as error:
        raise _sentence(kind, error.errors(include_url=False)[0]) from None


@cache
def _reader(kind: Any) -> Any:
    """The same dataclass, whose values pydantic checks as it is made."""
    return dataclasses.dataclass(kind, frozen=True, config=ConfigDict(strict=True, extra="forbid"))


def _sentence(kind: Any, error: ErrorDetails) -> ConfigError:
    name = ".".join(str(part) for part in error["loc"] if not isinstance(part, int))
    value, context = error["input"], error.get("ctx", {})
    if error["type"] == "unexpected_keyword_argument":
        return unknown_name("key", name, [spec.name for spec in fields(kind)])
    if error["type"] == "literal_error" and isinstance(value, str):
        return unknown_name(name, value, re.findall(r"'(\w+)'", context["expected"]))
    expected = EXPECTED.get(error["type"], error["msg"]).format(**context)
    return ConfigError(f"{name}: got {show(value)}, expected {expected}")


def show(value: Any) -> str:
    """A value as it would be written, on one line of at most 80 characters; a tuple is written as a list."""
    try:
        return one_line(repr(list(value) if isinstance(value, tuple) else value), 80)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__}"
