"""One picture for documents: the main run's accuracy, accuracy by completions, the stress study's curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kalman_rl.engine.runs.files import explained, replacing_file
from kalman_rl.engine.runs.reading import RunRecord, find_runs
from kalman_rl.errors import AdapterError, PlaceError, RunError
from kalman_rl.instruments.report.sections.stress import learning_lines
from kalman_rl.instruments.report.sections.training import palette_of
from kalman_rl.instruments.report.stats.intervals import wilson
from kalman_rl.instruments.report.stats.pool import Group, pooled
from kalman_rl.instruments.report.stats.series import with_interval
from kalman_rl.instruments.report.stats.spent import by_completions
from kalman_rl.instruments.report.stats.study import (
    ACCURACIES,
    POOL_SAMPLED,
    SAMPLED,
    Study,
    answers,
    colours,
    evaluations,
    split,
)
from kalman_rl.palette import INK, LIGHT, MUTED, RULE

PREFERRED = ("A", "C")
STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "text.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "svg.hashsalt": "kalman-rl",
}


def write_figure(runs: Sequence[Path], output_png: Path) -> Path:
    """Draw held-out accuracy of the first main run, accuracy against completions spent where runs on one task differ in
    completions per update, and stress curves of A and C (or the outer two).

    Args:
        runs: as for :func:`kalman_rl.instruments.report.write_report`.
        output_png: the file; its suffix chooses the format (``.png``, ``.svg``, ``.pdf``).

    Returns: the path of the picture.
    Raises: AdapterError without matplotlib; RunError if there is nothing to draw or it cannot be written.
    """
    main, study = split(find_runs(runs))
    shown = [run for run in main if evaluations(run, SAMPLED)][:1]
    compared = _compared(pooled(main))
    shown = [] if compared and shown and shown[0] in compared[0].runs else shown
    conditions = _two(study)
    if not shown and not compared and not conditions:
        raise RunError(
            "figure: got runs without held-out accuracy and without a stress study, expected either; "
            "train with evaluation"
        )
    try:
        from matplotlib import rc_context
        from matplotlib.figure import Figure
    except ImportError as error:
        raise AdapterError(
            "matplotlib: got no such package, expected it for pictures; pip install matplotlib"
        ) from error
    with rc_context(STYLE):
        panels = len(shown) + bool(compared) + len(conditions)
        across = 2 if panels == 4 else panels
        size = (4.6 * across, 3.7 * (panels // across))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        axes = figure.subplots(panels // across, across, squeeze=False).flatten().tolist()
        if shown:
            _main(axes[0], shown[0])
        if compared:
            _spending(axes[len(shown)], compared)
        if study:
            _stress(axes[panels - len(conditions) :], study, conditions)
        layout: Any = figure.get_layout_engine()
        layout.set(wspace=0.06, hspace=0.08, w_pad=0.12, h_pad=0.1)
        target = Path(output_png)
        with explained(target, "write", kind=PlaceError):
            target.parent.mkdir(parents=True, exist_ok=True)
            with replacing_file(target) as temporary:
                figure.savefig(temporary, dpi=200, format=target.suffix[1:] or "png")
    return target


def _compared(groups: Sequence[Group]) -> list[Group]:
    """The first groups of one subject that are compared by completions spent."""
    subjects = {
        group.subject: [other for other in groups if other.subject == group.subject] for group in groups
    }
    return next((rivals for rivals in subjects.values() if by_completions(rivals) and _measured(rivals)), [])


def _measured(groups: Sequence[Group]) -> str:
    """The accuracy that all runs measured: on the training prompts, where a method wins or loses, else held out."""
    keys = (POOL_SAMPLED, SAMPLED)
    return next((k for k in keys if all(evaluations(run, k) for group in groups for run in group.runs)), "")


def _spending(axes: Any, groups: Sequence[Group]) -> None:
    key, palette, ends = _measured(groups), palette_of(groups), []
    for group, spent in zip(groups, by_completions(groups) or []):
        runs = [evaluations(run, key) for run in group.runs]
        line, band = with_interval([[(row["step"], row[key]) for row in rows] for rows in runs])
        if group.seeds == 1:
            band = [(row["step"], *wilson(row[key], n)) for row in runs[0] if (n := answers(row, key))]
        index = palette[group.name]
        points = [(spent(step), value) for step, value in line]
        axes.plot(*zip(*points), color=LIGHT[index], marker="o", markersize=3.5, lw=1.8)
        if band:
            edges = [(spent(step), low, high) for step, low, high in band]
            axes.fill_between(*zip(*edges), color=LIGHT[index], alpha=0.13, lw=0)
        ends.append((line[-1][1], group.name, index))
    side = "on the training prompts" if key == POOL_SAMPLED else "held out"
    axes.set(title=groups[0].subject, xlabel="completions spent", ylabel=f"accuracy {side}")
    _finish(axes, ends)


def _two(study: Study | None) -> list[str]:
    if study is None:
        return []
    preferred = [condition for condition in PREFERRED if condition in study.conditions]
    return (
        preferred if len(preferred) == 2 else list(dict.fromkeys([study.conditions[0], study.conditions[-1]]))
    )


def _main(axes: Any, run: RunRecord) -> None:
    ends = []
    for index, (key, kind) in enumerate(ACCURACIES.items()):
        rows = evaluations(run, key)
        if rows:
            steps, values = [row["step"] for row in rows], [row[key] for row in rows]
            axes.plot(
                steps,
                values,
                color=LIGHT[index],
                marker="o",
                markersize=3.5,
                lw=1.8,
                ls="--" if index else "-",
            )
            known = [(row["step"], *wilson(row[key], count)) for row in rows if (count := answers(row, key))]
            if known:
                axes.fill_between(*zip(*known), color=LIGHT[index], alpha=0.13, lw=0)
            ends.append((values[-1], kind, index))
    axes.set(title=" on ".join(run.labels[k] for k in ("model", "task") if k in run.labels) or run.name,
             xlabel="update", ylabel="held-out accuracy",)  # fmt: skip
    _finish(axes, ends)


def _stress(axes: Sequence[Any], study: Study, conditions: Sequence[str]) -> None:
    palette = colours(study.methods)
    highest = 0.0
    for index, (panel, condition) in enumerate(zip(axes, conditions)):
        what, lines = learning_lines(study, condition, palette)
        ends = []
        for line in lines:
            colour = LIGHT[line.colour]
            panel.plot(*zip(*line.points), color=colour, lw=1.8, ls="--" if line.dashed else "-")
            if line.band:
                panel.fill_between(*zip(*line.band), color=colour, alpha=0.13, lw=0)
            known = [value for _, value in line.points if math.isfinite(value)]
            highest = max([highest, *known, *(high for _, _, high in line.band)])
            if known:
                ends.append((known[-1], line.name, line.colour))
        panel.set(title=f"Stress, condition {condition}", xlabel="update")
        if index == 0:
            panel.set_ylabel("sampled held-out accuracy" if what == "accuracy" else "training reward")
        panel.ends = ends
    for panel in axes:
        panel.set_ylim(0, 1.05 * highest or 1)
        _finish(panel, panel.ends)


def spread(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Sorted places moved as little as needed to be ``gap`` apart, kept inside ``[top, bottom]`` if they fit.

    >>> spread([10.0, 11.0, 50.0], 14.0, 0.0, 100.0)
    [3.5, 17.5, 50.0]
    """
    groups: list[list[float]] = []  # [sum of (place - offset), size]
    for place in places:
        groups.append([place, 1])
        while len(groups) > 1:
            (sum_a, n_a), (sum_b, n_b) = groups[-2:]
            start_a, start_b = sum_a / n_a, sum_b / n_b
            if start_a + gap * n_a <= start_b:
                break
            groups[-2:] = [[sum_a + sum_b - gap * n_a * n_b, n_a + n_b]]
    result: list[float] = []
    for total, size in groups:
        start = min(max(total / size, top), max(top, bottom - gap * (size - 1)))
        result += [start + gap * index for index in range(int(size))]
    for index in range(1, len(result)):
        result[index] = max(result[index], result[index - 1] + gap)
    return result


def _finish(axes: Any, ends: list[tuple[float, str, int]]) -> None:
    """Light grid, and names beside the line ends."""
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.set_axisbelow(True)
    low, high = axes.get_ylim()
    ends = sorted(ends)
    places = spread([value for value, _, _ in ends], 0.062 * (high - low), low, high)
    for place, (_, name, colour) in zip(places, ends):
        axes.annotate(
            name.replace("$", r"\$"),
            (1.02, place),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9.5,
            color=LIGHT[colour],
            annotation_clip=False,
        )
