"""What was spent where: completions by what was believed of their prompts, for any size of group."""

from __future__ import annotations

from collections import Counter
from statistics import fmean

import torch

from kalman_rl.engine.runs.beliefs import HOPELESS, LEARNED, Beliefs, Visit
from kalman_rl.instruments.report.charts.chart import ChartLine, lines_chart
from kalman_rl.instruments.report.stats.intervals import wilson
from kalman_rl.instruments.report.stats.metrics import Figure
from kalman_rl.instruments.report.stats.savings import beta_shapes
from kalman_rl.instruments.report.stats.series import Point, smooth, window_of
from kalman_rl.sampling.gains import beta_signal

KINDS = {f"below {HOPELESS:g}": 1, f"{HOPELESS:g} to {LEARNED:g}": 7, f"above {LEARNED:g}": 2}
"""Ranges of the predicted success rate, with the colours of hopeless, undecided and learned."""
BINS, FEWEST = 8, 10


def by_difficulty(beliefs: Beliefs) -> Figure | None:
    """Shares of each batch's completions that went to prompts predicted as hard, in between and easy."""
    low, middle, high = KINDS
    lines: dict[str, list[Point]] = {kind: [] for kind in KINDS}
    evenly: list[Point] = []
    seen: dict[str, float] = {}
    spent: Counter[str] = Counter()

    def kind_of(mean: float) -> str:
        return low if mean < HOPELESS else high if mean > LEARNED else middle

    for batch in beliefs.batches:
        counts: Counter[str] = Counter()
        for visit in batch.visits.values():
            counts[kind_of(visit.mean)] += visit.n  # type: ignore[assignment]
        total = sum(counts.values())
        seen |= {name: visit.mean for name, visit in batch.visits.items()}
        if total:
            for kind, points in lines.items():
                points.append((batch.step, counts[kind] / total))
            evenly.append((batch.step, fmean(kind_of(mean) == middle for mean in seen.values())))
            spent += counts
        seen |= {name: visit.after for name, visit in batch.visits.items()}
    if not evenly:
        return None
    window = window_of(len(evenly))
    drawn = [ChartLine(kind, smooth(lines[kind], window), colour) for kind, colour in KINDS.items()]
    drawn.append(ChartLine(f"{middle}, evenly", smooth(evenly, window), 7, dashed=True))
    share = spent[middle] / sum(spent.values())
    note = (
        f"Completions by the success rate predicted for their prompt; {share:.0%} of all went to those at {middle}. "
        "Dashed: had all prompts seen so far been drawn evenly."
    )
    chart = lines_chart(drawn, y_label="share of completions", limits=(0.0, 1.0))
    return Figure("Completions by difficulty", note, chart)


def informative(beliefs: Beliefs) -> Figure | None:
    """How much the completions of each batch were expected to teach, beside an even draw from all prompts seen."""
    every = [visit for batch in beliefs.batches for visit in batch.visits.values()]
    if not every:
        return None
    signal = iter((4 * beta_signal(*torch.tensor(beta_shapes(every), dtype=torch.float64).T)).tolist())
    drawn: list[Point] = []
    evenly: list[Point] = []
    known: dict[str, float] = {}
    total = 0.0
    for batch in beliefs.batches:
        taught = {name: next(signal) for name in batch.visits}
        for name, value in taught.items():
            total += value - known.get(name, 0.0)
        known |= taught
        if count := sum(visit.n for visit in batch.visits.values()):
            mean = sum(taught[name] * visit.n for name, visit in batch.visits.items()) / count
            drawn.append((batch.step, mean))
            evenly.append((batch.step, total / len(known)))
    window = window_of(len(drawn))
    lines = [
        ChartLine("as drawn", smooth(drawn, window), 0, behind=[drawn] if window > 1 else []),
        ChartLine("evenly", smooth(evenly, window), 7, dashed=True),
    ]
    note = (
        "4 E[p (1 - p)] under the belief: 1 for a completion at success rate 1/2, 0 at hopeless and solved prompts. "
        "Dashed: had all prompts seen so far been drawn evenly."
    )
    chart = lines_chart(lines, y_label="mean over completions", limits=(0.0, 1.0))
    return Figure("Informative completions", note, chart)


def reliability(beliefs: Beliefs) -> Figure | None:
    """Success rates predicted and observed: what calibration means for single 0/1 rewards."""
    bins: dict[int, list[Visit]] = {}
    for batch in beliefs.batches:
        for visit in batch.visits.values():
            if visit.n and visit.reward == visit.reward:
                bins.setdefault(min(BINS - 1, max(0, int(BINS * visit.mean))), []).append(visit)
    points, bars = [], []
    for _, visits in sorted(bins.items()):
        count = sum(visit.n for visit in visits)
        if count >= FEWEST:
            x = 100 * sum(visit.mean * visit.n for visit in visits) / count
            share = min(1.0, max(0.0, sum(visit.reward * visit.n for visit in visits) / count))
            points.append((x, share))
            bars.append((x, *wilson(share, count)))
    if not points:
        return None
    note = (
        "Mean reward of completions by the success rate predicted for their prompt, with 95% Wilson intervals. Above "
        "the dashed line the prompts were easier than predicted; below, harder."
    )
    ideal = ChartLine("ideal", [(0.0, 0.0), (100.0, 1.0)], 7, dashed=True)
    lines = [ideal, ChartLine("observed", points, 0, whiskers=bars, dots=True)]
    chart = lines_chart(lines, y_label="mean reward", x_label="predicted success rate, %", limits=(0.0, 1.0))
    return Figure("Calibration", note, chart)
