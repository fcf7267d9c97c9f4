"""Runs: held-out accuracy, training curves, and a table of before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean

from kalman_rl.engine.runs.reading import RunRecord
from kalman_rl.instruments.report.charts.chart import COLOURS, ChartLine, lines_chart
from kalman_rl.instruments.report.sections.positions import position_figure
from kalman_rl.instruments.report.sections.section import Context
from kalman_rl.instruments.report.sections.versus import SeedBySeed, seed_by_seed
from kalman_rl.instruments.report.stats.intervals import wilson
from kalman_rl.instruments.report.stats.metrics import (
    COSTS,
    CUMULATIVE,
    LEARNING,
    RATIOS,
    Figure,
    Metric,
    Panel,
    each_reward,
)
from kalman_rl.instruments.report.stats.pool import Group
from kalman_rl.instruments.report.stats.series import (
    Band,
    Point,
    cycle_of,
    finite,
    series,
    smooth,
    window_of,
    with_interval,
)
from kalman_rl.instruments.report.stats.spent import Spent, by_completions, completions
from kalman_rl.instruments.report.stats.study import (
    ACCURACIES,
    COLOUR_OF,
    POOL_ACCURACIES,
    Measured,
    StudyArm,
    answers,
    evaluations,
    measure,
    noop_share,
    trend,
)
from kalman_rl.instruments.report.words import counted, decimal, duration, listing, signed
from kalman_rl.numerics.curve import FEWEST, smooth_curve

MAX_DOTS = 16
IN_TRAINING = {
    "reward": "Training reward",
    "entropy": "Entropy, nats",
    "completions/mean_length": "Completion length, tokens",
    "trust/kept": "Clipped share",
}
RATIO_NOTE = "Updates at which every log-ratio is zero are left out."


@dataclass(frozen=True)
class BeforeAfter:
    """One cell of the before-and-after table, as shown."""

    before: str
    after: str
    change: str
    interval: str = ""


@dataclass
class MainSection:
    """Held-out accuracy, training curves, before and after, of one subject."""

    title: str
    anchor: str
    figure: Figure | None = None
    pool: Figure | None = None
    learning: list[Figure] = field(default_factory=list)
    ratios: list[Figure] = field(default_factory=list)
    costs: list[Figure] = field(default_factory=list)
    table: list[tuple[str, dict[str, BeforeAfter]]] = field(default_factory=list)
    rows: list[str] = field(default_factory=list)
    spent: list[tuple[str, list[str]]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    several: bool = False
    names: list[str] = field(default_factory=list)
    versus: SeedBySeed | None = None
    notes: list[str] = field(default_factory=list)
    pooled: bool = False


class Compared:
    """Groups side by side: their colours, and the axis that they are compared on.

    That is the step, unless their batches are of different size: then it is the completions spent.
    """

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups, self.palette = groups, palette_of(groups)
        self.single = len(groups) == 1
        spent = by_completions(groups)
        self.x_label = "step" if spent is None else "completions"
        self._spent = {group.name: of for group, of in zip(groups, spent or [])}

    def line(self, group: Group, line: ChartLine) -> ChartLine:
        """The line on the axis."""
        spent = self._spent.get(group.name)
        return line if spent is None else moved(line, spent)


def moved(line: ChartLine, spent: Spent) -> ChartLine:
    """The line with completions in place of steps."""
    return replace(
        line,
        points=[(spent(x), y) for x, y in line.points],
        behind=[[(spent(x), y) for x, y in points] for points in line.behind],
        band=[(spent(x), low, high) for x, low, high in line.band],
        whiskers=[(spent(x), low, high) for x, low, high in line.whiskers],
    )


def build(context: Context) -> list[MainSection] | None:
    """Charts and tables of the main runs, a section for each subject; None if there are none."""
    arms = dict(zip((group.name for group in context.groups), context.arms))
    several = len(context.subjects) > 1
    return [
        _section(groups, [arms[group.name] for group in groups], subject if several else "", number)
        for number, (subject, groups) in enumerate(context.subjects.items())
    ] or None


def _section(groups: Sequence[Group], arms: Sequence[StudyArm], subject: str, number: int) -> MainSection:
    drawn = Compared(groups)
    title = subject or ("The run" if drawn.single else "The runs")
    section = MainSection(title, f"runs-{number + 1}" if number else "runs", several=not drawn.single)
    section.pooled = any(group.seeds > 1 for group in groups)
    section.notes = [note for note in (_axis(drawn), _bands(groups)) if note]
    section.names = [group.name for group in groups]
    section.versus = seed_by_seed(groups)
    section.figure = _accuracies(drawn, "Held-out accuracy", ACCURACIES)
    section.pool = _accuracies(drawn, "Accuracy on the training prompts", POOL_ACCURACIES)
    if section.figure is None:
        section.missing.append("No held-out evaluation was recorded, so there is no accuracy to draw.")
    absent = []
    rewards = each_reward([run for group in groups for run in group.runs])
    learning = (*LEARNING, *([rewards] if rewards else []))
    for metrics, figures in ((learning, section.learning), (RATIOS, section.ratios), (COSTS, section.costs)):
        for metric in metrics:
            figure = _small(metric, drawn)
            if figure:
                figures.append(figure)
            else:
                absent.append(metric.title[0].lower() + metric.title[1:])
    if by_position := position_figure(groups, drawn.palette):
        section.ratios.append(by_position)
    if absent:
        section.missing.append(f"Not recorded, so not drawn: {listing(absent).replace('kL', 'KL')}.")
    titles = [_with_seeds(group) for group in groups]
    section.table = [(name, _before_after(group, arm)) for group, arm, name in zip(groups, arms, titles)]
    section.rows = list(dict.fromkeys(what for _, rows in section.table for what in rows))
    section.spent = _table([_spent(group) for group in groups])
    return section


def _axis(drawn: Compared) -> str:
    if drawn.x_label == "step":
        return ""
    return "Batches are of different size, so runs are compared by the completions they had sampled, not by steps."


def _table(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Rows over all that any column has, with a dash where one has nothing."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "–") for column in columns]) for name in names]


def palette_of(groups: Sequence[Group]) -> dict[str, int]:
    """A colour for each group: that of its method, or by turns from what is left."""
    names = [group.name for group in groups]
    free = [colour for colour in range(COLOURS) if colour not in map(COLOUR_OF.get, names)]
    others = iter(free * len(names) or [0] * len(names))
    return {name: COLOUR_OF[name] if name in COLOUR_OF else next(others) for name in names}


def _with_seeds(group: Group) -> str:
    return f"{group.name} ({counted(group.seeds, 'seed')})" if group.seeds > 1 else group.name


def _bands(groups: Sequence[Group]) -> str:
    sizes = {group.seeds for group in groups}
    if max(sizes) < 2:
        return ""
    told = [f"{_with_seeds(group)}" for group in groups if group.seeds > 1]
    kind = "95% interval of the mean by Student's t"
    pair = " (of two seeds: their range)" if 2 in sizes else ""
    text = f"Runs that differ only by seed are one line, the mean: {listing(told)}"
    return f"{text}. Thin: the single seeds. Band: {kind}{pair}."


def _accuracies(drawn: Compared, title: str, keys: Mapping[str, str]) -> Figure | None:
    lines: list[ChartLine] = []
    counts: set[str] = set()
    single = drawn.single
    for group in drawn.groups:
        for index, (key, kind) in enumerate(keys.items()):
            many = [evaluations(run, key) for run in group.runs]
            many = [rows for rows in many if rows]
            if not many:
                continue
            counts |= {f"{count:.0f}" for rows in many for row in rows if (count := answers(row, key))}
            whiskers: list[Band] = []
            seeds = [[(row["step"], row[key]) for row in rows] for rows in many]
            if len(many) > 1:
                points, band = with_interval(seeds)
                band = [(step, max(0.0, low), min(1.0, high)) for step, low, high in band]
            else:
                points, band, seeds = seeds[0], [], []
                spread = [(row["step"], *wilson(row[key], n)) for row in many[0] if (n := answers(row, key))]
                few = len(points) <= MAX_DOTS
                whiskers, band = (spread, []) if few and single else ([], spread if single else [])
            line = ChartLine(
                kind if single else f"{group.name}, {kind}" if index else group.name,
                points,
                index if single else drawn.palette[group.name],
                band=band,
                whiskers=whiskers,
                behind=seeds,
                dashed=index > 0,
                dots=len(points) <= MAX_DOTS,
            )
            lines.append(drawn.line(group, line))
    if not lines:
        return None
    chart = lines_chart(
        lines, height=320, y_label="share of correct answers", x_label=drawn.x_label, limits=(0.0, 1.0)
    )
    return Figure(title, _accuracies_note(drawn.groups, counts), chart)


def _accuracies_note(groups: Sequence[Group], counts: set[str]) -> str:
    if len(groups) > 1:
        note = "Solid: sampled; dashed: greedy."
        return note if any(group.seeds > 1 for group in groups) else f"{note} Intervals are in the table."
    if groups[0].seeds > 1:
        return f"Mean and band over {counted(groups[0].seeds, 'seed')}."
    if not counts:
        return "The number of answers was not recorded, so there are no intervals."
    return f"Bars: 95% Wilson intervals from {' or '.join(sorted(counts))} answers."


def _small(metric: Metric, drawn: Compared) -> Figure | None:
    lines = []
    single, note = drawn.single, metric.note
    for group in drawn.groups:
        for index, panel in enumerate(metric.panels):
            many = [pair for run in group.runs if (pair := _panel(run, metric, panel))]
            if not many:
                continue
            name = panel.name if single else group.name if index == 0 else f"{group.name}, {panel.name}"
            colour = index if single else drawn.palette[group.name]
            if len(many) > 1:
                seeds = [points for points, _ in many]
                points, band = with_interval(seeds, log=metric.log)
                band = [(step, *metric.inside(low, high)) for step, low, high in band]
                line = ChartLine(name, points, colour, band=band, behind=seeds, dashed=panel.dashed)
            else:
                points, raw = many[0]
                behind = [raw] if single and raw else []
                line = ChartLine(name, points, colour, behind=behind, dashed=panel.dashed)
                if behind and metric in LEARNING and len(finite(raw)) >= FEWEST:
                    line, slope = _through(line, raw, metric)
                    note += slope
            lines.append(drawn.line(group, line))
    if not lines:
        return None
    if metric.of_ratio and any(noop_share(run) for group in drawn.groups for run in group.runs):
        note += f" {RATIO_NOTE}"
    chart = lines_chart(
        lines, y_label=metric.unit, x_label=drawn.x_label, log=metric.log, limits=metric.limits
    )
    return Figure(metric.title, note, chart)


def _through(line: ChartLine, raw: Sequence[Point], metric: Metric) -> tuple[ChartLine, str]:
    """The line behind noisy values with its 90 % band, in place of a moving mean; and its last slope in words."""
    curve = smooth_curve(*zip(*raw))
    band = [(step, *metric.inside(low, high)) for step, low, high in zip(curve.step, curve.low, curve.high)]
    slope, low, high = (100 * side[-1] for side in (curve.slope, curve.slope_low, curve.slope_high))
    told = f" Band: 90% for the line. At the end it moves by {slope:+.2g} in 100 steps ({low:+.2g} to {high:+.2g})."
    return replace(line, points=list(zip(curve.step, curve.mean)), band=band), told.replace("-", "−")


def _panel(run: RunRecord, metric: Metric, panel: Panel) -> tuple[list[Point], list[Point]] | None:
    """Smoothed points, and the raw ones if smoothing did anything; None without a finite value."""
    ratio = panel.key.startswith(("ratio/", "trust/", "policy/"))
    evaluated = panel.key.startswith("eval/")
    points = series(run.evals if evaluated else run.train, panel.key, panel.change, skip_noop=ratio)
    if not finite(points):
        return None
    window = window_of(len(points), cycle_of(run.train) if metric.of_ratio else 1)
    window = 1 if evaluated or panel.key in CUMULATIVE else window
    return smooth(points, window), points if window > 1 else []


def _before_after(group: Group, arm: StudyArm) -> dict[str, BeforeAfter]:
    """Accuracies at the first and last evaluation; training metrics in the first and last tenth."""
    rows = {
        f"{kind.capitalize()} accuracy": _change(arm.measured[key])
        for key, kind in ACCURACIES.items()
        if key in arm.measured
    }
    for key, kind in POOL_ACCURACIES.items():
        if numbers := measure(arm.runs, key):
            rows[f"{kind.capitalize()}, training prompts"] = _change(numbers)
    for key, label in IN_TRAINING.items():
        pairs = [trend(run, key, kept=key == "trust/kept") for run in group.runs]
        known = [pair for pair in pairs if pair]
        if known:
            before, after = (fmean(pair[side] for pair in known) for side in (0, 1))
            rows[label] = BeforeAfter(decimal(before), decimal(after), signed(after - before))
    return rows


def _change(numbers: Measured) -> BeforeAfter:
    after = decimal(numbers.mean)
    if numbers.start is None:
        return BeforeAfter("–", after, "–")
    interval = f"{signed(numbers.change[0])} to {signed(numbers.change[1])}" if numbers.change else ""
    return BeforeAfter(decimal(numbers.start), after, signed(numbers.mean - numbers.start), interval)


def _spent(group: Group) -> dict[str, str]:
    """What a run of the group took: means over its seeds."""
    times = [run.seconds for run in group.runs if run.seconds is not None and run.seconds >= 0]
    tokens = [points[-1][1] for run in group.runs if finite(points := series(run.train, "num_tokens"))]
    drawn = [spent(run.steps) for run in group.runs if run.steps and (spent := completions(run))]
    table = {"Updates": f"{fmean(run.steps for run in group.runs):,.0f}"}
    if drawn:
        table["Completions sampled"] = f"{fmean(drawn):,.0f}"
    if tokens:
        table["Tokens sampled"] = f"{fmean(tokens):,.0f}"
    if times:
        table["Time"] = duration(fmean(times))
    return table
