"""The off-policy stress study: many tiny runs, the same prompts and seeds, methods side by side.

The task is sort16 on the 113k-parameter model: 512 completions per generation batch, cut into 64. The
conditions differ in how far the policy moves away from its samples before it gets new ones, in how far behind or how
coarse the sampler is, and in the length of completions.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from kalman_rl.engine.config import StressConfig, TrainConfig, labels, to_toml, validate
from kalman_rl.engine.runs.run import name_part
from kalman_rl.errors import RunError
from kalman_rl.terminal import tell

LAGS = (0, 1, 4, 16)
"""Optimizer steps by which the sampler is behind."""
CONDITIONS: dict[str, dict[str, Any]] = {
    "A": {"iterations": 1, "learning_rate": 1e-4},  # 8 updates per generation batch
    "B": {"iterations": 4, "learning_rate": 1e-4},  # 4 passes, so 32 updates per generation batch
    "C": {"iterations": 1, "learning_rate": 3e-4},  # 8 updates with steps three times as long
    **{
        f"lag{lag}": {"iterations": 1, "learning_rate": 1e-4, "updates_per_generation": 1, "sampler_lag": lag}
        for lag in LAGS
    },
    "quantised": {"iterations": 1, "learning_rate": 1e-4, "sampler_bits": 4},
    "long": {"iterations": 1, "learning_rate": 1e-4, "task": "sort_peel"},  # completions of 65 to 152 tokens
}
OPTIONS: dict[str, dict[str, float]] = {"kpo_diffuse": {"low": 3e-4, "high": 4e-4}}
"""Of methods in the study; KPO's clip, so that only the start differs from KPO."""


def stress(config: StressConfig) -> int:
    """Run every (condition, method, seed) that is not finished yet, print the table, write the report.

    A study that was interrupted goes on where it stopped: finished runs are kept, others start anew.

    Raises: RunError if the study's directory cannot be used. Returns: exit code, 130 after Ctrl-C.
    """
    plans = plan(config)
    todo = [p for p in plans if not is_finished(p)]
    if len(todo) < len(plans) and not config.quiet:
        tell(f"{len(plans) - len(todo)} of {len(plans)} runs are there already", error=True)
    jobs = min(config.jobs or os.cpu_count() or 1, max(len(todo), 1))
    for task in dict.fromkeys(p.task for p in todo):
        warm_start(task, _cache(config.run), quiet=config.quiet)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        running = [pool.submit(run_one, p) for p in todo]
        codes = []
        try:
            for done in as_completed(running):
                codes.append(done.result())
                if codes[-1]:
                    break
        except KeyboardInterrupt:
            codes.append(130)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
    if 130 in codes:
        tell(f"stopped; the same command goes on with what is left in {config.run}", error=True)
        return 130
    tell(table([config.run]))
    return max(codes, default=0)


def plan(config: StressConfig) -> list[TrainConfig]:
    """One training configuration per (seed, condition, method), seeds outermost."""
    plans = []
    for seed in range(config.first_seed, config.first_seed + config.seeds):
        for condition in config.conditions:
            for method in config.methods:
                plans.append(_planned(config, condition, method, seed))
    for p in plans:
        validate(p)
    return plans


def _planned(config: StressConfig, condition: str, method: str, seed: int) -> TrainConfig:
    """One run; where a batch has one update, it has a minibatch's completions."""
    changes: dict[str, Any] = {
        "task": "sort16",
        "updates_per_generation": config.rollouts // config.minibatch,
        **CONDITIONS[condition],
    }
    completions = config.minibatch * changes["updates_per_generation"]
    return TrainConfig(
        method=method,
        method_options=OPTIONS.get(method, {}),
        model="tiny",
        run=Path(config.run) / "runs" / f"{condition}-{name_part(method)}-seed{seed}",
        seed=seed,
        steps=config.steps,
        prompts_per_generation=completions // 8,
        completions_per_prompt=8,
        warmup_steps=min(20, config.steps // 2),
        lora_rank=0,
        dtype="float32",  # the same study on every machine
        eval_every=max(config.steps // 8, 1),
        eval_prompts=config.eval_prompts,
        eval_samples=1,
        save_every=0,
        traces_per_step=1,
        threads=1,
        log_every=max(config.steps // 96, 1),
        quiet=config.quiet,
        **changes,
    )


def run_one(config: TrainConfig) -> int:
    """One run of the study, in a separate process."""
    from kalman_rl.engine.runs.run import Run
    from kalman_rl.engine.train import train

    assert config.run is not None
    name = config.run.name
    condition = name.partition("-")[0]
    grouped = {"condition": condition, **labels(config)}
    with Run.create(config.run, to_toml(config), grouped, overwrite=True) as run:
        return train(config, run, cache=_cache(config.run.parent.parent), prefix=f"{name:<22} ")


def table(paths: list[Path]) -> str:
    """Final accuracies per condition and method, with the interval that ties are judged by."""
    from kalman_rl.engine.runs.reading import find_runs
    from kalman_rl.instruments.report.stats.study import ACCURACIES, split

    _, study = split(find_runs(paths))
    if study is None:
        raise RunError(f"{paths[0]}: got no runs of a stress study, expected some below runs/")
    lines = [
        f"{'':10}{'method':<15}{'sampled':>8}  {'95 % interval':<15}{'min..max':<14}{'greedy':>7}"
        f"  {'start':>6}  seeds"
    ]
    for condition in study.conditions:
        for arm in study.under(condition):
            numbers = [arm.measured.get(key) for key in ACCURACIES]
            sampled, greedy = numbers
            if sampled is None or greedy is None:
                lines.append(f"{condition:<10}{arm.method:<15}no finished run")
                continue
            low, high = sampled.noise or (float("nan"), float("nan"))
            spread = f"{min(sampled.finals):.2f}..{max(sampled.finals):.2f}"
            interval = f"{low:.3f}..{high:.3f}"
            lines.append(
                f"{condition:<10}{arm.method:<15}{sampled.mean:>8.3f}  {interval:<15}{spread:<14}"
                f"{greedy.mean:>7.3f}  {sampled.start or 0.0:>6.3f}  {len(sampled.finals)}"
            )
    lines.append("interval: the wider of Student's t over seeds and Wilson over held-out answers")
    return "\n".join(lines)


def warm_start(task: str, cache: Path, *, quiet: bool) -> None:
    """Warm-start the tiny model for a task once, before several processes would do it side by side."""
    import torch

    from kalman_rl.engine.models.load import load_model
    from kalman_rl.engine.tasks import load_task

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        say = (lambda text: None) if quiet else lambda text: tell(text, error=True)
        load_model("tiny", cache=cache, task=load_task(task), seed=0, progress=say)
    finally:
        torch.set_num_threads(threads)


def _cache(study: Path) -> Path:
    return Path(study).parent / ".cache"


def is_finished(config: TrainConfig) -> bool:
    """Whether this very run is complete: same settings, marked as finished."""
    from kalman_rl.engine.runs.reading import read_manifest
    from kalman_rl.engine.runs.received import MAX_TOML, read_bytes

    assert config.run is not None
    try:
        manifest = read_manifest(config.run)
        same = read_bytes(config.run, "config.toml", MAX_TOML) == to_toml(config).encode()
    except (RunError, OSError):
        return False
    return same and manifest.get("status") == "finished"
