"""From the words of a command line to a verb: tyro splits them, and a word that does not fit is one sentence.

tyro explains a mistake in its own box. So a word of the wrong type goes on as text, and the check of the settings
refuses it as it refuses the same value in a file; what is unknown or missing is found here.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from kalman_rl.errors import ConfigError, did_you_mean, one_line, quote, unknown_name

NOUNS = {
    int: ("INT", "a whole number"),
    float: ("FLOAT", "a number"),
    Path: ("PATH", "a path"),
    str: ("STR", "text"),
}
POSITIONAL, APPENDED = (get_args(mark[str])[1] for mark in (tyro.conf.Positional, tyro.conf.UseAppendAction))
BOX = "╭─╮│╰╯"


def parse(words: Sequence[str], verbs: Mapping[str, type], defaults: Mapping[str, Any], about: str) -> Any:
    """The verb that the words ask for, with what they give; values are of the right type or texts.

    Args:
        words: without the name of the command.
        verbs: name to dataclass.
        defaults: name to an instance that holds the values of flags not given.
        about: the command in a sentence.

    Raises: ConfigError for an unknown verb or flag, a word too many, and a missing value; SystemExit after ``--help``.
    """
    if words and words[0] not in (*verbs, "-h", "--help"):
        raise unknown_name("verb", words[0], verbs)
    verb = words[0] if words else ""
    for word in words:
        if verb in verbs and word.startswith("--"):
            _known(verb, word, [*_flags(verbs[verb]), "--help"])
    if verb in verbs:
        _refuse_bare_lists(verb, verbs[verb], words[1:])
    choices = [
        Annotated[
            kind,
            tyro.conf.subcommand(name, **({"default": defaults[name]} if name in defaults else {})),
        ]
        for name, kind in verbs.items()
    ]
    anyone: Any = Union[tuple(choices)]  # noqa: UP007
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, more = tyro.cli(
                anyone,
                prog="kalman-rl",
                description=about,
                args=list(words),
                config=(tyro.conf.OmitArgPrefixes,),
                registry=_registry(),
                return_unknown_args=True,
            )
    except SystemExit as stop:
        if stop.code and verb in verbs:
            _refuse_missing(verb, verbs[verb], words[1:])
        if stop.code:
            raise ConfigError(
                f"command line: {one_line(''.join(c for c in said.getvalue() if c not in BOX))}"
            ) from None
        raise
    for word in more:
        raise ConfigError(f"argument: got {quote(word)}, expected none; see `kalman-rl {verb} --help`")
    return found


def changed(base: Any, settings: Any) -> dict[str, Any]:
    """The settings that flags gave. Options given equal to the ones in a file were given all the same."""
    return {
        spec.name: value
        for spec in dataclasses.fields(base)
        if (value := getattr(settings, spec.name)) != (old := getattr(base, spec.name))
        or (isinstance(value, dict) and value is not old)
    }


def _known(verb: str, word: str, flags: Sequence[str]) -> None:
    flag = word.partition("=")[0].replace("_", "-")
    if flag in flags or flag.replace("--no-", "--", 1) in flags:
        return
    raise ConfigError(
        f"flag: got {quote(flag)}, expected one that `kalman-rl {verb} --help` lists{did_you_mean(flag, flags)}"
    )


def _flags(verb: type) -> dict[str, Any]:
    """Flags of a verb with their types; the settings of its field ``settings`` are flags too."""
    flags: dict[str, Any] = {}
    for name, hint in get_type_hints(verb, include_extras=True).items():
        if name == "settings":
            flags |= _flags(get_args(hint)[0])
            continue
        kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
        if POSITIONAL not in marks:
            flags[_flag(name)] = get_args(kind)[0] if APPENDED in marks else kind
    return flags


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _refuse_missing(verb: str, kind: type, words: Sequence[str]) -> None:
    """Raise ConfigError for the first flag without its value, or the first field that has to be given."""
    flags = _flags(kind)
    given = {word.partition("=")[0] for word in words}
    needed = [spec.name for spec in dataclasses.fields(kind) if spec.default is spec.default_factory]
    named = [_flag(name) for name in needed if _flag(name) in flags and _flag(name) not in given]
    bare = [
        word for word, after in itertools.pairwise([*words, "--"]) if word in flags and after.startswith("--")
    ]
    for flag in (*bare, *named):
        if noun := _noun(flags[flag]):
            raise ConfigError(f"{flag}: got nothing, expected {noun}; see `kalman-rl {verb} --help`")
    for name in needed:
        if _flag(name) not in flags:
            raise ConfigError(f"{name.upper()}: got nothing, expected a path; see `kalman-rl {verb} --help`")


def _refuse_bare_lists(verb: str, kind: type, words: Sequence[str]) -> None:
    """Raise ConfigError for a flag of a list without a value, which tyro takes for an empty list."""
    flags = _flags(kind)
    for word, after in itertools.pairwise([*words, "--"]):
        if word in flags and get_origin(flags[word]) is tuple and after.startswith("--"):
            raise ConfigError(
                f"{word}: got nothing, expected one or more values; see `kalman-rl {verb} --help`"
            )


def _noun(hint: Any) -> str | None:
    """What a flag of this type expects, in words; None if it can stand alone."""
    for part in (hint, *get_args(hint)):
        if part in NOUNS and get_origin(hint) not in (dict, tuple):
            return NOUNS[part][1]
    return f"one of {', '.join(get_args(hint))}" if get_origin(hint) is Literal else None


def _registry() -> tyro.constructors.ConstructorRegistry:
    """How a word is read: as a number, path, text or choice where it can be, else it stays a word."""
    registry = tyro.constructors.ConstructorRegistry()
    spec = tyro.constructors.PrimitiveConstructorSpec

    @registry.primitive_rule
    def options(
        kind: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        parts = (
            kind.type,
            *get_args(kind.type),
        )  # tyro makes a union where a default has values of other types
        if not any(dict in (part, get_origin(part)) for part in parts):
            return None
        return spec(
            nargs="*",
            metavar="[KEY=VALUE ...]",
            instance_from_str=_options,
            is_instance=lambda value: isinstance(value, dict),
            str_from_instance=lambda value: [f"{key}={json.dumps(item)}" for key, item in value.items()],
        )

    @registry.primitive_rule
    def scalar(
        kind: tyro.constructors.PrimitiveTypeInfo,
    ) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
        union = kind.type_origin in (Union, types.UnionType)
        (wanted, *others) = (
            [part for part in get_args(kind.type) if part is not type(None)] if union else [kind.type]
        )
        choices = get_args(wanted) if get_origin(wanted) is Literal else ()
        if others or not (choices or wanted in NOUNS):
            return None
        name = f"{{{','.join(choices)}}}" if choices else NOUNS[wanted][0]
        return spec(
            nargs=1,
            metavar=f"{{None}}|{name}" if union else name,
            instance_from_str=lambda words: None if union and words == ["None"] else _word(wanted, words[0]),
            is_instance=lambda value: True,
            str_from_instance=lambda value: [str(value)],
        )

    return registry


def _word(wanted: Callable[[str], Any], word: str) -> Any:
    if wanted not in NOUNS:  # a choice
        return word
    try:
        return wanted(word)
    except ValueError:
        return word


def _options(words: list[str]) -> Any:
    """Options by name: each value as JSON where it is, as a number (inf too), else as text."""
    if not all("=" in word for word in words):
        return words
    return {key: _value(value) for key, _, value in (word.partition("=") for word in words)}


def _value(text: str) -> Any:
    for read in (json.loads, float):
        with contextlib.suppress(ValueError, RecursionError):
            return read(text)
    return text
