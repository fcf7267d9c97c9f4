"""How far a run is: its step, what is left, and its own clock, from the end of its metrics; cheap at any size."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from kalman_rl.engine.runs.reading import number
from kalman_rl.engine.runs.received import MAX_ROWS, MAX_TOML, opened, parse_json, parse_toml, read_bytes
from kalman_rl.errors import RunError
from kalman_rl.instruments.report.words import duration

TAIL = 64_000
"""Bytes of metrics that are read; some fifty rows."""
RECENT = 20
"""Rows over which the pace is taken."""


@dataclass(frozen=True)
class Standing:
    """``step`` of ``steps``, ``seconds`` on the run's clock, which stands still while nobody trains, and as ``pace``
    the seconds of a step; 0 is unknown."""

    step: int
    steps: int
    seconds: float
    pace: float
    reward: float | None

    @property
    def share(self) -> float:
        """Part of the run that is done, in [0, 1]; 0 if it is not known."""
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    def text(self, *, going: bool) -> str:
        """As a line; ``going``: whether a process is training."""
        parts = [f"step {self.step:,}" + (f" of {self.steps:,} ({self.share:.0%})" if self.steps else "")]
        if self.reward is not None:
            parts.append(f"reward {self.reward:.3f}")
        parts.append(f"{duration(self.seconds)} so far")
        if going and self.pace > 0 and self.steps > self.step:
            parts.append(
                f"{duration(self.pace)} a step, about {duration(self.pace * (self.steps - self.step))} left"
            )
        return ", ".join(parts)


def progress_of(run: Path) -> Standing | None:
    """Progress of a run, None before its first row of training."""
    rows = []
    for line in _tail(run):
        with contextlib.suppress(ValueError, TypeError, AttributeError):
            row = parse_json(line, finite=True)
            at, time = number(row.get("step")), number(row.get("time"))
            if row.get("kind") == "train" and at is not None and time is not None and at >= 0 <= time:
                rows.append((int(at), time, number(row.get("reward"))))
    if not rows:
        return None
    (first, began, _), (step, seconds, _) = rows[-RECENT:][0], rows[-1]
    pace = (seconds - began) / (step - first) if step > first else 0.0
    reward = next((value for _, _, value in reversed(rows) if value is not None), None)
    return Standing(step, _steps(run), seconds, max(pace, 0.0), reward)


def _tail(run: Path) -> list[bytes]:
    """The last whole lines of the metrics."""
    try:
        with opened(run, "metrics.jsonl", MAX_ROWS) as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - TAIL))
            lines = file.read(TAIL).split(b"\n")
    except (RunError, OSError):
        return []
    return lines[1 if size > TAIL else 0 : -1]


def _steps(run: Path) -> int:
    with contextlib.suppress(RunError, OSError, ValueError):
        steps = parse_toml(read_bytes(run, "config.toml", MAX_TOML).decode()).get("steps")
        return steps if isinstance(steps, int) and 0 < steps < 2**53 else 0
    return 0
