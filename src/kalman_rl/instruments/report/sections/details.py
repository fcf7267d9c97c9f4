"""What the page rests on: notes from reading, every run, versions and configurations."""

from __future__ import annotations

from dataclasses import dataclass

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.sections.section import Context
from kalman_rl.instruments.report.stats.study import evaluations
from kalman_rl.instruments.report.words import decimal, duration

MAX_CONFIGS = 4


@dataclass(frozen=True)
class Details:
    """``facts`` is the run whose versions and machine are shown; ``configs`` those whose settings are."""

    absent: list[str]
    notes: list[tuple[str, str]]
    runs: list[dict[str, str]]
    facts: RunRecord
    configs: list[RunRecord]


def build(context: Context) -> Details:
    """The details; the sections built before have added their notes."""
    main = [run for run in context.first if run.config][:MAX_CONFIGS]
    stressed = [run for run in context.stressed if run.config][:1]
    rows = [_row(run) for run in context.runs]
    return Details(context.absent, context.notes, rows, context.shown[0], main + stressed)


def _row(run: RunRecord) -> dict[str, str]:
    def last(key: str) -> str:
        rows = evaluations(run, key)
        return decimal(rows[-1][key]) if rows else "–"

    return {
        "name": run.name,
        "condition": run.labels.get("condition", "–"),
        "method": run.labels.get("method", "–"),
        "seed": run.labels.get("seed", "–"),
        "status": run.status,
        "steps": str(run.steps),
        "time": duration(run.seconds) if run.seconds is not None and run.seconds >= 0 else "–",
        "sampled": last("eval/sampled_accuracy"),
        "greedy": last("eval/greedy_accuracy"),
    }
