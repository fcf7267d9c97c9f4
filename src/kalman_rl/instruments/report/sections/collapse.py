"""What the collapse alarm reported during the runs."""

from __future__ import annotations

from dataclasses import dataclass

from kalman_rl.engine.collapse.rule import ADVICE, read_alarms
from kalman_rl.engine.runs.reading import clean
from kalman_rl.instruments.report.sections.section import Context

MAX_ALARMS = 40


@dataclass(frozen=True)
class AlarmLine:
    """One alarm as shown; texts are safe."""

    run: str
    step: int
    sentence: str
    tokens: tuple[str, ...]
    advice: str


@dataclass(frozen=True)
class AlarmSection:
    """The first alarms of every run, at most MAX_ALARMS in all, and a sentence about the rest."""

    lines: list[AlarmLine]
    note: str


def build(context: Context) -> AlarmSection | None:
    """The section, or None if no run recorded an alarm."""
    found = [(run, alarm) for run in context.shown for alarm in read_alarms(run.path)]
    if not found:
        return None
    found.sort(key=lambda pair: pair[1].step)
    lines = [
        AlarmLine(
            run=run.name,
            step=alarm.step,
            sentence=alarm.happened(),
            tokens=tuple(f"{clean(t.text, 24)} ({t.log_ratio:+.2f})" for t in alarm.tokens),
            advice=ADVICE,
        )
        for run, alarm in found[:MAX_ALARMS]
    ]
    note = "" if len(found) <= MAX_ALARMS else f"The first {MAX_ALARMS} of {len(found)} alarms are shown."
    return AlarmSection(lines, note)
