"""Beliefs and budget: what was believed of the prompts, what they got, and what a fixed number would have cost."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from statistics import fmean

from kalman_rl.engine.runs.beliefs import BANDS, HOPELESS, LEARNED, Beliefs, Visit, read_beliefs
from kalman_rl.engine.runs.reading import RunRecord, clean
from kalman_rl.instruments.report.charts.chart import ChartLine, Spec, belief_chart, lines_chart
from kalman_rl.instruments.report.sections.section import Context
from kalman_rl.instruments.report.sections.spending import by_difficulty, informative, reliability
from kalman_rl.instruments.report.stats.intervals import wilson
from kalman_rl.instruments.report.stats.metrics import Figure
from kalman_rl.instruments.report.stats.savings import Saving, beta_shapes, mixed_share, savings
from kalman_rl.instruments.report.stats.series import Point, finite, series, smooth, window_of
from kalman_rl.instruments.report.stats.study import flat
from kalman_rl.instruments.report.words import counted, decimal
from kalman_rl.sampling.advice import FACTOR, INFORMATIVE, advice

MAX_PROMPTS = 12
RECENT = 8
"""Batches that advice looks back on."""
ENOUGH = 8
"""Completions of a prompt after which F was right within a tenth, see tests/sampling/test_advice.py."""
BINS = 8
BAND_COLOURS = {"learned": 2, "undecided": 7, "hopeless": 1}


@dataclass(frozen=True)
class PromptRow:
    """One prompt as the table shows it."""

    text: str
    line: Spec
    mean: str
    interval: str
    band: str
    spent: int
    visits: int
    following: str | None
    order: float


@dataclass
class BeliefSection:
    """One run's beliefs: charts, the table of prompts, and the savings in words."""

    run: str
    lead: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    prompts: list[PromptRow] = field(default_factory=list)
    prompts_note: str = ""
    savings: list[dict[str, str]] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)


def build(context: Context) -> BeliefSection | None:
    """The section of the first run that has beliefs, None if there is none; problems are noted."""
    for run in context.shown:
        problems: list[str] = []
        beliefs = read_beliefs(run.path, problems)
        context.notes += [(run.name, problem) for problem in problems]
        if beliefs:
            return _section(run, beliefs)
    return None


def _section(run: RunRecord, beliefs: Beliefs) -> BeliefSection:
    prompts = beliefs.prompts
    section = BeliefSection(clean(run.name, 60))
    section.lead = [*_lead(beliefs, prompts), *_advice(run, beliefs)]
    single = single_completions(run, beliefs)
    calibration = reliability if single and beliefs.unit else _calibration
    figures = [_bands(beliefs), calibration(beliefs)]
    if beliefs.unit:
        figures += [by_difficulty(beliefs), informative(beliefs)]
    if not single:
        figures += [_allocation(beliefs), _informative(beliefs)]
        section.savings = [_saved(saving) for saving in savings(beliefs)]
    for figure in figures:
        if isinstance(figure, Figure):
            section.figures.append(figure)
        elif figure:
            section.missing.append(figure)
    section.prompts = _rows(beliefs, prompts)
    section.prompts_note = _note(beliefs, prompts)
    return section


def single_completions(run: RunRecord, beliefs: Beliefs) -> bool:
    """Whether the run samples a prompt once, so that nothing is said about groups; a stream may draw one twice."""
    each = flat(run.config).get("completions_per_prompt")
    if beliefs.allocation == "fixed" and each:
        return each == "1"
    return all(visit.n <= 1 for batch in beliefs.batches for visit in batch.visits.values())


def _lead(beliefs: Beliefs, prompts: dict[str, list[Visit]]) -> list[str]:
    used = sum(batch.used for batch in beliefs.batches)
    text = (
        f"{counted(len(beliefs.batches), 'generation batch', 'generation batches')} drew {used:,.0f} completions; "
        f"{counted(len(prompts), 'prompt')} came up and {'was' if len(prompts) == 1 else 'were'} followed."
    )
    if not beliefs.unit or not prompts:
        return [text]
    last = [visits[-1].band for visits in prompts.values()]
    told = ", ".join(f"{last.count(band)} {band}" for band in BANDS)
    return [text, f"At the end: {told}."]


