"""Cards of the methods: what one needs to know before choosing one, joined from the code and two files.

The composition, the options and the inputs come from the code; equation, use, deviations and sources from
``methods/cards.toml`` and ``methods/references.toml``. A test keeps them complete.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import textwrap
import tomllib
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from kalman_rl.errors import KalmanRLError
from kalman_rl.methods import METHODS, make_method
from kalman_rl.objectives.inputs import INPUTS
from kalman_rl.objectives.loss import Method

TEXTS = ("equation", "use", "avoid", "deviations", "defaults")
"""Entries that every card has."""

PARTS = ("advantage", "ratio", "trust", "aggregate", "penalty", "correction")
"""The factors of a method."""

CHANGES = {
    "by_advantage": "the advantage: who did better than expected",
    "by_filter": "the filter: how noisy a token's ratio is taken to be",
    "by_ratio": "the ratio: how much a token still counts off-policy",
    "by_trust": "the trust region: which tokens may still move",
}
"""Module of a method -> what the method changes, in the order of the table."""

FOREIGN = "foreign"
"""What :func:`changes` says of a method of an installed package."""


@functools.cache
def _read(name: str) -> dict[str, dict[str, Any]]:
    text = resources.files("kalman_rl.methods").joinpath(name).read_text(encoding="utf-8")
    return tomllib.loads(text)


def texts() -> Mapping[str, Mapping[str, Any]]:
    """``methods/cards.toml``: method -> entries."""
    return _read("cards.toml")


def references() -> Mapping[str, Mapping[str, Any]]:
    """``methods/references.toml``: key -> title, year and what else is known."""
    return _read("references.toml")


def card(name: str) -> dict[str, Any]:
    """Everything about one method, as a JSON-compatible table.

    The card of a method without an entry in ``methods/cards.toml`` comes from its docstring and its composition.

    Raises: ConfigError for an unknown name.

    >>> card("rloo")["factors"]["advantage"]
    'leave_one_out'
    """
    method = make_method(name)
    entry = _entry(name)
    return {
        "name": name,
        "summary": summary(name),
        "changes": changes(name),
        **{key: str(entry[key]).strip("\n") for key in TEXTS},
        "factors": factors(method),
        "options": options(name),
        "names": list(entry["names"]),
        "inputs": {key: INPUTS[key] for key in method.inputs},
        "source": source(name),
        "cite": list(entry["cite"]),
    }


def _entry(name: str) -> Mapping[str, Any]:
    if name in texts():
        return texts()[name]
    body = (inspect.getdoc(METHODS[name]) or "").partition("\n")[2]
    return dict.fromkeys(TEXTS, "") | {"equation": body, "names": [], "cite": []}


def summary(name: str) -> str:
    """First line of the method's docstring."""
    line = (inspect.getdoc(METHODS[name]) or "").partition("\n")[0]
    return re.sub(r":\w+:`([^`]+)`", r"\1", line)


def changes(name: str) -> str:
    """The module that holds the method: which factor it changes. FOREIGN for one that is not ours."""
    if name not in METHODS.table:
        return FOREIGN
    return METHODS.table[name].__module__.rpartition(".")[2]


def options(name: str) -> dict[str, Any]:
    """Options of a method with their defaults."""
    return {key: option.default for key, option in inspect.signature(METHODS[name]).parameters.items()}


def factors(method: Method) -> dict[str, str]:
    """The composition, a readable label for each factor there is."""
    return {part: named_label(value) for part in PARTS if (value := getattr(method, part)) is not None}


def source(name: str) -> str:
    """Where the method comes from, in a few words: a paper, ours, or a package."""
    if name not in METHODS.table:
        return METHODS.origin(name)
    entry = texts().get(name, {})
    cited = [references()[key] for key in entry.get("cite", [])]
    if "source" in entry or not cited:
        return str(entry.get("source", "ours"))
    first = cited[0]
    return f"arXiv {first['eprint']}" if "eprint" in first else str(first["short"])


def label(part: Callable[..., Any]) -> str:
    """``token`` for a function, ``Clip(0.2, 0.28)`` for a component with settings."""
    if not dataclasses.is_dataclass(part):
        return str(getattr(part, "__name__", part))
    values = (getattr(part, spec.name) for spec in dataclasses.fields(part) if spec.init)
    shown = ", ".join(_value(value) for value in values if value is not None)
    return f"{type(part).__name__}({shown})"


def named_label(part: Callable[..., Any], *, short: bool = False) -> str:
    """As :func:`label` with the names of settings; ``short`` leaves out those at the component's defaults."""
    if not dataclasses.is_dataclass(part):
        return label(part)
    shown = [
        f"{spec.name}={_value(value)}"
        for spec in dataclasses.fields(part)
        if spec.init and ((value := getattr(part, spec.name)) != spec.default or not short)
    ]
    return f"{type(part).__name__}({', '.join(shown)})" if shown else type(part).__name__


