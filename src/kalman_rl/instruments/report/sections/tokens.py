"""Traced tokens for the inspector: which completions a page holds, and what happened to each token of them.

Everything here was written by a model, so texts are cleaned before they are kept. The result is plain lists and
numbers: the page carries it as JSON, and its script shows it as text only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs import traces
from kalman_rl.engine.runs.reading import RunRecord, clean
from kalman_rl.engine.runs.traces import Table
from kalman_rl.instruments.replay import own_method
from kalman_rl.instruments.report.sections.other_methods import on_tokens
from kalman_rl.instruments.report.sections.section import Context
from kalman_rl.instruments.report.words import counted

NEEDED = ("sequence", "token", "log_ratio")
OPTIONAL = ("prompt", "position", "token_id", "logp_old", "logp_behaviour", "logp", "filtered_log_ratio", "gain",
            "coefficient", "kept", "advantage", "reward", "answer")  # fmt: skip
MAX_ROWS = 200_000
MAX_TOKENS = 12_000
"""Tokens of all completions on a page together; about 100 bytes each."""
MAX_OF_COMPLETION = 1_200
MAX_RUNS, MAX_STEPS, MAX_OF_STEP = 3, 8, 6
MAX_TRIES = 4
MAX_TOKEN, MAX_PROMPT = 200, 2_000


@dataclass
class Inspected:
    """What the inspector shows, or in ``note`` why there is nothing; ``data`` is ready for JSON."""

    note: str = ""
    said: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    @property
    def completions(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.data.get("completions", [])
        return found


def build(context: Context) -> Inspected:
    """Tokens of the first seed of each group and of the study; the page's script draws them from its data."""
    tokens = inspected([*context.first, *context.stressed])
    if tokens.completions:
        context.data["inspector-data"] = tokens.data
    return tokens


def inspected(runs: Sequence[RunRecord]) -> Inspected:
    """Completions of the runs that have traces, a few from steps spread over each run."""
    problems: list[str] = []
    traced = [(run, files) for run in runs if (files := traces.steps(run.path))]
    if not traced:
        return Inspected("No token traces were recorded, so there is no completion to show.")
    shown = traced[:MAX_RUNS]
    completions: list[dict[str, Any]] = []
    said = (
        [f"Tokens of {counted(len(shown), 'run')} of {len(traced)} with traces."]
        if len(traced) > len(shown)
        else []
    )
    methods: list[dict[str, Any]] = []
    for run, files in shown:
        room = MAX_TOKENS // len(shown)
        chosen, there = _of_run(files, room, problems)
        if not chosen:
            continue
        own, notes = own_method(run.path)
        other, notes = on_tokens(chosen, own, notes)
        methods.append({"run": clean(run.name, 60), **other})
        said += notes
        completions += [shown_completion(columns, len(methods) - 1) for columns in chosen]
        said.append(_sampled(run, chosen, files, there))
    if not completions:
        return Inspected(problems[0] if problems else "The token traces hold no completion.")
    return Inspected(said=said + problems[:3], data={"runs": methods, "completions": completions})


def spread_out(steps: Sequence[int], most: int) -> list[int]:
    """At most ``most`` of the steps, the last one among them, evenly over all.

    >>> spread_out([1, 2, 3, 4, 5, 6, 7], 3)
    [3, 5, 7]
    """
    count = min(most, len(steps))
    return [steps[math.ceil((i + 1) * len(steps) / count) - 1] for i in range(count)]


def number_of(value: Any) -> float:
    """A float; NaN for what is none."""
    return float(value) if isinstance(value, (int, float)) else math.nan


def rounded(value: Any, digits: int = 4) -> float | None:
    """A short number for JSON, None for what is not finite."""
    result = number_of(value)
    return float(f"{result:.{digits}g}") if math.isfinite(result) else None


def _of_run(files: dict[int, Path], room: int, problems: list[str]) -> tuple[list[Table], int]:
    """Chosen completions, each a separate table, and how many there were in the files that were read."""
    chosen: list[Table] = []
    there = 0
    used: set[int] = set()
    steps = spread_out(list(files), MAX_STEPS)
    for index, step in enumerate(steps):
        table = _moved(files, step, used, problems)
        if table is None:
            continue
        used.add(table["step"][0])
        rows_of = sequences(table)
        there += len(rows_of)
        left = room * (index + 1) // len(steps) - sum(
            min(len(columns["token"]), MAX_OF_COMPLETION) for columns in chosen
        )
        for rows in list(_most_moved_first(list(rows_of.values()), table))[:MAX_OF_STEP]:
            size = min(len(rows), MAX_OF_COMPLETION)
            if size <= left or not chosen:
                chosen.append({name: [values[row] for row in rows] for name, values in table.items()})
                left -= size
    return [columns for columns in chosen if not columns["still"][0]] or chosen, there