def _advice(run: RunRecord, beliefs: Beliefs) -> list[str]:
    """What the belief's own numbers say about single completions, from the last eight batches."""
    factors = finite(series(run.train, FACTOR))[-RECENT:]
    if not factors or not beliefs.prompts:
        return []
    said = [advice(fmean(factors), single=single_completions(run, beliefs))]
    often = fmean(sum(visit.n for visit in visits) for visits in beliefs.prompts.values())
    if often < ENOUGH:
        said.append(
            f"A prompt was sampled {often:.1f} times so far; before about {ENOUGH} F comes out too small."
        )
    if shares := finite(series(run.train, INFORMATIVE))[-RECENT:]:
        said.append(
            f"Informative completions: {fmean(shares):.0%} (100% if all went to success rate 1/2, 0% if to hopeless or "
            "solved prompts). F = 1 + Var(p) / E[p (1 - p)] over the prompts seen."
        )
    else:
        said.append(
            "Rewards are not 0/1, so F = 1 + variance of the prompts' values / noise variance of a reward."
        )
    return said


def _bands(beliefs: Beliefs) -> Figure | str:
    if not beliefs.unit:
        return "Rewards are not confined to 0 to 1, so prompts are not called learned or hopeless."
    now: dict[str, str] = {}
    lines: dict[str, list[Point]] = {band: [] for band in BANDS}
    for batch in beliefs.batches:
        now |= {name: visit.band for name, visit in batch.visits.items()}
        for band, points in lines.items():
            if now:
                points.append((batch.step, sum(value == band for value in now.values()) / len(now)))
    note = (
        f"Learned: the 90% interval of the success rate lies above {LEARNED:g}; hopeless: below {HOPELESS:g}; "
        "undecided: neither. Of the prompts seen so far."
    )
    drawn = [ChartLine(band, points, BAND_COLOURS[band]) for band, points in lines.items()]
    return Figure(
        "Learned, undecided, hopeless",
        note,
        lines_chart(drawn, y_label="share of prompts", limits=(0.0, 1.0)),
    )


def _calibration(beliefs: Beliefs) -> Figure | str:
    inside: dict[float, float] = {}
    judged = sum(batch.judged for batch in beliefs.batches)
    for batch in beliefs.batches:
        for level, count in batch.inside.items():
            inside[level] = inside.get(level, 0.0) + count
    if not inside or judged < 1:
        return "No coverage was recorded, so the intervals' calibration is not drawn."
    levels = sorted(inside)
    points = [(100 * level, min(1.0, inside[level] / judged)) for level in levels]
    bars = [(x, *wilson(share, judged)) for x, share in points]
    ideal = [(x, x / 100) for x, _ in points]
    said = f"{inside[0.9] / judged:.0%} of" if 0.9 in inside else "Of"
    note = (
        f"Predicted intervals against what came: {said} {judged:,.0f} first rounds had their mean inside the 90% "
        "interval. Above the dashed line, intervals are too wide; below, too narrow. A mean of few completions takes "
        "few values, so the narrow intervals are judged roughly."
    )
    lines = [
        ChartLine("ideal", ideal, 7, dashed=True),
        ChartLine("observed", points, 0, whiskers=bars, dots=True),
    ]
    chart = lines_chart(lines, y_label="share inside", x_label="predicted interval, %", limits=(0.0, 1.0))
    return Figure("Calibration", note, chart)


def _allocation(beliefs: Beliefs) -> Figure | str:
    visits = [visit for batch in beliefs.batches for visit in batch.visits.values()]
    if beliefs.allocation == "fixed":
        return "Every prompt got the same number of completions, so there is no allocation to draw."
    if not beliefs.unit or len(visits) < BINS:
        return ""
    bins: dict[int, list[float]] = {}
    for visit in visits:
        bins.setdefault(min(BINS - 1, max(0, int(BINS * visit.mean))), []).append(visit.n)
    points, bars = [], []
    for place, counts in sorted(bins.items()):
        x = 100 * (place + 0.5) / BINS
        ordered = sorted(counts)
        points.append((x, fmean(counts)))
        bars.append((x, ordered[int(0.1 * (len(ordered) - 1))], ordered[math.ceil(0.9 * (len(ordered) - 1))]))
    fixed = sum(batch.rows for batch in beliefs.batches) / max(
        1.0, sum(batch.prompts for batch in beliefs.batches)
    )
    note = (
        "Completions of a prompt in one batch by the success rate predicted for it; bars hold eight in ten."
    )
    lines = [ChartLine("mean", points, 0, whiskers=bars, dots=True)]
    chart = lines_chart(
        lines, y_label="completions", x_label="predicted success rate, %", limits=(0.0,),
        reference=(fixed, f"fixed: {fixed:.3g}"),
    )  # fmt: skip
    return Figure("Where completions went", note, chart)