def _value(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if callable(value):
        return named_label(value)
    return str(value)


def bibtex(name: str) -> str:
    """BibTeX of a method's sources; authors only where the list was checked.

    >>> print(bibtex("kpo").splitlines()[0])
    @misc{he2026kpo,
    """
    entries = []
    for key in texts().get(name, {}).get("cite", []):
        entry = {field: value for field, value in references()[key].items() if field != "short"}
        if "eprint" in entry:
            entry |= {"archivePrefix": "arXiv", "url": f"https://arxiv.org/abs/{entry['eprint']}"}
        kind = "article" if "journal" in entry else "misc"
        fields = ",\n".join(f"  {field} = {{{value}}}" for field, value in entry.items())
        entries.append(f"@{kind}{{{key},\n{fields}\n}}")
    whose = "ours: cite this package, see CITATION.cff" if name in METHODS.table else f"of {source(name)}"
    return "\n\n".join(entries) or f"% {name} is {whose}"


def table() -> list[dict[str, Any]]:
    """One row per method: its name, its parts, its source, its options with defaults, a summary; or an error."""
    return [_row(name) for name in METHODS]


def _row(name: str) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "changes": changes(name), "source": source(name)}
    try:
        method = make_method(name)
    except KalmanRLError as error:  # of somebody else's package: the others are listed all the same
        return row | {"error": str(error)}
    row |= {part: label(getattr(method, part)) for part in PARTS[:4]}
    return row | {"options": options(name), "summary": summary(name)}


def as_text(name: str, width: int = 100) -> str:
    """The card for a terminal of ``width`` columns."""
    shown = card(name)
    lines = [*textwrap.wrap(shown["summary"], width), ""]
    if shown["equation"]:
        lines += ["  " + line for line in shown["equation"].splitlines()] + [""]
    rows = [*shown["factors"].items()]
    rows += [("options", ", ".join(f"{key}={value}" for key, value in shown["options"].items()) or "none")]
    rows += [(key, shown[key]) for key in ("defaults", "use", "avoid", "deviations") if shown[key]]
    rows += [("names", text) for text in shown["names"]]
    rows += [("inputs", f"{key}: {text}") for key, text in shown["inputs"].items()]
    rows += [("source", shown["source"]), *(("cite", _reference(key)) for key in shown["cite"])]
    for key, value in rows:
        wrapped = textwrap.wrap(value, max(width - 14, 30))
        lines += [f"{head:<13} {line}" for head, line in zip([key, *[""] * len(wrapped)], wrapped)]
    return "\n".join(line.rstrip() for line in lines)


def _reference(key: str) -> str:
    entry = references()[key]
    where = [f"arXiv {entry['eprint']}"] if "eprint" in entry else [entry["url"]] if "url" in entry else []
    return ", ".join([f"{entry['title']} ({entry['year']})", *where])


def as_markdown(name: str) -> str:
    """The card as a section of ``docs/methods.md``."""
    shown = card(name)
    lines = [f"## {name}", "", shown["summary"], "", "```text", shown["equation"], "```", ""]
    lines += [f"- **{part}**: `{text}`" for part, text in shown["factors"].items()]
    given = ", ".join(f"`{key}={value}`" for key, value in shown["options"].items())
    lines += [f"- **options**: {given or 'none'}. {shown['defaults']}"]
    lines += [f"- **{key}**: {shown[key]}" for key in ("use", "avoid", "deviations")]
    lines += [f"- **names**: {text}" for text in shown["names"]]
    lines += [f"- **inputs** `{key}`: {text}" for key, text in shown["inputs"].items()]
    lines += [
        f"- **source**: {shown['source']}",
        *(f"- **cite**: {_reference(key)}" for key in shown["cite"]),
    ]
    return "\n".join(lines) + "\n"


def by_change() -> dict[str, list[str]]:
    """Module -> its methods, in the order of the table; FOREIGN at the end, if there are any."""
    found: dict[str, list[str]] = {module: [] for module in CHANGES}
    for name in METHODS:
        found.setdefault(changes(name), []).append(name)
    return found


def _composition(name: str) -> str:
    """Advantage x ratio x trust region x aggregation, or why a package does not give it."""
    try:
        method = make_method(name)
    except KalmanRLError as error:
        return str(error)
    return " x ".join(
        named_label(getattr(method, part), short=True) for part in PARTS if getattr(method, part) is not None
    )


def as_table(width: int = 100) -> str:
    """Every method in ``width`` columns, by what it changes: name, source, and its factors."""
    lines = []
    size = max(map(len, METHODS))
    indent = " " * (size + 3)
    for module, names in by_change().items():
        title = (
            f"Methods that change {CHANGES[module]}" if module in CHANGES else "Methods of installed packages"
        )
        lines += ["", *textwrap.wrap(title, width)]
        for name in names:
            text = f"{_composition(name)}  [{source(name)}]"
            first, *rest = textwrap.wrap(text, max(width - len(indent), 30), break_long_words=False)
            lines += [f"  {name:<{size}} {first}", *(indent + line for line in rest)]
    end = "advantage x ratio x trust region x aggregation. `kalman-rl methods NAME` shows a card."
    return "\n".join([*lines[1:], "", *textwrap.wrap(end, width)])
