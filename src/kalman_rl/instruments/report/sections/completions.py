"""All traced completions in a table that can be searched: prompt, expected answer, completion, reward, advantage.

Everything here was written by a model, so texts are cleaned before they are kept; the page's script shows them as text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs import traces
from kalman_rl.engine.runs.reading import RunRecord, clean
from kalman_rl.instruments.report.sections.section import Context
from kalman_rl.instruments.report.sections.tokens import MAX_ROWS, rounded, spread_out
from kalman_rl.instruments.report.words import counted

NEEDED, OPTIONAL = ("sequence", "completion"), ("prompt", "answer", "reward", "advantage")
NUMBERS = ("reward", "advantage", "tokens")
MAX_LISTED, MAX_FILES = 2_000, 240
"""Completions and trace files of a page; of more, those of steps spread over the runs."""
MAX_TEXT = 400
"""Characters of a completion, a prompt and an answer each."""


@dataclass
class Listed:
    """Rows of the table as data for the page, and in ``said`` what was left out.

    ``data``: ``numbers`` names the columns of numbers; a row is (run, step, sequence, prompt, answer, completion,
    numbers), where run and prompt are places in ``runs`` and ``prompts``.
    """

    numbers: Sequence[str] = NUMBERS
    runs: list[str] = field(default_factory=list)
    prompts: dict[str, int] = field(default_factory=dict)
    rows: list[list[Any]] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def add(
        self, step: Any, sequence: Any, prompt: Any, answer: Any, completion: Any, numbers: Sequence[Any]
    ) -> None:
        """A row of the run that was named last."""
        text = clean("" if prompt is None else prompt, MAX_TEXT, breaks=True)
        place = self.prompts.setdefault(text, len(self.prompts))
        told = [
            clean("" if value is None else value, MAX_TEXT, breaks=True) for value in (answer, completion)
        ]
        number = rounded(step, 15)
        self.rows.append(
            [
                len(self.runs) - 1,
                number,
                clean(sequence, 20),
                place,
                *told,
                [rounded(value) for value in numbers],
            ]
        )

    @property
    def data(self) -> dict[str, Any]:
        return {
            "numbers": list(self.numbers), "runs": self.runs, "prompts": list(self.prompts), "rows": self.rows,
        }  # fmt: skip


def build(context: Context) -> Listed | None:
    """The completions of all runs, None without traces."""
    listed = listing_of([*context.main, *context.stressed])
    if not listed.rows:
        return None
    context.data["completions-data"] = listed.data
    return listed


def listing_of(runs: Sequence[RunRecord]) -> Listed:
    """Completions of runs with traces, each with its own share of the room."""
    listed = Listed()
    traced = [(run, files) for run in runs if (files := traces.steps(run.path))][:MAX_FILES]
    shown = there = 0
    for run, files in traced:
        listed.runs.append(clean(run.name, 60))
        steps = spread_out(list(files), max(1, MAX_FILES // len(traced)))
        shown, there = shown + len(steps), there + len(files)
        _of_run(listed, files, steps, MAX_LISTED // len(traced))
    if shown < there:
        listed.said.append(f"Of {shown} of {there} traced steps, spread over the runs.")
    return listed


def _of_run(listed: Listed, files: dict[int, Path], steps: Sequence[int], room: int) -> None:
    cut = 0
    for index, step in enumerate(steps):
        table = traces.read(files[step], NEEDED, [], optional=OPTIONAL, limit=MAX_ROWS, first_of="sequence")
        if table is None:  # the inspector says why
            continue
        size = len(table["sequence"])
        take = min(size, max(1, room // (len(steps) - index)))
        cut, room = cut + size - take, room - take
        for row in range(take):
            get = {name: table[name][row] for name in table}
            listed.add(
                step, get["sequence"], get.get("prompt"), get.get("answer"), get["completion"],
                [get.get("reward"), get.get("advantage"), get["rows"]],
            )  # fmt: skip
    if cut:
        listed.said.append(f"{listed.runs[-1]}: {counted(cut, 'completion')} of these steps left out.")
