"""Stress study: where each method ends, learning curves, small multiples and a table, per condition."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from kalman_rl.instruments.report.charts.chart import ChartLine, Dots, dots_chart, lines_chart
from kalman_rl.instruments.report.sections.section import Context
from kalman_rl.instruments.report.stats.intervals import t_quantile, wilson
from kalman_rl.instruments.report.stats.metrics import STRESS, Figure, Metric
from kalman_rl.instruments.report.stats.series import (
    Point,
    cycle_of,
    finite,
    over_seeds,
    series,
    smooth,
    window_of,
)
from kalman_rl.instruments.report.stats.study import (
    ACCURACIES,
    SAMPLED,
    Measured,
    Study,
    StudyArm,
    colours,
    differences,
    evaluations,
)
from kalman_rl.instruments.report.words import decimal

ENOUGH_EVALUATIONS = 5


@dataclass
class StressSection:
    """Learning curves, finals with intervals, small multiples, the table."""

    settings: dict[str, dict[str, str]] = field(default_factory=dict)
    finals: list[Figure] = field(default_factory=list)
    learning: list[Figure] = field(default_factory=list)
    learning_note: str = ""
    multiples: list[tuple[str, str, list[Figure]]] = field(default_factory=list)
    conditions: list[str] = field(default_factory=list)
    table: list[dict[str, object]] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    t_factor: str = ""


def build(context: Context) -> StressSection | None:
    """Charts and the table of the stress study, None if there is none."""
    study = context.study
    if study is None:
        return None
    palette = colours(study.methods)
    section = StressSection(settings=differences(study), conditions=study.conditions)
    section.findings = context.summary.findings
    if study.seeds[0] > 1:
        section.t_factor = decimal(t_quantile(study.seeds[0] - 1))
    section.finals = [
        figure for condition in study.conditions if (figure := _finals(study, condition, palette))
    ]
    section.learning_note, section.learning = learning(study, palette)
    for metric in STRESS:
        figures = _multiples(study, metric, palette)
        if figures:
            section.multiples.append((metric.title, metric.note, figures))
    for method in study.methods:
        cells = [_cell(study.find(condition, method)) for condition in study.conditions]
        section.table.append({"method": method, "colour": palette[method], "cells": cells})
    return section


def dashed(method: str) -> bool:
    """The control is dashed everywhere: it is no method."""
    return method == "ratio_one"


def learning_lines(study: Study, condition: str, palette: dict[str, int]) -> tuple[str, list[ChartLine]]:
    """What is drawn (``accuracy`` or ``reward``), and a line per method: mean and range over seeds."""
    often = all(
        len(evaluations(run, SAMPLED)) >= ENOUGH_EVALUATIONS for arm in study.arms for run in arm.runs
    )
    lines = []
    for arm in study.under(condition):
        many: list[list[Point]] = []
        for run in arm.runs:
            points = series(run.evals, SAMPLED) if often else series(run.train, "reward")
            if finite(points):
                many.append(points if often else smooth(points, window_of(len(points))))
        line, band = over_seeds(many)
        if line:
            lines.append(ChartLine(arm.method, line, palette[arm.method], band, dashed=dashed(arm.method)))
    return ("accuracy" if often else "reward"), lines


def learning(study: Study, palette: dict[str, int]) -> tuple[str, list[Figure]]:
    """What the curves show (``accuracy`` or ``reward``), and one figure per condition."""
    figures, what = [], "reward"
    tables = {condition: learning_lines(study, condition, palette) for condition in study.conditions}
    every = [
        value
        for _, lines in tables.values()
        for line in lines
        for _, *ys in (*line.points, *line.band)
        for value in ys
    ]
    known = [value for value in every if math.isfinite(value)]
    span = (min(known), max(known)) if known else ()
    for condition, (what, lines) in tables.items():
        start = _start(study, condition) if what == "accuracy" else None
        if lines:
            chart = lines_chart(
                lines,
                height=280,
                y_label="sampled accuracy" if what == "accuracy" else "training reward",
                include=span,
                reference=(start, "start") if start is not None else None,
                limits=(0.0, 1.0) if what == "accuracy" else (),
            )
            figures.append(Figure(f"Condition {condition}", "", chart))
    note = (
        "Sampled held-out accuracy over training." if what == "accuracy" else "Training reward, moving mean."
    )
    if study.seeds[1] > 1:
        note += " Line: mean over seeds; band: lowest and highest seed."
    return note, figures


def _start(study: Study, condition: str) -> float | None:
    starts = [arm.main.start for arm in study.under(condition) if arm.main and arm.main.start is not None]
    return fmean(starts) if starts else None


def _finals(study: Study, condition: str, palette: dict[str, int]) -> Figure | None:
    arms = [arm for arm in study.under(condition) if arm.main]
    if not arms:
        return None
    rows = [
        Dots(arm.method, arm.main.mean, arm.main.noise, arm.main.finals, palette[arm.method])
        for arm in arms
        if arm.main
    ]
    start = _start(study, condition)
    everything = [
        value for arm in study.arms if arm.main for value in (arm.main.mean, *(arm.main.noise or ()))
    ]
    chart = dots_chart(
        rows,
        unit=f"{arms[0].kind} accuracy at the end",
        include=everything,
        reference=(start, "start") if start is not None else None,
    )
    return Figure(f"Condition {condition}", "", chart)


def _multiples(study: Study, metric: Metric, palette: dict[str, int]) -> list[Figure]:
    """One small chart per condition, all on the same scale."""
    panel = metric.panels[0]
    tables: dict[str, list[ChartLine]] = {}
    for condition in study.conditions:
        for arm in study.under(condition):
            many = []
            for run in arm.runs:
                points = series(run.train, panel.key, panel.change, skip_noop=True)
                if finite(points):
                    many.append(smooth(points, window_of(len(points), cycle_of(run.train))))
            line, _ = over_seeds(many)
            if line:
                tables.setdefault(condition, []).append(
                    ChartLine(arm.method, line, palette[arm.method], dashed=dashed(arm.method))
                )
    shared = [
        value
        for lines in tables.values()
        for line in lines
        for _, value in line.points
        if math.isfinite(value)
    ]
    span = (min(shared), max(shared)) if shared else ()
    return [
        Figure(
            f"Condition {condition}",
            "",
            lines_chart(lines, y_label=metric.unit, log=metric.log, limits=metric.limits, include=span),
        )
        for condition, lines in tables.items()
    ]


def _cell(arm: StudyArm | None) -> dict[str, object]:
    """One cell of the method x condition table."""
    if arm is None or not arm.measured:
        why = "not run" if arm is None else "not finished" if not arm.runs else "not evaluated"
        return {"empty": why}
    numbers = {ACCURACIES[key]: _numbers(measured) for key, measured in arm.measured.items()}
    return {"empty": "", "verdict": arm.main.verdict if arm.main else "unknown", "numbers": numbers}


def _numbers(measured: Measured) -> dict[str, str]:
    several = len(measured.finals) > 1
    spread = (
        measured.over_seeds if several else wilson(measured.mean, measured.count) if measured.count else None
    )
    return {
        "mean": decimal(measured.mean),
        "range": f"[{decimal(min(measured.finals))}, {decimal(max(measured.finals))}]" if several else "",
        "seeds": f"n = {len(measured.finals)}",
        "interval": f"{decimal(spread[0])} to {decimal(spread[1])}" if spread else "",
    }
