"""``kalman-rl reproduce``: every claim as a named experiment with its acceptance written before the run."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from kalman_rl.engine.runs.files import explained
from kalman_rl.errors import PlaceError, quote, unknown_name
from kalman_rl.instruments.reproduce.collapses import COLLAPSE
from kalman_rl.instruments.reproduce.experiment import (
    Experiment,
    Ledger,
    check_seeds,
    progress,
    run_all,
)
from kalman_rl.instruments.reproduce.exploration import CONCENTRATION, EXPLORATION
from kalman_rl.instruments.reproduce.gradients import GRADIENTS
from kalman_rl.instruments.reproduce.long import long_world
from kalman_rl.instruments.reproduce.off_policy import OFF_POLICY
from kalman_rl.instruments.reproduce.pool import World, tiny_world
from kalman_rl.instruments.reproduce.pools import POOLS
from kalman_rl.instruments.reproduce.ratios import RATIOS
from kalman_rl.instruments.reproduce.report import outcome, summary, table, write
from kalman_rl.instruments.reproduce.simulated import SIMULATED
from kalman_rl.instruments.reproduce.smollm2 import SMOLLM2, smollm2_world
from kalman_rl.instruments.reproduce.warning import WARNING

EXPERIMENTS: dict[str, Experiment] = {
    experiment.name: experiment
    for experiment in (
        *POOLS,
        EXPLORATION,
        CONCENTRATION,
        *GRADIENTS,
        *RATIOS,
        *OFF_POLICY,
        *SIMULATED,
        COLLAPSE,
        WARNING,
        *SMOLLM2,
    )
}
"""Every experiment by name."""
MODELS: dict[str, Callable[..., World]] = {
    "tiny": tiny_world,
    "tiny-long": long_world,
    "smollm2": smollm2_world,
}
"""Where a start policy and its questions come from: ``world(cache, progress)``."""


def listing() -> str:
    """Every experiment with its claims and their acceptance."""
    lines = []
    for experiment in EXPERIMENTS.values():
        model = "" if experiment.model == "tiny" else f"; --model {experiment.model}"
        lines += [f"{experiment.name}: {experiment.question}", f"    {experiment.pool}{model}"]
        for claim in experiment.claims:
            lines.append(f"    - {claim.text} (from: {claim.source}; accepted: {claim.acceptance})")
    return "\n".join(lines)


def reproduce(
    names: Sequence[str] = (),
    *,
    output: Path,
    model: str = "tiny",
    quick: bool = False,
    seeds: Sequence[int] | None = None,
    jobs: int = 0,
    command: str = "kalman-rl reproduce",
    say: Callable[[str], None] = progress,
) -> Path:
    """Run experiments, or what is left of them, and write numbers, figures and the table of evidence.

    Args:
        names: of experiments; none = all, or with ``quick`` those that have quick seeds.
        output: folder of the results; the table is beside it, with ``.md``.
        model: key of ``MODELS``. quick: few seeds, and rates as chosen before.
        seeds: test seeds in place of each experiment's own. jobs: runs at a time; 0 = one per core.
        command: how it was called, for the table. say: called with a line of progress.

    Returns: the path of the table.
    Raises: ConfigError for an unknown name, model or seed; PlaceError for a folder that cannot be used.
    """
    if model not in MODELS:
        raise unknown_name("model", model, MODELS)
    known = {name: experiment for name, experiment in EXPERIMENTS.items() if experiment.model == model}
    for name in names:
        if name not in known:
            raise unknown_name(f"experiment with model {quote(model)}", name, known)
    check_seeds(seeds or ())
    with explained(output, "create", kind=PlaceError):
        output.mkdir(parents=True, exist_ok=True)
    ledger = Ledger(output / "runs.jsonl", model)
    unnamed = [name for name, experiment in known.items() if experiment.quick_seeds or not quick]
    chosen = [known[name] for name in dict.fromkeys(names or unnamed)]
    make_world = functools.partial(MODELS[model], output.parent / ".cache", progress)
    found = run_all(
        chosen,
        ledger,
        make_world,
        quick=quick,
        seeds=seeds,
        jobs=jobs or os.cpu_count() or 1,
        say=say,
    )
    for experiment in chosen:
        records, choices = found[experiment.name]
        result = summary(experiment, records, choices, model, command)
        write(output, result)
        for claim in result["claims"]:
            say(f"{experiment.name}: {claim['verdict']:<12} {outcome(claim):<32} {claim['claim']}")
    return table(output, list(EXPERIMENTS))
