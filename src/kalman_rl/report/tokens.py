"""Token strips: traced completions, each token coloured by how far its probability moved.

Everything shown here was written by a model, so it is hostile until cleaned and escaped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kalman_rl.report.data import Run, clean

NEEDED = ("sequence", "token", "log_ratio")
OPTIONAL = ("prompt", "position", "filtered_log_ratio", "coefficient", "kept", "advantage", "reward", "gain",
            "logp_old", "logp")  # fmt: skip
LEVELS = 5
MOST_TOKENS = 160
MOST_STRIPS = 6
MOST_ROWS = 50_000
MOST_FILES = 12
ROW_WIDTH = 920.0
"""Pixels of one row of tokens, at 8.4 per letter and at least 52 per token."""
MARKS = {"\n": "↵", "\t": "⇥", " ": "·", "\r": "␍"}


@dataclass(frozen=True)
class Cell:
    """One number as shown: its text, its colour class and the exact value for hovering."""

    text: str
    colour: str
    exact: str


@dataclass(frozen=True)
class Token:
    """One token with its three numbers; ``hint`` is the hover text."""

    text: str
    colour: str
    hint: str
    raw: Cell
    filtered: Cell
    coefficient: Cell


@dataclass(frozen=True)
class Strip:
    """One completion: what was asked, what it earned, its tokens in rows."""

    prompt: str
    earned: str
    rows: list[list[Token]]
    cut: int

    @property
    def tokens(self) -> list[Token]:
        return [token for row in self.rows for token in row]


@dataclass(frozen=True)
class Strips:
    """The traced completions of one step, or the sentence that says why there are none."""

    note: str
    run: str = ""
    step: int = 0
    scale: float = 0.0
    strips: Sequence[Strip] = ()


def token_strips(runs: Sequence[Run]) -> Strips:
    """The latest traced step, of the first run that has one, at which any log-ratio is not zero."""
    problems: list[str] = []
    still = None
    for run in runs:
        files = sorted((run.path / "traces").glob("step-*.parquet"), reverse=True)[:MOST_FILES]
        for file in files:
            table = _read(file, problems)
            if table:
                scale = max((abs(value) for value in _numbers(table["log_ratio"])), default=0.0)
                if scale > 0:
                    return _build(run, file, table, scale)
                still = still or (run, file, table)
    if still:
        return _build(*still, 0.0)
    return Strips(
        problems[0] if problems else "No token traces were recorded, so there is no completion to show."
    )


def _read(file: Path, problems: list[str]) -> dict[str, list[Any]] | None:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError:
        problems.append("Token traces are Parquet files; install pyarrow to show them.")
        return None
    try:
        source = parquet.ParquetFile(file)
        present = [name for name in (*NEEDED, *OPTIONAL) if name in source.schema_arrow.names]
        if any(name not in present for name in NEEDED):
            problems.append(f"The token trace {clean(file.name)} lacks columns, so it is not shown.")
            return None
        batch = next(source.iter_batches(batch_size=MOST_ROWS, columns=present), None)
        return batch.to_pydict() if batch is not None and len(batch) else None
    except (OSError, ValueError, ArrowException) as error:
        problems.append(f"The token trace {clean(file.name)} could not be read ({type(error).__name__}).")
        return None


def _numbers(values: Sequence[Any]) -> list[float]:
    return [value for value in map(_number, values) if math.isfinite(value)]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _build(run: Run, file: Path, table: dict[str, list[Any]], scale: float) -> Strips:
    step = int("".join(char for char in file.stem if char.isdigit())[:12] or 0)
    rows_of: dict[str, list[int]] = {}
    for index, sequence in enumerate(table["sequence"]):
        rows_of.setdefault(str(sequence), []).append(index)
    strips: list[Strip] = []
    left = MOST_TOKENS
    for rows in _choose(list(rows_of.values()), table):
        if strips and len(rows) > left:
            continue
        strips.append(_strip(rows, table, scale))
        left -= len(rows)
        if len(strips) == MOST_STRIPS or left <= 0:
            break
    note = "" if scale else "Every log-ratio is zero here: these are first updates after sampling."
    return Strips(note, run.name, step, scale, strips)


def _choose(sequences: list[list[int]], table: dict[str, list[Any]]) -> list[list[int]]:
    """Those whose tokens moved most first: encouraged and discouraged in turn, the indifferent last."""

    def spread(rows: list[int]) -> float:
        return -max(
            (abs(value) for value in _numbers([table["log_ratio"][row] for row in rows])), default=0.0
        )

    sides: dict[int, list[list[int]]] = {1: [], -1: [], 0: []}
    for rows in sorted(sequences, key=spread):
        advantage = _at(table, "advantage", rows[0])
        sides[(advantage > 0) - (advantage < 0)].append(rows)
    pairs = zip_longest(sides[1], sides[-1])
    return [rows for pair in pairs for rows in pair if rows] + sides[0]


def _strip(rows: list[int], table: dict[str, list[Any]], scale: float) -> Strip:
    tokens = [_token(row, table, scale) for row in rows[:MOST_TOKENS]]
    prompt = clean(table["prompt"][rows[0]], 400, breaks=True) if "prompt" in table else ""
    earned = [(name, _at(table, name, rows[0])) for name in ("reward", "advantage")]
    return Strip(
        prompt=prompt,
        earned=", ".join(f"{name} {_short(value)}" for name, value in earned if math.isfinite(value)),
        rows=_wrapped(tokens),
        cut=max(0, len(rows) - MOST_TOKENS),
    )


def _wrapped(tokens: Sequence[Token]) -> list[list[Token]]:
    rows: list[list[Token]] = []
    used = ROW_WIDTH
    for token in tokens:
        width = max(52.0, 8.4 * len(token.text) + 16)
        if used + width > ROW_WIDTH:
            rows.append([])
            used = 0.0
        rows[-1].append(token)
        used += width
    return rows


def _at(table: dict[str, list[Any]], name: str, row: int) -> float:
    return _number(table[name][row]) if name in table else math.nan


def _token(row: int, table: dict[str, list[Any]], scale: float) -> Token:
    raw, filtered = _at(table, "log_ratio", row), _at(table, "filtered_log_ratio", row)
    coefficient = _at(table, "coefficient", row)
    kept = table["kept"][row] if "kept" in table else None
    text = clean(table["token"][row], 24, breaks=True)
    shown = "".join(MARKS.get(char, char) for char in text) or "∅"
    facts = [
        ("log-ratio", raw),
        ("filtered", filtered),
        ("coefficient", coefficient),
        ("gain", _at(table, "gain", row)),
    ]
    facts += [("log p old", _at(table, "logp_old", row)), ("log p now", _at(table, "logp", row))]
    hint = "; ".join(f"{name} {value:.4g}" for name, value in facts if math.isfinite(value))
    if kept is False:
        weight = Cell("clipped", "dropped", "clipped: this token has no gradient")
    else:
        change = math.log(coefficient) if coefficient > 0 else math.nan
        weight = Cell(_short(coefficient), _colour(change, scale), f"coefficient {coefficient:.6g}")
    return Token(
        shown,
        _colour(raw, scale),
        f"{shown}: {hint}",
        Cell(_signed(raw), _colour(raw, scale), f"log-ratio {raw:.6g}"),
        Cell(_signed(filtered), _colour(filtered, scale), f"filtered log-ratio {filtered:.6g}"),
        weight,
    )


def _colour(value: float, scale: float) -> str:
    """Class of the diverging scale: ``n5`` (less likely now) over ``z`` to ``p5`` (more likely now)."""
    if not math.isfinite(value) or not scale:
        return "z"
    level = round(LEVELS * max(-1.0, min(1.0, value / scale)))
    return "z" if level == 0 else f"{'p' if level > 0 else 'n'}{abs(level)}"


def _short(value: float) -> str:
    """
    >>> _short(1.0), _short(0.98765), _short(float("nan"))
    ('1', '0.988', '–')
    """
    if not math.isfinite(value):
        return "–"
    return f"{value:.3f}".rstrip("0").rstrip(".").replace("-", "−") if abs(value) < 1000 else f"{value:.2g}"


def _signed(value: float) -> str:
    """
    >>> _signed(0.0312), _signed(-0.5), _signed(1e-7), _signed(0.0)
    ('+.031', '−.500', '≈ 0', '0')
    """
    if not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    if abs(value) < 5e-4:
        return "≈ 0"
    text = f"{abs(value):.3f}" if abs(value) < 10 else f"{abs(value):.1f}"
    return ("−" if value < 0 else "+") + text.removeprefix("0")
