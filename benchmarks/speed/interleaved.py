"""Ratios of run times that a busy machine does not spoil.

Every round runs every candidate once, in an order that rotates, and a ratio is formed *within* a round: what
slows one candidate slows its neighbour. Reported are the median over rounds and the quartiles. Time is the
processor time of this process, all its threads together, so waiting for other processes does not count.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from typing import Any

Call = Callable[[], Any]
ROUNDS = 11
SAMPLE = 0.02  # seconds that one sample of a candidate lasts at least


@dataclass(frozen=True)
class Row:
    """One line of the table: ``ratio`` (median) of ``name`` to ``peer`` with quartiles; ``target`` is an upper
    bound of the ratio if ``smaller``, else a lower bound; ``holds`` None = nothing was promised."""

    name: str
    case: str
    peer: str
    ratio: float
    low: float
    high: float
    target: float | None
    smaller: bool
    holds: bool | None
    attempts: int
    seconds: float  # median time of one call of ``name``
    load: float


def sample(calls: dict[str, Call], rounds: int = ROUNDS, least: float = SAMPLE) -> dict[str, list[float]]:
    """Seconds per call of every candidate, one number a round."""
    repeats = {name: _repeats(call, least) for name, call in calls.items()}
    names, out = list(calls), {name: [] for name in calls}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            for i in range(len(names)):
                name = names[(i + round_) % len(names)]
                call, count = calls[name], repeats[name]
                start = time.process_time()
                for _ in range(count):
                    call()
                out[name].append((time.process_time() - start) / count)
    finally:
        gc.enable()
    return out


def _repeats(call: Call, least: float) -> int:
    call()  # compiles, fills caches
    start = time.process_time()
    call()
    return max(1, round(least / max(time.process_time() - start, 1e-7)))


def ratios(times: dict[str, list[float]], name: str, peer: str) -> tuple[float, float, float]:
    """Median and quartiles over rounds of the time of ``name`` over that of ``peer``."""
    values = [a / b for a, b in zip(times[name], times[peer], strict=True)]
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, _, high = quantiles(values, n=4, method="inclusive")
    return median(values), low, high


def missed(ratio: tuple[float, float, float], target: float, smaller: bool) -> bool:
    """True if the median and the better quartile are both on the wrong side."""
    middle, low, high = ratio
    return (middle > target and low > target) if smaller else (middle < target and high < target)


@dataclass(frozen=True)
class Promise:
    """A ratio to report: time of ``name`` over that of ``peer``; or, with ``smaller = False``, how many times
    faster ``name`` is than ``peer``."""

    name: str
    peer: str
    target: float | None = None
    smaller: bool = True

    def ratio(self, times: dict[str, list[float]]) -> tuple[float, float, float]:
        over = (self.name, self.peer) if self.smaller else (self.peer, self.name)
        return ratios(times, *over)


def judge(
    case: str,
    calls: dict[str, Call],
    promises: Sequence[Promise],
    *,
    rounds: int = ROUNDS,
    least: float = SAMPLE,
    scale: dict[str, float] | None = None,
) -> list[Row]:
    """Time the candidates, again where a promise was missed: it fails only in two of three attempts.

    Args: scale: what a candidate's time is multiplied by, for slow ones that were given less work.
    """
    attempts: list[dict[str, list[float]]] = []
    while True:
        times = sample(calls, rounds, least)
        for name, factor in (scale or {}).items():
            times[name] = [factor * t for t in times[name]]
        attempts.append(times)
        misses = {p: sum(_fails(p, t) for t in attempts) for p in promises}
        undecided = [p for p in promises if misses[p] == 1 and len(attempts) - misses[p] < 2]
        if not undecided or len(attempts) == 3:
            break
    rows = []
    for promise in promises:
        best = [t for t in attempts if _fails(promise, t) == (misses[promise] >= 2)][-1]
        middle, low, high = promise.ratio(best)
        holds = None if promise.target is None else misses[promise] < 2
        seconds, load = median(best[promise.name]), os.getloadavg()[0]
        numbers = (middle, low, high, promise.target, promise.smaller, holds, len(attempts), seconds, load)
        rows.append(Row(promise.name, case, promise.peer, *numbers))
    return rows


def _fails(promise: Promise, times: dict[str, list[float]]) -> bool:
    return promise.target is not None and missed(promise.ratio(times), promise.target, promise.smaller)


def table(rows: Sequence[Row]) -> str:
    """Markdown."""
    lines = [
        "| what | case | against | ratio [quartiles] | target | holds | load |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        sense = "time, smaller is better" if row.smaller else "times faster"
        target = "" if row.target is None else f"{'<=' if row.smaller else '>='} {row.target:g}"
        holds = "" if row.holds is None else "yes" if row.holds else "**no**"
        ratio = f"{_short(row.ratio)} [{_short(row.low)} {_short(row.high)}] {sense}"
        lines.append(
            f"| {row.name} | {row.case} | {row.peer} | {ratio} | {target} | {holds} | {row.load:.1f} |"
        )
    return "\n".join(lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]
