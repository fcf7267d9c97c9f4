"""The figure of an experiment: learning curves with intervals over seeds, and each claim against its acceptance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from kalman_rl.engine.runs.files import replacing
from kalman_rl.errors import extra
from kalman_rl.instruments.report.picture import STYLE
from kalman_rl.instruments.report.stats.intervals import t_interval
from kalman_rl.palette import LIGHT, MUTED

COLOURS = {"reproduced": LIGHT[2], "refuted": LIGHT[1], "not decided": MUTED}
FARTHEST = 8
"""Half-widths from its bound at which a claim is drawn at the rim, as an arrow."""
COLUMNS = 2  # of the legend


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw an experiment's summary. Raises: AdapterError without matplotlib."""
    with extra("app", "kalman-rl reproduce"):
        from matplotlib import rc_context
        from matplotlib.figure import Figure

    with rc_context(STYLE):
        curves = {name: arm for name, arm in result["arms"].items() if "accuracy" in arm}
        claims = result["claims"]
        legend = 0.2 * -(-len(curves) // COLUMNS)
        height = max(3.4 + legend if curves else 1.2, 0.62 * len(claims) + 1.1)
        figure = Figure(figsize=(12 if curves else 8, height), layout="constrained")
        axes = figure.subplots(1, 2 if curves else 1, squeeze=False)[0]
        if curves:
            _curves(axes[0], curves)
        _claims(axes[-1], claims)
        with replacing(path) as temporary:
            figure.savefig(temporary, format="png", dpi=90)


def _curves(axis: Any, arms: Mapping[str, Mapping[str, Any]]) -> None:
    styles = ("-", "--", ":")
    for i, (name, arm) in enumerate(arms.items()):
        points = list(zip(*arm["accuracy"]))
        mean = [sum(point) / len(point) for point in points]
        colour = LIGHT[i % len(LIGHT)]
        axis.plot(arm["spent"], mean, styles[i // len(LIGHT)], color=colour, label=name, lw=1.8)
        bands = [t_interval(point) for point in points]
        if all(bands) and len(arms) <= 7:
            low, high = zip(*(band for band in bands if band is not None))
            axis.fill_between(arm["spent"], low, high, color=colour, alpha=0.12, lw=0)
    axis.set_title("exact accuracy on the pool")
    axis.set_xlabel("completions")
    axis.legend(
        frameon=False, fontsize=8, ncols=COLUMNS, loc="upper left", bbox_to_anchor=(0, 0), borderaxespad=4.5
    )


def _claims(axis: Any, claims: Sequence[Mapping[str, Any]]) -> None:
    """One row a claim: interval, mean, and where its acceptance begins and ends, in its own units."""
    axis.set_title("claims: 0 = the bound that had to be passed")
    for row, claim in enumerate(reversed(claims)):
        colour = COLOURS[claim["verdict"]]
        value, interval = _scaled(claim)
        if value is not None:
            far = abs(value) > FARTHEST
            marker = (">" if value > 0 else "<") if far else "o"
            fill_colour = colour if interval is not None else "none"
            axis.plot(_inside(value), [row], marker, color=colour, markerfacecolor=fill_colour)
        if interval is not None:
            axis.plot([_inside(end) for end in interval], [row, row], color=colour, lw=2)
        axis.annotate(
            claim["verdict"],
            (1.0, row),
            xycoords=("axes fraction", "data"),
            ha="left",
            va="center",
            fontsize=8,
            color=colour,
        )
    axis.axvline(0, color=MUTED, lw=1, ls=":")
    labels = [fill(claim["claim"], 46) for claim in reversed(claims)]
    axis.set_yticks(range(len(claims)), labels, fontsize=7.5)
    axis.set_ylim(-0.6, len(claims) - 0.4)
    note = f"half-widths of the interval from the bound (arrow: over {FARTHEST}; hollow: no interval)"
    axis.set_xlabel(note, fontsize=8)


def _inside(distance: float) -> float:
    return max(-FARTHEST, min(FARTHEST, distance))


def _scaled(claim: Mapping[str, Any]) -> tuple[float | None, tuple[float, float] | None]:
    """Mean and ends as distances inside the nearer bound, so that claims of different units share an axis."""
    from math import log

    if claim["value"] is None:
        return None, None
    move = log if claim["factor"] else float
    bounds = [
        (sign, move(bound))
        for sign, bound in ((1, claim["low"]), (-1, claim["high"]))
        if bound is not None and abs(bound) < float("inf")
    ]
    value = move(claim["value"])
    sign, bound = min(bounds, key=lambda pair: abs(value - pair[1]))
    interval = claim["interval"]
    if not interval or interval[0] == interval[1]:
        return (1.0 if claim["verdict"] == "reproduced" else -1.0), None
    ends = [move(end) for end in interval]
    half = max((ends[1] - ends[0]) / 2, 1e-12)
    low, high = sorted(sign * (end - bound) / half for end in ends)
    return sign * (value - bound) / half, (low, high)
