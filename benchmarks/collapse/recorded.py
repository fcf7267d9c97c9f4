"""The recorded runs of the benchmark: their rows, their accuracy, and where they collapsed, if they did."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.collapse.runs import SETTINGS
from benchmarks.collapse.surprise import Surprise, WatchOptions
from kalman_rl.engine.config import TrainConfig, build, load_toml
from kalman_rl.engine.runs.reading import read_manifest, read_metrics
from kalman_rl.errors import ConfigError, RunError

HOLD = list(SETTINGS)[: list(SETTINGS).index("no_ratio_ramp")]
"""Settings meant to hold."""
Event = tuple[int, str]
"""Step and metric of one alarm."""
LASTS = 32
"""Steps that accuracy must stay below half of its best for a collapse."""


@dataclass
class Recorded:
    """One recorded run: its rows, its accuracy per generation batch, and where it collapsed, if it did."""

    name: str
    setting: str
    seed: int
    period: int
    rows: list[dict[str, Any]]
    accuracy: list[tuple[int, float]]
    collapse: int | None
    surprises: dict[WatchOptions | int, list[tuple[int, list[Surprise]]]] = field(default_factory=dict)

    @property
    def group(self) -> str:
        if self.collapse is not None:
            return "collapsed"
        return "held" if self.setting in HOLD else "neither"

    @property
    def steps(self) -> int:
        return int(self.rows[-1]["step"])


def collapse_of(accuracy: list[tuple[int, float]], lasts: int = LASTS) -> int | None:
    """First step of the first batch from which accuracy stays below half its best so far for long enough.

    >>> collapse_of([(1, 0.2), (9, 0.4), (17, 0.1), (25, 0.1), (33, 0.0), (41, 0.0), (49, 0.0)])
    17
    >>> collapse_of([(1, 0.2), (9, 0.4), (17, 0.1), (25, 0.3), (33, 0.2), (41, 0.3)]) is None
    True
    """
    best = 0.0
    for i, (step, value) in enumerate(accuracy):
        below = [s for s, v in accuracy[i:] if v < best / 2]
        after = accuracy[i:]
        stay = next((s for s, v in after if v >= best / 2), None)
        long = (stay or after[-1][0] + 1) - step >= lasts
        if value < best / 2 and long and len([s for s in below if stay is None or s < stay]) >= 2:
            return step
        best = max(best, value)
    return None


def load(root: Path) -> list[Recorded]:
    """The finished runs below ``root``."""
    found = []
    for folder in sorted(root.glob("*-s*")):
        try:
            if read_manifest(folder).get("status") != "finished":
                continue
        except RunError:
            continue
        rows = [row for row in read_metrics(folder) if row["kind"] == "train"]
        setting, _, seed = folder.name.rpartition("-s")
        sampled = [row["step"] for row in rows if row.get("reward") is not None]
        exact = [share for count, share in json.loads((folder / "exact.json").read_text()) if count == 256]
        values = exact or [row["reward"] for row in rows if row.get("reward") is not None]
        accuracy = list(zip(sampled, values, strict=True))
        found.append(
            Recorded(
                folder.name, setting, int(seed), period_of(folder), rows, accuracy, collapse_of(accuracy)
            )
        )
    return found


def period_of(run: Path) -> int:
    """Optimizer steps from one sampling to the next, from the run's settings; 1 where they cannot be read."""
    try:
        config = build(TrainConfig, load_toml(run / "config.toml"))
    except (ConfigError, TypeError):
        return 1
    return max(config.updates_per_generation * config.iterations, 1)
