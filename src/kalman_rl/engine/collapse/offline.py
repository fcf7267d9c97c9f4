"""The alarm on recorded runs: what would have fired."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from kalman_rl.engine.collapse.fall import Fall
from kalman_rl.engine.collapse.rule import SHOWN_TOKENS, Alarm, Judge, Rule, Token
from kalman_rl.engine.collapse.watch import Watch, WatchOptions
from kalman_rl.engine.config import TrainConfig, build, load_toml
from kalman_rl.engine.runs.run import read_manifest, read_metrics
from kalman_rl.errors import ConfigError, RunError


def period_of(run: Path) -> int:
    """Optimizer steps from one sampling to the next, from the run's settings; 1 where they cannot be read."""
    try:
        config = build(TrainConfig, load_toml(run / "config.toml"))
    except (ConfigError, TypeError):
        return 1
    return max(config.updates_per_generation * config.iterations, 1)


def alarms_of(run: Path, *, rule: Rule | None = None, options: WatchOptions | None = None) -> list[Alarm]:
    """Alarms that the recorded metrics of a run would have raised, with tokens where that step was traced.

    Args:
        run: directory with ``metrics.jsonl``; nothing is written.
        rule, options: the decision and the filter; None = those of training.

    Raises: RunError if there is no run, or its metrics cannot be read.
    """
    run = Path(run)
    read_manifest(run)
    watch, judge, fall = Watch(period_of(run), options=options), Judge(rule), Fall()
    found: list[Alarm] = []
    for row in read_metrics(run):
        if row["kind"] == "train":
            found += judge.judge(row["step"], watch.see(row["step"], row)) + fall.see(row["step"], row)
    return [replace(alarm, tokens=traced_tokens(run, alarm.step)) for alarm in found]


def traced_tokens(run: Path, step: int) -> tuple[Token, ...]:
    """The traced tokens of a step with the largest |log-ratio|; none where nothing readable was traced."""
    path = run / "traces" / f"step-{step:06d}.parquet"
    if not path.is_file() or path.is_symlink():
        return ()
    import pyarrow as pa
    import pyarrow.parquet

    names = ["token", "log_ratio", "prompt_id", "position"]
    try:
        rows = pyarrow.parquet.read_table(path, columns=names).to_pylist()
        rows = [row for row in rows if row["log_ratio"] is not None and math.isfinite(row["log_ratio"])]
        rows.sort(key=lambda row: -abs(row["log_ratio"]))
        return tuple(
            Token(str(row["token"]), float(row["log_ratio"]), str(row["prompt_id"]), int(row["position"]))
            for row in rows[:SHOWN_TOKENS]
        )
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError):
        return ()


def show_alarms(runs: list[Path], rule: Rule, options: WatchOptions, as_json: bool) -> int:
    """Print what would have fired in each run, as text or JSON; returns the exit code 0.

    Raises: RunError for a directory that holds no run.
    """
    everything: list[dict[str, Any]] = []
    for run in runs:
        found = alarms_of(run, rule=rule, options=options)
        everything.append({"run": str(run), "alarms": [asdict(alarm) for alarm in found]})
        if not as_json:
            print(f"{run}: {len(found) or 'no'} alarm{'' if len(found) == 1 else 's'}")
            for alarm in found:
                print(f"  {alarm.sentence()}")
    if as_json:
        print(json.dumps(everything, indent=2))
    else:
        print(
            f"rule: {rule.k} of {rule.n} beyond {rule.band:g} deviations on one harmful side; white Gaussian noise "
            f"would raise {rule.false_alarms():.2g} alarms per 1000 observations of a metric and side"
        )
    return 0


def runs_below(paths: list[Path]) -> list[Path]:
    """The runs among and below directories, in order. Raises: RunError where there is none."""
    found: dict[Path, None] = {}
    for path in paths:
        if not path.is_dir():
            raise RunError(f"{path}: no such run directory")
        folders = sorted(file.parent for file in path.rglob("manifest.json"))
        if not folders:
            raise RunError(f"{path}: got no manifest.json in it or below, expected a run")
        found |= dict.fromkeys(folders)
    return list(found)