def _moved(files: dict[int, Path], step: int, used: set[int], problems: list[str]) -> Table | None:
    """The trace of a step, or of one just before it at which some log-ratio is not zero; none of the used ones."""
    steps = list(files)
    place = steps.index(step)
    still = None
    for near in reversed(steps[max(0, place - MAX_TRIES + 1) : place + 1]):
        if near in used:
            continue
        why: list[str] = []
        table = traces.read(files[near], NEEDED, why, optional=OPTIONAL, limit=MAX_ROWS)
        problems += [
            f"The token trace {clean(files[near].name)} could not be read ({clean(reason, 300)})."
            for reason in why
        ]
        if table:
            moved = any(value != 0 for value in table["log_ratio"] if value is not None)
            table |= {"step": [near] * len(table["token"]), "still": [not moved] * len(table["token"])}
            if moved:
                return table
            still = still or table
    return still


def sequences(table: Table) -> dict[str, list[int]]:
    """Rows of each completion, in the order of their positions."""
    rows_of: dict[str, list[int]] = {}
    for index, sequence in enumerate(table["sequence"]):
        rows_of.setdefault(str(sequence), []).append(index)
    if "position" in table:
        for rows in rows_of.values():
            rows.sort(key=lambda row: number_of(table["position"][row]))
    return rows_of


def _most_moved_first(found: list[list[int]], table: Table) -> Iterator[list[int]]:
    """Those whose tokens moved most first: encouraged and discouraged in turn, the indifferent last."""

    def spread(rows: list[int]) -> float:
        values = [abs(value) for row in rows if math.isfinite(value := number_of(table["log_ratio"][row]))]
        return -max(values, default=0.0)

    sides: dict[int, list[list[int]]] = {1: [], -1: [], 0: []}
    for rows in sorted(found, key=spread):
        advantage = number_of(table["advantage"][rows[0]]) if "advantage" in table else 0.0
        sides[(advantage > 0) - (advantage < 0)].append(rows)
    for pair in zip_longest(sides[1], sides[-1]):
        yield from (rows for rows in pair if rows)
    yield from sides[0]


def shown_completion(columns: Table, run: int) -> dict[str, Any]:
    """One completion for the page: texts cleaned, numbers rounded; what was computed for it is in ``by``.

    A long one is cut here, after the methods saw all of it.
    """
    end = MAX_OF_COMPLETION

    def numbers(name: str, digits: int = 4) -> list[float | None] | None:
        values = [rounded(value, digits) for value in columns.get(name, [])[:end]]
        return values if any(value is not None for value in values) else None

    prompt = columns["prompt"][0] if "prompt" in columns else ""
    return {
        "run": run,
        "step": columns["step"][0],
        "sequence": clean(columns["sequence"][0], 20),
        "prompt": clean(prompt, MAX_PROMPT, breaks=True),
        "answer": clean(columns["answer"][0] or "", MAX_TOKEN, breaks=True) if "answer" in columns else "",
        "reward": rounded(columns["reward"][0]) if "reward" in columns else None,
        "advantage": rounded(columns["advantage"][0]) if "advantage" in columns else None,
        "cut": max(0, len(columns["token"]) - end),
        "token": [clean(token, MAX_TOKEN, breaks=True) for token in columns["token"][:end]],
        "id": numbers("token_id", 15),
        "old": numbers("logp_old"),
        "now": numbers("logp"),
        "raw": numbers("log_ratio"),
        "gain": numbers("gain"),
        "deviation": numbers("deviation"),
        "innovation": numbers("innovation"),
        "by": [[values[:end] for values in entry] for entry in columns.get("by", [])],
    }


def _sampled(run: RunRecord, chosen: Sequence[Table], files: dict[int, Path], there: int) -> str:
    steps = sorted({columns["step"][0] for columns in chosen})
    cut = sum(len(columns["token"]) > MAX_OF_COMPLETION for columns in chosen)
    text = (
        f"{clean(run.name, 60)}: {counted(len(chosen), 'completion')} of steps "
        f"{', '.join(map(str, steps))} (out of {counted(len(files), 'traced step')}; these files hold {there}), "
        "those that moved most, encouraged and discouraged in turn."
    )
    return text + (f" {counted(cut, 'long one')} cut at {MAX_OF_COMPLETION} tokens." if cut else "")
