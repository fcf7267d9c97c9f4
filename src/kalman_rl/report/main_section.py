"""Section 1: held-out accuracy, training curves, and a table of before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from kalman_rl.report.chart import Line, lines_chart
from kalman_rl.report.data import Run
from kalman_rl.report.intervals import wilson
from kalman_rl.report.metrics import MAIN, Figure, Metric
from kalman_rl.report.series import cycle_of, finite, series, smooth, window_of
from kalman_rl.report.study import (
    ACCURACIES,
    COLOUR_OF,
    GREEDY,
    SAMPLED,
    Arm,
    Measured,
    answers,
    colours,
    evaluations,
    names_of,
    noop_share,
    trend,
)
from kalman_rl.report.words import decimal, signed

WIDE, FULL, NARROW = 660, 1056, 344
FEW_EVALUATIONS = 16
IN_TRAINING = {
    "reward": "Training reward",
    "entropy": "Entropy, nats",
    "completions/mean_length": "Completion length, tokens",
    "trust/kept": "Clipped share",
}
RATIO_NOTE = "Updates at which every log-ratio is zero are left out."


@dataclass(frozen=True)
class Change:
    """One cell of the before-and-after table, as shown."""

    before: str
    after: str
    change: str
    interval: str = ""


@dataclass
class MainSection:
    """Section 1: held-out accuracy, training curves, before and after."""

    figure: Figure | None = None
    small: list[Figure] = field(default_factory=list)
    table: list[tuple[str, dict[str, Change]]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    several: bool = False


def main_section(runs: Sequence[Run], arms: Sequence[Arm]) -> MainSection:
    """Charts and tables of the main runs."""
    names = names_of(runs)
    known = all(name in COLOUR_OF for name in names)
    palette = colours(names) if known else {name: index for index, name in enumerate(names)}
    section = MainSection(several=len(runs) > 1)
    section.figure = _held_out(runs, names, palette)
    if section.figure is None:
        section.missing.append("No held-out evaluation was recorded, so there is no accuracy to draw.")
    for metric in MAIN:
        figure = _small(metric, runs, names, palette)
        if figure:
            section.small.append(figure)
        else:
            section.missing.append(f"{metric.title}: not recorded.")
    section.table = [(name, _before_after(run, arm)) for run, arm, name in zip(runs, arms, names)]
    section.rows = list(dict.fromkeys(what for _, rows in section.table for what in rows))
    return section


def _held_out(runs: Sequence[Run], names: Sequence[str], palette: dict[str, int]) -> Figure | None:
    lines: list[Line] = []
    counts = set()
    for run, name in zip(runs, names):
        for key, kind in ACCURACIES.items():
            rows = evaluations(run, key)
            if not rows:
                continue
            points = [(row["step"], row[key]) for row in rows]
            spread = [(row["step"], *wilson(row[key], count)) for row in rows if (count := answers(row, key))]
            counts |= {f"{count:.0f}" for row in rows if (count := answers(row, key))}
            few = len(points) <= FEW_EVALUATIONS
            alone = len(runs) == 1
            lines.append(
                Line(
                    kind if alone else f"{name}, {kind}",
                    points,
                    (0 if key == SAMPLED else 1) if alone else palette[name],
                    band=[] if few or not alone else spread,
                    whiskers=spread if few and alone else [],
                    dashed=key == GREEDY,
                    dots=few,
                )
            )
    if not lines:
        return None
    bars = f"Bars: 95% Wilson intervals from {' or '.join(sorted(counts))} answers." if counts else (
        "The number of answers was not recorded, so there are no intervals."
    )  # fmt: skip
    if len(runs) > 1:
        bars = "Solid: sampled; dashed: greedy. Intervals are in the table."
    return Figure(
        "Held-out accuracy",
        bars,
        lines_chart(
            lines,
            width=WIDE if len(runs) == 1 else FULL,
            height=350,
            y_label="share of correct answers",
            y_range=(0.0, 1.0),
        ),
        lines_chart(lines, width=NARROW, height=270, y_label="share of correct answers", y_range=(0.0, 1.0)),
    )


def _small(
    metric: Metric, runs: Sequence[Run], names: Sequence[str], palette: dict[str, int]
) -> Figure | None:
    lines = []
    for run, name in zip(runs, names):
        for index, panel in enumerate(metric.panels):
            points = series(run.train, panel.key, panel.change, skip_noop="/" in panel.key)
            if not finite(points):
                continue
            window = window_of(len(points), cycle_of(run.train) if metric.of_ratio else 1)
            label = panel.name if len(runs) == 1 else name if index == 0 else f"{name}, {panel.name}"
            lines.append(
                Line(
                    label,
                    smooth(points, window),
                    index if len(runs) == 1 else palette[name],
                    behind=points if window > 1 and len(runs) == 1 else [],
                    dashed=panel.dashed,
                )
            )
    if not lines:
        return None
    note = metric.note
    if metric.of_ratio and any(noop_share(run) for run in runs):
        note += f" {RATIO_NOTE}"
    chart = lines_chart(
        lines,
        width=NARROW,
        y_label=metric.unit,
        log=metric.log,
        y_range=metric.y_range,
        labels=len(lines) > 1,
    )
    return Figure(metric.title, note, chart)


def _before_after(run: Run, arm: Arm) -> dict[str, Change]:
    """Accuracies at the first and last evaluation; training metrics in the first and last tenth."""
    rows = {
        f"{kind.capitalize()} accuracy": _change(arm.measured[key])
        for key, kind in ACCURACIES.items()
        if key in arm.measured
    }
    for key, label in IN_TRAINING.items():
        pair = trend(run, key, kept=key == "trust/kept")
        if pair:
            rows[label] = Change(decimal(pair[0]), decimal(pair[1]), signed(pair[1] - pair[0]))
    return rows


def _change(numbers: Measured) -> Change:
    after = decimal(numbers.mean)
    if numbers.start is None:
        return Change("–", after, "–")
    interval = f"{signed(numbers.change[0])} to {signed(numbers.change[1])}" if numbers.change else ""
    return Change(decimal(numbers.start), after, signed(numbers.mean - numbers.start), interval)
