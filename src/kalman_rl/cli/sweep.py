"""One configuration with several seeds, one run after another, and one report of all."""

from __future__ import annotations

import dataclasses
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean

from kalman_rl.cli.demo import run_one
from kalman_rl.cli.resume import resume
from kalman_rl.cli.stress import is_finished
from kalman_rl.engine.config import TrainConfig, build, settings_of, to_toml
from kalman_rl.engine.runs.reading import read_metrics
from kalman_rl.errors import PlaceError
from kalman_rl.terminal import tell

MEASURES = {"eval/sampled_reward": "held-out mean reward", "eval/sampled_accuracy": "held-out accuracy"}


def sweep(config: TrainConfig, seeds: int, *, overwrite: bool = False) -> int:
    """Train with seeds ``seed, seed + 1, ...`` in ``RUN/seed-N``, and write ``RUN/report.html``.

    Each run has a process of its own, so it is the run that its seed gives alone. The same command goes on where it
    stopped: finished runs stay, one that was interrupted is resumed.

    Raises: PlaceError for a run with other settings that may not be replaced. Returns: the exit code.
    """
    assert config.run is not None
    plans = [
        dataclasses.replace(config, seed=seed, run=config.run / f"seed-{seed}")
        for seed in range(config.seed, config.seed + seeds)
    ]
    for plan in plans:
        if not overwrite and _there(plan) and not _same(plan):
            raise PlaceError(
                f"{plan.run}: exists with other settings, expected those of this command; choose another --run, or "
                "replace it with --overwrite"
            )
    for plan in plans:
        if is_finished(plan) and not overwrite:
            continue
        tell(f"{plan.run}: seed {plan.seed}", error=True)
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            try:
                code = pool.submit(_train, plan, overwrite).result()
            except KeyboardInterrupt:
                code = 130
        if code:
            tell(f"stopped; the same command goes on with what is left in {config.run}", error=True)
            return code
    for name, said in MEASURES.items():
        if line := pooled([plan.run for plan in plans if plan.run], name, said):
            tell(line)
    from kalman_rl.instruments.report import write_report

    tell(write_report([config.run], config.run / "report.html"))
    return 0


def pooled(runs: list[Path], name: str, said: str) -> str:
    """A measure before and after, with Student's interval over the runs; "" where it is missing in one."""
    from kalman_rl.instruments.report.stats.intervals import t_interval

    evals = [[row for row in read_metrics(run) if row["kind"] == "eval"] for run in runs]
    series = [[row[name] for row in rows if row.get(name) is not None] for rows in evals]
    if not all(series) or (interval := t_interval(finals := [values[-1] for values in series])) is None:
        return ""
    return (
        f"{said}: {fmean(values[0] for values in series):.3f} before, {fmean(finals):.3f} after (95 % interval over "
        f"{len(finals)} seeds: {interval[0]:.3f} to {interval[1]:.3f})"
    )


def _train(config: TrainConfig, overwrite: bool) -> int:
    assert config.run is not None
    if _there(config) and not overwrite:
        return resume(config.run, quiet=config.quiet)
    return run_one(config, config.run.parent.parent / ".cache", overwrite=overwrite)


def _there(config: TrainConfig) -> bool:
    return config.run is not None and (config.run / "config.toml").is_file()


def _same(config: TrainConfig) -> bool:
    assert config.run is not None
    found = build(TrainConfig, settings_of(config.run))
    return to_toml(dataclasses.replace(found, run=config.run, quiet=config.quiet)) == to_toml(config)
