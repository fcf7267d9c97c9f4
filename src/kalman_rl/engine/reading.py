"""Reading settings: a text file with its lines, and values as their annotated types, without guessing."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin

from kalman_rl.errors import ConfigError, unknown_name

MAX_TOML_BYTES = 10_000_000


def text_of(path: Path) -> str:
    """The text of a settings file. Raises: ConfigError if it cannot be read, is too large or not UTF-8."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOML_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise ConfigError(f"config: cannot read {show(str(path))}: {reason}") from None
    if len(data) > MAX_TOML_BYTES:
        raise ConfigError(f"{path}: got more than {MAX_TOML_BYTES:,} bytes, expected a file of settings")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}:{line}: got a byte that is not UTF-8, expected TOML in UTF-8") from None


def line_of(text: str, key: str) -> int:
    """Line (from 1) on which a top-level key or table starts; 1 if it is spelled in an unusual way."""
    start = re.search(rf"^[ \t]*\[?[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*[=.\]]", text, re.MULTILINE)
    return text.count("\n", 0, start.start()) + 1 if start else 1


def show(value: Any) -> str:
    """A value as it would be written, shortened to 80 characters."""
    try:
        shown = repr(value)
    except ValueError:  # a whole number of thousands of digits
        shown = f"a {type(value).__name__}"
    return shown if len(shown) <= 80 else shown[:77] + "..."


def read(name: str, value: Any, kind: Any) -> Any:
    """``value`` as a field's annotated type, without guessing: "3" is no number, 3.0 no whole number."""
    if isinstance(kind, UnionType):  # "X | None"
        if value is None:
            return None
        kind = get_args(kind)[0]
    shape, inner = get_origin(kind) or kind, get_args(kind)
    if shape is Literal and isinstance(value, str) and value not in inner:
        raise unknown_name(name, value, inner)
    if shape is tuple and isinstance(value, (list, tuple)):
        return tuple(read(name, item, inner[0]) for item in value)
    if shape is dict and isinstance(value, dict):
        return {read(name, key, str): read(f"{name}.{key}", item, inner[1]) for key, item in value.items()}
    accepts, make, expected = _KINDS[shape]
    if not accepts(value):
        raise ConfigError(f"{name}: got {show(value)}, expected {expected}")
    return make(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


def _is_number(value: Any) -> bool:
    return (type(value) is float and value == value) or (type(value) is int and abs(value) < 1e308)


_KINDS: dict[Any, tuple[Callable[[Any], bool], Callable[[Any], Any], str]] = {
    int: (lambda value: type(value) is int, int, "a whole number"),
    float: (_is_number, float, "a number"),
    bool: (lambda value: type(value) is bool, bool, "true or false"),
    str: (_is_text, str, "a text (UTF-8, without NUL)"),
    Path: (lambda value: isinstance(value, Path | str) and _is_text(str(value)), Path, "a path"),
    Literal: (lambda value: isinstance(value, str), str, "one of the names"),
    tuple: (lambda value: False, tuple, "a list"),
    dict: (lambda value: False, dict, "a table of numbers"),
}
