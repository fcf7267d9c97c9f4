"""Beliefs of a run, read from its ``beliefs.jsonl``: what was thought of each prompt, and what it got."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from kalman_rl.engine.runs.reading import clean, left_out, number
from kalman_rl.engine.runs.received import parse_json, read_lines
from kalman_rl.errors import RunError
from kalman_rl.sampling.gains import NINETY

FILE = "beliefs.jsonl"
MAX_LINES = 200_000
LISTS = ("n", "reward", "mean", "sd", "noise", "after", "after_sd")
LEARNED, HOPELESS = 0.8, 0.2
"""A prompt is learned if its whole 90 % interval lies above the one, hopeless if it lies below the other."""
BANDS = ("learned", "undecided", "hopeless")


class Visit(NamedTuple):
    """One prompt in one generation batch: ``n`` completions of mean ``reward`` (NaN without any, ``mixed`` if
    they differed), the value as predicted (``mean``, ``sd``), ``noise`` of one reward, the posterior (``after``,
    ``after_sd``), ``next`` completions if it came up again (NaN if unknown)."""

    step: float
    n: float
    reward: float
    mean: float
    sd: float
    noise: float
    after: float
    after_sd: float
    next: float
    mixed: bool

    @property
    def interval(self) -> tuple[float, float]:
        """The central 90 % of the posterior."""
        return self.after - NINETY * self.after_sd, self.after + NINETY * self.after_sd

    @property
    def band(self) -> str:
        low, high = self.interval
        return "learned" if low > LEARNED else "hopeless" if high < HOPELESS else "undecided"


class BeliefBatch(NamedTuple):
    """Counts over one whole generation batch, and the visits that were written down."""

    step: float
    rows: float
    prompts: float
    used: float
    groups: float
    informative: float
    judged: float
    inside: dict[float, float]
    visits: dict[str, Visit]


@dataclass
class Beliefs:
    """Everything read; ``texts`` by prompt id; ``unit`` if rewards lie in [0, 1]."""

    batches: list[BeliefBatch] = field(default_factory=list)
    texts: dict[str, str] = field(default_factory=dict)
    allocation: str = "fixed"
    unit: bool = True

    @property
    def prompts(self) -> dict[str, list[Visit]]:
        """Visits of each prompt that was written down, in order."""
        found: dict[str, list[Visit]] = {}
        for batch in self.batches:
            for name, visit in batch.visits.items():
                found.setdefault(name, []).append(visit)
        return found


def read_beliefs(path: Path, notes: list[str]) -> Beliefs | None:
    """Beliefs of a run directory, None if it has none; rows that cannot be read are counted in ``notes``.

    A run that was resumed writes some steps again: the later rows count.
    """
    beliefs, bad = Beliefs(), 0
    try:
        for row in _rows(read_lines(path, FILE)):
            batch = _batch(row) if isinstance(row, dict) else None
            if batch is None:
                bad += 1
                continue
            while beliefs.batches and beliefs.batches[-1].step >= batch.step:
                beliefs.batches.pop()
            beliefs.batches.append(batch)
            beliefs.texts |= _texts(row.get("texts"))
            beliefs.allocation = clean(row.get("allocation", "fixed"), 20)
            beliefs.unit = row.get("rewards", "unit") == "unit"
    except RunError as error:
        if os.path.lexists(path / FILE):
            notes.append(left_out(path, FILE, error))
        return None
    if bad:
        notes.append(f"{bad} {'row' if bad == 1 else 'rows'} of beliefs.jsonl could not be read")
    return beliefs if beliefs.batches else None


def _rows(lines: Any) -> Iterator[Any]:
    for index, line in enumerate(lines):
        if index >= MAX_LINES:
            return
        if not line.strip():
            continue
        try:
            yield parse_json(line)
        except ValueError:
            yield None


def _texts(table: Any) -> dict[str, str]:
    if not isinstance(table, dict):
        return {}
    return {clean(name, 80): clean(text, 200) for name, text in table.items()}


def _batch(row: dict[str, Any]) -> BeliefBatch | None:
    """A checked row, None if its step or its lists are no good."""
    names = row.get("id")
    step = number(row.get("step"))
    if step is None or not isinstance(names, list):
        return None
    lists = {key: row.get(key) for key in LISTS}
    if any(not isinstance(values, list) or len(values) != len(names) for values in lists.values()):
        return None
    columns = {key: [_finite(value) for value in lists[key] or []] for key in LISTS}
    after = row.get("next") if isinstance(row.get("next"), list) else []
    following = [_finite(value) for value in after or []] + [math.nan] * len(names)
    mixed = str(row.get("mixed", "")).ljust(len(names), "0")
    visits = {}
    for i, name in enumerate(names):
        values = {key: columns[key][i] for key in LISTS}
        if all(math.isfinite(value) for key, value in values.items() if key != "reward"):
            visits[clean(name, 80)] = Visit(step=step, **values, next=following[i], mixed=mixed[i] == "1")
    levels, inside = row.get("levels"), row.get("inside")
    pairs = zip(levels, inside) if isinstance(levels, list) and isinstance(inside, list) else ()
    counts = {
        key: _count(row.get(key)) for key in ("rows", "prompts", "used", "groups", "informative", "judged")
    }
    shares = {
        level: _count(count) for key, count in pairs if (level := number(key)) is not None and 0 < level < 1
    }
    return BeliefBatch(step, **counts, inside=shares, visits=visits)


def _finite(value: Any) -> float:
    found = number(value)
    return math.nan if found is None else found


def _count(value: Any) -> float:
    found = number(value)
    return max(0.0, found) if found is not None and not math.isnan(found) else 0.0
