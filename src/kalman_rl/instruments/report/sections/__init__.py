"""The sections of the page, in order. A new one is a module here, a template, and a line in the list."""

from __future__ import annotations

from kalman_rl.instruments.report.sections import (
    beliefs,
    collapse,
    completions,
    details,
    stress,
    tokens,
    training,
)
from kalman_rl.instruments.report.sections.section import Context, Section

__all__ = ["SECTIONS", "Context", "Section"]

SECTIONS: list[Section] = [
    Section("Runs", "runs", "runs.html", training.build,
            "There is no main run here: every run belongs to the stress study."),
    Section("Alarms", "alarms", "alarms.html", collapse.build),
    Section("Beliefs and budget", "beliefs", "beliefs.html", beliefs.build,
            "No run tracked beliefs about its prompts, so there are none to show."),
    Section("Token by token", "tokens-section", "inspector.html", tokens.build),
    Section("Completions", "completions-section", "completions.html", completions.build),
    Section("Stress study", "stress", "stress.html", stress.build,
            "No stress study was given, so methods are not compared under stress here."),
    Section("Details", "details", "details.html", details.build),
]  # fmt: skip
"""The details come last: they show what the others noted."""