def _informative(beliefs: Beliefs) -> Figure | str:
    if not beliefs.unit:
        return ""
    observed: list[Point] = []
    expected: list[Point] = []
    for batch in beliefs.batches:
        if not batch.visits or not batch.prompts:
            continue
        fixed = batch.rows / batch.prompts
        visits = list(batch.visits.values())
        observed.append((batch.step, fmean(visit.mixed for visit in visits)))
        expected.append((batch.step, fmean(mixed_share(fixed, shape) for shape in beta_shapes(visits))))
    if not observed:
        return ""
    window = window_of(len(observed))
    lines = [ChartLine("as drawn", smooth(observed, window), 0, behind=[observed] if window > 1 else [])]
    note = "Prompts of a batch whose completions earned different rewards, so that they teach something."
    if beliefs.allocation != "fixed":
        lines.append(ChartLine("fixed, expected", smooth(expected, window), 7, dashed=True))
        note += " Dashed: expected from the beliefs had the batch been shared out evenly."
    chart = lines_chart(lines, y_label="share of prompts", limits=(0.0, 1.0))
    return Figure("Informative groups", note, chart)


def _saved(saving: Saving) -> dict[str, str]:
    if math.isinf(saving.fixed):
        return {
            "equality": saving.equality,
            "used": decimal(saving.used, 1),
            "fixed": "over 4096",
            "share": "–",
        }
    share = saving.share
    word = f"{share:.0%} saved" if share >= 0 else f"{-share:.0%} more"
    return {
        "equality": saving.equality,
        "used": decimal(saving.used, 1),
        "fixed": decimal(saving.fixed, 1),
        "share": word,
    }


def _rows(beliefs: Beliefs, prompts: dict[str, list[Visit]]) -> list[PromptRow]:
    """Prompts spread over the range of what is believed of them, the lowest first."""
    ordered = sorted(prompts, key=lambda name: (prompts[name][-1].after, name))
    count = min(MAX_PROMPTS, len(ordered))
    chosen = [ordered[round(i * (len(ordered) - 1) / max(1, count - 1))] for i in range(count)]
    every = [visit for name in chosen for visit in prompts[name]]
    steps = (beliefs.batches[0].step, beliefs.batches[-1].step)
    limits = (0.0, 1.0)
    if not beliefs.unit and every:
        limits = (min(visit.interval[0] for visit in every), max(visit.interval[1] for visit in every))
    return [_row(beliefs.texts.get(name) or name, prompts[name], steps, limits, beliefs) for name in chosen]


def _row(
    text: str, visits: list[Visit], steps: tuple[float, float], limits: tuple[float, float], beliefs: Beliefs
) -> PromptRow:
    last, unit, fixed = visits[-1], beliefs.unit, beliefs.allocation == "fixed"
    low, high = last.interval
    if unit:
        low, high = max(0.0, low), min(1.0, high)
    return PromptRow(
        text=text,
        line=belief_chart(visits, steps, limits),
        mean=decimal(last.after),
        interval=f"{decimal(low)} to {decimal(high)}",
        band=last.band if unit else "",
        spent=round(sum(visit.n for visit in visits)),
        visits=len(visits),
        following=None if fixed else f"{last.next:.0f}" if math.isfinite(last.next) else "–",
        order=last.after,
    )


def _note(beliefs: Beliefs, prompts: dict[str, list[Visit]]) -> str:
    text = (
        "Line: posterior mean of the prompt's value after each batch it was in; band: its central 90%; dots: the "
        "mean reward of the batch, larger for more completions."
    )
    if beliefs.allocation != "fixed":
        text += " Next: completions if the batch came up again."
    most = sum(batch.prompts > len(batch.visits) for batch in beliefs.batches)
    if len(prompts) > MAX_PROMPTS:
        text += (
            f" Shown: {MAX_PROMPTS} of {len(prompts)} followed prompts, spread over what is believed of them."
        )
    if most:
        text += f" In {most} batches the run wrote down a sample of the prompts only."
    return text
