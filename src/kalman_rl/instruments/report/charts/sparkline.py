"""A prompt's belief over a run as a line the height of a table row."""

from __future__ import annotations

import math
from collections.abc import Sequence

from markupsafe import Markup

from kalman_rl.engine.runs.beliefs import Visit

WIDTH, HEIGHT, PAD = 400.0, 48.0, 4.0
MAX_VISITS = 80


def belief_line(
    visits: Sequence[Visit], steps: tuple[float, float], limits: tuple[float, float], name: str
) -> Markup:
    """Posterior mean, its 90 % band and the observed means as SVG; steps and limits are the axes' ends."""
    shown = list(visits[:: max(1, math.ceil(len(visits) / MAX_VISITS))])
    if shown[-1] is not visits[-1]:
        shown.append(visits[-1])

    def x(step: float) -> float:
        return PAD + (WIDTH - 2 * PAD) * (step - steps[0]) / max(steps[1] - steps[0], 1e-9)

    def y(value: float) -> float:
        share = (value - limits[0]) / max(limits[1] - limits[0], 1e-9)
        return HEIGHT - PAD - (HEIGHT - 2 * PAD) * min(max(share, 0.0), 1.0)

    upper = [f"{x(v.step):.1f} {y(v.interval[1]):.1f}" for v in shown]
    lower = [f"{x(v.step):.1f} {y(v.interval[0]):.1f}" for v in reversed(shown)]
    line = "L".join(f"{x(v.step):.1f} {y(v.after):.1f}" for v in shown)
    parts = [
        Markup('<path class="rail" d="M{0} {1:.1f}H{2}M{0} {3:.1f}H{2}"/>').format(
            PAD, y(limits[0]), WIDTH - PAD, y(limits[1])
        ),
        Markup('<path class="band f0" d="M{}Z"/>').format("L".join(upper + lower)),
        Markup('<path class="line s0" d="M{}"/>').format(line),
    ]
    for visit in shown:
        if math.isfinite(visit.reward):
            radius = min(3.4, 0.9 + 0.55 * math.sqrt(max(visit.n, 0.0)))
            said = f"step {visit.step:g}: {visit.n:g} completions, mean {visit.reward:.2f}; belief {visit.after:.2f}"
            parts.append(
                Markup(
                    '<circle class="seen" cx="{:.1f}" cy="{:.1f}" r="{:.1f}"><title>{}</title></circle>'
                ).format(x(visit.step), y(visit.reward), radius, said)
            )
    last = shown[-1]
    parts.append(
        Markup('<circle class="dot f0" cx="{:.1f}" cy="{:.1f}" r="3"/>').format(x(last.step), y(last.after))
    )
    label = f"belief about {name[:60]}: from {shown[0].after:.2f} to {last.after:.2f}"
    return Markup('<svg class="spark" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, label, Markup("").join(parts)
    )
